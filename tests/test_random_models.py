"""Random models on real ranks: each trains as the original, whatever it is made of and however it is split.

``RANDOM_MODELS=n`` sets how many the long run draws; with ``RANDOM_SEED`` it draws others.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

import descompiler as des
from descompiler.check.judge import DIVERGED
from tests.harness.plans import LOOKED_UP
from tests.harness.pool import RankPoolError, here
from tests.harness.random_models import CONSUMERS, cases

SLOW = int(os.environ.get("RANDOM_MODELS", "500"))
common = settings(
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # a smaller failing model is not worth minutes
    suppress_health_check=list(HealthCheck),
)


def check(rank, ranks, case):
    """On every rank: build the model from its text and verify it."""
    space = {"__name__": "random_model"}
    exec(compile(case.text, "<random model>", "exec"), space)
    plans = [case.plan]
    report = des.verify(
        space["Model"](), space["inputs"](), ranks=ranks, plans=plans, optimizers=[case.optimizer], launch=here
    )
    return max(report.worst.values()), report.growth


def verify(on_ranks, case):
    try:
        worst, growth = map(max, zip(*on_ranks(check, case.ranks, case), strict=True))
    except RankPoolError as error:
        pytest.fail(f"{error}\n\n# the model, to run on its own:\n{case.script()}", pytrace=False)
    assert worst <= 1e-10
    assert growth < DIVERGED, "beside huge weights everything else is rounding"


@seed(1)
@settings(common, max_examples=15)
@given(case=cases(LOOKED_UP))
def test_some(on_ranks, case):
    verify(on_ranks, case)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@seed(int(os.environ.get("RANDOM_SEED", "2")))
@settings(common, max_examples=SLOW)
@given(case=cases(LOOKED_UP))
def test_many(on_ranks, case):
    verify(on_ranks, case)


def test_a_case_is_a_script():
    """What a failure prints defines and verifies the model."""
    found = []

    @seed(0)
    @settings(common, max_examples=3)
    @given(case=cases(LOOKED_UP))
    def draw(case):
        found.append(case)

    draw()
    for case in found:
        assert set(case.consumers) <= set(CONSUMERS)
        text = case.script()
        assert "des.verify(Model(), inputs()" in text
        space = {"__name__": "not main"}
        exec(compile(text, "<script>", "exec"), space)
        assert space["Model"]()(*space["inputs"]()) is not None

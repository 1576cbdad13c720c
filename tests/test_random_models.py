"""Random models on real ranks: each trains as the original, whatever it is made of and however it is split, or is
refused by name, which few are.

``RANDOM_MODELS=n`` sets how many the long run draws; ``RANDOM_SEED`` is the first one's seed.
"""

import os
import re
from pathlib import Path

import pytest

from descompiler.check.judge import DIVERGED
from tests.harness.consumers import EVERY, UNUSUAL
from tests.harness.plans import LOOKED_UP
from tests.harness.pool import RankPoolError
from tests.harness.random_models import TRAININGS, drawn
from tests.harness.training import outcome

SLOW = int(os.environ.get("RANDOM_MODELS", "500"))
REFUSALS = {
    r"^UnsupportedError: the gradient of opaque leaf .*which is not traced, .*is differentiated again": (
        "capture.md",
        "Gradients of gradients don't go through a leaf",
    ),
    r"^InputError: .*\n?.*mixes the rows of all ranks over them: pad to one length on all ranks": (
        "capture.md",
        "What mixes rows over a length",
    ),
}
"""What may be refused, by the words of the error: the page that names it, and its words."""

MOST_REFUSED = 0.1
"""Share of the models that may be refused."""


def verify(on_ranks, case):
    """Whether a case is exact; else it is refused, by name, on every rank."""
    try:
        outcomes = on_ranks(outcome, case.ranks, case.text, case.plan, case.optimizer, case.training)
    except RankPoolError as error:
        pytest.fail(f"{error}\n\n# the model, to run on its own:\n{case.script()}", pytrace=False)
    if refused := [x for x in outcomes if isinstance(x, str)]:
        if len(refused) < len(outcomes) or not all(any(re.search(r, x) for r in REFUSALS) for x in refused):
            pytest.fail(f"{outcomes}\n\n# the model, to run on its own:\n{case.script()}", pytrace=False)
        return False
    worst, growth = map(max, zip(*outcomes, strict=True))
    assert worst <= 1e-10
    assert growth < DIVERGED, "beside huge weights everything else is rounding"
    return True


def verify_all(on_ranks, seeds):
    refused = [seed for seed in seeds if not verify(on_ranks, drawn(seed, LOOKED_UP))]
    print(f"{len(seeds)} models, of which {len(refused)} are refused by name ({refused}), and all others exact")
    assert len(refused) <= MOST_REFUSED * len(seeds)


def test_some(on_ranks):
    verify_all(on_ranks, range(4))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many(on_ranks):
    first = int(os.environ.get("RANDOM_SEED", "1000"))
    verify_all(on_ranks, range(first, first + SLOW))


@pytest.mark.parametrize(("page", "words"), REFUSALS.values())
def test_docs_name_what_is_refused(page, words):
    assert words in (Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8")


def test_a_case_is_a_script():
    """What a failure prints defines the model, and verifies it."""
    for seed in range(20):
        case = drawn(seed, LOOKED_UP)
        assert set(case.consumers) <= set(EVERY)
        text = case.script()
        assert ("des.verify(Model(), inputs()" in text) == (case.training is None)
        space = {"__name__": "not main"}
        exec(compile(text, "<script>", "exec"), space)
        assert space["Model"]()(*space["inputs"]()) is not None


MANY = [drawn(seed, LOOKED_UP) for seed in range(300)]


@pytest.mark.parametrize("consumer", sorted(UNUSUAL))
def test_what_is_unusual_is_drawn(consumer):
    """Branches, state, complex values, sets and draws."""
    assert any(consumer in case.consumers for case in MANY)


@pytest.mark.parametrize("training", TRAININGS)
def test_ways_of_training_are_drawn(training):
    """Kinds of losses, outputs that they ignore, gradient penalties, lengths of each rank."""
    assert any(case.training == training for case in MANY)


@pytest.mark.parametrize(
    "text", [r"per_sample_weights=weights_", r"per_sample_weights=self\.", r"return {'y0'", r"return [\w.]*\(y0\), "]
)
def test_weighted_bags_and_outputs_are_drawn(text):
    assert any(re.search(text, case.text) for case in MANY)

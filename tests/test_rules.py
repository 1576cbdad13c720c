"""Each consumer of embeddings, with every form forced, on two real ranks: what rules keep inside, and what they do not.

`make test` runs those that a rule of their own is about; `make test-all` runs all.
"""

import pytest

import descompiler as des
from descompiler.passes import FORMS
from tests.pool import RankPool, here
from tests.random_models import CONSUMERS, fixed

PLANS = [None, *({"*": form.name} for form in FORMS)]
ALWAYS = {
    "attention with heads",
    "bias of each element",
    "compressed interaction",
    "cosine",
    "einsum with a weight",
    "layer norm",
    "normalised",
    "pairs by index",
    "parametric relu",
    "recurrent",
    "repeated",
    "split and joined",
    "target attention",
}


def forced(rank, ranks, text):
    """On every rank: verify the model of a text with each form on all tables."""
    space = {"__name__": "model"}
    exec(compile(text, "<model>", "exec"), space)
    return des.verify(space["Model"](), space["inputs"](), ranks=ranks, plans=PLANS, launch=here)


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as ranks:
        yield ranks


@pytest.mark.parametrize(
    "consumer", [pytest.param(c, marks=() if c in ALWAYS else pytest.mark.slow) for c in sorted(CONSUMERS)]
)
def test_every_form(consumer, pool):
    report = pool(forced, fixed(consumer).text)[0]
    assert report.cases == len(PLANS)
    assert max(report.worst.values()) <= 1e-10

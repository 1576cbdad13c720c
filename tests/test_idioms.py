"""What people write in forward is captured whole, by the rung that is known for it, and trains as it should."""

import pytest

import descompiler as des
from descompiler.capture.ladder import capture
from descompiler.model.probe import blueprint
from descompiler.passes import NORMALISE
from tests.harness.idioms import IDIOMS, IDS, LoopOverRows
from tests.harness.pool import here

RUNGS = dict.fromkeys(IDIOMS, "export")
RUNGS |= dict.fromkeys(("BatchSizeAsInt", "AssertsAndPrints"), "dynamo")
RUNGS |= dict.fromkeys(("BranchOnAny", "FormatsValues", "Data"), "leaf")


@pytest.mark.parametrize("name", IDIOMS)
def test_captured_by(name):
    assert capture(blueprint(IDIOMS[name]()), (IDS,), passes=NORMALISE)[0].rung == RUNGS[name]


def test_what_does_not_run_without_rows_is_known_in_the_program_itself():
    program = capture(blueprint(IDIOMS["Frequencies"]()), (IDS,), passes=NORMALISE)[0]
    assert sum("spare_row" in n.meta for n in program.graph.nodes) == 4


def _verify(rank, ranks):
    for name, cls in IDIOMS.items():
        plan = None if name == "OneHot" else {"table*": "row_wise"}  # a product, no table
        try:
            des.verify(cls(), (IDS,), ranks=ranks, steps=2, plans=[plan], launch=here)
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error


def test_they_train_as_the_original(on_ranks):
    on_ranks(_verify, 2, timeout_s=300)


def test_a_loop_over_rows_is_captured_in_part():
    coverage = des.compile(LoopOverRows(), (IDS,)).coverage()
    assert coverage.rung == "partial"
    assert "leaf: forward can't be an opaque leaf: which lookups it makes depends on values" in str(coverage)

"""What the tables say about a plan: crossovers against plans on the other side of them."""

import math

import pytest
import torch

from descompiler.captured import Captured
from descompiler.report import sheets
from examples.models import MODELS, make_inputs


@pytest.fixture(scope="module")
def captured():
    torch.manual_seed(0)
    return Captured.of(MODELS["lr"]("fields", vocab_sizes=[5000] * 6), make_inputs("lr", "fields", 8))


def crossover(plan, text):
    rows = {row[1]: row for row in sheets.thresholds(plan).rows if row[2] == "ranks"}
    return rows[text][4]


@pytest.mark.parametrize("batch", [256, 512])
def test_closed_forms_agree_with_plans_on_both_sides(captured, batch):
    def sent(name, ranks):
        plan = captured.plan(ranks=ranks, batch=batch, pins={"*": name})
        return sum(plan.traffic(r).total for r in range(ranks)) / ranks

    plan = captured.plan(ranks=4, batch=batch, pins={"*": "row_wise"})
    start = crossover(plan, "replicate beats row_wise, partial sums")
    # tables of 5,000 numbers, all-reduced, against ids of 4 bytes to each rank and sums that six tables share
    assert start == math.floor(2 * 5000 * 4 / (batch * (4 + 2 * 4 / 6))) + 1
    # headers are in the plans and not in the curves: a rank either way
    assert sent("replicate", start + 1) < sent("row_wise", start + 1)
    assert sent("replicate", start - 2) > sent("row_wise", start - 2)


def test_patterns_of_names():
    assert sheets.pattern_of(["a.0.weight", "b.weight"]) == "*"
    assert sheets.pattern_of(["a.0.weight"]) == "a.0.weight"

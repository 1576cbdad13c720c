"""What tables say about a plan, and `explain` with them: one set of numbers, true on both sides of a crossover."""

import dataclasses
import json
import math
import re

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.captured import Captured
from descompiler.cost_models.symbols import U, V
from descompiler.layout.step import StepHeader
from descompiler.planning import summary
from descompiler.planning.curves import curves, numbers, overtakes
from descompiler.planning.explain import of_table, whole
from descompiler.planning.kinds import kinds, pattern_of
from descompiler.report.render import to_json
from examples.models import MODELS, make_inputs

BATCH, RANKS = 256, 4


def capture_lr(rows, tables=6):
    with torch.device("meta"):
        model = MODELS["lr"]("fields", vocab_sizes=[rows] * tables)
    dense, ids = make_inputs("lr", "fields", 8)
    return Captured.of(model, (dense, ids % 40))


@pytest.fixture(scope="module")
def captured():
    return capture_lr(5000)


@pytest.fixture(scope="module")
def mixed():
    """A plan with every kind of row in its tables."""
    sizes = [5000, 700, 3000, 40, 5000, 2000]
    found = Captured.of(MODELS["deepfm"]("fields", vocab_sizes=sizes), make_inputs("deepfm", "fields", 8))
    pins = {
        "*.0": "table_wise",
        "*.1": "column_wise",
        "*.2": "row_wise",
        "*.3": "replicate",
        "*.4": "sparse_all_gather",
        "*.5": "unique_rows",
    }
    return found.plan(ranks=RANKS, batch=64, pins=pins)


def sent(plan):
    return sum(plan.traffic(r).total for r in range(plan.ranks)) / plan.ranks


# --- crossovers


@pytest.mark.parametrize("batch", [256, 512])
def test_closed_forms_agree_with_plans_on_both_sides(captured, batch):
    def priced(name, ranks):
        return sent(captured.plan(ranks=ranks, batch=batch, pins={"*": name}))

    plan = captured.plan(ranks=4, batch=batch, pins={"*": "row_wise"})
    rows = {row[1]: row for row in summary.thresholds(plan).rows if row[2] == "ranks"}
    start = rows["replicate beats row_wise, partial sums"][4]
    # tables of 5,000 numbers, all-reduced, against ids of 4 bytes to each rank and sums that six tables share
    assert start == math.floor(2 * 5000 * 4 / (batch * (4 + 2 * 4 / 6))) + 1
    # headers are in the plans and not in the curves: a rank either way
    assert priced("replicate", start + 1) < priced("row_wise", start + 1)
    assert priced("replicate", start - 2) > priced("row_wise", start - 2)


@pytest.mark.parametrize("form", ["unique_rows", "sparse_all_gather"])
def test_a_larger_table_has_more_unique_ids_at_a_crossover(captured, form):
    """Of tables of 5,000 rows a batch has more unique ids than of those at the crossover."""
    plan = captured.plan(ranks=RANKS, batch=BATCH, pins={"*": "replicate"})
    (kind,) = kinds(plan)
    (at,) = (x for x in overtakes(plan, kind) if x.symbol == V and x.first == form)
    assert (at.second, U in at.threshold.free_symbols) == ("replicate", True)
    naive = at.threshold.subs(numbers(plan, kind))
    assert at.value < 0.8 * float(naive)
    for rows, cheaper in ((round(0.9 * at.value), "replicate"), (round(1.1 * at.value), form)):
        found = capture_lr(rows)
        priced = {f: sent(found.plan(ranks=RANKS, batch=BATCH, pins={"*": f})) for f in ("replicate", form)}
        assert min(priced, key=priced.get) == cheaper, (rows, priced)


def test_samples_count_and_say_nothing_of_tables_of_another_size():
    dense, ids = make_inputs("lr", "fields", 64)
    found = Captured.of(MODELS["lr"]("fields", vocab_sizes=[5000] * 6), (dense, ids % 2))
    plan = found.plan(ranks=RANKS, pins={"*": "replicate"}, samples=[(dense, ids % 2)] * 3)
    for kind in kinds(plan):
        assert numbers(plan, kind)[U] == pytest.approx(sum(plan.unique[t.name] for t in kind.tables) / len(kind.tables))
        assert not any(x.symbol == V and U in x.threshold.free_symbols for x in overtakes(plan, kind))


@pytest.mark.parametrize("sparse", [False, True])
def test_curves_are_the_forms_own_costs(sparse):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.EmbeddingBag(500, 8, mode="sum", sparse=sparse)

        def forward(self, ids):
            return self.table(ids)

    plan = des.plan(Bag(), torch.zeros(4, 3, dtype=torch.int64), ranks=RANKS, batch=16, pins={"*": "replicate"})
    (kind,), (table,) = kinds(plan), plan.tables
    formula, size = dict(curves(plan, kind))["replicate"], summary.candidates(plan).rows[0][6]
    # with sparse gradients, unique rows cross and not the whole table
    assert (formula, size) == next(iter(plan.sends(table).values())) and (U in formula.free_symbols) == sparse


# --- one set of numbers


@pytest.mark.long
def test_explain_has_the_numbers_of_the_tables_and_no_other(mixed):
    for text, sheets in [
        (mixed.explain(), whole(mixed)),
        *((mixed.explain(t.name), of_table(mixed, t.name)) for t in mixed.tables[:6:2]),
    ]:
        data = json.loads(to_json(sheets))["sheets"]
        cells = [(c["unit"], row[c["title"]]) for s in data for c in s["columns"] for row in s["rows"]]
        for unit, value in cells:
            if unit == "bytes" and value is not None:
                assert f" {value:,.0f} B" in text
            elif unit != "count" or isinstance(value, int):
                assert (f"{value:,}" if unit == "count" else "" if unit == "ratio" else str(value or "")) in text
        words = "\n".join([note for s in data for note in s["notes"]] + [v for u, v in cells if u == "text" and v])
        known = {round(v) for u, v in cells if u == "bytes" and v is not None}
        known |= {int(x.replace(",", "")) for x in re.findall(r"([\d,]+) B\b", words)}
        found = {int(x.replace(",", "")) for x in re.findall(r"([\d,]+) B\b", text)}
        assert found <= known and len(found) > 3


def test_prices_and_reasons_are_the_plans(mixed, captured):
    for plan in (mixed, captured.plan(ranks=RANKS, batch=BATCH)):
        for t in plan.tables:
            (*rows,) = summary.candidates(plan, t.name).rows
            of = {row[4]: row for row in rows}
            assert {f: row[7] for f, row in of.items() if row[7] is not None} == {
                plan.forms[t.name]: plan.price_bytes,
                **plan.prices.get(t.name, {}),
            }
            for form, why in t.refusals.items():
                assert of[form][8] == f"not possible: {why}"
            alone = plan.sends(t)
            if alone:
                assert of[plan.forms[t.name]][6] == pytest.approx(sum(size for _, size in alone.values()), abs=1)


def test_what_crosses_is_all_that_is_sent(mixed):
    """The rows add up to the layout's bytes, without headers and dense parameters."""
    sheet = summary.crossings(mixed)
    at = [c.title for c in sheet.columns].index("bytes")
    rest = sum(float(mixed.traffic(r).bytes_by_collective.get(StepHeader.SEND, 0)) for r in range(RANKS)) / RANKS
    dense = sum(math.prod(p.shape) for n, p in mixed.pieces.items() if n not in mixed.splits and p.is_replicated)
    rest += 2 * (RANKS - 1) / RANKS * 4 * dense
    assert sum(row[at] for row in sheet.rows) == pytest.approx(sent(mixed) - rest, rel=0.01)
    assert {"ids", "values", "gradients of unique ids", "dense gradients"} < {row[0] for row in sheet.rows}


@pytest.mark.long
def test_printing_a_plan_explains_it(mixed, tmp_path):
    assert str(mixed) == mixed.explain()
    mixed.save(tmp_path / "plan.json")
    assert des.Plan.load(tmp_path / "plan.json").explain() == mixed.explain()
    for t in mixed.tables[::3]:
        text = mixed.explain(t.name)
        assert text == mixed.explain(t.name.removesuffix(".weight"))
        line = next(x for x in text.splitlines() if str(mixed.splits[t.name]) in x)
        assert t.name in line and t.line in line and all(use in line for use in t.uses)
    with pytest.raises(
        des.PlanError, match=r"no table 'x'; there are first_order.weights.tables.0.weight.* and \d+ more"
    ):
        mixed.explain("x")


def test_of_a_model_that_runs_in_part_as_much_is_said():
    """Its lookups are in the layout, and its memory is estimated, as those of its outline."""

    class InPart(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.top = nn.Embedding(5000, 8), nn.Linear(8, 1)

        def forward(self, ids):
            return self.top(self.table(torch.tensor(ids.tolist())).mean(1))

    plan = des.plan(InPart(), torch.zeros(8, 3, dtype=torch.int64), ranks=RANKS, cluster="bytes")
    assert plan.forms == {"table.weight": "unique_rows"}
    sheets = {s.title.partition(":")[0]: s for s in whole(plan)}
    assert list(sheets) == [
        "operators and the forms that they can take",
        "crossovers, in closed form",
        "what crosses the wire",
        "what the busiest rank sends in a step, by collective",
        "strategies",
        "memory per rank",
        "what each rank holds",
    ]
    price = plan.prices["table.weight"]["unique_rows"]
    assert f"{price:,} B  chosen" in plan.explain()
    (total,) = [r for r in sheets["what the busiest rank sends in a step, by collective"].rows if r[0] == "total"]
    assert total[1] == price == plan.price_bytes
    assert sheets["memory per rank"].rows[0][1] == 4 * (5000 * 8 // RANKS + 9)
    older = dataclasses.replace(plan, memories=())  # from a file of version 2, which lists no lookup of such a model
    assert not {"strategies", "memory per rank"} & {s.title.partition(":")[0] for s in whole(older)}


def test_patterns_of_names():
    assert pattern_of(["a.0.weight", "b.weight"]) == "*"
    assert pattern_of(["a.0.weight"]) == "a.0.weight"

"""The list of what crosses: each kind is described, carried out, written and read, and counted as if it were alone."""

import inspect
import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.cost_models.symbols import L, N, b, i, s, w
from descompiler.cost_models.table import Table
from descompiler.dynamic import Capacity
from descompiler.layout.border import Entry, Exit, IdsIn, SharedColumns, ValuesOut
from descompiler.layout.division import Division
from descompiler.layout.fetches import Fetch, FetchTable
from descompiler.layout.global_values import (
    GatherRows,
    GlobalValue,
    NormOutside,
    NormsInside,
    SliceRows,
    SpreadValue,
    SumTerms,
    TableTotal,
    Whole,
    WholeTables,
)
from descompiler.layout.layout import Layout
from descompiler.layout.pieces import Pieces
from descompiler.layout.step import DenseGradients, LeafStatus, StepHeader, UsedOutputs
from descompiler.layout.traffic import Collective, Stage, kind_of
from descompiler.layout.transfer import Counts, Step, Transfer
from descompiler.layout.vocabulary import Vocabulary
from descompiler.planning.json import decode, encode
from descompiler.planning.older import VERSION
from descompiler.runtime import fetch, gradients, runtime  # noqa: F401 (all that carries transfers)
from descompiler.runtime.carriers import CARRIERS
from descompiler.tables import aliases

VALUES = (GlobalValue("x", ((3,),)), GlobalValue("n", ((2,),), itemsize=8))
ROWS = FetchTable(Table("rows", 9, 4), Pieces.even((9, 4), 0, 3))
SHARED = FetchTable(Table("shared", 9, 4), Pieces.replicate((9, 4), 3), gathered=True)
REDUCED = FetchTable(Table("reduced", 9, 4, sparse=True), Pieces.replicate((9, 4), 3))

# of three ranks with 2, 3 and 5 rows and elements of 4 bytes, what rank 1 sends by collective, worked out by hand
EXAMPLES = [
    (StepHeader(), {"SEND": 2 * 40}),
    (LeafStatus(2, True), {"RUN": 2 * 2, "BACKWARD": 2}),
    (UsedOutputs(3), {"GATHER": 2 * 3}),
    (DenseGradients(30), {"AVERAGE": Fraction(2 * 2 * 120, 3)}),
    (DenseGradients(30, ((torch.float16, 5),)), {"AVERAGE": Fraction(2 * 2 * (120 + 10), 3)}),
    # its 3 rows' ids: two columns to rank 0, all four to rank 2
    (IdsIn((Entry("ids", (4,), ((0, 1, (0, 2)), (1, 3, None))),), 8), {"SEND": 8 * 3 * (2 + 4)}),
    # its 5 elements of the others' 7 rows, and gradients of its 3 rows of 6 elements
    (ValuesOut((Exit("v", ((0, 1, (6,)), (1, 2, (5,)))),)), {"SEND": 4 * 5 * 7, "BACK": 4 * 3 * 6}),
    # the same beside a sum of two 16-bit elements, of which all three ranks have terms
    (
        ValuesOut(
            (
                Exit("v", ((0, 1, (6,)), (1, 2, (5,)))),
                Exit("n", ((0, 3, (2,)),), wire_dtype=torch.bfloat16),
            )
        ),
        {"SEND": (4 * 5 + 2 * 2) * 7, "BACK": 3 * (4 * 6 + 2 * 2 * 2)},
    ),
    (ValuesOut(()), {"SEND": 0}),
    (SharedColumns((6, 3)), {"AVERAGE": Fraction(2 * 2 * 9 * 4, 3)}),
    (GatherRows(VALUES), {"GATHER": 2 * 3 * (3 * 4 + 2 * 8)}),
    (SumTerms((GlobalValue("t", ((1, 2),)),)), {"SUM": Fraction(2 * 2 * 21 * 4, 3)}),
    (SliceRows(VALUES[:1]), {"BACK": 2 * 3 * 3 * 4}),
    (SpreadValue(VALUES[:1]), {"BACK": Fraction(2 * 2 * 3 * 4, 3)}),
    (TableTotal((GlobalValue("t"),)), {"SUM": Fraction(2 * 2 * 4, 3), "BACK": Fraction(2 * 2 * 4, 3)}),
    (TableTotal((GlobalValue("t"),), False), {"SUM": Fraction(2 * 2 * 4, 3)}),
    (NormOutside(5), {"GATHER": 2 * 11 * 4, "BACK": Fraction(2 * 2 * 10 * 4, 3)}),
    (NormsInside(((2, 3, 0), (1, 1, 1))), {"SEND": 2 * 2 * 4 * 4}),
    (NormsInside(((2, 3, 0), (1, 1, 1)), (torch.float64, None)), {"SEND": 2 * 2 * (3 * 8 + 4)}),
    (NormOutside(5, torch.bfloat16), {"GATHER": 2 * 11 * 4, "BACK": Fraction(2 * 2 * 10 * 4, 3)}),
    (NormOutside(5, torch.float64), {"GATHER": 2 * 11 * 8, "BACK": Fraction(2 * 2 * 10 * 8, 3)}),
    (WholeTables((Whole("w", Pieces.even((7, 2), 0, 3)),)), {"GATHER": 2 * 2 * 2 * 4, "BACK": 5 * 2 * 4}),
    (WholeTables((Whole("w", Pieces.even((7, 2), 0, 3), False),)), {"GATHER": 2 * 2 * 2 * 4}),
    # an owner's 12 and 11 of 23 logits: the largest 2 of each, and one that is selected; two rows of x for each row
    (
        Vocabulary("p", Division.of([(12, 0), (11, 1)]), 0, 23, 5, 2, (("top", 2), ("select", 1))),
        {"ROWS": 6 * (5 * 4 + 4), "PARTIAL": 14 * (3 * 4 + 2 * 4), "GRADIENTS": 6 * 3 * 4, "TERMS": 14 * 5 * 4},
    ),
    (Fetch((ROWS,), (0,), early=True), {"IDS": 9, "ROWS": 4 * 4 * 7, "BACK": 4 * 4 * 6}),
    (
        Fetch((replace(ROWS, wire_dtype=torch.float16),), (0,), early=True),
        {"IDS": 9, "ROWS": 2 * 4 * 7, "BACK": 2 * 4 * 6},
    ),
    (Fetch((SHARED,), (0,)), {"COUNTS": 2 * 24, "GATHERED_IDS": 2 * 11, "GATHERED_BACK": 2 * 4 * 4 * 8}),
    (Fetch((REDUCED,), (0,), early=True), {"SUM_SHARED": Fraction(2 * 2 * 9 * 5 * 4, 3)}),
]
UNIQUE = {name: Counts(6, 7, 8, 9, 11) for name in ("rows", "shared", "reduced")}
STEP = ([2, 3, 5], 4)


def kinds(base=Transfer):
    """Every class that is a kind of transfer."""
    found = [] if inspect.isabstract(base) else [base]
    return found + [k for sub in base.__subclasses__() for k in kinds(sub)]


def collectives(kind):
    return {name: x for name, x in vars(kind).items() if isinstance(x, Collective)}


@pytest.mark.parametrize(("transfer", "expected"), EXAMPLES, ids=lambda x: type(x).__name__)
def test_bytes_of_each_kind(transfer, expected):
    by_name = {x: name for name, x in collectives(type(transfer)).items()}
    sent = Layout(3, (transfer,)).predict(1, *STEP, unique=UNIQUE)
    assert {by_name[x]: n for x, n in sent.bytes_by_collective.items()} == expected
    every = LeafStatus.RUN if isinstance(transfer, LeafStatus) else ""
    assert all(n == (2 if x == every else 1) for x, n in sent.calls_by_collective.items())
    forward = Layout(3, (transfer,)).predict(1, *STEP, unique=UNIQUE, backward=False)
    assert forward.bytes_by_collective == {x: n for x, n in sent.bytes_by_collective.items() if without_gradients(x)}
    assert Layout(1, (transfer,)).predict(0, [2], 4, unique=UNIQUE).calls == 0


def without_gradients(name):
    """Whether a forward without gradients makes a collective: none that tells what backward will bring."""
    stage = next(x.stage for k in kinds() for x in collectives(k).values() if x == name)
    return stage < Stage.GRADIENTS_BACK and name != "all_to_all (gathered gradients, ids)"


def test_every_kind_has_an_example_with_each_of_its_collectives():
    shown = {}
    for transfer, expected in EXAMPLES:
        shown.setdefault(type(transfer), set()).update(expected)
    assert shown == {k: set(collectives(k)) for k in kinds()}


def test_a_layout_is_the_sum_of_its_list_in_order_of_stage():
    transfers = tuple(t for t, _ in EXAMPLES)
    together = Layout(3, transfers).predict(1, *STEP, unique=UNIQUE)
    alone = [Layout(3, (t,)).predict(1, *STEP, unique=UNIQUE) for t in transfers]
    for name, sent in together.bytes_by_collective.items():
        assert sent == sum(x.bytes_by_collective.get(name, 0) for x in alone)
        assert together.calls_by_collective[name] == sum(x.calls_by_collective.get(name, 0) for x in alone)
    stage = {x: x.stage for k in kinds() for x in collectives(k).values()}
    order = [stage[name] for name in together.bytes_by_collective]
    assert order == sorted(order) and set(order) == set(Stage)


def test_what_plans_tell_of_a_value_is_what_its_transfer_sends():
    """The formula, in numbers of three ranks with 5 rows each, is the mean over ranks of what is predicted."""
    told, own = set(), {"L": L, "w": w}
    for transfer in (t for t, _ in EXAMPLES if list(t.crossed())):
        told.add(type(transfer))
        layout = Layout(3, (transfer,))
        sent = sum(layout.predict(r, [5] * 3, 4).total for r in range(3)) / 3
        id_bytes = getattr(transfer, "id_bytes", 4)
        known = {N: 3, b: 5, s: 4, i: id_bytes}
        numbers = ({**known, L: 0, w: 0, **{own[x]: n for x, n in c.symbols.items()}} for c in layout.crossed)
        assert sum(c.formula.subs(n) for c, n in zip(layout.crossed, numbers, strict=True)) == pytest.approx(sent)
    assert told == {IdsIn, ValuesOut, Vocabulary}


def test_ranks_that_send_alike_are_predicted_once():
    layout = Layout(64, (StepHeader(), IdsIn((Entry("ids", (4,), ((0, 32, (0, 2)), (32, 64, None))),), 8)))
    every = [layout.predict(r, [2] * 64, 4) for r in range(64)]
    found = layout.predict_kinds(2, 4)
    assert len(found) == 2 and all(x in found for x in every)
    assert [n for n, _ in layout.predict_alike(2, 4)] == [32, 32]
    assert len(Layout(64, (StepHeader(),)).predict_kinds(2, 4)) == 1 and Layout(1).predict_kinds(2, 4)[0].calls == 0


def test_every_kind_says_what_it_is_and_is_carried_out():
    """Its docstring, as a rule's, says from where to where; each collective is made by what is marked so."""
    assert set(CARRIERS) == set(kinds())
    names = [x for k in kinds() for x in collectives(k).values()]
    assert len(set(names)) == len(names)
    for kind in kinds():
        assert re.match(rf"{kind.kind}: .+ --> ", inspect.getdoc(kind))
        source = "\n".join(inspect.getsource(f) for f in CARRIERS[kind])
        assert all(re.search(rf"\w\.{name}\b", source) for name in collectives(kind)), kind
        for name in collectives(kind).values():
            assert kind_of(name) in ("all_to_all", "all_gather", "all_reduce")


@pytest.mark.parametrize("transfer", [t for t, _ in EXAMPLES], ids=lambda x: type(x).__name__)
def test_every_kind_is_written_and_read(transfer):
    layout = Layout(3, (transfer,))
    assert decode(Layout, json.loads(json.dumps(encode(layout)))) == layout


def test_rows_of_every_rank_are_counted_at_once():
    step = Step(np.array([2, 3, 5]), 4, UNIQUE)
    assert step.total == 10 and step.rest.tolist() == [8, 7, 5] and step.others == 2


def test_a_plan_file_of_version_2_is_read():
    """A file with every kind of crossing that graphs without leaves have, and the bytes that its plan promised.

    Its forms have the names that they had then.
    """
    data = json.loads((Path(__file__).parent / "plans" / "version_2_layout.json").read_text())
    promised = data.pop("promised")
    aliases._note.cache_clear()
    with pytest.warns(UserWarning, match="is named"):
        plan = des.Plan.from_json(json.dumps(data))
    assert set(plan.forms.values()) == {"column_wise", "unique_rows", "row_wise", "fsdp"}
    for rank, expected in enumerate(promised):
        found = plan.traffic(rank)
        ids, promised_ids = found.bytes_by_collective.pop(Fetch.IDS), int(expected["bytes"].pop(Fetch.IDS))
        assert promised_ids // 4 <= ids <= promised_ids // 4 + 1  # a byte each now, four then
        assert {n: str(x) for n, x in found.bytes_by_collective.items()} == expected["bytes"]
        assert found.calls_by_collective == expected["calls"]
    assert {type(t) for t in plan.layout.transfers} == set(kinds()) - {LeafStatus, UsedOutputs}
    again = json.loads(plan.to_json())
    assert again["version"] == VERSION and des.Plan.from_json(plan.to_json()) == plan
    again["layout"]["transfers"][0]["is"] = "Header"  # as some files of version 3 named the first kind
    assert des.Plan.from_json(json.dumps(again)) == plan


class Pulled(nn.Module):
    """The model of the plan files of version 7."""

    def __init__(self, static):
        super().__init__()
        self.user, self.item = (des.DynamicEmbedding(4, name=n, evict=Capacity(64)) for n in ("user", "item"))
        self.shop = nn.Embedding(50, 4) if static else None

    def forward(self, users, items):
        found = self.user(users) * self.item(items) + self.user(items)
        return (found if self.shop is None else found * self.shop(users % 50)).sum(1)


@pytest.mark.parametrize("static", [False, True])
def test_a_plan_file_of_version_7_is_followed(static):
    """In which each lookup of a dynamic table was fetched by itself; with a static table the header tells of that."""
    name = f"version_7_dynamic{'_and_static' if static else ''}.json"
    plan = des.Plan.load(Path(__file__).parent / "plans" / name)
    ids = torch.arange(8), torch.arange(8)
    again = des.plan(Pulled(static), ids, plan=plan)
    assert set(again.forms.values()) == {"unique_rows"} and again.layout.sends_as(plan.layout, 8, 4)
    calls = plan.traffic(0).calls_by_collective
    assert calls[Fetch.IDS] == calls[Fetch.BACK] == 1 + static and calls.get(Fetch.COUNTS, 0) == static


def test_a_plan_file_of_version_3_is_read():
    """Every kind, as version 3 wrote it: pieces, values that leave and products said in three ways who has what."""
    plan = des.Plan.from_json((Path(__file__).parent / "plans" / "version_3_divisions.json").read_text())
    found = plan.layout.transfers
    assert {type(t) for t in found} == set(kinds()) - {UsedOutputs} and LeafStatus(2, True) in found
    assert plan.splits["tables.3.weight"].pieces == Pieces.even((40, 6), 0, 3)
    assert WholeTables((Whole("w", Pieces.even((7, 2), 0, 3)),)) in found
    ranges = Division.of([(3, 0), (2, 1), (3, 0), (4, -1), (3, 1)])  # -1: own rows
    assert ValuesOut((Exit("shard", ((0, 1, (6,)), (1, 2, (5,))), 1, ranges),)) in found
    assert Vocabulary("narrowed", Division.of([(12, 0), (11, 1)]), 2, 21, 5, 2, (("top", 2),)) in found
    assert found[-1].parts == {0: (0, 10, 2), 1: (10, 11, 0)}
    assert des.Plan.from_json(plan.to_json()) == plan


def test_a_plan_file_from_when_tables_had_fewer_numbers_is_read():
    """Of version 3 too: the header had another name, tables an itemsize, fetched ones neither shape nor line."""
    data = json.loads((Path(__file__).parent / "plans" / "version_2_layout.json").read_text())
    with pytest.warns(UserWarning, match="is named"):
        aliases._note.cache_clear()
        plan = des.Plan.from_json(json.dumps(data))
    old = json.loads(plan.to_json())
    old["version"] = 3
    old["tables"] = [{**without(t, "dtype", "padding_idx", "trained"), "itemsize": 4} for t in old["tables"]]
    old["crossings"] = [without(c, "value") for c in old["crossings"]]
    for t in old["layout"]["transfers"]:
        t["is"] = t["is"].replace("StepHeader", "Header")
        if t["is"] == "Fetch":
            t["tables"] = [
                {**without(x, "rows", "dim", "vectors", "line"), "dtype": "torch.float32"} for x in t["tables"]
            ]
    assert des.Plan.from_json(json.dumps(old)) == plan
    with pytest.raises(des.PlanError, match="crossings"):
        des.Plan.from_json(json.dumps({**old, "crossings": old["crossings"][1:]}))


def without(data, *names):
    return {n: x for n, x in data.items() if n not in names}

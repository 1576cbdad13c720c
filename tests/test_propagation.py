"""Tables that are used whole before rows are looked up: graph propagation."""

import copy

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.capture.ladder import capture
from descompiler.captured import Captured
from descompiler.check.compare import train_and_compare
from descompiler.model.attributes import copied
from descompiler.model.float64 import widen_attributes
from descompiler.model.probe import blueprint
from descompiler.model.sparse import equal, parts_of, with_parts
from descompiler.passes import NORMALISE
from descompiler.tables.computed import find_groups
from descompiler.tables.form import find_tables
from tests.harness.cases import cases
from tests.harness.propagation import ITEMS, NGCF, STEPS, Cosine, LightGCN, Loss, Weighted, inputs

HELD = [f"{layout} {how}" for layout in ("coo", "csr", "dense") for how in ("buffer", "attribute")]


def program_of(model, batch=None):
    torch.manual_seed(0)
    return capture(blueprint(model), inputs() if batch is None else batch, passes=NORMALISE)[0]


@pytest.mark.parametrize("held", HELD)
def test_matrices_are_captured_as_the_model_holds_them(held):
    """Capture accepts a graph only if it reproduces outputs and gradients."""
    (group,) = find_groups(program_of(LightGCN("matmul" if "dense" in held else "sparse.mm", held)))
    assert group.tables == ("user.weight", "item.weight") and not group.others and len(group.lookups) == 2


@pytest.mark.parametrize("step", [s for s in STEPS if s != "sparse.mm"])
def test_every_way_to_pass_messages_is_by_columns(step):
    for operator in find_tables(program_of(LightGCN(step))):
        assert operator.forms == ("replicate", "column_wise", "fsdp")
        assert "computed of all its rows" in operator.refusals["row_wise"]


def test_rows_are_looked_up_before_what_needs_all_columns():
    program = program_of(Cosine())
    notes = [n for n in program.journal if n.startswith("lookups_first")]
    assert len(notes) == 4 and all("div" in n for n in notes)
    assert all("column_wise" in o.forms and not o.other_uses for o in find_tables(program))


def test_dense_layers_mix_columns():
    assert not find_groups(program_of(NGCF()))


class Scores(LightGCN):
    """Scores of all items, for some."""

    def forward(self, user, item):
        users, items = self.everyone()
        return (users[user] @ items.T).gather(1, item.unsqueeze(1))


def test_another_use_of_the_computed_table_is_named():
    for operator in find_tables(program_of(Scores())):
        assert operator.forms == ("replicate", "fsdp")
        assert "also used by aten.matmul" in operator.refusals["column_wise"]


MODELS = {
    "LightGCN": (lambda: LightGCN(), inputs()),
    "scatter_add, csr": (lambda: LightGCN("scatter_add", "csr attribute"), inputs()),
    "index_add": (lambda: LightGCN("index_add", sparse=True), inputs()),
    "norms of rows": (lambda: Cosine(), inputs()),
    "its loss": (lambda: Loss(LightGCN(padding_idx=0)), inputs(loss=True)),
    "learnt weights on the way": (lambda: Weighted(), inputs()),
    "fewer columns than ranks": (lambda: Loss(Weighted(dim=2)), inputs(loss=True)),
}


def _verify(rank, ranks, names):
    cases = []
    for name in names:
        torch.manual_seed(0)
        make, batch = MODELS[name]
        model, plans = make().double(), [{"*": "column_wise"}, {"*": "replicate"}]
        widen_attributes(model)
        cases.append(train_and_compare(rank, ranks, model, (batch, {}), 3, plans, ["adagrad"], "cpu").cases)
    return cases


TWO, THREE = list(MODELS)[:-1], list(MODELS)[-1:]
SOME = [(2, TWO[::2]), (3, THREE)]


@pytest.mark.parametrize("ranks, names", cases([*SOME, (2, TWO[1::2])], SOME))
def test_propagation_by_columns_trains_as_the_original(on_ranks, ranks, names):
    assert on_ranks(_verify, ranks, names) == [[2] * len(names)] * ranks


def test_the_planner_divides_by_columns_and_sends_no_table():
    torch.manual_seed(0)
    model = Loss(LightGCN(users=300, items=200, dim=16))
    batch = inputs(rows=8, users=300, items=200, loss=True)
    plan = des.plan(model, batch, ranks=4, batch=32, cluster="bytes")
    assert plan.forms == {"model.user.weight": "column_wise", "model.item.weight": "column_wise"}
    assert plan.price_bytes < min(plan.baselines().values()) / 4  # every row has a gradient, whatever was looked up
    assert {c.width for c in plan.crossings if c.kind == "values"} == {4}  # regularisers too: a number a row and rank
    assert not any(note.startswith("gather") for note in plan.notes)
    replicated = des.plan(model, batch, ranks=4, batch=32, pins={"*": "replicate"})
    assert plan.memory(0).total < replicated.memory(0).total / 3  # weights, state, and the layers of the table
    assert "each rank computes its columns, nothing crosses" in plan.explain()


def test_tables_that_are_computed_together_are_divided_together():
    model, batch = LightGCN(), inputs()
    plan = des.plan(model, batch, ranks=2, pins={"user.weight": "column_wise"})
    assert set(plan.forms.values()) == {"column_wise"}
    plan = des.plan(model, batch, ranks=2, forbid={"item.weight": "column_wise"})
    assert set(plan.forms.values()) == {"replicate"}
    with pytest.raises(des.PlanError, match="pin both"):
        des.plan(model, batch, ranks=2, pins={"user.weight": "column_wise", "item.weight": "replicate"})


def _bad_ids(rank, ranks):
    torch.manual_seed(0)
    user, item = inputs()
    module = des.compile(LightGCN().double(), (user, item), plan={"*": "column_wise"})
    wrong = item.clone()
    if rank == 1:
        wrong[3] = ITEMS
    with pytest.raises(des.InputError) as caught:
        module(user, wrong)
    module(user, item).sum().backward()
    return str(caught.value)


def test_ids_out_of_range_of_the_computed_table_raise_on_every_rank(on_ranks):
    for text in on_ranks(_bad_ids, 2):
        assert f"id {ITEMS} in row 3" in text and "computed of user.weight, item.weight" in text


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.strided])
def test_parts_of_a_matrix_make_it_again(layout):
    x = torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 4.0]])
    x = x if layout is torch.strided else x.to_sparse(layout=layout)
    again = with_parts(x, [p.clone() for p in parts_of(x)])
    assert again.layout is layout and equal(x, again)
    model = nn.Module()
    model.register_buffer("x", x)
    assert equal(copy.deepcopy(model, copied(model)).x, x)
    assert not equal(x, with_parts(x, [*parts_of(x)[:-1], parts_of(x)[-1] + 1]))


def _verify_whole(rank, ranks):
    torch.manual_seed(0)
    cases = []
    for model, batch in ((Loss(NGCF()), inputs(loss=True)), (Scores("index_add"), inputs()), (Twice(), inputs())):
        plans = [{"*": "fsdp"}, {"*user*": "fsdp"}]
        cases.append(train_and_compare(rank, ranks, model.double(), (batch, {}), 3, plans, ["adagrad"], "cpu").cases)
    return cases


class Twice(nn.Module):
    """A table used whole by an operator that has no rule, looked up, multiplied with and in a norm."""

    def __init__(self):
        super().__init__()
        self.item = nn.Embedding(ITEMS, 4, padding_idx=0)
        self.user = nn.Embedding(11, 4)

    def forward(self, user, item):
        w = torch.cumsum(self.item.weight, 0)
        x = self.user(user) + self.item(item) + w.sum(0)
        return x @ self.item.weight.T + self.item.weight.norm(), (x @ w.T).logsumexp(1)


def test_gathered_tables_train_as_the_original(on_ranks):
    assert on_ranks(_verify_whole, 3) == [[2] * 3] * 3


def test_the_planner_gathers_tables_where_memory_is_short():
    """What is sent is the same, so that memory decides: Adam's state is cut, weights and gradients are there whole."""
    torch.manual_seed(0)
    captured = Captured.of(NGCF(users=2100, items=2100, dim=8), inputs(users=2100, items=2100))  # large enough to count
    free = captured.plan(ranks=4, optimizer="adam")
    assert free.forms == {"user.weight": "replicate", "item.weight": "replicate"}
    limit = max(free.memory(r).total for r in range(4)) - 1000
    plan = captured.plan(ranks=4, optimizer="adam", memory_bytes=limit)
    assert "fsdp" in plan.forms.values() and max(plan.memory(r).total for r in range(4)) <= limit
    gathered = captured.plan(ranks=4, optimizer="adam", pins={"*": "fsdp"})
    assert gathered.price_bytes - free.price_bytes == 0
    assert "gathered table user.weight: aten.cat needs all of it, 100,800 B a rank" in gathered.explain()

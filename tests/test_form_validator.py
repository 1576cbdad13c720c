"""Every form of small tables, against the lookup in the whole one; and the pieces that all forms are made of.

In one process: what ranks hold is cut, each rank's part of a lookup is emitted and run, and the parts are put together
as the form's placement says (`tests.harness.lookups`). Fetches take rows from the owners' pieces where they are.
"""

import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import descompiler as des
from descompiler.emit.together import look_up_together
from descompiler.layout.pieces import ALL, Pieces, locate
from descompiler.ops.local import lookup, lookup_rows, lookups_rows
from descompiler.passes import FORMS
from descompiler.tables.form import Choice
from tests.harness.lookups import Looked, LookupCase, fetched, patterns
from tests.harness.parts import RANKS

CHOICES = {
    "table_wise": (Choice(owner=1), Choice(field_owners=(2, 0, 2)), Choice(field_owners=(1, 1, 1))),
    "row_wise": (Choice(), Choice(sizes=(5, 0, 4)), Choice(sizes=(0, 9, 0)), Choice(sizes=(1, 7, 1))),
    "unique_rows": (Choice(), Choice(sizes=(5, 0, 4)), Choice(sizes=(0, 9, 0))),
    "hot_rows": (Choice(), Choice(hot=((1, 3), (6, 7))), Choice(hot=((0, 9),)), Choice(hot=(), sizes=(0, 2, 7))),
}
"""Of tables of 9 rows, beside what a form takes by itself."""


def tables():
    """Lookups of every kind, padded and not, in dense and sparse tables."""
    for padding, sparse in product((-1, 0, 4, 8), (False, True)):
        for ids in ((), (1,), (3,), (2, 3)):
            yield LookupCase(9, 4, ids, None, padding, sparse)
        for mode in ("sum", "mean", "max"):
            if not (mode == "max" and sparse):  # torch has none
                yield LookupCase(9, 4, (3,), mode, padding, sparse)
        yield LookupCase(9, 4, (3,), None, padding, sparse, starts=(0, 2, 7))
        yield LookupCase(9, 1, (3,), None, padding, sparse)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_every_lookup_and_its_gradient(form):
    found, tried = [], 0
    for table in tables():
        if form.name == "row_wise" and table.mode == "max":  # refused
            continue
        for choice in CHOICES.get(form.name, (Choice(),)):
            looked = Looked(table, form, choice)
            found += [f"{table}, {looked.split}: {x}" for x in looked.faults()]
            tried += 1
    assert not found
    assert tried > 60


def test_lookups_with_one_key_have_one_pattern():
    """Tables of the same ids: of other widths, padding and modes; divided alike, and not."""
    row = next(f for f in FORMS if f.name == "row_wise")
    looked = {
        f"{table}, {sizes}": Looked(table, row, Choice(sizes=sizes))
        for table in (
            LookupCase(9, 4),
            LookupCase(9, 2),
            LookupCase(9, 4, padding=4),
            *(LookupCase(9, k, (3,)) for k in (4, 1)),
        )
        for sizes in ((3, 3, 3), (5, 0, 4), (4, 0, 5), (1, 7, 1))
    }
    assert not patterns(looked)
    assert len({x.placement for x in looked.values()}) < len(looked)


def test_tables_that_are_fetched_together():
    """Rows of two tables are asked of their owners at once, and each table's padding is its own."""
    pull, hot = (next(f for f in FORMS if f.name == name) for name in ("unique_rows", "hot_rows"))
    found = [LookupCase(9, 4, (3,), "mean", 4), LookupCase(7, 4, (), None, 0), LookupCase(5, 4, (2,), None)]
    splits = [
        pull.split(found[0].operator, RANKS, Choice(sizes=(5, 0, 4))),
        hot.split(found[1].operator, RANKS, Choice(hot=((2, 4),))),
        pull.split(found[2].operator, RANKS, Choice()),
    ]
    pieces = [
        [s.pieces.cut(t.numbers[0], r).requires_grad_() for r in range(RANKS)]
        for s, t in zip(splits, found, strict=True)
    ]
    results = fetched(splits, pieces, found, [t.numbers[1] for t in found])
    wholes = [torch.cat([result[r] for r in range(RANKS)]) for result in results]
    for table, got in zip(found, wholes, strict=True):
        assert torch.allclose(got, table.site.result)
    sum((got * t.site.weights).sum() for got, t in zip(wholes, found, strict=True)).backward()
    for table, split, parts in zip(found, splits, pieces, strict=True):
        expected = next(iter(table.site.gradients.values()))
        for r, w in enumerate(parts):
            own = split.pieces.own_size(r)
            assert torch.allclose(w.grad[:own], split.pieces.cut(expected, r)[:own])


@st.composite
def random_pieces(draw, shapes, rows=False):
    """A shape, cut anywhere: empty ranges, ranks without any, ranges of all ranks in between; of rows only, or not."""
    shape = draw(shapes)
    dim = draw(st.integers(0, len(shape) - 1)) if shape and not rows else 0
    size, ranks = (shape[dim] if shape else 1), draw(st.integers(1, 4))
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=5))) if shape else []
    ends = [0, *cuts, size]
    owners = draw(st.lists(st.sampled_from([ALL, *range(ranks)]), min_size=len(ends) - 1, max_size=len(ends) - 1))
    return Pieces.of(shape, dim, [(b - a, o) for a, b, o in zip(ends, ends[1:], owners, strict=False)], ranks)


@settings(max_examples=300, deadline=None)
@given(pieces=random_pieces(st.lists(st.integers(0, 7), max_size=3).map(tuple)))
def test_pieces_are_joined_bit_for_bit(pieces):
    count = torch.empty(pieces.shape).numel()
    bits = torch.arange(count, dtype=torch.int32).reshape(pieces.shape) + 0x7FC00000  # every element another nan
    parts = [pieces.cut(bits.view(torch.float32) if count else bits.float(), r) for r in range(pieces.ranks)]
    assert [tuple(p.shape) for p in parts] == [pieces.piece_shape(r) for r in range(pieces.ranks)]
    assert [p.numel() for p in parts] == [pieces.numel(r) for r in range(pieces.ranks)]
    assert torch.equal(pieces.join(parts).view(torch.int32), bits)
    assert pieces.sizes.tolist() == [*(pieces.own_size(r) for r in range(pieces.ranks)), pieces.shared_size()]
    for r in range(pieces.ranks):  # what a rank holds alone is in front, and no other rank's
        if pieces.shape:
            own = parts[r].narrow(pieces.dim, 0, pieces.own_size(r)).contiguous().view(torch.int32)
            others = [p.contiguous().view(torch.int32).flatten() for i, p in enumerate(parts) if i != r]
            assert not torch.isin(own, torch.cat([own.new_empty(0), *others])).any()


@settings(max_examples=200, deadline=None)
@given(pieces=random_pieces(st.tuples(st.integers(1, 9), st.just(1)), rows=True))
def test_rows_are_where_they_are_located(pieces):
    rows = torch.arange(pieces.shape[0])
    parts = [pieces.cut(rows.unsqueeze(1), r) for r in range(pieces.ranks)]
    for rank in range(pieces.ranks):
        owners, positions = locate(pieces, rows, rank)
        assert [int(parts[o][p]) for o, p in zip(owners.tolist(), positions.tolist(), strict=True)] == rows.tolist()


class Whole(nn.Module):
    """A table of which every row is used, and some are looked up."""

    def __init__(self, sparse: bool):
        super().__init__()
        self.item = nn.Embedding(9, 4, sparse=sparse)

    def forward(self, ids):
        x = self.item(ids)
        return x if self.item.sparse else x @ self.item.weight.t()


@pytest.mark.parametrize(
    ("form", "sparse", "trained", "reason"),
    [
        ("fsdp", False, True, None),
        ("sparse_all_gather", True, True, None),
        ("sparse_all_gather", True, False, "it is not trained: no gradient is exchanged"),
        ("sparse_all_gather", False, True, "products with it have gradients of every row"),
        ("hot_rows", True, False, "it is not trained: hot rows would save nothing"),
        ("unique_rows", True, True, None),
    ],
)
def test_what_forms_refuse(form, sparse, trained, reason):
    model = Whole(sparse).requires_grad_(trained)
    (table,) = des.plan(model, (torch.zeros(4, dtype=torch.int64),), ranks=2).tables
    if reason is None:
        assert form not in table.refusals
    else:
        assert re.search(reason, table.refusals[form])


class Squared(Whole):
    def forward(self, ids):
        return self.item(ids).sum(1) + self.item.weight.square().sum()


def test_a_table_with_sparse_gradients_is_not_gathered_whole():
    (table,) = des.plan(Squared(sparse=True), (torch.zeros(4, dtype=torch.int64),), ranks=2).tables
    assert "its gradients are sparse" in table.refusals["fsdp"]


class Looks(Whole):
    def forward(self, ids):
        return self.item(ids)


@pytest.mark.parametrize(("sparse", "trained"), product((False, True), (False, True)))
def test_gradients_of_a_replicated_table_are_gathered_if_they_are_sparse(sparse, trained):
    model = Looks(sparse).requires_grad_(trained)
    plan = des.plan(model, (torch.zeros(4, dtype=torch.int64),), ranks=2, pins={"*": "replicate"})
    assert plan.splits["item.weight"].gathered == (sparse and trained)


def test_lookups_are_made_one_where_their_ids_are_there_before():
    graph, table = fx.Graph(), torch.arange(12.0).reshape(6, 2)
    weight, ids = graph.placeholder("weight"), graph.placeholder("ids")
    first, second = (graph.call_function(lookup_rows, (weight, ids, start, -1, False)) for start in (0, 1))
    later = graph.call_method("long", (graph.call_method("sum", (first, 1)),))
    third, fourth = (graph.call_function(lookup_rows, (weight, later, start, -1, False)) for start in (0, 2))
    graph.output([first, second, third, fourth])
    before = fx.GraphModule(nn.Module(), graph)
    expected = before(table, torch.tensor([0, 1, 5]))
    look_up_together(graph, lambda n: n, ())
    graph.lint()
    calls = [n for n in graph.nodes if n.target is lookups_rows]
    assert len(calls) == 2 and lookup_rows not in [n.target for n in graph.nodes]
    found = fx.GraphModule(nn.Module(), graph)(table, torch.tensor([0, 1, 5]))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("checked", [False, True])
def test_ids_that_nobody_checked_are_looked_up_in_their_own_table(checked):
    """In one storage an id behind a table's end is a row of the next table."""
    graph = fx.Graph()
    weights = [graph.placeholder(name) for name in ("first", "second")]
    ids = graph.placeholder("ids")
    found = [graph.call_function(lookup, (w, ids, -1, True)) for w in weights]
    graph.output([graph.call_function(torch.neg, (x,)) for x in found])
    look_up_together(graph, lambda n: "one kind", {ids} if checked else ())
    graph.lint()
    tables = torch.arange(8.0).reshape(4, 2).split(2)
    found = fx.GraphModule(nn.Module(), graph)
    assert [x.tolist() for x in found(*tables, torch.tensor([1]))] == [[[-2.0, -3.0]], [[-6.0, -7.0]]]
    if not checked:
        with pytest.raises(IndexError):
            found(*tables, torch.tensor([2]))
    assert (lookup in [n.target for n in graph.nodes]) is not checked

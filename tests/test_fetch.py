"""Forms that fetch unique rows: unique_rows, sparse_all_gather, and whatever mixes them with a region."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import descompiler as des
from descompiler.cost_models.table import Table
from descompiler.layout.fetches import Fetch, FetchTable
from descompiler.layout.pieces import Pieces
from descompiler.runtime.fetch import pull, stacked_takes, take, takes
from descompiler.runtime.runtime import Runtime
from tests.harness.cases import cases


class Everything(nn.Module):
    """Every use of a table that the forms know, in one model; ids are 2 fields, then a history of 3 with padding."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.item = nn.Embedding(11, 4, padding_idx=0, sparse=sparse)  # looked up as target and as history
        self.user = nn.Embedding(7, 3, sparse=sparse)
        self.bag = nn.EmbeddingBag(11, 4, mode="mean", padding_idx=0, sparse=sparse)
        self.largest = nn.EmbeddingBag(11, 4, mode="max", padding_idx=0)
        self.position = nn.Embedding(3, 4, sparse=sparse)  # ids are the same for every batch
        self.group = nn.Embedding(4, 2, sparse=sparse)  # ids are computed from a lookup
        self.frozen = nn.Embedding(11, 4).requires_grad_(False)
        self.linear = nn.Linear(17, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        user, item, history = self.user(ids[:, 0]), self.item(ids[:, 1]), ids[:, 2:]
        vectors = self.item(history) + self.position(torch.arange(3))
        group = self.group((user[:, 0] > 0).long() + 2 * (item[:, 0] > 0).long())
        x = [user, item * vectors.cumsum(1).mean(1), self.bag(history), self.largest(history), group]
        return self.linear(torch.cat(x, 1)) + self.frozen(ids[:, 1]).cos().sum(1, keepdim=True)


def ids_of(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(7, (rows, 5), generator=generator)
    return torch.cat([ids[:, :2], ids[:, 2:] * torch.tensor([1, 1, 0])], 1)  # some padding in every history


MIXED = {
    "item.weight": "unique_rows",
    "user.weight": "row_wise",
    "group.weight": "unique_rows",
    "bag.weight": "sparse_all_gather",
}


@pytest.mark.parametrize("optimizer", cases(["adam", "sparse_adam"], ["sparse_adam"]))
def test_every_use_of_a_table(on_ranks, optimizer):
    torch.manual_seed(0)
    model = Everything(sparse=optimizer == "sparse_adam")
    plans = [{"*": "unique_rows"}, {"*": "sparse_all_gather"}, {"*": "hot_rows"}, MIXED]
    des.verify(model, (ids_of(9),), ranks=3, plans=plans, optimizers=[optimizer], launch=on_ranks)


def test_what_is_sent_for_unique_ids(on_ranks):
    """2 ranks, one row each: the expected counts are those of the formula, not those of the runtime."""
    for unique, sent in on_ranks(_counted, 2):
        rank, counts = unique
        # rank 0 asks for rows 0 (its own), 5, 6 of 8; rank 1 for rows 5 (its own), 1
        assert counts == ((2, 1, 0) if rank == 0 else (1, 2, 0))
        asked, served = counts[:2]
        assert sent["all_to_all (unique ids)"] == asked  # each a byte: the distance to the one before it
        assert sent["all_to_all (rows of unique ids)"] == 3 * 8 * served
        assert sent["all_to_all (gradients of unique ids)"] == 3 * 8 * asked


def _counted(rank, ranks):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(8, 3)

        def forward(self, x):
            return self.table(x).sum((1, 2))

    module = des.compile(Model().double(), (torch.zeros(2, 4, dtype=torch.long),), plan={"*": "unique_rows"})
    ids = [[0, 5, 6, 5], [5, 1, 1, 5]][rank]
    module(torch.tensor([ids])).sum().backward()
    counts = module.unique()["table.weight"]
    return (rank, (counts.asked, counts.served, counts.shared)), module.traffic().bytes_by_collective


def _bad_late_ids(rank, ranks):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Embedding(8, 3), nn.Embedding(8, 3)
            with torch.no_grad():
                self.first.weight.copy_(torch.arange(24.0).reshape(8, 3))

        def forward(self, x):
            return self.second(9 * (self.first(x)[:, 0] > 8).long()).sum(1)  # row 3 begins with 9

    module = des.compile(Model().double(), (torch.zeros(2, dtype=torch.long),), plan={"*": "unique_rows"})
    texts = []
    for last in (2, 3):
        try:
            module(torch.tensor([1, last if rank else 1])).sum().backward()
            texts.append("fine")
        except des.InputError as error:
            texts.append(str(error))
    return texts


def test_computed_ids_that_are_wrong_on_one_rank_raise_on_every_rank(on_ranks):
    for fine, text in on_ranks(_bad_late_ids, 2):
        assert fine == "fine" and "rank 1: table 'second.weight'" in text and "id 9 in row 1" in text


def _many_ranges(rank, ranks, sparse):
    """Hot rows all over a table, one by one: 500 ranges, two tables of a class and one beside it."""
    generator = torch.Generator().manual_seed(3)
    tables, weights, expected = [], [], []
    for name, rows, dim in (("a", 1000, 3), ("b", 700, 3), ("c", 50, 2)):
        owners = torch.randint(-1, ranks, (rows // 2,), generator=generator).tolist()
        whole = torch.randn(rows, dim, dtype=torch.float64, generator=generator).requires_grad_()
        pieces = Pieces.of((rows, dim), 0, [(2, owner) for owner in owners], ranks)
        tables.append(FetchTable(Table(name, rows, dim, torch.float64, padding_idx=5, sparse=sparse), pieces))
        weights.append(pieces.cut(whole.detach(), rank).requires_grad_())
        expected.append(whole)
    tables.sort(key=lambda t: t.kind)
    by_name = dict(zip("abc", zip(weights, expected, strict=True), strict=True))
    runtime = Runtime(dist.group.WORLD, rank, ranks, "sum")
    total, whole_total, errors = 0.0, 0.0, []
    for step in range(2):
        for t in tables:
            every = torch.randint(t.rows, (ranks, 200), generator=generator)
            weight, whole = by_name[t.name]
            out = pull(runtime, Fetch.of_table(t), weight, every[rank])
            own = torch.nn.functional.embedding(every, whole, padding_idx=5, sparse=sparse)
            errors.append(float((out - own[rank]).abs().max()))
            total, whole_total = total + out.sin().sum() * (step + 1), whole_total + own.sin().sum() * (step + 1)
    total.backward()
    (whole_total / ranks).backward()
    for t in tables:
        weight, whole = by_name[t.name]
        grad, expected_grad = weight.grad.coalesce() if sparse else weight.grad, whole.grad
        errors.append(float((grad.to_dense() - t.pieces.cut(expected_grad.to_dense(), rank)).abs().max()))
        if sparse:  # the rows that have an entry are those that were looked up, also where their gradient is 0
            touched = torch.zeros(t.rows, 1)
            touched[expected_grad.coalesce().indices()[0]] = 1
            mine = t.pieces.cut(touched.expand(t.rows, t.dim).contiguous(), rank)[:, 0].nonzero()[:, 0]
            assert torch.equal(grad.indices()[0], mine)
    return max(errors)


@pytest.mark.parametrize("sparse", [False, True])
def test_many_ranges_of_hot_rows(on_ranks, sparse):
    assert max(on_ranks(_many_ranges, 3, sparse)) < 1e-12


def _alone(rank, ranks):
    """`pull` by itself, as partial capture uses it: two lookups of one table, one a bag, and no rows on rank 0."""
    torch.manual_seed(0)
    whole = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    pieces = Pieces.by_sizes((10, 3), 0, [2, 5, 3], ranks)
    piece = pieces.cut(whole.detach(), rank).requires_grad_()
    runtime = Runtime(dist.group.WORLD, rank, ranks, "sum")
    fetch = Fetch.of_table(FetchTable(Table("table", 10, 3), pieces))
    every = [torch.randint(10, (n, 2), generator=torch.Generator().manual_seed(n)) for n in (0, 3, 4)]
    out = (
        pull(runtime, fetch, piece, every[rank]).sin().sum()
        + pull(runtime, fetch, piece, every[rank], "mean").exp().sum()
    )
    out.backward()
    expected = sum(whole[x].sin().sum() + whole[x].mean(1).exp().sum() for x in every) / ranks
    expected.backward()
    own = sum(whole[x].sin().sum() + whole[x].mean(1).exp().sum() for x in every[rank : rank + 1])
    difference = (piece.grad - pieces.cut(whole.grad, rank)).abs().max()
    return float((out - own).abs()), float(difference)


def test_pull_by_itself(on_ranks):
    for output, gradient in on_ranks(_alone, 3):
        assert output < 1e-12 and gradient < 1e-12


class Different(nn.Module):
    """One lookup has a padding row and the other has none, so no form may treat them alike."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, x):
        padded = nn.functional.embedding(x, self.table.weight, padding_idx=3)
        return (padded * nn.functional.embedding((x + 1) % 9, self.table.weight)).sum(1)


def test_lookups_that_differ_are_not_fetched_together(on_ranks):
    model, inputs = Different(), (torch.arange(9).repeat(2),)
    (table,) = des.plan(model, inputs, ranks=2).tables
    assert {"unique_rows", "sparse_all_gather", "hot_rows", "row_wise"} <= set(table.refusals)
    assert table.refusals["unique_rows"] == "its lookups differ in padding_idx or sparse"
    des.verify(model, inputs, ranks=2, launch=on_ranks)


class Selects(nn.Module):
    """Of what is stacked, the pulled table's rows are not read: what is read is in the region."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.unread = nn.Embedding(10, 4), nn.Embedding(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        v = torch.stack([self.read(ids[:, 0]), self.unread(ids[:, 1])], 1)
        return v[:, 0].sum(1)


def test_rows_that_nobody_reads(on_ranks):
    """Their gradients are zero, not missing: weight decay moves the table, as in the original."""
    module = des.compile(Selects(), (ids_of(6),), plan={"unread.weight": "unique_rows"})
    module(ids_of(6)).sum().backward()
    assert module.unread.weight.grad is not None and not module.unread.weight.grad.any()
    for read in ("table_wise", "row_wise", "unique_rows"):
        plans = [
            {"read.weight": read, "unread.weight": form} for form in ("unique_rows", "sparse_all_gather", "hot_rows")
        ]
        des.verify(Selects(), (ids_of(9),), ranks=2, plans=plans, launch=on_ranks)


@pytest.mark.parametrize("shapes", [[(4,), (4,), (4,)], [(2, 3), (2, 3), (2, 3)], [(4,), (0,), (2, 3)]])
@pytest.mark.parametrize("unread", [False, True])
def test_lookups_in_fetched_rows_together_are_those_one_by_one(shapes, unread):
    """Results, and gradients of rows, where two tables of a class have a padding row and an id is there twice."""
    values = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    other = torch.randn(3, 5, dtype=torch.float64)
    fetching: Any = SimpleNamespace(
        fetch=SimpleNamespace(lookups=[0, 2, 1, 2], class_of=[1, 0, 1]),
        padding=[3, -1, 8],
        positions=[
            torch.randint(6, shapes[0]),
            torch.randint(6, 9, shapes[1]),
            torch.arange(3),
            torch.full(shapes[2], 8),
        ],
    )
    fetching.positions[0].view(-1)[:2] = 3
    chosen, found = [0, 1, 3], []
    each = [[take(fetching, [other, values], i) for i in chosen], list(takes(fetching, [other, values], chosen))]
    if len(set(shapes)) == 1:
        stack = stacked_takes(fetching, [other, values], chosen)
        assert torch.equal(stack, torch.stack(each[0], 1))
        each.append(list(stack.unbind(1)))
    for results in each:
        read = results[:2] if unread else results
        loss = sum((x.square() * (i + 1)).sum() for i, x in enumerate(read))
        (gradient,) = torch.autograd.grad(loss, values, create_graph=True)
        found.append([*(x.detach() for x in results), gradient.detach()])
        if (0,) not in shapes:  # PyTorch's own fails there
            found[-1] += torch.autograd.grad(gradient.square().sum(), values)
    for got in found[1:]:
        for e, f in zip(found[0], got, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-12, atol=0)
    assert not found[0][3][[3, 8]].any()

"""Outputs that a loss ignores: what is behind them has no gradient, as in the original, and stands still."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import descompiler as des
from tests.harness.training import Training, trained

IDS = torch.randint(0, 50, (8, 3), generator=torch.Generator().manual_seed(5))


class Tasks(nn.Module):
    """Two towers on one table, of which one has a table of its own; the last output is a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = nn.Embedding(50, 6), nn.Embedding(50, 6)
        self.a, self.b = nn.Linear(18, 1), nn.Linear(36, 1)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids = self.prepared(ids)
        shared, own = self.table(ids).flatten(1), self.other(ids).flatten(1)
        second = self.b(torch.cat([shared, own], 1))
        return self.a(shared), second, second.pow(2).mean()

    def prepared(self, ids: Tensor) -> Tensor:
        return ids


class TasksInPart(Tasks):
    """In Python that no tracer goes through."""

    def prepared(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(np.sort(ids.numpy(), axis=1))


class TasksCoupled(TasksInPart):
    """Where every rank runs the global batch."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = super().forward(ids)
        return a - a.mean(0), b, c


class TasksInALeaf(Tasks):
    """A module that no tracer goes through, behind one of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Sequential(Sorted(), nn.Linear(36, 1))


class TasksOfABranch(Tasks):
    """All of forward is a leaf. Of two layers, the rows that there are take one."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = super().forward(ids)
        return (self.low if ids.sum() < 1000 else self.high)(a), b, c


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(36))

    def forward(self, x: Tensor) -> Tensor:
        order = torch.from_numpy(np.argsort(x.detach().numpy(), axis=1))
        return x.gather(1, order) * self.scale


STEPS = [((0,), (0,)), ((0, 2), (0, 2)), ((0,), (1,)), ((1,), (1,)), ((0,), (0,)), ((1, 2), (0, 2)), ((0,), (0,))]
"""By step and rank: the outputs that its loss uses."""


def _loss(out: tuple[Tensor, ...], used: tuple[int, ...], rows: slice = slice(None)) -> Tensor:
    """A sum over rows; a number is the global batch's on every rank, and counts once."""
    return sum(out[i][rows].pow(2).sum() if out[i].dim() else out[i] for i in used)


def _trained(rank, ranks, model, form, in_place, penalty):
    module = des.compile(model, (IDS,), plan={"*": form}, loss="sum", in_place=in_place)
    optimizer = torch.optim.Adam(module.parameters(), 0.05, weight_decay=0.1)
    still = []
    for used in STEPS:
        optimizer.zero_grad()
        loss = _loss(module(IDS[rank * 4 : rank * 4 + 4]), used[rank])
        (loss + penalty * module.a.bias.pow(2).sum() / 2).backward()
        still.append([n for n, p in module.named_parameters() if p.grad is None])
        optimizer.step()
    return still, des.full_state_dict(module)


def _expect(model, found, penalty=0):
    optimizer = torch.optim.Adam(model.parameters(), 0.05, weight_decay=0.1)
    for step, used in enumerate(STEPS):
        optimizer.zero_grad()
        out = model(IDS)
        numbers = [out[i] for i in {i for of_rank in used for i in of_rank} if not out[i].dim()]
        rows = [[i for i in of_rank if out[i].dim()] for of_rank in used]
        loss = sum(_loss(out, of_rank, slice(4 * r, 4 * r + 4)) for r, of_rank in enumerate(rows)) + sum(numbers)
        (loss + penalty * model.a.bias.pow(2).sum() / 2).backward()
        still = [n for n, p in model.named_parameters() if p.grad is None]
        assert all(of_rank[step] == still for of_rank, _ in found), (step, found[0][0][step], still)
        optimizer.step()
    for _, state in found:
        for name, x in model.state_dict().items():
            torch.testing.assert_close(state[name], x)


@pytest.mark.parametrize(
    ("model", "form", "in_place"),
    [
        (Tasks, "row_wise", False),
        (Tasks, "table_wise", True),
        (Tasks, "replicate", False),
        (Tasks, "unique_rows", True),
        (TasksInALeaf, "row_wise", False),
        (TasksOfABranch, "row_wise", False),
        (TasksInPart, "row_wise", False),
        (TasksInPart, "replicate", True),
        (TasksCoupled, "row_wise", True),
    ],
)
def test_what_no_loss_uses_stands_still(model, form, in_place, on_ranks):
    model = model().double()
    _expect(model, on_ranks(_trained, 2, model, form, in_place, 0))


class Apart(Tasks):
    """Towers that share nothing; behind the first there is a table alone."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        second = self.a(self.other(ids).flatten(1))
        return self.table(ids).sum(1), second, second.pow(2).mean()


def test_ranks_that_use_other_towers(on_ranks):
    model = Apart().double()
    _expect(model, on_ranks(_trained, 2, model, "row_wise", False, 0))


def test_a_penalty_in_the_users_loss_is_a_gradient(on_ranks):
    """Of weights that are zero, too: they have a gradient, which is zero."""
    model = Tasks().double()
    nn.init.zeros_(model.a.bias)
    _expect(model, on_ranks(_trained, 2, model, "replicate", False, 0.5), 0.5)


class ReadInPart(nn.Module):
    """Fields of one table: of all of them together a part is read, which is of one rank."""

    def __init__(self, kind: str, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fields, self.kind = nn.Embedding(15, 4, sparse=sparse), kind
        self.register_buffer("starts", torch.tensor([0, 3, 8]))
        self.scale, self.norm = nn.Parameter(torch.rand(3, 4)), nn.BatchNorm1d(12)

    def forward(self, ids: Tensor) -> Tensor:
        v = self.fields(ids % torch.tensor([3, 5, 7]) + self.starts)
        if self.kind == "a field":
            return v[:, 0].sum(1)
        if self.kind == "columns":
            return (v * self.scale)[:, 0, :2].sum(1)
        return self.norm((v * self.scale).flatten(1))[:, :4].square().sum(1)


KINDS, PLANS = ("a field", "columns", "a norm"), ({"*": "table_wise"}, {"*": "column_wise"})


def _read_in_part(rank, ranks, sparse):
    torch.set_default_dtype(torch.float64)
    for plan in PLANS:
        for kind in KINDS:
            trained(rank, ranks, ReadInPart(kind, sparse), (IDS,), plan, Training())


@pytest.mark.parametrize("sparse", [False, True])
def test_what_nobody_reads_of_a_value_has_a_gradient_of_zero(sparse, on_ranks):
    """It is decayed, as in the original; in a sparse gradient are all rows that were looked up."""
    on_ranks(_read_in_part, 2, sparse)

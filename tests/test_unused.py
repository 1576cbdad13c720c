"""Outputs that a loss ignores: what is behind them has no gradient, as in the original, and stands still."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import descompiler as des
from tests.harness.cases import cases
from tests.harness.failures import raised
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
        return torch.tensor([sorted(row) for row in ids.tolist()], dtype=torch.int64).reshape(-1, 3)


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


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    ("model", "form", "in_place"),
    [
        (Tasks, "row_wise", False),
        (Tasks, "table_wise", True),
        pytest.param(Tasks, "replicate", False, marks=pytest.mark.slow),
        pytest.param(Tasks, "unique_rows", True, marks=pytest.mark.slow),
        pytest.param(TasksInALeaf, "row_wise", False, marks=pytest.mark.slow),
        (TasksOfABranch, "row_wise", False),
        (TasksInPart, "row_wise", False),
        pytest.param(TasksInPart, "replicate", True, marks=pytest.mark.slow),
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


@pytest.mark.long(but=1)
@pytest.mark.parametrize("sparse", [False, True])
def test_what_nobody_reads_of_a_value_has_a_gradient_of_zero(sparse, on_ranks):
    """It is decayed, as in the original; in a sparse gradient are all rows that were looked up."""
    on_ranks(_read_in_part, 2, sparse)


def _asked(model: nn.Module, ids: Tensor) -> tuple[list[list[bool] | str], list[list[str]], dict[str, Tensor]]:
    """What of it there is, by ways to ask; the hooks that were called, at each step; the gradients."""
    called: list[str] = []
    for n, p in model.named_parameters():
        p.register_hook(lambda g, n=n: called.append(n) or 3 * g)
        p.register_post_accumulate_grad_hook(lambda p, n=n: called.append(f"{n}, accumulated"))
    names = [n for n, _ in model.named_parameters()]
    there: list[list[bool] | str] = []
    calls, found = [], {}

    def note(way: str, gradients: list[Tensor | None]) -> None:
        there.append([g is not None for g in gradients])
        calls.append(sorted(called))
        called.clear()
        found.update({f"{way} {n}": g for n, g in zip(names, gradients, strict=True) if g is not None})

    for output in (0, 1):
        model.zero_grad()
        model(ids)[output].pow(2).sum().backward()
        note(f"backward {output}", [p.grad for p in model.parameters()])
        model.zero_grad()
        model(ids)[output].pow(2).sum().backward(inputs=list(model.parameters()))
        note(f"inputs {output}", [p.grad for p in model.parameters()])
        loss = model(ids)[output].pow(2).sum()
        note(f"grad {output}", list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    called.clear()
    try:
        torch.autograd.grad(model(ids)[0].pow(2).sum(), list(model.parameters()))
    except RuntimeError as error:
        there.append(str(error))
    calls.append(sorted(called))
    return there, calls, found


def _asked_of_ranks(rank, ranks, model, form, in_place):
    module = des.compile(model, (IDS,), plan={"*": form}, loss="sum", in_place=in_place)
    assert (des.module_of(module).coverage().rung == "partial") == isinstance(model, TasksInPart)
    there, calls, found = _asked(module, IDS[rank * 4 : rank * 4 + 4])
    return there, calls, found, des.module_of(module).plan.pieces


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    ("model", "form", "in_place"),
    [
        (Tasks, "row_wise", False),
        (Tasks, "table_wise", True),
        pytest.param(Tasks, "replicate", False, marks=pytest.mark.slow),
        (TasksInALeaf, "row_wise", False),
        pytest.param(TasksInPart, "row_wise", False, marks=pytest.mark.slow),
        (TasksInPart, "replicate", True),
        (TasksCoupled, "row_wise", True),
    ],
)
def test_gradients_that_are_asked_for_and_hooks(model, form, in_place, on_ranks):
    """A gradient that the original has not is none, and no hook is called; where that raises, every rank does."""
    model = model().double()
    there, calls, gradients = _asked(copy.deepcopy(model), IDS)
    assert "appears to not have been used" in there[-1]
    for rank, (of_rank, called, found, pieces) in enumerate(on_ranks(_asked_of_ranks, 2, model, form, in_place)):
        assert of_rank == there
        assert called == calls
        for key, expected in gradients.items():
            torch.testing.assert_close(found[key], pieces[key.split()[-1]].cut(expected, rank))


class Swapped(TasksInPart):
    """What is behind which output is another on one rank."""

    is_swapped = False

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = super().forward(ids)
        return (b, a, c) if self.is_swapped else (a, b, c)


def _asked_apart(rank, ranks):
    model = Swapped().double()
    des.compile(model, (IDS,), plan={"*": "row_wise"}, loss="sum", in_place=True)
    model.is_swapped = rank == 1
    asked = [model.table.weight, model.a.bias]
    return raised(lambda: torch.autograd.grad(model(IDS)[0].sum(), asked, allow_unused=True))


def test_a_gradient_that_some_ranks_can_not_return_is_refused_on_all(on_ranks):
    for message in on_ranks(_asked_apart, 2):
        assert message.startswith("UnsupportedError: torch.autograd.grad of a.bias: the losses of some ranks come to")


class TwoInputs(nn.Module):
    """Each behind one output; ``mixes``: of the whole batch."""

    def __init__(self, in_part: bool, mixes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.a, self.b = nn.Embedding(50, 3), nn.Linear(2, 3), nn.Linear(2, 3)
        self.in_part, self.mixes = in_part, mixes

    def forward(self, ids: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.in_part:
            ids = torch.from_numpy(np.ascontiguousarray(ids.numpy()))
        if self.mixes:
            x, y = x.softmax(0), y.softmax(0)
        e = self.table(ids).sum(1)
        return (e + self.a(x)).sin().sum(1), (e * self.b(y)).sum(1)


def _of_inputs(net: nn.Module, given: list[Tensor], own: slice) -> list[object]:
    """What the inputs get of a loss of the first output, by ways to ask for it, and the hooks that are called."""
    ids, *floats = (x[own] for x in given)
    called: list[object] = []
    found: list[object] = []
    inputs = [x.clone().requires_grad_() for x in floats]
    for i, x in enumerate(inputs):
        x.register_hook(lambda g, i=i: called.append(i))
    several = torch.autograd.graph.register_multi_grad_hook(
        inputs, lambda grads: called.append([g is not None for g in grads])
    )
    net(ids, *inputs)[0].sum().backward()
    several.remove()
    found += [x.grad for x in inputs]
    inputs = [x.clone().requires_grad_() for x in floats]
    found += torch.autograd.grad(net(ids, *inputs)[0].sum(), inputs, allow_unused=True)
    return [*found, sorted(map(str, called))]


def _inputs_of_ranks(rank, ranks, form, loss):
    torch.set_default_dtype(torch.float64)
    result = []
    for in_part, mixes in itertools.product([False, True], repeat=2):
        model, given = TwoInputs(in_part, mixes), [IDS, torch.rand(8, 2), torch.rand(8, 2)]
        module = des.compile(copy.deepcopy(model), given, plan={"*": form}, loss=loss)
        own = slice(0, 3) if rank == 0 else slice(3, 8)
        result.append((_of_inputs(module, given, own), _of_inputs(model, given, slice(0, 8)), own))
    return result


@pytest.mark.long
@pytest.mark.parametrize("form", cases(["row_wise", "replicate"], ["row_wise"]))
def test_inputs_get_a_gradient_where_the_original_gives_one(form, on_ranks):
    for of_rank in on_ranks(_inputs_of_ranks, 2, form, "sum"):
        for (*got, called), (*expected, expected_calls), own in of_rank:
            assert called == expected_calls
            for g, e in zip(got, expected, strict=True):
                assert (g is None) == (e is None)
                if g is not None:
                    torch.testing.assert_close(g, e[own])


def _with_a_hook_of_several(rank, ranks, form):
    model = Tasks().double()
    module = des.compile(model, (IDS,), plan={"*": form}, loss="sum")
    torch.autograd.graph.register_multi_grad_hook(list(module.parameters()), lambda grads: None)
    return raised(lambda: module(IDS)[0].sum().backward())


def test_a_hook_that_waits_for_several_gradients_is_refused_where_they_are_of_pieces(on_ranks):
    for message in on_ranks(_with_a_hook_of_several, 2, "row_wise"):
        assert message.startswith("UnsupportedError: register_multi_grad_hook on ")
    assert on_ranks(_with_a_hook_of_several, 2, "replicate") == ["nothing", "nothing"]


def _of_one_row(rank, ranks, rows):
    torch.manual_seed(0)
    module = des.compile(Tasks().double(), (IDS,), loss="sum")
    number = module(IDS[:rows] if rank == 0 else IDS[rows:4])[2]
    constant, said = torch.ones(1, dtype=torch.float64), None
    if (rows, rank) == (1, 0):
        said, constant = raised(lambda: number * constant), constant[0]
    (number * constant * 3).sum().backward()
    return said, des.local_tensor(module.b.bias.grad)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_constant_of_one_row_is_not_taken_for_a_row(rows, on_ranks):
    """On a rank with one row nobody can tell which of both it is; elsewhere it counts once."""
    torch.manual_seed(0)
    model = Tasks().double()
    (model(IDS[:4])[2] * 3).backward()
    for said, gradient in on_ranks(_of_one_row, 2, rows):
        assert said is None or all(
            x in said for x in ("UnsupportedError", "test_unused.py", "one row", "Python number")
        )
        assert not gradient.numel() or torch.allclose(gradient, model.b.bias.grad)

"""Gradients that are asked for, with torch.autograd.grad or backward(inputs=...), against one process's."""

import pytest
import torch
from torch import nn

import descompiler as des
from tests.harness.cases import cases
from tests.harness.failures import raised

IDS = torch.randint(40, (10, 3), generator=torch.Generator().manual_seed(1))
SIZES = (7, 3)


class Tasks(nn.Module):
    """Two heads on what they share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.users, self.items = nn.Embedding(40, 6), nn.Embedding(9, 6)
        self.shared, self.click, self.buy = nn.Linear(12, 5), nn.Linear(5, 1), nn.Linear(5, 1)

    def forward(self, ids):
        both = torch.cat([self.users(ids).mean(1), self.items(ids % 9).sum(1)], 1)
        hidden = torch.tanh(self.shared(both))
        return self.click(hidden), self.buy(hidden)


class InPart(Tasks):
    def forward(self, ids):
        return super().forward(torch.tensor(ids.tolist()))


def losses(model, ids):
    """A sum over rows each, so that the sum over ranks is the global batch's."""
    click, buy = model(ids)
    return click.square().sum(), (buy - 1).abs().sum()


def gradients(model, ids, names):
    """Of each task, for the parameters of these names; then all, accumulated after two backwards."""
    asked = [model.get_parameter(n) for n in names]
    for p in model.parameters():
        p.register_hook(lambda g: 3 * g)  # a user's, which autograd calls on what it returns too
    found = {}
    for task, loss in enumerate(losses(model, ids)):
        got = torch.autograd.grad(loss, asked, retain_graph=True, allow_unused=True)
        found |= {(task, n): torch.zeros_like(p) if g is None else g for n, p, g in zip(names, asked, got, strict=True)}
    sum(losses(model, ids)).backward(inputs=asked)
    some = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    sum(losses(model, ids)).backward()
    found |= {("all", n): p.grad for n, p in model.named_parameters()}
    return found, some


def _differences(rank, ranks, cls, form, in_place, choices):
    worst, extra = 0.0, set()
    mine = IDS[: SIZES[0]] if rank == 0 else IDS[SIZES[0] :]
    for names in choices:
        model = cls().double()
        module = des.compile(cls().double(), (IDS,), plan={"*": form}, loss="sum", in_place=in_place)
        wanted, _ = gradients(model, IDS, names)
        got, some = gradients(module, mine, names)
        extra |= some - set(names)
        pieces = des.module_of(module).pieces
        for key, g in got.items():
            cut = wanted[key] if pieces(key[1]).is_replicated else pieces(key[1]).cut(wanted[key], rank)
            worst = max(worst, float((g - cut).abs().max()) if g.numel() else 0.0)
    return worst, extra


ALL = [n for n, _ in Tasks().named_parameters()]
FORMS = ["row_wise", "table_wise", "column_wise", "unique_rows", "hot_rows", "replicate"]


@pytest.mark.long(but=1)
@pytest.mark.parametrize("form", cases(FORMS, ["table_wise", "unique_rows", "replicate"]))
def test_gradients_of_tasks(on_ranks, form):
    for worst, extra in on_ranks(_differences, 2, Tasks, form, False, [ALL, ["items.weight"], ["shared.bias"]]):
        assert worst < 1e-10 and not extra


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    ("cls", "in_place"), cases([(InPart, False), (InPart, True), (Tasks, True)], [(InPart, False), (Tasks, True)])
)
def test_gradients_of_tasks_where_the_users_code_runs(on_ranks, cls, in_place):
    for worst, extra in on_ranks(_differences, 2, cls, "row_wise", in_place, [ALL, ["items.weight", "buy.bias"]]):
        assert worst < 1e-10 and not extra


def _refused(rank, ranks, cls):
    module = des.compile(cls().double(), (IDS,), plan={"*": "row_wise"})
    asked = [p for n, p in module.named_parameters() if n in ("shared.weight", "shared.bias")]
    different = raised(lambda: torch.autograd.grad(losses(module, IDS)[0], asked[rank:]))
    twice = raised(lambda: torch.autograd.grad(losses(module, IDS)[0], asked, create_graph=True))
    fine = torch.autograd.grad(losses(module, IDS)[0], asked)
    return different, twice, bool(fine[0].any())


@pytest.mark.parametrize("cls", [Tasks, InPart])
def test_what_is_refused_is_refused_on_every_rank(on_ranks, cls):
    for different, twice, fine in on_ranks(_refused, 2, cls):
        assert different.startswith("RankError: ranks begin different backwards")
        assert "rank 1: gradients of shared.bias by torch.autograd.grad" in different
        assert "UnsupportedError" in twice and "gradients of gradients" in twice
        assert fine, "the next step has to work"

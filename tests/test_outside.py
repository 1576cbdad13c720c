"""Compiled in place: what the user's loop computes of parameters outside of the compiled method."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import descompiler as des

IDS = torch.randint(0, 40, (9, 2), generator=torch.Generator().manual_seed(5))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.proj, self.out = nn.Embedding(40, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.alpha = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("basis", torch.linspace(-1, 1, 16).reshape(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(self.table(ids))


class TowersInPart(Towers):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.tensor(ids.tolist(), dtype=torch.int64))


USES = {
    "lookup": lambda m, h, y: (h * m.table(y)).sum(1).pow(2),
    "lookup alone": lambda m, h, y: h.sum(1) + m.table(y).pow(2).sum(1),
    "layer": lambda m, h, y: m.out(h).pow(2).sum(1),
    "whole": lambda m, h, y: F.cross_entropy(h @ m.table.weight.t(), y, reduction="none"),
    "offset": lambda m, h, y: (h.sum(1) + m.alpha).pow(2),
    "number": lambda m, h, y: (m.alpha * h).sum(1) * m.alpha.exp(),
    "layer of labels": lambda m, h, y: h.sum(1) + m.out(F.one_hot(y, 4).to(h) if y.max() < 4 else h.detach()).sum(1),
}

PENALTIES = {
    "none": lambda m: 0.0,
    "sum": lambda m: 0.1 * m.table.weight.pow(2).sum() + m.out.weight.norm(),
    "in turn": lambda m: torch.zeros(1, dtype=torch.float64) + m.out.weight.pow(2).sum(),
    "learnt": lambda m: (m.alpha * m.table.weight).pow(2).sum() + m.alpha.pow(2) + m.out.bias.pow(2).sum() * m.alpha,
    "buffer": lambda m: (m.basis @ m.out.weight).pow(2).sum() + (m.basis[:, 0] * m.alpha).sum(),
    "given": lambda m: (m.out.weight - GIVEN).pow(2).sum() + (GIVEN * m.out.weight).sum(),
    "gram": lambda m: (m.out.weight @ m.out.weight.t() - torch.eye(4, dtype=torch.float64)).pow(2).sum(),
}


GIVEN = nn.Parameter(torch.linspace(0, 1, 16, dtype=torch.float64).reshape(4, 4))
"""A parameter that is none of the model's."""


def _total(m: nn.Module, ids: Tensor, kind: str, use: str, penalty: str) -> Tensor:
    of_rows = USES[use](m, m(ids[:, 0]), ids[:, 1])
    if kind == "sum":
        return of_rows.sum() + PENALTIES[penalty](m)
    return (of_rows.mean() if len(ids) else of_rows.sum()) * m.alpha + PENALTIES[penalty](m)


def _trained(rank, ranks, model, kind, form, cases):
    module = des.compile(model, (IDS[:, 0],), plan={"table*": form}, loss=kind, in_place=True)
    mine, found = IDS[:CUT] if rank == 0 else IDS[CUT:], []
    for use, penalty in cases:
        module.zero_grad()
        _total(module, mine, kind, use, penalty).sum().backward()
        pieces = des.module_of(module).plan.pieces
        found.append({n: (pieces[n], p.grad) for n, p in module.named_parameters()})
    return found


CUT = 4
"""As many rows as some parameters and constants have."""


CASES = [*((use, "none") for use in USES), *(("lookup", penalty) for penalty in PENALTIES), ("layer", "learnt")]


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    ("model", "kind", "form"),
    [
        (Towers, "row_mean", "row_wise"),
        (Towers, "sum", "replicate"),
        pytest.param(Towers, "sum", "hot_rows", marks=pytest.mark.slow),
        pytest.param(TowersInPart, "row_mean", "replicate", marks=pytest.mark.slow),
        (TowersInPart, "sum", "row_wise"),
    ],
)
def test_uses_outside_of_the_method_weigh_as_its_outputs(model, kind, form, on_ranks):
    torch.manual_seed(0)
    model = model().double()
    found = on_ranks(_trained, 2, copy.deepcopy(model), kind, form, CASES)
    for i, (use, penalty) in enumerate(CASES):
        model.zero_grad()
        _total(model, IDS, kind, use, penalty).sum().backward()
        for rank, of_rank in enumerate(found):
            for name, p in model.named_parameters():
                pieces, grad = of_rank[i][name]
                expected = None if p.grad is None else pieces.cut(p.grad, rank)
                assert (grad is None) == (expected is None), (use, penalty, name)
                if expected is not None:
                    assert torch.allclose(grad, expected, rtol=1e-9, atol=1e-12), (use, penalty, name)


class Numbered(Towers):
    """Returns a number of the whole batch, too."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = super().forward(ids)
        return h, h.pow(2).mean()


class NumberedInPart(Numbered):
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(torch.tensor(ids.tolist(), dtype=torch.int64))


class NumberedCoupled(NumberedInPart):
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h, x = super().forward(ids)
        return h - h.mean(0), x


NUMBERS = {
    "times a parameter": lambda m, h, x: (h.pow(2).sum(1), m.alpha * x),
    "times rows": lambda m, h, x: ((h * x).sum(1), 0.0),
    "plus rows": lambda m, h, x: ((h + x).pow(2).sum(1), x.exp()),
    "scales a parameter that meets rows": lambda m, h, x: ((m.alpha * x * h).sum(1), m.out.weight.norm() * x),
}


def _with_numbers(rank, ranks, model, kind, in_place):
    found = []
    module = des.compile(model, (IDS[:, 0],), plan={"table*": "row_wise"}, loss=kind, in_place=in_place)
    for case in NUMBERS if in_place else ("times rows", "plus rows"):
        module.zero_grad()
        _loss_with_numbers(module, case, kind, IDS[:CUT] if rank == 0 else IDS[CUT:]).backward()
        pieces = des.module_of(module).plan.pieces
        found.append((case, {n: (pieces[n], p.grad) for n, p in module.named_parameters()}))
    return found


def _loss_with_numbers(m: nn.Module, case: str, kind: str, ids: Tensor) -> Tensor:
    of_rows, once = NUMBERS[case](m, *m(ids[:, 0]))
    return (of_rows.sum() if kind == "sum" else of_rows.mean()) + once


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    ("model", "kind", "in_place"),
    [
        (Numbered, "sum", True),
        (Numbered, "row_mean", False),
        pytest.param(NumberedInPart, "row_mean", True, marks=pytest.mark.slow),
        (NumberedInPart, "sum", False),
        (NumberedCoupled, "sum", True),
    ],
)
def test_numbers_of_the_batch_that_the_method_returns_count_once(model, kind, in_place, on_ranks):
    torch.manual_seed(0)
    model = model().double()
    for rank, of_rank in enumerate(on_ranks(_with_numbers, 2, copy.deepcopy(model), kind, in_place)):
        for case, grads in of_rank:
            model.zero_grad()
            _loss_with_numbers(model, case, kind, IDS).backward()
            for name, p in model.named_parameters():
                pieces, grad = grads[name]
                assert (grad is None) == (p.grad is None), (case, name)
                if grad is not None:
                    torch.testing.assert_close(
                        grad, pieces.cut(p.grad, rank), rtol=1e-9, atol=1e-12, msg=f"{case} {name}"
                    )


def _of_one_row(rank, ranks, model):
    module = des.compile(model, (IDS[:, 0],), plan={"table*": "row_wise"}, loss="sum", in_place=True)
    (module(IDS[:8, 0] if rank == 0 else IDS[8:, 0]).sum() + PENALTIES["in turn"](module)).sum().backward()
    return module.out.weight.grad


def test_terms_that_are_added_up_in_turn_beside_one_row(on_ranks):
    model = Towers().double()
    found = on_ranks(_of_one_row, 2, copy.deepcopy(model))
    for grad in found:
        torch.testing.assert_close(grad, 2 * model.out.weight.detach())

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
    "gram": lambda m: (m.out.weight @ m.out.weight.t() - torch.eye(4, dtype=torch.float64)).pow(2).sum(),
}


def _total(m: nn.Module, ids: Tensor, kind: str, use: str, penalty: str) -> Tensor:
    of_rows = USES[use](m, m(ids[:, 0]), ids[:, 1])
    if kind == "sum":
        return of_rows.sum() + PENALTIES[penalty](m)
    return (of_rows.mean() if len(ids) else of_rows.sum()) * m.alpha + PENALTIES[penalty](m)


def _trained(rank, ranks, model, kind, form, cases):
    module = des.compile(model, (IDS[:, 0],), plan={"table*": form}, loss=kind, in_place=True)
    mine, found = IDS[:6] if rank == 0 else IDS[6:], []
    for use, penalty in cases:
        module.zero_grad()
        _total(module, mine, kind, use, penalty).sum().backward()
        pieces = des.module_of(module).plan.pieces
        found.append({n: (pieces[n], p.grad) for n, p in module.named_parameters()})
    return found


CASES = [*((use, "none") for use in USES), *(("lookup", penalty) for penalty in PENALTIES), ("layer", "learnt")]


@pytest.mark.parametrize(
    ("model", "kind", "form"),
    [
        (Towers, "row_mean", "row_wise"),
        (Towers, "sum", "replicate"),
        (Towers, "sum", "hot_rows"),
        (TowersInPart, "row_mean", "replicate"),
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


class Cached(Towers):
    """Its prediction reads what forward left."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.is_fresh = None, False

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        self.cache, self.is_fresh = x.detach(), True
        return x


def test_attributes_that_the_graph_does_not_set_are_named():
    with pytest.warns(UserWarning, match="cache, is_fresh: the method that is compiled sets what its graph does not"):
        des.compile(Cached(), (IDS[:, 0],), in_place=True)

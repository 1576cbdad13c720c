"""Gradients of inputs, and of losses that are made of them: the original's, whatever a rank's loss is."""

import copy
import itertools

import pytest
import torch
from torch import nn

import descompiler as des
from tests.harness.cases import cases

GENERATOR = torch.Generator().manual_seed(3)
IDS, X = torch.randint(20, (7,), generator=GENERATOR), torch.randn(7, 3, generator=GENERATOR, dtype=torch.float64)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first, self.last = nn.Embedding(20, 4), nn.Linear(7, 5), nn.Linear(5, 1)

    def forward(self, x, ids):
        return self.last(self.first(torch.cat([self.table(ids), x], 1)).tanh()).squeeze(1)


class InPart(Whole):
    """Captured in part: ids go through lists."""

    def forward(self, x, ids):
        return super().forward(x, torch.tensor(ids.tolist(), dtype=torch.int64))


def _loss(y, kind):
    return y.sum() if kind == "sum" else y.sum() / max(len(y), 1)


def _train(rank, ranks, model, kind, counts, penalty):
    """The largest error of the inputs' gradients, and of what a step makes of the weights."""
    reference = model().double()
    module = des.compile(copy.deepcopy(reference), (X, IDS), plan={"*": "unique_rows"}, loss=kind)
    mine = slice(0, counts[0]) if rank == 0 else slice(counts[0], sum(counts))
    every, own = X[: sum(counts)].clone().requires_grad_(), X[mine].clone().requires_grad_()
    y, z = reference(every, IDS[: sum(counts)]).square(), module(own, IDS[mine]).square()
    whole, part, errors = _loss(y, kind), _loss(z, kind), []
    if penalty:  # as a Wasserstein critic's: of each row by itself
        (g,) = torch.autograd.grad(y.sum(), every, create_graph=True)
        (h,) = torch.autograd.grad(z.sum(), own, create_graph=True)
        errors.append(g[mine] - h)
        whole = whole + _loss((g.norm(dim=1) - 1).square(), kind)
        part = part + _loss((h.norm(dim=1) - 1).square(), kind)
    whole.backward()
    part.backward()
    share = 1.0 if kind == "sum" else len(z) / len(y)  # of this rank's mean in that of all
    errors.append(own.grad * share - every.grad[mine])
    for m in (reference, module):
        torch.optim.SGD(m.parameters(), 1.0).step()
    state = des.full_state_dict(module)
    errors += [state[n] - x for n, x in reference.state_dict().items()]
    return max(float(e.abs().max()) for e in errors if e.numel())


KINDS = {"rank_mean": (3, 3), "row_mean": (5, 2), "row_mean, a rank without rows": (0, 7), "sum": (5, 2)}


CASES = list(itertools.product(KINDS, [Whole], [False, True])) + [(kind, InPart, False) for kind in KINDS]
ALWAYS = [*CASES[:6:2], CASES[3], CASES[9]]


@pytest.mark.parametrize(("kind", "model", "penalty"), cases(CASES, ALWAYS))
def test_gradients_of_inputs_are_those_of_the_ranks_loss(on_ranks, kind, model, penalty):
    for error in on_ranks(_train, 2, model, kind.split(",")[0], KINDS[kind], penalty):
        assert error < 1e-12

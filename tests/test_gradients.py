"""Averages of replicated parameters' gradients, whatever part of them a backward comes to."""

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import descompiler as des
from tests.harness.failures import raised

IDS = torch.randint(9, (8,), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.first, self.last = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, ids):
        return self.last(self.first(self.table(ids)).tanh())


def compiled(rank):
    """A module whose layers are replicated, its original, and this rank's ids."""
    model = Model().double()
    module = des.compile(copy.deepcopy(model), (IDS,), plan={"*": "unique_rows"}, loss="sum")
    return module, model, IDS[:3] if rank == 0 else IDS[3:]


def _some(rank, ranks):
    module, model, mine = compiled(rank)
    for m, ids in ((module, mine), (model, IDS)):
        m(ids).square().sum().backward(inputs=[m.last.weight, m.table.weight])
        m(ids).square().sum().backward(inputs=[m.last.weight, m.table.weight])
    left = [n for n, p in module.named_parameters() if p.grad is None]
    return left, float((module.last.weight.grad - model.last.weight.grad).abs().max())


def test_parameters_that_a_backward_does_not_come_to_keep_what_they_have(on_ranks):
    for left, error in on_ranks(_some, 2):
        assert left == ["first.weight", "first.bias", "last.bias"]
        assert error < 1e-12


def _in_two_parts(rank, ranks):
    module, _, mine = compiled(rank)
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    apart = checkpoint(lambda x: x @ module.first.weight, x, use_reentrant=True)
    loss = module(mine).sum() + apart.sum()
    text = raised(loss.backward)
    module.zero_grad()
    module(mine).sum().backward()
    return text, module.first.weight.grad is not None


def test_a_gradient_that_comes_in_two_parts_is_refused_by_name(on_ranks):
    for text, fine in on_ranks(_in_two_parts, 2):
        assert "the gradient of 'first.weight' is computed in two parts" in text
        assert fine, "the next step has to work"

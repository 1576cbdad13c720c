"""Libraries' own training: their loss, in their loop, once with the compiled model and once with the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import descompiler as des
from descompiler.check.judge import own_rows
from descompiler.check.objective import batches

STEPS = 3


@dataclass(frozen=True)
class Loop:
    """How a library trains a model.

    Attributes
    ----------
    model : torch.nn.Module
        What is compiled, in place if ``in_place``; its output is the loss of the batch.
    inputs : (args, kwargs)
        Of one call.
    train : callable
        ``train(model, batches)`` runs the library's loop over batches, which are as ``inputs``, with this model or what
        it was compiled to, and returns the loss of each.
    """

    model: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    train: Callable[[nn.Module, Sequence[Any]], list[float]]
    in_place: bool = False


class Calls(nn.Module):
    """A model whose forward is another method of it."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, self.method)(*args, **kwargs)


def steps(model: nn.Module, batches: Sequence[Any], optimizer: torch.optim.Optimizer) -> list[float]:
    """The loop that libraries leave to their users, as their examples write it."""
    losses = []
    model.train()
    for args, kwargs in batches:
        optimizer.zero_grad()
        loss = model(*args, **kwargs)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def trained_by_library(rank: int, ranks: int, build: Callable[[], Loop]) -> dict[str, float]:
    """On every rank: the largest differences of losses and of weights. Collective.

    On three global batches, divided unevenly, of which one leaves a rank without rows.
    """
    torch.set_default_dtype(torch.float64)
    ours, theirs = build(), build()
    compiled = des.compile(ours.model, ours.inputs, in_place=ours.in_place)
    wholes, parts = [], []
    for step in range(STEPS):
        batch, counts = batches(ours.inputs, step, ranks)
        wholes.append(own_rows(batch, 0, sum(counts)))
        parts.append(own_rows(batch, sum(counts[:rank]), counts[rank]))
    got, expected = ours.train(compiled, parts), theirs.train(theirs.model, wholes)
    assert len(got) == len(expected) == STEPS
    state = des.full_state_dict(compiled)
    moved = {n: _difference(state[n], x) for n, x in theirs.model.state_dict().items()}
    return {"loss": _difference(torch.tensor(got), torch.tensor(expected)), "weight": max(moved.values())}


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest; of large values, as a share. Adam makes steps of gradients that are nothing but rounding."""
    if not b.is_floating_point():
        return float((a != b).sum())
    return float(((a - b).abs() / b.abs().clamp_min(1)).max()) if b.numel() else 0.0

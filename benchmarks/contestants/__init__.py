"""Contestants of the bench: the same model, trained on the same batches, each distributed in another way.

Each file has ``CONTESTANTS``, names to functions of a `Case`, which return a `Contestant` or raise `NotPossible`. Every
one starts from the weights of the workload's seed and steps Adagrad with `RATE` and `EPSILON` on the mean of all ranks'
losses, so that losses stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.workloads import Workload

RATE, EPSILON = 0.01, 0.01
ADAGRAD = {"lr": RATE, "eps": EPSILON}
"""With a small epsilon, steps would be as large for gradients that are wrong by a factor, and for rounding errors."""

BATCHES = 8
"""That contestants train on, again and again."""


class NotPossible(Exception):
    """Why a contestant can't run a case."""


@dataclass(frozen=True)
class Case:
    """What is trained, on this rank.

    Attributes
    ----------
    rows : int
        Of each rank's batch.
    sparse : bool
        Whether tables have sparse gradients where contestants leave it open.
    shared : dict
        What contestants of one file keep for each other.
    """

    workload: Workload
    rows: int
    sparse: bool
    rank: int
    ranks: int
    shared: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def example(self) -> tuple[Tensor, ...]:
        """This rank's inputs to plan with."""
        return self.batch(0)[0]

    def batch(self, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """This rank's inputs and labels of a step."""
        return self.workload.batch(self.rows, 1 + step * self.ranks + self.rank)


class Contestant(Protocol):
    """One way to train a model."""

    def step(self, inputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Train on this rank's rows; their mean loss before the step."""

    def about(self) -> dict[str, Any]:
        """What the results say of it beside times: ``traffic`` in bytes, its plan."""


Build = Callable[..., Contestant]


@dataclass
class Module:
    """A contestant that is a module which averages gradients over ranks in backward, and optimisers."""

    module: Callable[..., Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizers: Sequence[torch.optim.Optimizer]
    says: Callable[[], dict[str, Any]] = dict

    def step(self, inputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        loss = self.loss(self.module(*inputs), labels)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def about(self) -> dict[str, Any]:
        return self.says()


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    """The optimiser of all contestants, as PyTorch has it."""
    return torch.optim.Adagrad(parameters, **ADAGRAD)

"""Opaque leaves on ranks: a failure of one is told to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from descompiler.graph.leaf import Leaf
from descompiler.runtime.guard import Guard

if TYPE_CHECKING:
    from descompiler.runtime.runtime import Runtime


class LeafOnRanks:
    """The target of an emitted node that runs a leaf, and whose failure on one rank is raised on all.

    ``run(runtime, tensors, rows, state)``, with the arguments of a `Leaf`. Collective. What its backward raises is told
    at the end of backward (`Runtime.together`).

    Parameters
    ----------
    drawn : bool
        Whether random draws have to be the same on every rank (`Runtime.draw`).
    own_rows : bool
        Whether it runs on the rank's own rows, not on the global batch.
    """

    def __init__(self, leaf: Leaf, *, drawn: bool = False, own_rows: bool = False):
        self.leaf, self.drawn, self.own_rows = leaf, drawn, own_rows
        self.__name__ = self.__qualname__ = leaf.__name__
        self.__module__ = __name__

    def __call__(
        self, runtime: Runtime, tensors: Sequence[Tensor], rows: Sequence[Tensor], state: Sequence[Tensor]
    ) -> list[Tensor]:
        def run() -> list[Tensor]:
            try:
                out = self._guarded(runtime, tensors, rows, state)
            except Exception as error:  # whatever the user's forward raises
                runtime.agree(self.leaf.failure(error))
                raise
            runtime.agree(None)
            return out

        return runtime.draw(run) if self.drawn else run()

    def _guarded(
        self, runtime: Runtime, tensors: Sequence[Tensor], rows: Sequence[Tensor], state: Sequence[Tensor]
    ) -> list[Tensor]:
        own_rows = self.own_rows and runtime.ranks > 1
        if runtime.ranks == 1 or not torch.is_grad_enabled():
            return self.leaf(tensors, rows, state, own_rows=own_rows)
        failures = runtime.failures
        guard = Guard(lambda error: failures.append((f"backward of {self.leaf.failure(error)}", error)))
        inner = guard.enter(tensors), guard.enter(rows), guard.enter(state)
        return guard.leave(self.leaf(*inner, own_rows=own_rows))

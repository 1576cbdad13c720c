"""Opaque leaves on ranks: a failure of one is told to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from descompiler.classify.behind import LeafReach
from descompiler.graph.leaf import Leaf
from descompiler.model.reach import leaves_of
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
    reach : LeafReach, optional
        What ranks tell each other of it in backward: which of its operands its results are made of.
    """

    def __init__(self, leaf: Leaf, *, drawn: bool = False, own_rows: bool = False, reach: LeafReach | None = None):
        self.leaf, self.drawn, self.own_rows, self.reach = leaf, drawn, own_rows, reach
        self.__name__ = self.__qualname__ = leaf.__name__
        self.__module__ = __name__

    def __call__(
        self, runtime: Runtime, tensors: Sequence[Tensor], rows: Sequence[Tensor], state: Sequence[Tensor]
    ) -> list[Tensor]:
        runtime.settle()

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
        if runtime.ranks == 1:
            return self.leaf.run(tensors, rows, state)
        if not torch.is_grad_enabled():
            return self.leaf.run(tensors, rows, state, own_rows=self.own_rows)
        failures = runtime.failures
        guard = Guard(lambda error: failures.append((f"backward of {self.leaf.failure(error)}", error)), self.leaf.said)
        inner = guard.enter(tensors), guard.enter(rows), guard.enter(state)
        operands = [x for group in inner for x in group]
        out = self.leaf.run(*inner, own_rows=self.own_rows)
        if self.reach is not None:
            self._see(runtime, self.reach, out, operands)
        return guard.leave(self.leaf.anchored(out, operands))

    def _see(self, runtime: Runtime, reach: LeafReach, out: Sequence[Tensor], operands: Sequence[Tensor]) -> None:
        """Note which operands the results are made of; a rank without rows has run on none that are in the batch."""
        if self.own_rows and any(runtime.rows) and not runtime.rows[runtime.rank]:
            return
        made = [{id(x) for x in leaves_of([y])} for y in out]
        found = [id(operands[i]) in leaves for leaves in made for i in reach.operands]
        before = runtime.seen.get(reach.name, [False] * reach.size)  # it may run on own rows and on the global batch
        runtime.seen[reach.name] = [a or b for a, b in zip(before, found, strict=True)]

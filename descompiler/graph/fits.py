"""Whether inputs of other shapes than the example's go through a graph: tried without values, before anything is sent.

An operator that refuses a shape would do so on one rank, in the middle of a step, with the others waiting for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from descompiler.graph.nodes import tail, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import interpret

Tails = tuple[tuple[int, ...] | None, ...]
"""Sizes of each input but the first, which is the batch; None where there is not even that."""


class Fits:
    """What is known of the shapes that a program takes; each combination is tried once."""

    def __init__(self, program: Program):
        self.program = program
        inputs = [n for n in program.graph.nodes if (s := program.source(n)) is not None and s.kind == "input"]
        self.example: Tails = tuple(tail(n) for n in inputs)
        self._known: dict[Tails, str | None] = {self.example: None}
        self._knows: bool | None = None  # whether the example goes through; some operators need values

    def problem(self, tensors: Sequence[Tensor]) -> str | None:
        """Why inputs don't fit, or None."""
        tails: Tails = tuple(tuple(x.shape[1:]) if x.dim() else None for x in tensors)
        if tails not in self._known:
            self._known[tails] = self._tried(tails)
        return self._known[tails]

    def _tried(self, tails: Tails) -> str | None:
        told = f"inputs of shapes {_shown(tails)} don't fit the model, which was compiled for {_shown(self.example)}"
        if [t is None or len(t) for t in tails] != [t is None or len(t) for t in self.example]:
            return told
        if self._knows is None:
            self._knows = self._error(self.example) is None
        error = self._error(tails) if self._knows else None
        return None if error is None else f"{told}: {error}"

    def _error(self, tails: Tails) -> str | None:
        program, left = self.program, list(tails)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            values = {}
            for n in program.graph.nodes:
                if n.op == "placeholder":
                    is_input = program.sources[n.name].kind == "input"
                    shape = (2, *(left.pop(0) or ())) if is_input else tuple(value(n).shape)
                    values[n.name] = torch.empty(shape, dtype=value(n).dtype)
            try:
                interpret(program, values)
            except Exception as error:  # whatever the operators raise
                return str(error).splitlines()[0] if str(error) else type(error).__name__
        return None


def _shown(tails: Tails) -> str:
    return ", ".join("()" if t is None else f"({', '.join(['rows', *map(str, t)])})" for t in tails)

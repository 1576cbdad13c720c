"""Which parameters are behind an output, and which inputs: those to which a loss of it may send a gradient.

A graph says it, but for opaque leaves: which of its operands a result of a leaf is made of may depend on values, and
shows when forward has run, on the rows of each rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from descompiler.classify.scope import scope_of, trained_parameters
from descompiler.graph.leaf import Leaf
from descompiler.graph.nodes import stops_gradients
from descompiler.graph.program import Program
from descompiler.model.kinds import MOST_KEPT

Seen = Mapping[str, Sequence[bool]]
"""By name of a leaf's node, whether each result (the outer loop) is made of each of its trained operands."""


@dataclass(frozen=True)
class LeafReach:
    """A leaf that gradients go through.

    Attributes
    ----------
    name : str
        Of its node.
    results : int
    operands : tuple of int
        Positions of those that get gradients, among all: tensors, rows, state.
    """

    name: str
    results: int
    operands: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.results * len(self.operands)


def reach_of(n: fx.Node) -> LeafReach | None:
    """Of a node; None if it is no leaf, or no gradient goes through it."""
    if not isinstance(n.target, Leaf) or not scope_of(n).grad:
        return None
    trained = tuple(i for i, a in enumerate(_operands(n)) if isinstance(a, fx.Node) and scope_of(a).grad)
    return LeafReach(n.name, len(n.target.call.results), trained)


def _operands(n: fx.Node) -> list[Any]:
    groups: tuple[Any, ...] = n.args
    return [a for group in groups for a in group]


class Behind:
    """The trained parameters, and inputs that require a gradient, behind each output of a program.

    Attributes
    ----------
    leaves : tuple of LeafReach
        What shows in a step.
    """

    def __init__(self, program: Program):
        self.program, self.trained = program, trained_parameters(program)
        self.leaves = tuple(reach for n in program.graph.nodes if (reach := reach_of(n)) is not None)
        self._known: dict[tuple[bool, ...], tuple[frozenset[str], ...]] = {}

    @property
    def size(self) -> int:
        """How many numbers a step tells."""
        return sum(leaf.size for leaf in self.leaves)

    @cached_property
    def possible(self) -> tuple[frozenset[str], ...]:
        """By output, the parameters and inputs that may be behind it."""
        return self.of([True] * self.size)

    def told(self, seen: Seen) -> list[bool]:
        """What a rank tells of a step; of a leaf that has not run, nothing is made of anything."""
        return [x for leaf in self.leaves for x in seen.get(leaf.name, [False] * leaf.size)]

    def of(self, told: Sequence[bool]) -> tuple[frozenset[str], ...]:
        """By output, the parameters and inputs behind it in a step of which so much is `told`."""
        if (key := tuple(told)) not in self._known:
            if len(self._known) == MOST_KEPT:
                self._known.clear()
            (end,) = (n for n in self.program.graph.nodes if n.op == "output")
            reached = dict(self._reached(key))
            self._known[key] = tuple(self._behind(output, reached) for output in end.args[0])
        return self._known[key]

    def _reached(self, told: Sequence[bool]) -> Iterator[tuple[str, list[set[int]]]]:
        """By leaf, by result, the positions of the operands that it is made of."""
        queue = iter(told)
        for leaf in self.leaves:
            yield leaf.name, [{i for i in leaf.operands if next(queue)} for _ in range(leaf.results)]

    def _behind(self, output: fx.Node, reached: Mapping[str, Sequence[set[int]]]) -> frozenset[str]:
        seen, left = {output}, [output]
        while left:
            n = left.pop()
            if stops_gradients(n):
                continue
            taken = n.all_input_nodes
            if taken and taken[0].name in reached:  # one of a leaf's results
                operands, result = _operands(taken[0]), n.args[1]
                assert isinstance(result, int)
                taken = [a for i in reached[taken[0].name][result] if isinstance(a := operands[i], fx.Node)]
            new = [a for a in taken if a not in seen]
            seen.update(new)
            left += new
        parameters = {name for n in seen if (name := self.program.parameter(n)) is not None}
        return frozenset(parameters & self.trained) | {n.name for n in seen if self._is_trained_input(n)}

    def _is_trained_input(self, n: fx.Node) -> bool:
        return n.op == "placeholder" and self.program.sources[n.name].kind == "input" and scope_of(n).grad

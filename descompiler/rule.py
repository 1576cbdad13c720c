"""What a placement rule is: how an operator stays in the substituted region.

A rule answers two questions about a node of the original graph. `place`: given the placements of its operands, which
placement has its result if it is computed in the region, or why it can't be? `emit`: what is this rank's part of it?
A rank holds up to two parts of a value (see `descompiler.placement`), one for the global batch, one for its own rows;
`emit` is asked for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from descompiler.pieces import Pieces
from descompiler.placement import LOCAL, Local, Owned, Partial, Placement, Region, Shard
from descompiler.program import Program


@dataclass(frozen=True)
class Placed:
    """A rule's answer: yes.

    Attributes
    ----------
    placement : Region
    pieces : dict of str to Pieces
        Weights that are cut to follow the placement (co-located): no all-reduce for what one rank owns.
    replicated : tuple of str
        Weights that stay on every rank and are also used on the global batch.
    """

    placement: Region
    pieces: Mapping[str, Pieces] = field(default_factory=dict)
    replicated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declined:
    """A rule's answer: no, and why."""

    reason: str


@dataclass(frozen=True)
class Situation:
    """What a rule sees when it places a node."""

    program: Program
    ranks: int
    placements: Mapping[fx.Node, Placement]

    def at(self, node: Any) -> Placement:
        return self.placements.get(node, Local()) if isinstance(node, fx.Node) else Local()

    def colocatable(self, weight: Any) -> str | None:
        """Name of a parameter that one node alone uses, so that it may be cut to follow that node."""
        name = self.program.parameter(weight)
        return name if name is not None and len(weight.users) == 1 else None


@dataclass
class Part:
    """What a rule sees when it emits: one part (global batch, or own rows) of a node on one rank."""

    graph: fx.Graph
    program: Program
    rank: int
    ranks: int
    owner: int  # the rank for the global part, LOCAL for the part of own rows
    rows: Any  # node: number of rows of this part
    placements: Mapping[fx.Node, Placement]
    pieces: Mapping[str, Pieces]
    operand: Callable[[fx.Node], fx.Node | None]  # this part of an operand, or None where the rank holds nothing
    weight: Callable[[fx.Node], fx.Node]  # a parameter (or constant) as this part uses it

    def at(self, node: Any) -> Placement:
        return self.placements.get(node, Local()) if isinstance(node, fx.Node) else Local()

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def width(self, placement: Shard) -> int:
        return placement.width(self.owner)

    def holds(self, placement: Placement) -> bool:
        """Whether this part of a value with that placement exists on this rank."""
        if isinstance(placement, Local):
            return self.owner == LOCAL
        if isinstance(placement, Owned):
            return self.owner == placement.rank
        if isinstance(placement, Shard):
            return placement.width(self.owner) > 0
        if self.owner == LOCAL:
            return isinstance(placement, Partial) and placement.local
        return self.owner in placement.ranks

    def tail(self, placement: Placement, tail: tuple[int, ...]) -> tuple[int, ...]:
        """Shape after the batch dimension of this part, from that of the whole."""
        if not isinstance(placement, Shard):
            return tail
        return (*tail[: placement.dim - 1], self.width(placement), *tail[placement.dim :])


class Rule(Protocol):
    """One family of operators. ``targets`` are the functions of the graph that it is about."""

    @property
    def name(self) -> str: ...

    @property
    def targets(self) -> frozenset[Any]: ...

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined: ...

    def emit(self, node: fx.Node, part: Part) -> fx.Node: ...

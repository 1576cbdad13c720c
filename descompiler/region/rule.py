"""What a placement rule is: how an operator stays in the substituted region.

A rule answers two questions about a node of the original graph. `place`: given the placements of its operands, which
placement has its result if it is computed in the region, or why it can't be? `emit`: what is this rank's part of it?
A rank holds up to two parts of a value (see `descompiler.layout.placement`), one for the global batch, one for its own
rows; `emit` is asked for each.

An operand that is no value of the region may be *given* there: it depends on no batch (a parameter, a constant, what is
computed from them), or ranks can compute it from ids of the global batch that they got anyway (masks, lengths).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from descompiler.graph.program import Program
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import LOCAL, Local, Owned, Partial, Placement, Region, Shard, ranks_of


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


NO_RULE = "no rule for this operator"
"""Why nothing keeps an operator inside that no rule names."""


@dataclass(frozen=True)
class Situation:
    """What a rule sees when it places a node."""

    program: Program
    ranks: int
    placements: Mapping[fx.Node, Placement]
    givens: Givens

    def at(self, node: Any) -> Placement:
        return self.placements.get(node, Local()) if isinstance(node, fx.Node) else Local()

    def given(self, node: fx.Node, placement: Region) -> bool:
        """Whether an operand that is not in the region is known to all ranks that hold a value."""
        return node not in self.placements and self.givens.on(node, ranks_of(placement))

    def colocatable(self, weight: Any) -> str | None:
        """Name of a parameter that one node alone uses, so that it may be cut to follow that node."""
        name = self.program.parameter(weight)
        return name if name is not None and len(weight.users) == 1 and name not in self.givens.tables else None

    def to_owner(self, weight: fx.Node, owner: Owned) -> dict[str, Pieces] | None:
        """The pieces of a parameter that may move to a value's owner; None if it may not."""
        name = self.colocatable(weight)
        if name is None or not self.program.parameters[name].dim():  # a number is not cut
            return None
        return {name: Pieces.whole(tuple(self.program.parameters[name].shape), owner.rank, self.ranks)}

    def along(self, weight: fx.Node, dim: int, placement: Shard) -> tuple[dict[str, Pieces], tuple[str, ...]]:
        """How a given operand follows a divided value along ``dim``: (pieces of it if it may be cut, replicated)."""
        if (name := self.colocatable(weight)) is not None:
            shape = tuple(self.program.parameters[name].shape)
            return {name: Pieces(shape, dim, placement.division, self.ranks)}, ()
        return {}, self.givens.parameters(weight)


@dataclass(frozen=True)
class Givens:
    """What is known inside the region without being one of its values.

    Attributes
    ----------
    constants : mapping of node to tuple of str
        What depends on no batch, and the parameters that it is made of.
    known : mapping of node to frozenset of int
        What is computed from ids alone, and the ranks that get all of those ids.
    sized : frozenset of node
        Numbers and tensors that are made from the batch size alone.
    tables : frozenset of str
        Parameters that are divided by a form, or may be.
    """

    constants: Mapping[fx.Node, tuple[str, ...]]
    known: Mapping[fx.Node, frozenset[int]]
    sized: frozenset[fx.Node]
    tables: frozenset[str]

    def on(self, node: fx.Node, ranks: Iterable[int]) -> bool:
        return node in self.constants or self.known.get(node, frozenset()).issuperset(ranks)

    def parameters(self, node: fx.Node) -> tuple[str, ...]:
        """The parameters that a given operand is made of."""
        return self.constants.get(node, ())


@dataclass
class Part:
    """What a rule sees when it emits: one part (global batch, or own rows) of a node on one rank."""

    graph: fx.Graph
    runtime: fx.Node
    program: Program
    rank: int
    ranks: int
    owner: int  # the rank for the global part, LOCAL for the part of own rows
    rows: Any  # node: number of rows of this part
    placements: Mapping[fx.Node, Placement]
    pieces: Mapping[str, Pieces]
    operand: Callable[[fx.Node], fx.Node | None]  # this part of an operand, or None where the rank holds nothing
    given: Callable[[fx.Node], Any]  # an operand that is given (see the module's text), for the rows of this part

    def at(self, node: Any) -> Placement:
        return self.placements.get(node, Local()) if isinstance(node, fx.Node) else Local()

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def argument(self, node: fx.Node) -> Any:
        """This part of an operand, a value of the region or a given one."""
        return self.operand(node) if node in self.placements else self.given(node)

    def copy(self, node: fx.Node) -> fx.Node:
        """The node's own operator on this part of its operands."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.argument)
        return self.call(node.target, *args, **kwargs)

    def share(self, weight: fx.Node, dim: int, placement: Shard) -> Any:
        """What a part needs of a given operand that has the divided dimension, as its ``dim``."""
        name, whole = self.program.parameter(weight), self.given(weight)
        if name is not None and not self.pieces[name].is_replicated:
            return whole  # this rank's piece
        return self.call(operator.getitem, whole, (*[slice(None)] * dim, placement.positions(self.owner)))

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
    """One family of operators. ``targets`` are the functions of the graph that it is about; None: any.

    The operands and the result of a rule with targets are tensors of floating point with the batch in front. One
    without is asked about anything: lists, masks, batches behind other dimensions. Such values stay inside.
    """

    @property
    def name(self) -> str: ...

    @property
    def targets(self) -> frozenset[Any] | None: ...

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined: ...

    def emit(self, node: fx.Node, part: Part) -> fx.Node: ...

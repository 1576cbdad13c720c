"""view: ``flatten(gather_1([B, F_r, k]), 1)  -->  gather_1([B, F_r * k])``

Reshapes, transpositions and slices keep a division as long as each rank's elements stay runs of one dimension. It pays
because it is what stands between embeddings and the first `Linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.arguments import operand
from descompiler.graph.nodes import aten, shape_of, signature, tail
from descompiler.graph.slicing import order_of, reshaped
from descompiler.layout.placement import LOCAL, Disjoint, Partial, Region, Shard, shard
from descompiler.region.rule import Declined, Part, Placed, Situation
from descompiler.region.sliced import place_slices

VIEW_OPERATORS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.unflatten.int,
    }
)


@dataclass(frozen=True)
class Reshape:
    """Operators that keep the order of the elements and the batch dimension."""

    name: str = "reshape"
    targets: ClassVar[frozenset[Any]] = VIEW_OPERATORS

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, before, after = at.at(node.args[0]), tail(operand(node)), tail(node)
        if isinstance(x, Partial):
            return Placed(x)
        if isinstance(x, Disjoint):
            if before[: x.lead - 1] == after[: x.lead - 1]:
                return Placed(x)
            return Placed(Disjoint(x.ranks, ("reshape", x.key, x.lead, before, after), 1 + len(after)))
        assert isinstance(x, Shard)
        result = reshape_shard(x, before, after)
        return Placed(result) if result is not None else Declined("the reshape cuts through ranks' segments")

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        shape = part.tail(part.at(node), tail(node))
        return part.call(aten.reshape.default, part.operand(operand(node)), [part.rows, *shape])


def reshape_shard(x: Shard, before: tuple[int, ...], after: tuple[int, ...]) -> Region | None:
    """Where the ranges of a sharded dimension are after a reshape of the dimensions behind the batch.

    >>> from descompiler.layout.division import Division
    >>> x = Shard(1, Division.of([(1, 0), (2, 1)]))
    >>> str(reshape_shard(x, (3, 4), (12,)))
    'Shard(1: 4@0,8@1)'
    >>> str(reshape_shard(Shard(2, x.division), (2, 3), (6,)))
    'Shard(1: 1@0,2@1,1@0,2@1)'
    """
    found = reshaped(before, after, x.dim - 1)
    if found is None or any(r.size % found[3] for r in x.division.runs):
        return None
    dim, repeat, times, over = found
    return shard(dim + 1, [(size * times // over, owner) for _ in range(repeat) for size, owner in x.division.pairs])


@dataclass(frozen=True)
class Permute:
    """``transpose`` and ``permute`` that leave the batch in front."""

    name: str = "permute"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.transpose.int, aten.permute.default})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, order = at.at(node.args[0]), order_of(node)
        if order[0] != 0:
            return Declined("moves the batch dimension")
        if isinstance(x, Shard):
            return place_slices(node, at)
        if isinstance(x, Disjoint):
            return Placed(Disjoint(x.ranks, ("permute", x.key, tuple(order), x.lead), len(order)))
        assert isinstance(x, Partial)
        return Placed(x)

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        return part.call(aten.permute.default, part.operand(operand(node)), order_of(node))


@dataclass(frozen=True)
class Narrow:
    """``select`` and ``slice`` of a dimension other than the batch."""

    name: str = "narrow"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.select.int, aten.slice.Tensor})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, (dim, start, stop, step) = at.at(node.args[0]), _interval(node)
        if dim == 0:
            return Declined("selects rows of the batch")
        drops = node.target is aten.select.int
        if isinstance(x, Partial):
            return Placed(x)
        if isinstance(x, Disjoint):
            if dim >= x.lead:
                return Placed(x)
            return Placed(Disjoint(x.ranks, ("narrow", x.key, dim, start, stop, step), x.lead - drops))
        assert isinstance(x, Shard)
        if dim != x.dim:
            return place_slices(node, at)
        if step != 1:
            return Declined("a slice with steps through ranks' segments")
        kept = [(r.size, r.owner) for r, _ in x.division.within(start, stop)]
        if all(owner == LOCAL for _, owner in kept):
            return Declined("selects what every rank has for its own rows")
        if drops and len(kept) != 1:
            return Declined("selects nothing")
        return Placed(shard(dim, kept))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        x, (dim, start, stop, step) = part.at(node.args[0]), _interval(node)
        value = part.operand(operand(node))
        if isinstance(x, Shard) and x.dim == dim:
            # what lies before the interval on this part is where the part's share of the interval begins
            before = sum(r.size for r, _ in x.division.within(0, start) if r.owner == part.owner)
            size = sum(r.size for r, _ in x.division.within(start, stop) if r.owner == part.owner)
            start, stop = before, before + size
        if node.target is aten.select.int:
            return part.call(aten.select.int, value, dim, start)
        return part.call(aten.slice.Tensor, value, dim, start, stop, step)


def _interval(node: fx.Node) -> tuple[int, int, int, int]:
    """(dim, start, stop, step) with non-negative numbers."""
    args = signature(node)
    shape = shape_of(operand(node))
    dim = args["dim"] % len(shape)
    if dim == 0:
        return 0, 0, 0, 1
    size = int(shape[dim])
    if node.target is aten.select.int:
        index = args["index"] % size
        return dim, index, index + 1, 1
    start, stop, _ = slice(args["start"], args["end"], 1).indices(size)
    return dim, start, max(start, stop), args["step"]

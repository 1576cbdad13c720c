"""reduce: ``sum(gather(x_r), sharded dim)  -->  sum_r(sum(x_r))``

A sum over the dimension that ranks divide is a sum of their terms (`Partial`); over any other it stays divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.arguments import operand
from descompiler.graph.nodes import aten, shape_of, signature
from descompiler.graph.slicing import along
from descompiler.layout.placement import Disjoint, Partial, Shard
from descompiler.region.rule import Declined, Part, Placed, Situation
from descompiler.region.sliced import place_slices


@dataclass(frozen=True)
class Reduce:
    """``sum`` and ``mean`` over dimensions other than the batch."""

    name: str = "reduce"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.sum.dim_IntList, aten.mean.dim})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, dims = at.at(node.args[0]), along(node)
        if 0 in dims:
            return Declined("sums over the batch")
        if isinstance(x, Partial):
            return Placed(x)
        if isinstance(x, Disjoint):
            return Placed(x if min(dims) >= x.lead else Partial(x.ranks))
        assert isinstance(x, Shard)
        if x.dim in dims:
            return Placed(Partial(x.ranks, x.local))
        return place_slices(node, at)

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        x, dims, keep = operand(node), sorted(along(node)), signature(node)["keepdim"]
        placement = part.at(x)
        if node.target is aten.mean.dim and isinstance(placement, Shard) and placement.dim in dims:
            count = prod(int(shape_of(x)[d]) for d in dims)
            return part.call(aten.div.Tensor, part.call(aten.sum.dim_IntList, part.operand(x), dims, keep), count)
        return part.call(node.target, part.operand(x), dims, keep)

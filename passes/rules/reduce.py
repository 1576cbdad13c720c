"""reduce: ``sum(gather(x_r), sharded dim)  -->  sum_r(sum(x_r))``

A sum over the dimension that ranks divide is a sum of their terms (`Partial`); over any other it stays divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.nodes import aten, shape_of, signature
from descompiler.layout.placement import Disjoint, Partial, Shard
from descompiler.region.rule import Declined, Part, Placed, Situation


@dataclass(frozen=True)
class Reduce:
    """``sum`` and ``mean`` over dimensions other than the batch."""

    name: str = "reduce"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.sum.dim_IntList, aten.mean.dim})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, dims, keep = at.at(node.args[0]), _dims(node), signature(node)["keepdim"]
        if not dims or 0 in dims:
            return Declined("sums over the batch")
        if isinstance(x, Partial):
            return Placed(x)
        if isinstance(x, Disjoint):
            return Placed(x if min(dims) >= x.lead else Partial(x.ranks))
        assert isinstance(x, Shard)
        if x.dim in dims:
            return Placed(Partial(x.ranks, x.local))
        return Placed(x if keep else Shard(x.dim - sum(d < x.dim for d in dims), x.segments))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        assert isinstance(node.args[0], fx.Node)
        x, placement, dims = part.operand(node.args[0]), part.at(node.args[0]), _dims(node)
        keep = signature(node)["keepdim"]
        if node.target is aten.mean.dim and isinstance(placement, Shard) and placement.dim in dims:
            count = 1
            for d in dims:
                count *= int(shape_of(node.args[0])[d])
            return part.call(aten.div.Tensor, part.call(aten.sum.dim_IntList, x, dims, keep), count)
        return part.call(node.target, x, dims, keep)


def _dims(node: fx.Node) -> list[int]:
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    return [d % rank for d in signature(node)["dim"] or ()]

"""expand: ``expand(gather_1(x_r), [b, F, n])  -->  gather_1(expand(x_r, [b, F_r, n]))``

Repeating a dimension of size 1, or tiling any, along dimensions that are not divided. It pays because the copies would
cross the wire otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.arguments import operand
from descompiler.graph.nodes import aten, shape_of
from descompiler.layout.placement import Disjoint, Partial, Shard
from descompiler.region.rule import Declined, Part, Placed, Situation
from descompiler.region.sliced import place_slices


@dataclass(frozen=True)
class Expand:
    name: str = "expand"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.expand.default, aten.repeat.default})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, before, after = at.at(node.args[0]), shape_of(operand(node)), shape_of(node)
        if len(before) != len(after) or before[0] != after[0]:
            return Declined("adds dimensions, or rows")
        if isinstance(x, Shard):
            return place_slices(node, at, "tiles what ranks divide")
        grown = [d for d, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        if isinstance(x, Partial):
            return Placed(x)
        assert isinstance(x, Disjoint)
        key = ("expand", x.key, tuple(map(str, after)), str(node.target))
        return Placed(x if min(grown, default=x.lead) >= x.lead else Disjoint(x.ranks, key, x.lead))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        if node.target is aten.repeat.default:
            return part.copy(node)
        before, after = shape_of(operand(node)), shape_of(node)
        sizes = [-1 if a == b else b for a, b in zip(before, after, strict=True)]
        return part.call(aten.expand.default, part.operand(operand(node)), sizes)

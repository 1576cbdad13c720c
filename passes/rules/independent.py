"""independent: ``softmax(gather_1(x_r), 2)  -->  gather_1(softmax(x_r, 2))``

An operator that mixes elements along some dimensions treats each slice of the others on its own, so a value may stay
divided along those. It pays because attention over fields, norms of fields and normalisation stay where columns or
fields are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.nodes import aten
from descompiler.graph.slicing import KEEPS, MIXES, REDUCES, along
from descompiler.layout.placement import Disjoint, Shard
from descompiler.passes.rules.reduce import Reduce
from descompiler.region.rule import Declined, Part, Placed, Situation
from descompiler.region.sliced import emit_slices, place_slices

KEEPS_ZERO = frozenset(
    {
        aten.linalg_vector_norm.default,
        aten.amax.default,
        aten.amin.default,
        aten.cumsum.default,
        aten.prelu.default,
    }
)


@dataclass(frozen=True)
class Independent:
    """Operators along dimensions, with their parameters."""

    name: str = "independent"
    targets: ClassVar[frozenset[Any]] = (REDUCES | KEEPS | {aten.prelu.default, aten.gather.default}) - Reduce.targets

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x = at.at(node.args[0])
        if isinstance(x, Shard):
            return place_slices(node, at)
        dims = along(node) if node.target in MIXES else frozenset[int]()
        weights = [n for n in node.all_input_nodes if n is not node.args[0]]
        if not all(n in at.givens.constants for n in weights):
            return Declined("its weight depends on the batch, or is a table")
        names = tuple(name for n in weights for name in at.givens.parameters(n))
        if 0 in dims:
            return Declined("mixes the rows of the batch")
        if isinstance(x, Disjoint) and node.target in KEEPS_ZERO and min(dims, default=x.lead) >= x.lead:
            return Placed(x, replicated=names)
        return Declined("of a sum it is not the sum of the terms'")

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        return emit_slices(node, part) if isinstance(part.at(node), Shard) else part.copy(node)

"""independent: ``softmax(gather_1(x_r), 2)  -->  gather_1(softmax(x_r, 2))``

An operator that mixes elements along some dimensions treats each slice of the others on its own, so a value may stay
divided along those. It pays because attention over fields, norms of fields and normalisation stay where columns or
fields are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.nodes import aten, shape_of, signature
from descompiler.layout.placement import Disjoint, Partial, Shard
from descompiler.region.rule import Declined, Part, Placed, Situation

REDUCES = frozenset({aten.linalg_vector_norm.default, aten.amax.default, aten.amin.default, aten.logsumexp.default})


KEEPS = frozenset(
    {
        aten.softmax.int,
        aten.log_softmax.int,
        aten.cumsum.default,
        aten.layer_norm.default,
        aten.prelu.default,
        aten.conv1d.default,
    }
)


ZERO_TO_ZERO = frozenset(
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
    targets: ClassVar[frozenset[Any]] = REDUCES | KEEPS

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, dims = at.at(node.args[0]), along(node)
        weights = [n for n in node.all_input_nodes if n is not node.args[0]]
        if not all(n in at.givens.constants for n in weights):
            return Declined("its weight depends on the batch, or is a table")
        names = tuple(name for n in weights for name in at.givens.parameters(n))
        if dims is None or 0 in dims:
            return Declined("mixes the rows of the batch, or what it mixes is not known")
        if isinstance(x, Disjoint) and node.target in ZERO_TO_ZERO and min(dims, default=x.lead) >= x.lead:
            return Placed(x, replicated=names)
        if isinstance(x, Partial | Disjoint):
            return Declined("of a sum it is not the sum of the terms'")
        assert isinstance(x, Shard)
        if x.dim in dims:
            return Declined("it mixes what different ranks have")
        before = 0
        if node.target in REDUCES and not signature(node)["keepdim"]:
            before = sum(d < x.dim for d in dims)
        return Placed(Shard(x.dim - before, x.segments), replicated=names)

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        return part.copy(node)


def along(node: fx.Node) -> set[int] | None:
    """The dimensions whose elements the operator mixes; None if they are not known."""
    rank, args = len(shape_of(node.args[0])), signature(node)  # type: ignore[arg-type]
    if node.target is aten.layer_norm.default:
        return set(range(rank - len(args["normalized_shape"]), rank))
    if node.target is aten.prelu.default:
        return {1} if int(shape_of(node.args[1])[0]) > 1 else set()  # type: ignore[arg-type]
    if node.target is aten.conv1d.default:
        kernel = int(shape_of(node.args[1])[-1])  # type: ignore[arg-type]
        point = kernel == 1 and all(s == 1 for s in args["stride"]) and all(p == 0 for p in args["padding"])
        return {1} if point and rank == 3 else {1, 2} if rank == 3 else None
    dims = args["dim"]
    if dims is None or dims == []:
        return None
    return {d % rank for d in ([dims] if isinstance(dims, int) else dims)}

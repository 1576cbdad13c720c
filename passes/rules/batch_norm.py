"""batch_norm: ``batch_norm(gather_1(x_r), W)  -->  gather_1(batch_norm(x_r, W_r))``

The rank that has a channel inside the region has it for the global batch, so its statistics need no other rank. Weight
and bias are cut along channels. Running statistics move where the channel is, and are then sent to all ranks: two
numbers a channel, where batch norm outside the region sends twice as many. It pays where it stands between a wide
interaction and the `Linear` that narrows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.arguments import BatchNormCall
from descompiler.graph.nodes import aten, shape_of
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import Owned, Shard
from descompiler.region.rule import Declined, Part, Placed, Situation


@dataclass(frozen=True)
class BatchNorm:
    """Batch norm over channels (dim 1) that are divided, or have one owner; training and evaluation."""

    name: str = "batch norm"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.batch_norm.default})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        norm = BatchNormCall(node)
        x, weights, buffers = at.at(norm.x), _present(norm.affine), _present(norm.statistics)
        if not isinstance(x, Owned | Shard):
            return Declined("the variance of a sum is not the sum of the terms'")
        if isinstance(x, Shard) and (x.dim != 1 or x.local):
            return Declined("a channel's statistics are of what different ranks have")
        if any(n not in at.givens.constants for n in weights) or any(len(n.users) > 1 for n in buffers):
            return Declined("it is not alone with its weights and running statistics")
        pieces: dict[str, Pieces] = {}
        replicated: tuple[str, ...] = ()
        for n in weights:
            if isinstance(x, Shard):
                cut, whole = at.along(n, 0, x)
            else:
                cut = at.to_owner(n, x) or {}
                whole = () if cut else at.givens.parameters(n)
            pieces.update(cut)
            replicated += whole
        return Placed(x, pieces, tuple(dict.fromkeys(replicated)))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        norm = BatchNormCall(node)
        x, operand = part.at(norm.x), part.operand(norm.x)

        def share(n: fx.Node | None) -> Any:
            if n is None:
                return None
            return part.share(n, 0, x) if isinstance(x, Shard) else part.given(n)

        weights = map(share, norm.affine)
        if not norm.training:
            return part.call(node.target, operand, *weights, *map(share, norm.statistics), *node.args[5:])
        buffers = [None if n is None else part.given(n) for n in norm.statistics]
        mine = x.positions(part.rank) if isinstance(x, Shard) else list(range(int(shape_of(node)[1])))
        return part.graph.call_method("norm_inside", (part.runtime, operand, *weights, *buffers, mine, *norm.options))


def _present(nodes: Iterable[fx.Node | None]) -> list[fx.Node]:
    return [n for n in nodes if n is not None]

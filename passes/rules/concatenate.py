"""concatenate: ``cat([x@0, y@1, dense], 1)  -->  gather_1([x@0, y@1, dense@local])``

Values of different owners side by side are a divided value; what every rank computes from its own rows takes part as a
local range, and crosses nothing. Terms (`Partial`, `Disjoint`) are concatenated term by term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.nodes import aten, dim_of, shape_of, signature, tail
from descompiler.layout.placement import (
    LOCAL,
    Disjoint,
    Local,
    Owned,
    Partial,
    Shard,
    has_local,
    ranks_of,
    shard,
)
from descompiler.region.rule import Declined, Part, Placed, Situation
from descompiler.region.sliced import place_slices


@dataclass(frozen=True)
class Concatenate:
    """``cat`` and ``stack`` along a dimension other than the batch."""

    name: str = "concatenate"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.cat.default, aten.stack.default})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        tensors, dim = _joined(node), dim_of(node)
        if dim == 0:
            return Declined("concatenates batches")
        stack = node.target is aten.stack.default
        places = [at.at(t) for t in tensors]
        sizes = [1 if stack else int(shape_of(t)[dim]) for t in tensors]
        divided = all(
            isinstance(p, Local | Owned) or (isinstance(p, Shard) and p.dim == dim and not stack) for p in places
        )
        if divided:
            ranges: list[tuple[int, int]] = []
            for p, size in zip(places, sizes, strict=True):
                if isinstance(p, Shard):
                    ranges += p.division.pairs
                else:
                    ranges.append((size, p.rank if isinstance(p, Owned) else LOCAL))
            return Placed(shard(dim, ranges))
        first = places[0]
        if any(isinstance(p, Shard) for p in places):
            if not all(p == first for p in places):
                return Declined("concatenates values that are divided differently")
            return place_slices(node, at)
        if isinstance(first, Disjoint) and all(p == first for p in places) and dim >= first.lead:
            return Placed(first)
        ranks: set[int] = set()
        for p in places:
            if not isinstance(p, Local):
                ranks.update(ranks_of(p))
        if all(isinstance(p, Disjoint | Owned) for p in places):
            # still at most one rank has each element; the pattern now spans all dimensions, and where one operand's
            # ends and the next one's begins is part of it
            key = ("cat", dim, stack, tuple(zip(places, sizes, strict=True)))
            return Placed(Disjoint(tuple(sorted(ranks)), key, len(shape_of(node))))
        local = any(isinstance(p, Local) or has_local(p) for p in places)
        return Placed(Partial(tuple(sorted(ranks)), local))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        placement, parts = part.at(node), []
        terms = isinstance(placement, Partial | Disjoint)
        like = next(x for t in _joined(node) if (x := part.operand(t)) is not None)
        for t in _joined(node):
            x = part.operand(t)
            if x is not None:
                parts.append(x)
            elif terms:
                parts.append(part.call(aten.new_zeros.default, like, [part.rows, *tail(t)]))
        return part.call(node.target, parts, dim_of(node))


def _joined(node: fx.Node) -> list[fx.Node]:
    return list(signature(node)["tensors"])

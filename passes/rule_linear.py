"""linear: ``linear(gather_1(x_r), W)  -->  sum_r(linear(x_r, W[:, columns of r]))``

A contraction of the divided dimension is a sum of terms, and the columns of W go where their inputs are (co-location):
their gradients are complete there, so they need no all-reduce. Columns of what every rank computes from its own rows
stay on every rank. On terms (`Partial`), or divided by another dimension, W stays replicated and is used on the global
batch. On a value with one owner, W moves to that owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from descompiler.pieces import ALL, Pieces, Range
from descompiler.placement import LOCAL, Disjoint, Owned, Partial, Segment, Shard, has_local, ranks_of
from descompiler.program import aten, shape_of
from descompiler.rule import Declined, Part, Placed, Situation


@dataclass(frozen=True)
class Linear:
    name: str = "linear"
    targets: frozenset[Any] = frozenset({aten.linear.default})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, (weight, bias) = at.at(node.args[0]), _weights(node)
        names = [at.program.parameter(w) for w in (weight, bias) if w is not None]
        if None in names:
            return Declined("the weight is computed")
        replicated = tuple(n for n in names if n is not None)
        shape = tuple(int(s) for s in shape_of(weight))
        last = len(shape_of(node.args[0])) - 1  # type: ignore[arg-type]
        if isinstance(x, Owned):
            return with_owner(at, x, [w for w in (weight, bias) if w is not None])
        if isinstance(x, Shard) and x.dim == last:
            name = at.colocatable(weight)
            result = Partial(x.ranks, x.local or bias is not None)
            if name is None:
                return Declined("the weight is used elsewhere too, so it can't be cut to follow its input")
            return Placed(result, {name: Pieces(shape, 1, ranges_of(x.segments), at.ranks)})
        if isinstance(x, Shard):
            return Placed(x, replicated=replicated)
        assert isinstance(x, Partial | Disjoint)
        if bias is not None:
            replicated = replicated[:1]
        return Placed(Partial(ranks_of(x), has_local(x) or bias is not None), replicated=replicated)

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        assert isinstance(node.args[0], fx.Node)
        placement, (weight, bias) = part.at(node.args[0]), _weights(node)
        x = part.operand(node.args[0])
        divided = isinstance(placement, Owned) or (
            isinstance(placement, Shard) and placement.dim != len(shape_of(node.args[0])) - 1
        )
        # where the result is a sum of terms, the bias is the term of each rank's own rows
        with_bias = bias is not None and (divided or part.owner == LOCAL)
        if x is None:
            assert bias is not None
            shape = [part.rows, *(int(s) for s in shape_of(node)[1:])]
            return part.call(aten.expand.default, part.weight(bias), shape)
        args = (x, part.weight(weight)) + ((part.weight(bias),) if with_bias and bias is not None else ())
        return part.call(aten.linear.default, *args)


def with_owner(at: Situation, x: Owned, weights: Sequence[fx.Node]) -> Placed:
    """An operator on a value with one owner: its parameters move there, unless another node uses them."""
    names = tuple(at.program.parameter(w) or "" for w in weights)
    if all(at.colocatable(w) for w in weights):
        shapes = {n: tuple(at.program.parameters[n].shape) for n in names}
        return Placed(x, {n: Pieces.whole(shape, x.rank, at.ranks) for n, shape in shapes.items()})
    return Placed(x, replicated=names)


def _weights(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    bias = node.args[2] if len(node.args) > 2 else None
    assert isinstance(node.args[1], fx.Node) and (bias is None or isinstance(bias, fx.Node))
    return node.args[1], bias


def ranges_of(segments: Sequence[Segment]) -> tuple[Range, ...]:
    """Ranges of a weight's dimension that follow the segments of a value's; local ones belong to all ranks."""
    result, start = [], 0
    for s in segments:
        result.append(Range(start, start + s.size, ALL if s.owner == LOCAL else s.owner))
        start += s.size
    return tuple(result)

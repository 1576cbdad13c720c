"""linear: ``linear(gather_1(x_r), W)  -->  sum_r(linear(x_r, W[:, columns of r]))``

A contraction of the divided dimension is a sum of terms, and the columns of W go where their inputs are (co-location):
their gradients are complete there, so they need no all-reduce. Columns of what every rank computes from its own rows
stay on every rank. On terms (`Partial`), or divided by another dimension, W stays replicated and is used on the global
batch. On a value with one owner, W moves to that owner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.arguments import operand, optional_operand
from descompiler.graph.nodes import aten, shape_of
from descompiler.layout.placement import LOCAL, Local, Partial, Shard, has_local, ranks_of
from descompiler.region.rule import Declined, Part, Placed, Situation
from descompiler.region.sliced import place_slices


@dataclass(frozen=True)
class Linear:
    name: str = "linear"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.linear.default})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, (weight, bias) = at.at(node.args[0]), _weights(node)
        if isinstance(x, Local) or not all(w in at.givens.constants for w in (weight, bias) if w is not None):
            return Declined("its weight depends on the batch, or is a table")
        of_weight = at.givens.parameters(weight)
        if isinstance(x, Shard) and x.dim == len(shape_of(operand(node))) - 1:
            pieces, replicated = at.along(weight, 1, x)
            return Placed(Partial(x.ranks, x.local or bias is not None), pieces, replicated)
        if isinstance(x, Shard):
            return place_slices(node, at)
        return Placed(Partial(ranks_of(x), has_local(x) or bias is not None), replicated=of_weight)

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        placement, (weight, bias) = part.at(operand(node)), _weights(node)
        x = part.operand(operand(node))
        follows = isinstance(placement, Shard) and placement.dim == len(shape_of(operand(node))) - 1
        divided = isinstance(placement, Shard) and not follows
        # where the result is a sum of terms, the bias is the term of each rank's own rows
        with_bias = bias is not None and (divided or part.owner == LOCAL)
        if x is None:
            assert bias is not None
            shape = [part.rows, *(int(s) for s in shape_of(node)[1:])]
            return part.call(aten.expand.default, part.given(bias), shape)
        mine = part.share(weight, 1, placement) if follows and isinstance(placement, Shard) else part.given(weight)
        return part.call(aten.linear.default, x, mine, *([part.given(bias)] if with_bias and bias is not None else ()))


def _weights(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    return operand(node, 1), optional_operand(node, 2)

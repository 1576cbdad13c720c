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

from descompiler.graph.nodes import aten, shape_of
from descompiler.layout.placement import LOCAL, Local, Partial, Shard, has_local, ranks_of
from descompiler.region.rule import Declined, Part, Placed, Situation


@dataclass(frozen=True)
class Linear:
    name: str = "linear"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.linear.default})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, (weight, bias) = at.at(node.args[0]), _weights(node)
        if isinstance(x, Local) or not all(w in at.givens.constants for w in (weight, bias) if w is not None):
            return Declined("its weight depends on the batch, or is a table")
        of_weight = at.givens.parameters(weight)
        last = len(shape_of(node.args[0])) - 1  # type: ignore[arg-type]
        if isinstance(x, Shard) and x.dim == last:
            pieces, replicated = at.along(weight, 1, x)
            return Placed(Partial(x.ranks, x.local or bias is not None), pieces, replicated)
        if isinstance(x, Shard):
            of_bias = () if bias is None else at.givens.parameters(bias)
            return Placed(x, replicated=of_weight + of_bias)
        return Placed(Partial(ranks_of(x), has_local(x) or bias is not None), replicated=of_weight)

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        assert isinstance(node.args[0], fx.Node)
        placement, (weight, bias) = part.at(node.args[0]), _weights(node)
        x = part.operand(node.args[0])
        follows = isinstance(placement, Shard) and placement.dim == len(shape_of(node.args[0])) - 1
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
    bias = node.args[2] if len(node.args) > 2 else None
    assert isinstance(node.args[1], fx.Node) and (bias is None or isinstance(bias, fx.Node))
    return node.args[1], bias

"""owner: ``f(x@r, y@r)  -->  f(x, y)@r``

Any operator whose tensors all have one owner is computed there, on the global batch. It pays where the result is
narrower than what it was made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from descompiler.placement import Owned, Partial, Shard
from descompiler.program import aten, is_tensor, rowwise, shape_of
from descompiler.rule import Declined, Part, Placed, Situation


@dataclass(frozen=True)
class MatMul:
    """``bmm`` and ``matmul`` of two values of the region."""

    name: str = "matmul"
    targets: frozenset[Any] = frozenset({aten.bmm.default, aten.matmul.default})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        a, b = node.args
        assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
        x, y = at.at(a), at.at(b)
        if isinstance(x, Owned) and x == y:
            return Placed(x)
        last_a, last_b = len(shape_of(a)) - 1, len(shape_of(b)) - 1
        if not (isinstance(x, Shard) and isinstance(y, Shard) and x.segments == y.segments):
            return Declined("pairs of values with different owners")
        if last_a == last_b >= 2 and x.dim == last_a and y.dim == last_b - 1:
            return Placed(Partial(x.ranks, x.local))
        return Declined("pairs of values with different owners")

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        a, b = node.args
        assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
        return part.call(node.target, part.operand(a), part.operand(b))


ON_OWNER = frozenset(
    {
        aten.softmax.int,
        aten.log_softmax.int,
        aten.maximum.default,
        aten.minimum.default,
        aten.amax.default,
        aten.linalg_vector_norm.default,
        aten.cumsum.default,
        aten.index_select.default,
    }
)


@dataclass(frozen=True)
class OnOwner:
    """Operators without a rule of their own, on values of one owner."""

    name: str = "owner"
    targets: frozenset[Any] = ON_OWNER

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        tensors = [n for n in node.all_input_nodes if is_tensor(n)]
        places = {at.at(n) for n in tensors}
        first = next(iter(places))
        if len(places) == 1 and isinstance(first, Owned) and rowwise(at.program, node):
            return Placed(first)
        return Declined(f"no rule for values that are {', '.join(sorted(map(str, places)))}")

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), part.operand)
        return part.call(node.target, *args, **kwargs)

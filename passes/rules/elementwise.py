"""elementwise: ``f(gather(x_r), gather(y_r))  -->  gather(f(x_r, y_r))``

Any f on values that are divided alike (`Shard`); f with f(0) = 0 on `Disjoint`; linear f on `Partial`. It pays since FM
squares, activations, masks and products then need no exchange of their inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.nodes import aten, is_pointwise, shape_of, signature
from descompiler.layout.placement import Disjoint, Local, Owned, Partial, Placement, Shard, has_local, ranks_of
from descompiler.region.rule import NO_RULE, Declined, Part, Placed, Situation
from descompiler.region.sliced import emit_slices, place_slices

LINEAR = frozenset({aten.neg.default, aten.mul.Scalar, aten.div.Scalar})


ZERO_TO_ZERO = frozenset(
    {
        aten.relu.default,
        aten.tanh.default,
        aten.abs.default,
        aten.sin.default,
        aten.square.default,
        aten.leaky_relu.default,
        aten.gelu.default,
        aten.silu.default,
        aten.elu.default,
        aten.expm1.default,
        aten.sign.default,
        aten.relu6.default,
        aten.hardswish.default,
        aten.mish.default,
        aten.selu.default,
        aten.celu.default,
        aten.erf.default,
        aten.asinh.default,
        aten.atan.default,
    }
)


BINARY = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})


@dataclass(frozen=True)
class Pointwise:
    """Any elementwise operator on values that are divided alike, and on given ones."""

    name: str = "pointwise"
    targets: None = None

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x = next(at.at(n) for n in node.all_input_nodes if n in at.placements)
        if not is_pointwise(node) or isinstance(x, Owned):
            return Declined(NO_RULE)
        if not isinstance(x, Shard):
            return Declined("f of a sum is not the sum of f")
        return place_slices(node, at, "what ranks divide is broadcast")

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        return emit_slices(node, part)


@dataclass(frozen=True)
class Unary:
    """``f(x)``, and ``x op number``, of terms."""

    name: str = "elementwise"
    targets: ClassVar[frozenset[Any]] = LINEAR | ZERO_TO_ZERO | {aten.pow.Tensor_Scalar}

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x = at.at(node.args[0])
        # a root of the zeros that other ranks' rows are here has an infinite slope, and a scale in front of it none
        power = node.target is aten.pow.Tensor_Scalar and signature(node)["exponent"] >= 1
        linear = node.target in LINEAR and isinstance(x, Partial | Disjoint)
        if linear or (isinstance(x, Disjoint) and (power or node.target in ZERO_TO_ZERO)):
            assert not isinstance(x, Local)
            return Placed(x)
        return Declined("f of a sum is not the sum of f")

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        return part.copy(node)


@dataclass(frozen=True)
class Binary:
    """``x + y``, ``x - y``, ``x * y``, ``x / y``, of terms."""

    name: str = "elementwise pair"
    targets: ClassVar[frozenset[Any]] = BINARY

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        a, b = node.args
        additive = node.target in (aten.add.Tensor, aten.sub.Tensor)
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            x = at.at(a if isinstance(a, fx.Node) else b)
            if isinstance(x, Partial | Disjoint) and not additive and (isinstance(a, fx.Node) or _is_product(node)):
                return Placed(x)
            return Declined("a number added to each rank's term would be added several times")
        x, y = at.at(a), at.at(b)
        if (scaled := _with_given(node, at)) is not None:
            return scaled
        if isinstance(x, Disjoint) and x == y and shape_of(a) == shape_of(b):
            if additive or _is_product(node):
                return Placed(x)
            return Declined("0 / 0 on the rows that a rank does not own")
        if not additive:
            return Declined(_why_no_product(x, y))
        result = shape_of(node)
        ranks: set[int] = set()
        local = False
        for operand, placement in ((a, x), (b, y)):
            if isinstance(placement, Local):
                local = True
                continue
            if isinstance(placement, Shard):
                return Declined("a sum of a divided value and one that is not divided alike")
            if shape_of(operand) != result:
                return Declined("a term that is broadcast")
            ranks.update(ranks_of(placement))
            local = local or has_local(placement)
        return Placed(Partial(tuple(sorted(ranks)), local))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return part.copy(node)
        if node.target not in (aten.add.Tensor, aten.sub.Tensor):
            return part.copy(node)
        x, y = part.operand(a), part.operand(b)
        if x is not None and y is not None:
            return part.call(node.target, x, y, **node.kwargs)
        if x is None:
            assert y is not None
            scale = signature(node)["alpha"] * (1 if node.target is aten.add.Tensor else -1)
            x = y if scale == 1 else part.call(aten.mul.Tensor, y, scale)
            operand = b
        else:
            operand = a
        if shape_of(operand) != shape_of(node):
            x = part.call(aten.expand.default, x, [part.rows, *shape_of(node)[1:]])
        return x


def _is_product(node: fx.Node) -> bool:
    return node.target is aten.mul.Tensor


def _why_no_product(x: Placement, y: Placement) -> str:
    if isinstance(x, Local) or isinstance(y, Local):
        return "a product with what each rank has for its own rows only"
    if isinstance(x, Partial | Disjoint) or isinstance(y, Partial | Disjoint):
        return "a product of sums is not the sum of products"
    return "a product of values that different ranks have"


def _with_given(node: fx.Node, at: Situation) -> Placed | Declined | None:
    """The answer for terms that a given value multiplies; None for other pairs."""
    a, b = node.args
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    x_node, other = (a, b) if a in at.placements else (b, a)
    x = at.at(x_node)
    if not isinstance(x, Partial | Disjoint) or not at.given(other, x):
        return None
    if _is_product(node) or (node.target is aten.div.Tensor and other is b):
        whole = isinstance(x, Disjoint) and shape_of(x_node) == shape_of(node)
        names = at.givens.parameters(other)
        return Placed(x if whole else Partial(ranks_of(x), has_local(x)), replicated=names)
    return None if node.target in (aten.add.Tensor, aten.sub.Tensor) else Declined("a sum divides nothing")

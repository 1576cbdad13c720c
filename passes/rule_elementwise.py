"""elementwise: ``f(gather(x_r))  -->  gather(f(x_r))``

Any f on a value that is divided (`Owned`, `Shard`); f with f(0) = 0 on `Disjoint`; linear f on `Partial`. It pays since
FM squares, activations and products then need no exchange of their inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from descompiler.passes.rule_linear import ranges_of, with_owner
from descompiler.pieces import Pieces
from descompiler.placement import Disjoint, Local, Owned, Partial, Placement, Region, Shard, has_local, ranks_of
from descompiler.program import Program, aten, shape_of
from descompiler.rule import Declined, Part, Placed, Situation

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
ANY = frozenset(
    {
        aten.sigmoid.default,
        aten.exp.default,
        aten.cos.default,
        aten.softplus.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.hardtanh.default,
        aten.hardsigmoid.default,
        aten.rsub.Scalar,
        aten.log2.default,
        aten.exp2.default,
        aten.log1p.default,
        aten.log.default,
        aten.sqrt.default,
        aten.rsqrt.default,
        aten.reciprocal.default,
        aten.pow.Tensor_Scalar,
    }
)
BINARY = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})


@dataclass(frozen=True)
class Unary:
    """``f(x)``, and ``x op number``."""

    name: str = "elementwise"
    targets: frozenset[Any] = LINEAR | ZERO_TO_ZERO | ANY

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x = at.at(node.args[0])
        assert not isinstance(x, Local)
        if isinstance(x, Owned | Shard) or node.target in LINEAR:
            return Placed(x)
        power = node.target is aten.pow.Tensor_Scalar and float(node.args[1]) > 0  # type: ignore[arg-type]
        zero = node.target in ZERO_TO_ZERO or power
        if isinstance(x, Disjoint) and zero:
            return Placed(x)
        return Declined("f of a sum is not the sum of f" if zero else "f(0) is not 0")

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        assert isinstance(node.args[0], fx.Node)
        return part.call(node.target, part.operand(node.args[0]), *node.args[1:], **node.kwargs)


@dataclass(frozen=True)
class Binary:
    """``x + y``, ``x - y``, ``x * y``, ``x / y``."""

    name: str = "elementwise pair"
    targets: frozenset[Any] = BINARY

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        a, b = node.args
        additive = node.target in (aten.add.Tensor, aten.sub.Tensor)
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            x = at.at(a if isinstance(a, fx.Node) else b)
            linear = node.target is aten.mul.Tensor or (node.target is aten.div.Tensor and isinstance(a, fx.Node))
            zero = linear and isinstance(x, Partial | Disjoint)
            if not isinstance(x, Local) and (isinstance(x, Owned | Shard) or zero):
                return Placed(x)
            return Declined("a number added to each rank's term would be added several times")
        x, y = at.at(a), at.at(b)
        if (weighted := _with_weight(node, at)) is not None:
            return weighted
        if not isinstance(x, Local) and not isinstance(y, Local):
            if same := _same_division(node, x, y):
                return Placed(same)
            if isinstance(x, Disjoint) and x == y and shape_of(a) == shape_of(b):
                if additive or node.target is aten.mul.Tensor:
                    return Placed(x)
                return Declined("0 / 0 on the rows that a rank does not own")
        if not additive:
            return Declined("a product of values that are divided differently")
        result = shape_of(node)
        ranks: set[int] = set()
        local = False
        for operand, placement in ((a, x), (b, y)):
            if isinstance(placement, Local):
                local = True
                continue
            if isinstance(placement, Shard):
                return Declined("a sum of values that are divided differently")
            if shape_of(operand) != result:
                return Declined("a term that is broadcast")
            ranks.update(ranks_of(placement))
            local = local or has_local(placement)
        return Placed(Partial(tuple(sorted(ranks)), local))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            x, y = (part.operand(v) if isinstance(v, fx.Node) else v for v in (a, b))
            return part.call(node.target, x, y, **node.kwargs)
        x, y = part.operand(a), part.operand(b)
        if (weight := _weight_of(node, part.program)) is not None and not _is_term(node, part.at(node)):
            x, y = (part.weight(n) if n is weight else part.operand(n) for n in (a, b))
        if x is not None and y is not None:
            return part.call(node.target, x, y, **node.kwargs)
        if x is None:
            assert y is not None
            scale = node.kwargs.get("alpha", 1) if node.target is aten.add.Tensor else -node.kwargs.get("alpha", 1)  # type: ignore[operator]
            x = y if scale == 1 else part.call(aten.mul.Tensor, y, scale)
            operand = b
        else:
            operand = a
        if shape_of(operand) != shape_of(node):
            x = part.call(aten.expand.default, x, [part.rows, *shape_of(node)[1:]])
        return x


def _weight_of(node: fx.Node, program: Program) -> fx.Node | None:
    """The operand that is a parameter or a constant, if one is."""
    return next((n for n in node.args if isinstance(n, fx.Node) and _is_weight(program, n)), None)


def _is_weight(program: Program, node: fx.Node) -> bool:
    source = program.source(node)
    return source is not None and source.kind in ("parameter", "constant")


def _is_term(node: fx.Node, placement: Placement) -> bool:
    """Whether a weight is added to a sum of ranks' terms: it is the term of each rank's own rows."""
    return node.target in (aten.add.Tensor, aten.sub.Tensor) and isinstance(placement, Partial)


def _with_weight(node: fx.Node, at: Situation) -> Placed | Declined | None:
    """The answer for a value and a parameter (or a constant); None for other pairs, and for a sum with terms."""
    weight = _weight_of(node, at.program)
    if weight is None:
        return None
    a, b = node.args
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    x_node = b if weight is a else a
    x, name = at.at(x_node), at.program.parameter(weight)
    names = () if name is None else (name,)
    if isinstance(x, Local):
        return None
    if isinstance(x, Owned):
        return with_owner(at, x, [weight] if name is not None else [])
    if isinstance(x, Partial | Disjoint):
        if node.target is aten.mul.Tensor or (node.target is aten.div.Tensor and weight is b):
            whole = isinstance(x, Disjoint) and shape_of(x_node) == shape_of(node)
            return Placed(x if whole else Partial(ranks_of(x), has_local(x)), replicated=names)
        return None if node.target in (aten.add.Tensor, aten.sub.Tensor) else Declined("a sum divides nothing")
    if len(shape_of(x_node)) != len(shape_of(node)) or shape_of(x_node)[x.dim] != shape_of(node)[x.dim]:
        return Declined("what ranks divide is broadcast")
    dim = x.dim - (len(shape_of(node)) - len(shape_of(weight)))
    if dim < 0 or shape_of(weight)[dim] == 1:
        return Placed(x, replicated=names)
    if name is None or at.colocatable(weight) is None:
        return Declined("the weight is used elsewhere too, so it can't be cut to follow the value")
    shape = tuple(at.program.parameters[name].shape)
    return Placed(x, {name: Pieces(shape, dim, ranges_of(x.segments), at.ranks)})


def _same_division(node: fx.Node, x: Region, y: Region) -> Region | None:
    """The placement of both operands if corresponding elements are on the same rank."""
    if isinstance(x, Owned) and x == y:
        return x
    if isinstance(x, Shard) and x == y:
        shapes = [shape_of(n) for n in node.args]  # type: ignore[arg-type]
        if len(shapes[0]) == len(shapes[1]) and shapes[0][x.dim] == shapes[1][x.dim]:
            return x
    return None

"""The family that rules are asked about: operators with shapes that tell dimensions apart, and equal ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from descompiler.graph.nodes import aten
from descompiler.layout.division import Division
from descompiler.layout.placement import LOCAL, Disjoint, Owned, Partial, Region, Shard
from tests.harness.calls import BUFFER, KNOWN, KNOWN_TO_ONE, OWN, PARAMETER, SHARED, Call, Operand, value

X, Y, Z = value("x", 2, 3), value("y", 2, 3), value("z", 2, 3)
ROW, OTHER_ROW, SQUARE, OTHER_SQUARE = value("x", 4), value("y", 4), value("x", 2, 2), value("y", 2, 2)
CUBE, LONG = value("x", 2, 2, 3), value("x", 4, 3)


def weight(*shape: int, name: str = "w") -> Operand:
    """A parameter that the call alone uses."""
    return Operand(name, PARAMETER, shape)


def at(name: str, *positions: int) -> Operand:
    """Positions that every rank has."""
    return Operand(name, BUFFER, (len(positions),), positions)


MASK, SHORT_MASK = Operand("m", KNOWN, (2, 1), "mask"), Operand("m", KNOWN_TO_ONE, (2, 1), "mask")
NUMBERS = (
    Operand("n", KNOWN, (2, 1)),
    Operand("n", KNOWN_TO_ONE, (2, 3)),
    Operand("n", OWN, (2, 3)),
    Operand("n", OWN, (1, 3)),
)
"""Other operands of a pair that depend on the batch."""

WEIGHTS = (
    weight(2, 3),
    weight(3),
    weight(2, 1),
    weight(),
    weight(4, 1, 2, 3),
    Operand("w", SHARED, (2, 3)),
    Operand("w", SHARED, (3,)),
    Operand("w", BUFFER, (2, 1)),
)
"""Other operands of a pair that don't."""

UNARY = (
    *(aten.neg, aten.abs, aten.relu, aten.tanh, aten.sin, aten.square, aten.sign, aten.relu6, aten.erf, aten.expm1),
    *(aten.gelu, aten.silu, aten.elu, aten.selu, aten.celu, aten.mish, aten.hardswish, aten.leaky_relu),
    *(aten.asinh, aten.atan, aten.sigmoid, aten.exp, aten.cos, aten.softplus, aten.log_sigmoid, aten.reciprocal),
    *(aten.hardsigmoid, aten.hardtanh, aten.trunc, aten.sgn, aten.sinh, aten.nan_to_num, aten.zeros_like),
)

BATCH_NORM_TAIL = (0.1, 1e-5, False)


def _elementwise() -> Iterator[Call]:
    positive = value("x", 2, 3, numbers="positive")
    for packet in UNARY:
        yield Call(packet.default, (X,))
    for packet in (aten.log, aten.log1p, aten.sqrt, aten.rsqrt):
        yield Call(packet.default, (positive,))
    yield Call(aten.gelu.default, (X,), (("approximate", "tanh"),))
    for power in (2, 3.0, 1, 0.5, 0, -1):
        yield Call(aten.pow.Tensor_Scalar, (positive, power))
    for number in (2.0, 0.25):
        yield Call(aten.mul.Scalar, (X, number))
        yield Call(aten.div.Scalar, (X, number))
        yield Call(aten.rsub.Scalar, (X, number))
        yield Call(aten.clamp.default, (X, -number, number))
        yield Call(aten.clamp_min.default, (X, number))
        for packet in (aten.add, aten.sub, aten.mul, aten.div):
            yield Call(packet.Tensor, (X, number))
            yield Call(packet.Tensor, (number, X))
    yield Call(aten.add.Tensor, (X, 1.0), (("alpha", 2),))
    for mask in (MASK, SHORT_MASK):
        yield Call(aten.masked_fill.Scalar, (X, mask, -9.0))
        yield Call(aten.masked_fill.Scalar, (X, mask, 0.0))
        yield Call(aten.where.self, (mask, X, Y))
        yield Call(aten.mul.Tensor, (X, mask))


def _pairs() -> Iterator[Call]:
    others = (Y, X, value("y", 2, 1), value("y", 1, 3), *NUMBERS, *WEIGHTS)
    for packet in (aten.add, aten.sub, aten.mul, aten.div):
        for other in others:
            yield Call(packet.Tensor, (X, other))
            if other.kind != X.kind:
                yield Call(packet.Tensor, (other, X))
        yield Call(packet.Tensor, (OTHER_ROW, ROW))
        for other in (weight(2, 3), Operand("n", KNOWN, (2, 1)), value("y", 2, 3)):
            yield Call(packet.Tensor, (value("x", 1, 3), other))
    for packet in (aten.add, aten.sub):
        yield Call(packet.Tensor, (X, Y), (("alpha", 3),))
        yield Call(packet.Tensor, (X, NUMBERS[2]), (("alpha", 3),))
        yield Call(packet.Tensor, (NUMBERS[3], X), (("alpha", 3),))
    for packet in (aten.maximum, aten.minimum, aten.atan2):
        yield Call(packet.default, (X, Y))
    yield Call(aten.addcmul.default, (X, Y, Z))
    yield Call(aten.lerp.Scalar, (X, Y, 0.25))


def _reductions() -> Iterator[Call]:
    for dims, keep in product(([1], [2], [1, 2], [-1], [0], [0, 1]), (False, True)):
        yield Call(aten.sum.dim_IntList, (X, dims, keep))
        yield Call(aten.mean.dim, (X, dims, keep))
    for dims in ([1], [2], [1, 3]):
        yield Call(aten.sum.dim_IntList, (CUBE, dims))
        yield Call(aten.mean.dim, (CUBE, dims))
    for dims, keep in product(([1], [2], [1, 2]), (False, True)):
        yield Call(aten.amax.default, (X, dims, keep))
        yield Call(aten.amin.default, (X, dims, keep))
        yield Call(aten.logsumexp.default, (X, dims, keep))
        for order in (2, 1, 3.0, 0.5, float("inf")):
            yield Call(aten.linalg_vector_norm.default, (X, order, dims, keep))
    yield Call(aten.amax.default, (CUBE, [1]))
    for dim, x in product((1, 2), (X, SQUARE)):
        for packet in (aten.softmax, aten.log_softmax):
            yield Call(packet.int, (x, dim))
        for packet in (aten._softmax, aten._log_softmax):
            yield Call(packet.default, (x, dim, False))
        for packet in (aten.cumsum, aten.cumprod, aten.logcumsumexp):
            yield Call(packet.default, (x, dim))
        yield Call(aten.prod.dim_int, (x, dim))
        yield Call(aten.var.correction, (x, [dim]), (("correction", 0),))
        yield Call(aten.norm.ScalarOpt_dim, (x, 2, [dim]))


def _views() -> Iterator[Call]:
    for x, shapes in (
        (X, ((6,), (3, 2), (2, 3, 1), (1, 6), (2, 1, 3))),
        (ROW, ((2, 2), (4, 1), (1, 4))),
        (SQUARE, ((4,), (1, 2, 2))),
        (CUBE, ((4, 3), (2, 6), (12,), (2, 2, 3, 1), (6, 2))),
        (value("x", 6), ((2, 3), (3, 2))),
    ):
        for shape in shapes:
            yield Call(aten.reshape.default, (x, [-1, *shape]))
    yield Call(aten.view.default, (X, [-1, 6]))
    yield Call(aten._unsafe_view.default, (X, [-1, 3, 2]))
    yield Call(aten.flatten.using_ints, (CUBE, 1))
    yield Call(aten.flatten.using_ints, (CUBE, 1, 2))
    for dim in (1, 2, -1):
        yield Call(aten.unsqueeze.default, (X, dim))
    narrow = value("x", 1, 4)
    yield Call(aten.squeeze.dim, (narrow, 1))
    yield Call(aten.squeeze.dims, (value("x", 1, 4, 1), [1, 3]))
    yield Call(aten.squeeze.default, (narrow,))
    yield Call(aten.unflatten.int, (LONG, 1, [2, 2]))
    for x in (X, SQUARE):
        yield Call(aten.transpose.int, (x, 1, 2))
    yield Call(aten.transpose.int, (X, 0, 1))
    for order in ([0, 3, 1, 2], [0, 2, 1, 3], [0, -1, 2, 1]):
        yield Call(aten.permute.default, (CUBE, order))
    for x, dim, index in ((X, 1, 0), (X, 2, -1), (X, 0, 0), (ROW, 1, 2), (CUBE, 1, 1), (CUBE, 3, 1)):
        yield Call(aten.select.int, (x, dim, index))
    for x, dim, *interval in (
        *((X, 1, 1, 2), (X, 2, 0, 2), (X, 2, 1, 9223372036854775807), (X, 2, 0, 3, 2), (X, 0, 0, 1), (X, 2, -2, -1)),
        *((ROW, 1, 1, 3), (ROW, 1, 0, 2), (ROW, 1, 2, 4), (ROW, 1, 0, 4, 2), (CUBE, 1, 0, 1), (CUBE, 2, 1, 2)),
    ):
        yield Call(aten.slice.Tensor, (x, dim, *interval))
    for dims in ([1], [2], [1, 2]):
        yield Call(aten.flip.default, (X, dims))
    yield Call(aten.roll.default, (X, [1], [2]))


def _selections() -> Iterator[Call]:
    for x, dim, chosen in ((X, 1, (1, 0)), (X, 2, (2, 0, 0)), (ROW, 1, (3, 1, 1, 0)), (ROW, 1, (2,)), (CUBE, 1, (1,))):
        yield Call(aten.index_select.default, (x, dim, Operand("chosen", BUFFER, (len(chosen),), chosen)))
    first, second, wide = at("i", 1, 0, -1), at("j", 0, 2, 2), Operand("i", BUFFER, (1, 3), (1, 0, 1))
    for indices in ([None, first, second], [None, first], [None, None, second], [None, wide, second], [None, wide]):
        yield Call(aten.index.Tensor, (X, indices))
    yield Call(aten.index.Tensor, (X, [None, Operand("i", KNOWN, (), "index")]))
    yield Call(aten.index.Tensor, (X, [Operand("i", KNOWN, (), "index"), at("j", 1)]))
    for indices in ([None, first, at("j", 0, 1, 1)], [None, first, None, second], [None, None, first, second]):
        yield Call(aten.index.Tensor, (CUBE, indices))
    yield Call(aten.gather.default, (X, 1, Operand("i", KNOWN, (1, 3), "index")))
    grown, tiled = value("x", 1, 3), value("x", 3, 1)
    for x, sizes in ((grown, (4, -1)), (tiled, (-1, 2)), (X, (-1, -1)), (value("x", 2, 1, 3), (-1, 2, -1))):
        yield Call(aten.expand.default, (x, [-1, *sizes]))
    yield Call(aten.expand.default, (value("x", 1), [-1, 4]))
    for x, times in ((X, (2, 1)), (X, (1, 2)), (X, (1, 1)), (ROW, (2,)), (grown, (3, 2))):
        yield Call(aten.repeat.default, (x, [1, *times]))
    yield Call(aten.repeat.default, (X, [2, 1, 1]))


def _joined() -> Iterator[Call]:
    own = Operand("n", OWN, (2, 3))
    for dim in (1, 2):
        for others in ([X, Y], [Y, X, X], [own, X], [X, own, Y]):
            yield Call(aten.cat.default, (others, dim))
            yield Call(aten.stack.default, (others, dim))
    yield Call(aten.cat.default, ([X, Y], -1))
    yield Call(aten.stack.default, ([X, Y], -1))
    yield Call(aten.cat.default, ([ROW, OTHER_ROW], 1))
    yield Call(aten.cat.default, ([ROW, value("y", 2), Operand("n", OWN, (3,))], 1))
    yield Call(aten.stack.default, ([ROW, OTHER_ROW], 1))
    yield Call(aten.stack.default, ([ROW, OTHER_ROW], 0))
    yield Call(aten.cat.default, ([X, Y], 0))


def _products() -> Iterator[Call]:
    for x, size in ((X, 3), (ROW, 4)):
        for kind in (PARAMETER, SHARED, BUFFER):
            w, bias = Operand("w", kind, (5, size)), Operand("c", kind, (5,))
            yield Call(aten.linear.default, (x, w))
            yield Call(aten.linear.default, (x, w, bias))
    yield Call(aten.linear.default, (X, Operand("w", KNOWN, (3,))))
    for equation, operands in (
        ("bfd,bgd->bfg", [X, Y]),
        ("bfd,bgd->bfg", [X, X]),
        ("bfd,bfd->bf", [X, Y]),
        ("bfd,bfd->bd", [X, X]),
        ("bfd,dk->bfk", [X, weight(3, 4)]),
        ("bfd,kd->bkf", [X, weight(4, 3)]),
        ("bfd,fdk->bk", [X, weight(2, 3, 4)]),
        ("bfd,fd->bfd", [X, Operand("w", SHARED, (2, 3))]),
        ("bfd,fd,dk->bfk", [X, weight(2, 3), weight(3, 2, name="u")]),
        ("bfd,bf->bd", [X, Operand("n", KNOWN, (2,))]),
        ("bfd,bf->bd", [X, Operand("n", OWN, (2,))]),
        ("bfd,bfd->fd", [X, Y]),
        ("bff->bf", [SQUARE]),
    ):
        yield Call(aten.einsum.default, (equation, operands))
    tall = value("y", 3, 2)
    for packet in (aten.bmm, aten.matmul):
        yield Call(packet.default, (X, tall))
        yield Call(packet.default, (SQUARE, OTHER_SQUARE))
        yield Call(packet.default, (SQUARE, SQUARE))
    yield Call(aten.bmm.default, (Operand("n", KNOWN, (1, 2)), X))
    yield Call(aten.matmul.default, (CUBE, value("y", 1, 3, 2)))
    for w in (weight(3, 4), weight(3), Operand("w", SHARED, (3, 4)), Operand("w", BUFFER, (3, 4)), weight(2, 3, 2)):
        if len(w.shape) < 3:
            yield Call(aten.matmul.default, (X, w))
        else:
            yield Call(aten.matmul.default, (CUBE, w))
    yield Call(aten.matmul.default, (weight(4, 2), X))
    yield Call(aten.matmul.default, (ROW, weight(4, 3)))
    yield Call(aten.tensordot.default, (X, weight(3, 4), [2], [0]))
    yield Call(aten.tensordot.default, (X, weight(4, 2, 3), [1, 2], [1, 2]))
    yield Call(aten.scaled_dot_product_attention.default, (X, Y, Y))


def _with_weights() -> Iterator[Call]:
    for w, bias in ((weight(3), weight(3, name="c")), (Operand("w", SHARED, (3,)), Operand("c", BUFFER, (3,)))):
        yield Call(aten.layer_norm.default, (X, [3], w, bias))
    yield Call(aten.layer_norm.default, (X, [3]))
    yield Call(aten.layer_norm.default, (X, [2, 3], weight(2, 3)))
    for x, size in ((X, 1), (X, 2), (ROW, 1), (ROW, 4)):
        yield Call(aten.prelu.default, (x, weight(size)))
    yield Call(aten.conv1d.default, (X, weight(4, 2, 1), weight(4, name="c")))
    yield Call(aten.conv1d.default, (X, weight(4, 2, 2)))
    yield Call(aten.conv1d.default, (X, weight(4, 2, 1), None, [1], [1]))
    for x, channels in ((X, 2), (ROW, 4)):
        for kind, training in product((PARAMETER, SHARED), (True, False)):
            w, c = Operand("w", kind, (channels,)), Operand("c", kind, (channels,))
            running = [Operand(n, BUFFER, (channels,), "running") for n in ("mean", "variance")]
            yield Call(aten.batch_norm.default, (x, w, c, *running, training, *BATCH_NORM_TAIL))
            yield Call(aten.batch_norm.default, (x, None, None, *running, training, *BATCH_NORM_TAIL))
        yield Call(aten.batch_norm.default, (x, weight(channels), None, None, None, True, *BATCH_NORM_TAIL))


FAMILIES = {
    "elementwise": _elementwise,
    "pairs": _pairs,
    "reductions": _reductions,
    "views": _views,
    "selections": _selections,
    "joined": _joined,
    "products": _products,
    "weights": _with_weights,
}


def family(*names: str) -> list[Call]:
    """Every call of some of the families, by default of all, once."""
    return list({repr(call): call for name in names or FAMILIES for call in FAMILIES[name]()}.values())


def placements(x: Operand) -> list[Region]:
    """Where a value may be: every kind of placement, every dimension; ``y`` also where ``x`` is not."""
    places: list[Region] = [Owned(1), Partial((0, 2)), Partial((0, 2), local=True)]
    for dim, size in enumerate(x.shape, 1):
        places += [Shard(dim, Division.of(ranges)) for ranges in _divisions(size)]
    places += [Disjoint((0, 2), "k", lead) for lead in range(1, len(x.shape) + 2)]
    return places if x.name == "x" else [*places, Owned(2), Partial((1, 2)), Disjoint((0, 2), "j", 1)]


def _divisions(size: int) -> Iterator[list[tuple[int, int]]]:
    if size >= 2:
        yield [(1, 0), (size - 1, 2)]
        yield [(1, LOCAL), (size - 1, 0)]
    if size >= 3:
        yield [(1, 1), (1, 0), (size - 2, 1)]
        yield [(1, 2), (size - 2, LOCAL), (1, 0)]


def placed_values(call: Call) -> Iterator[dict[Operand, Region]]:
    """Every placement of a call's values; of three, the later two are alike."""
    values = call.values
    for some in product(*(placements(x) for x in values[:2])):
        yield dict(zip(values, [*some, *some[1:]], strict=False))

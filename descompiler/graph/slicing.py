"""Where a divided dimension goes: operators that work on each slice along it by itself.

A piece of an operand then gives a piece of the result. `follow` says, for an operator and the divided dimension of its
operands, where that dimension is in the result, which other operands have to be narrowed to the same slice, and which
argument is a size that changes; `along` says which dimensions an operator mixes. It is one table for three questions:
what is computed of tables that ranks divide (``cat`` of two by rows, ``A @ E``, ``normalize(W, dim=1)``), how a divided
value goes through the substituted region (`descompiler.region.sliced`), and which operators mix the rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx

from descompiler.graph.arguments import operand
from descompiler.graph.contractions import CONTRACTIONS, contraction
from descompiler.graph.nodes import aten, is_pointwise, is_tensor, shape_of, signature, value

Divided = Mapping[fx.Node, int]
"""The divided dimension of values that are known to be divided, all into the same slices."""


REDUCES = frozenset(
    {
        aten.sum.dim_IntList,
        aten.mean.dim,
        aten.amax.default,
        aten.amin.default,
        aten.linalg_vector_norm.default,
        aten.logsumexp.default,
        aten.norm.ScalarOpt_dim,
        aten.prod.dim_int,
        aten.var.correction,
    }
)
"""Operators that make one element of all along some dimensions."""


KEEPS = frozenset(
    {
        aten.softmax.int,
        aten.log_softmax.int,
        aten._softmax.default,
        aten._log_softmax.default,
        aten.cumsum.default,
        aten.cumprod.default,
        aten.logcumsumexp.default,
        aten.flip.default,
        aten.roll.default,
        aten.layer_norm.default,
        aten.conv1d.default,
    }
)
"""Operators that mix elements along some dimensions, and keep the others."""


PICKS = frozenset({aten.slice.Tensor, aten.narrow.default, aten.select.int, aten.index_select.default})
"""Operators that take some elements along a dimension."""


SCATTERS = frozenset({aten.index_add.default, aten.scatter_add.default, aten.scatter_reduce.two})
"""Operators that put elements of another value along a dimension."""


MIXES = (
    REDUCES
    | KEEPS
    | SCATTERS
    | {
        aten.sum.default,
        aten.mean.default,
        aten.cummax.default,
        aten.cummin.default,
        aten.sort.default,
        aten.sort.stable,
        aten.argsort.default,
        aten.argsort.stable,
        aten.topk.default,
        aten.index_select.default,
        aten.gather.default,
        aten.scatter.src,
        aten.scatter.value,
        aten.index_copy.default,
        aten.renorm.default,
    }
)
"""Operators of which `along` knows what they mix."""


RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


def along(node: fx.Node) -> frozenset[int]:
    """The dimensions of its first operand whose elements an operator of `MIXES` mixes."""
    rank, args = len(shape_of(node.all_input_nodes[0])), signature(node)
    every = frozenset(range(rank))
    if node.target is aten.layer_norm.default:
        return every - set(range(rank - len(args["normalized_shape"])))
    if node.target is aten.conv1d.default:
        kernel = shape_of(args["weight"])[-1]
        point = kernel == 1 and all(s == 1 for s in args["stride"]) and all(p == 0 for p in args["padding"])
        return frozenset({rank - 2} if point else {rank - 2, rank - 1})
    dims = args.get("dim", args.get("dims"))
    if dims is None or dims == []:
        return every
    found = frozenset(d % rank for d in ([dims] if isinstance(dims, int) else dims))
    return every - found if node.target is aten.renorm.default else found


@dataclass(frozen=True)
class SliceStep:
    """How an operator works on a slice.

    Attributes
    ----------
    dim : int
        The divided dimension of the result.
    narrowed : mapping of node to int
        Other operands of which the slice is needed, and along which dimension.
    shape : (int, int) or None
        The number of an argument that is a list of sizes, and the entry of it that is the slice's.
    """

    dim: int
    narrowed: Mapping[fx.Node, int] = field(default_factory=dict, hash=False)
    shape: tuple[int, int] | None = None

    def resized(self, args: Sequence[Any], size: int) -> tuple[Any, ...]:
        """The arguments for a slice of a size."""
        if self.shape is None:
            return tuple(args)
        argument, entry = self.shape
        sizes = [*args[argument][:entry], size, *args[argument][entry + 1 :]]
        return (*args[:argument], sizes, *args[argument + 1 :])


def follow(node: fx.Node, dims: Divided) -> SliceStep | None:
    """How a slice of a node is computed from slices; None if it is not."""
    if node.op != "call_function" or not is_tensor(node):
        return None
    for targets, answer in FAMILIES:
        if node.target in targets:
            return answer(node, dims)
    return _pointwise(node, dims) if is_pointwise(node) else None


def emit_slice(
    graph: fx.Graph,
    node: fx.Node,
    step: SliceStep,
    dims: Divided,
    piece: Callable[[fx.Node], fx.Node],
    whole: Callable[[fx.Node], fx.Node],
    first: int,
    size: int,
) -> fx.Node:
    """A node on the slice ``[first, first + size)``; ``piece`` makes divided operands, ``whole`` the others."""

    def argument(a: fx.Node) -> fx.Node:
        if a in dims:
            return piece(a)
        if a in step.narrowed:
            return graph.call_function(aten.narrow.default, (whole(a), step.narrowed[a], first, size))
        return whole(a)

    new = graph.node_copy(node, argument)
    new.args = step.resized(new.args, size)
    return new


def reshaped(before: Sequence[Any], after: Sequence[Any], dim: int) -> tuple[int, int, int, int] | None:
    """Where a dimension is after a reshape: (dimension, how often it is repeated there, its elements times, over).

    >>> reshaped((3, 4), (12,), 0)  # each of its elements is four
    (0, 1, 4, 1)
    >>> reshaped((2, 3), (6,), 1)  # it is there twice
    (0, 2, 1, 1)
    >>> reshaped((6, 4), (2, 3, 4), 0)  # three of its elements are one
    (0, 1, 1, 3)
    """
    outer, size, inner = prod(before[:dim]), before[dim], prod(before[dim + 1 :])
    for e, extent in enumerate(after):
        lead = prod(after[:e])
        if outer % lead or (extent == 1 and size != 1):
            continue
        repeat = outer // lead
        if extent % (repeat * size) == 0 and inner % (extent // (repeat * size)) == 0:
            return e, repeat, extent // (repeat * size), 1
        if repeat == 1 and size % extent == 0:
            return e, 1, 1, size // extent
    return None


def _alike(node: fx.Node, dims: Divided, operands: Sequence[fx.Node]) -> SliceStep | None:
    """Operands of one rank, none of which is repeated: the first divided one says which dimension and size."""
    found = [(dims[a], shape_of(a)[dims[a]]) for a in operands if a in dims]
    if not found or any(a in dims and a not in operands for a in node.all_input_nodes):
        return None
    (dim, size), rank = found[0], len(shape_of(operands[0]))
    if any(len(shape_of(a)) != rank or shape_of(a)[dim] != size or dims.get(a, dim) != dim for a in operands):
        return None
    return SliceStep(dim, {a: dim for a in operands if a not in dims})


def _alone(node: fx.Node, dims: Divided) -> int | None:
    """The divided dimension of the first operand, where no other is divided."""
    x = node.args[0]
    alone = isinstance(x, fx.Node) and x in dims and sum(a in dims for a in node.all_input_nodes) == 1
    return dims[operand(node)] if alone else None


def _pointwise(node: fx.Node, dims: Divided) -> SliceStep | None:
    """Operands are broadcast: dimensions are aligned at their ends, and one of size 1 is used whole."""
    operands, rank = [a for a in node.all_input_nodes if is_tensor(a)], len(shape_of(node))
    found = {(dims[a] + rank - len(shape_of(a)), shape_of(a)[dims[a]]) for a in operands if a in dims}
    if len(found) != 1 or len(operands) != len(node.all_input_nodes):
        return None
    ((dim, size),) = found
    narrowed: dict[fx.Node, int] = {}
    for a in operands:
        here = dim - (rank - len(shape_of(a)))
        if a not in dims and here >= 0 and shape_of(a)[here] != 1:
            if shape_of(a)[here] != size:
                return None
            narrowed[a] = here
    return SliceStep(dim, narrowed)


def _prelu(node: fx.Node, dims: Divided) -> SliceStep | None:
    """A slope for each channel, in dimension 1, or one for all."""
    dim, slopes = _alone(node, dims), operand(node, 1)
    if dim is None:
        return None
    return SliceStep(dim, {slopes: 0} if dim == 1 and shape_of(slopes)[0] != 1 else {})


def _cat(node: fx.Node, dims: Divided) -> SliceStep | None:
    args = signature(node)
    step, dim = _alike(node, dims, args["tensors"]), args["dim"] % len(shape_of(node))
    if node.target is aten.stack.default:
        return None if step is None else SliceStep(step.dim + (dim <= step.dim), step.narrowed)
    return None if step is None or step.dim == dim else step


def _product(node: fx.Node, dims: Divided) -> SliceStep | None:
    """What has the divided letter is narrowed to the slice; what has not is used whole."""
    found = contraction(node)
    if found is None or not any(n in dims for n, _ in found.factors):
        return None
    letter, *others = {t[dims[n]] for n, t in found.terms if n in dims}
    if others or found.out.count(letter) != 1 or any(t.count(letter) > 1 for _, t in found.terms):
        return None
    places = {(n, t.find(letter)) for n, t in found.terms}
    having = {n: d for n, d in places if d >= 0}
    if len(places) > len(dict(places)) or len({shape_of(n)[d] for n, d in having.items()}) > 1:
        return None  # of one tensor a slice and the whole, or two slices; or one that is repeated
    return SliceStep(found.out.index(letter), {n: d for n, d in having.items() if n not in dims})


def _keeps(node: fx.Node, dims: Divided) -> SliceStep | None:
    dim = _alone(node, dims)
    return None if dim is None or dim in along(node) else SliceStep(dim)


def _reduction(node: fx.Node, dims: Divided) -> SliceStep | None:
    dim = _alone(node, dims)
    if dim is None or dim in (over := along(node)):
        return None
    return SliceStep(dim if signature(node)["keepdim"] else dim - sum(d < dim for d in over))


def _pick(node: fx.Node, dims: Divided) -> SliceStep | None:
    """``x[i]``, ``x[a:b]``, ``index_select`` along another dimension."""
    dim = _alone(node, dims)
    if dim is None:
        return None
    over = signature(node)["dim"] % len(shape_of(operand(node)))
    return None if over == dim else SliceStep(dim - (node.target is aten.select.int and over < dim))


def _index(node: fx.Node, dims: Divided) -> SliceStep | None:
    """Positions in other dimensions: the dimensions of the indices are in their place."""
    dim, over = _alone(node, dims), indexed(node)
    if dim is None or over is None or dim in over:
        return None
    return SliceStep(dim if dim < over.start else dim + len(shape_of(node)) - len(shape_of(operand(node))))


def indexed(node: fx.Node) -> range | None:
    """The dimensions in which ``x[:, i, j]`` picks; None if these are not side by side, or a mask picks."""
    indices: Any = node.args[1] if node.target is aten.index.Tensor else [node.args[1]]
    given = [d for d, i in enumerate(indices) if i is not None]
    if not given or given[-1] - given[0] != len(given) - 1:
        return None
    masks = any(value(indices[d]).dtype in (torch.bool, torch.uint8) for d in given)
    return None if masks else range(given[0], given[-1] + 1)


def _gather(node: fx.Node, dims: Divided) -> SliceStep | None:
    step, args = _alike(node, dims, [operand(node), signature(node)["index"]]), signature(node)
    return None if step is None or args["dim"] % len(shape_of(node)) == step.dim else step


def _scatter(node: fx.Node, dims: Divided) -> SliceStep | None:
    """``self`` with ``source`` added at indices along another dimension."""
    args = signature(node)
    # index_add's index has one entry for each slice of the source, the others' one for each of its elements
    names = ("self", "source") if node.target is aten.index_add.default else ("self", "src", "index")
    step = _alike(node, dims, [args[name] for name in names])
    return None if step is None or args["dim"] % len(shape_of(node)) == step.dim else step


def _unsqueeze(node: fx.Node, dims: Divided) -> SliceStep | None:
    dim = _alone(node, dims)
    return None if dim is None else SliceStep(dim + (signature(node)["dim"] % len(shape_of(node)) <= dim))


def _squeeze(node: fx.Node, dims: Divided) -> SliceStep | None:
    dim, before = _alone(node, dims), shape_of(operand(node))
    over = signature(node)["dim"] % len(before)
    return None if dim is None or over == dim else SliceStep(dim - (over < dim and before[over] == 1))


def order_of(node: fx.Node) -> list[int]:
    """The dimensions of the operand of a transposition, in the order of the result's."""
    rank, args = len(shape_of(node)), signature(node)
    if node.target is aten.permute.default:
        return [int(d) % rank for d in args["dims"]]
    order = list(range(rank))
    if node.target is aten.transpose.int:
        a, b = args["dim0"] % rank, args["dim1"] % rank
        order[a], order[b] = b, a
        return order
    return order[::-1]


def _permute(node: fx.Node, dims: Divided) -> SliceStep | None:
    dim = _alone(node, dims)
    return None if dim is None else SliceStep(order_of(node).index(dim))


def _expand(node: fx.Node, dims: Divided) -> SliceStep | None:
    """Of other dimensions, and in front."""
    found = _alone(node, dims)
    if found is None:
        return None
    before, after = shape_of(operand(node)), shape_of(node)
    dim = found + len(after) - len(before)
    if after[dim] != before[found]:
        return None
    return SliceStep(dim, shape=None if node.target is aten.repeat.default else (1, dim))


def _reshape(node: fx.Node, dims: Divided) -> SliceStep | None:
    """Where the divided dimension stays one of its size, and says so."""
    sizes: Any = node.args[1]
    dim = _alone(node, dims)
    if dim is None or not all(isinstance(s, int) for s in sizes):
        return None
    found = reshaped(shape_of(operand(node)), shape_of(node), dim)
    return SliceStep(found[0], shape=(1, found[0])) if found is not None and found[1:] == (1, 1, 1) else None


FAMILIES: tuple[tuple[Any, Callable[[fx.Node, Divided], SliceStep | None]], ...] = (
    ({aten.cat.default, aten.stack.default}, _cat),
    (CONTRACTIONS, _product),
    ({aten.prelu.default}, _prelu),
    (REDUCES, _reduction),
    (KEEPS, _keeps),
    (PICKS, _pick),
    ({aten.index.Tensor, aten.embedding.default}, _index),
    ({aten.gather.default}, _gather),
    (SCATTERS, _scatter),
    ({aten.unsqueeze.default}, _unsqueeze),
    ({aten.squeeze.dim}, _squeeze),
    ({aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default}, _permute),
    ({aten.expand.default, aten.repeat.default}, _expand),
    (RESHAPES, _reshape),
)
"""Operators that are no pointwise ones, and how a slice goes through them."""

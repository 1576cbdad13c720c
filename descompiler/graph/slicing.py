"""Operators that work on each slice along a dimension by itself: a piece of the operand gives a piece of the result.

A table that ranks divide along one dimension, and what is computed from it: ``cat`` of two tables by rows, ``A @ E``, a
mean over layers treat every column as if there were no other; ``normalize(W, dim=1)`` treats every row so. `follow`
says, for an operator and the divided dimension of its operands, where that dimension is in the result, and which
other operands have to be narrowed to the same slice. A slice of the result then is the same operator on slices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from descompiler.graph.nodes import aten, is_pointwise, is_tensor, shape_of, signature

PRODUCTS = frozenset({aten.mm.default, aten.matmul.default, aten._sparse_mm.default})


REDUCTIONS = frozenset(
    {
        aten.sum.dim_IntList,
        aten.mean.dim,
        aten.amax.default,
        aten.amin.default,
        aten.linalg_vector_norm.default,
        aten.norm.ScalarOpt_dim,
    }
)


ALONG = frozenset({aten.softmax.int, aten.log_softmax.int, aten.cumsum.default})


SCATTERS = frozenset({aten.index_add.default, aten.scatter_add.default, aten.scatter_reduce.two})


RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


@dataclass(frozen=True)
class Step:
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


def follow(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    """How a slice of a node is computed from slices; None if it is not.

    Parameters
    ----------
    dims : mapping
        The divided dimension of values that are known to be divided; all of one size there.
    """
    if node.op != "call_function" or not is_tensor(node):
        return None
    for targets, answer in FAMILIES:
        if node.target in targets:
            return answer(node, dims)
    return _pointwise(node, dims) if is_pointwise(node) else None


def emit_slice(
    graph: fx.Graph,
    node: fx.Node,
    step: Step,
    dims: Mapping[fx.Node, int],
    piece: Callable[[fx.Node], fx.Node],
    whole: Callable[[fx.Node], fx.Node],
    first: int,
    size: int,
) -> fx.Node:
    """A node on the slice ``[first, first + size)``; ``piece`` makes divided operands, ``whole`` the others."""

    def operand(a: fx.Node) -> fx.Node:
        if a in dims:
            return piece(a)
        if a in step.narrowed:
            return graph.call_function(aten.narrow.default, (whole(a), step.narrowed[a], first, size))
        return whole(a)

    new = graph.node_copy(node, operand)
    if step.shape is not None:
        argument, entry = step.shape
        sizes = list(new.args[argument])  # type: ignore[arg-type]
        sizes[entry] = size
        new.update_arg(argument, sizes)
    return new


def _aligned(node: fx.Node, dims: Mapping[fx.Node, int], operands: list[fx.Node], dim: int, rank: int) -> Step | None:
    """Operands that are broadcast to a result of ``rank`` dimensions, of which ``dim`` is divided."""
    size = next(shape_of(a)[dims[a]] for a in node.all_input_nodes if a in dims)
    narrowed: dict[fx.Node, int] = {}
    for a in operands:
        here = dim - (rank - len(shape_of(a)))
        if a in dims:
            if dims[a] != here:
                return None
        elif here >= 0 and shape_of(a)[here] != 1:
            if shape_of(a)[here] != size:
                return None
            narrowed[a] = here
    return Step(dim, narrowed)


def _divided(node: fx.Node, dims: Mapping[fx.Node, int]) -> tuple[fx.Node, int] | None:
    """The first argument and its divided dimension."""
    x = node.args[0]
    return (x, dims[x]) if isinstance(x, fx.Node) and x in dims else None


def _alone(node: fx.Node, dims: Mapping[fx.Node, int]) -> tuple[fx.Node, int] | None:
    """As `_divided`, where no other operand is divided."""
    return _divided(node, dims) if sum(a in dims for a in node.all_input_nodes) == 1 else None


def _tensors(x: Any) -> list[fx.Node]:
    return [a for a in x if isinstance(a, fx.Node) and is_tensor(a)]


def _pointwise(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    operands = [a for a in node.all_input_nodes if is_tensor(a)]
    rank = len(shape_of(node))
    found = {dims[a] + rank - len(shape_of(a)) for a in operands if a in dims}
    if len(found) != 1 or len(operands) != len(node.all_input_nodes):
        return None
    return _aligned(node, dims, operands, found.pop(), rank)


def _cat(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    operands, rank = _tensors(node.args[0]), len(shape_of(node))
    along = signature(node)["dim"]
    if node.target is aten.stack.default:
        along %= rank
        found = {dims[a] for a in operands if a in dims}
        if len(found) != 1:
            return None
        (before,) = found
        step = _aligned(node, dims, operands, before, rank - 1)
        return None if step is None else Step(before + (along <= before), step.narrowed)
    found = {dims[a] for a in operands if a in dims}
    if len(found) != 1 or along % rank in found:
        return None
    return _aligned(node, dims, operands, found.pop(), rank)


def _product(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    """``A @ E`` with divided columns, ``E @ A`` with divided rows: of matrices, of which one is divided."""
    a, b = node.args[:2]
    if len(shape_of(a)) != 2 or len(shape_of(b)) != 2 or (a in dims) == (b in dims):  # type: ignore[arg-type]
        return None
    if dims.get(b) == 1:  # type: ignore[arg-type]
        return Step(1)
    return Step(0) if dims.get(a) == 0 else None  # type: ignore[arg-type]


def _product_and_sum(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    c, a, b = node.args[:3]
    if len(shape_of(a)) != 2 or (a in dims) == (b in dims):  # type: ignore[arg-type]
        return None
    dim = 1 if dims.get(b) == 1 else 0 if dims.get(a) == 0 else None  # type: ignore[arg-type]
    return None if dim is None else _aligned(node, dims, [c], dim, 2)  # type: ignore[list-item]


def _linear(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    x = _alone(node, dims)
    return None if x is None or x[1] == len(shape_of(x[0])) - 1 else Step(x[1])


def _along(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    x = _alone(node, dims)
    return None if x is None or signature(node)["dim"] % len(shape_of(x[0])) == x[1] else Step(x[1])


def _layer_norm(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    x = _alone(node, dims)
    if x is None:
        return None
    over: Any = node.args[1]
    return Step(x[1]) if x[1] < len(shape_of(x[0])) - len(over) else None


def _reduction(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    x, args = _alone(node, dims), signature(node)
    if x is None or not args["dim"] or args.get("dtype") is not None:
        return None
    over = {d % len(shape_of(x[0])) for d in args["dim"]}
    if x[1] in over:
        return None
    return Step(x[1] if args["keepdim"] else x[1] - sum(d < x[1] for d in over))


def _select(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    """``x[i]``, ``x[a:b]``, ``index_select`` along another dimension."""
    x = _alone(node, dims)
    if x is None:
        return None
    dim = signature(node)["dim"] % len(shape_of(x[0]))
    if dim == x[1]:
        return None
    return Step(x[1] - (node.target is aten.select.int and dim < x[1]))


def _index(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    """Rows at constant indices, of a value that is divided by columns."""
    x = _alone(node, dims)
    indices: Any = node.args[1] if node.target is aten.index.Tensor else [node.args[1]]
    if x is None or x[1] != 1 or len(indices) != 1 or indices[0] is None:
        return None
    return Step(len(shape_of(indices[0])))


def _gather(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    x, args = _alone(node, dims), signature(node)
    if x is None or args["dim"] % len(shape_of(x[0])) == x[1]:
        return None
    return _aligned(node, dims, [args["index"]], x[1], len(shape_of(node)))


def _scatter(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    """``self`` with ``source`` added at constant indices along another dimension."""
    args, rank = signature(node), len(shape_of(node))
    source = args.get("source", args.get("src"))
    assert isinstance(source, fx.Node)
    found = {dims[a] for a in (args["self"], source) if a in dims}
    if len(found) != 1 or args["dim"] % rank in found or args["index"] in dims:
        return None
    operands = [args["self"], source] + ([] if node.target is aten.index_add.default else [args["index"]])
    return _aligned(node, dims, operands, found.pop(), rank)


def _unsqueeze(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    x = _divided(node, dims)
    return None if x is None else Step(x[1] + (signature(node)["dim"] % len(shape_of(node)) <= x[1]))


def _squeeze(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    x = _divided(node, dims)
    if x is None:
        return None
    dim = signature(node)["dim"] % len(shape_of(x[0]))
    if dim == x[1]:
        return None
    return Step(x[1] - (dim < x[1] and shape_of(x[0])[dim] == 1))


def _permute(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    x = _divided(node, dims)
    if x is None:
        return None
    rank = len(shape_of(x[0]))
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    elif node.target is aten.transpose.int:
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = b, a
    else:
        order.reverse()
    return Step(order.index(x[1]))


def _expand(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    x = _alone(node, dims)
    if x is None:
        return None
    dim = x[1] + len(shape_of(node)) - len(shape_of(x[0]))
    return Step(dim, shape=(1, dim))


def _reshape(node: fx.Node, dims: Mapping[fx.Node, int]) -> Step | None:
    """Where the divided dimension stays the first, or the last."""
    x = _alone(node, dims)
    if x is None or not all(isinstance(s, int) for s in node.args[1]):  # type: ignore[union-attr]
        return None
    before, after = shape_of(x[0]), shape_of(node)
    for dim, end in ((0, 0), (len(after) - 1, len(before) - 1)):
        if x[1] == end and before[end] == after[dim]:
            return Step(dim, shape=(1, dim))
    return None


FAMILIES: tuple[tuple[Any, Callable[[fx.Node, Mapping[fx.Node, int]], Step | None]], ...] = (
    ({aten.cat.default, aten.stack.default}, _cat),
    (PRODUCTS, _product),
    ({aten.addmm.default, aten._sparse_addmm.default}, _product_and_sum),
    ({aten.linear.default}, _linear),
    ({aten.layer_norm.default}, _layer_norm),
    (REDUCTIONS, _reduction),
    (ALONG, _along),
    ({aten.slice.Tensor, aten.narrow.default, aten.select.int, aten.index_select.default}, _select),
    ({aten.index.Tensor, aten.embedding.default}, _index),
    ({aten.gather.default}, _gather),
    (SCATTERS, _scatter),
    ({aten.unsqueeze.default}, _unsqueeze),
    ({aten.squeeze.dim}, _squeeze),
    ({aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default}, _permute),
    ({aten.expand.default}, _expand),
    (RESHAPES, _reshape),
)

"""Products of the batch's rows with a table, for `descompiler.passes.normalise.recognise_outputs`: what is one, and
what is moved in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import sympy
from torch import fx

from descompiler.graph.arguments import operand
from descompiler.graph.nodes import aten, is_tensor, shape_of, signature, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import ancestors, insert_call
from descompiler.tables.computed import computed_by_rows

OUTPUT_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass
class Product:
    """``node = x @ table[first : first + size].T + bias``."""

    node: fx.Node
    x: fx.Node
    table: fx.Node
    first: int
    size: int
    bias: fx.Node | None = None


def product_of(program: Program, node: fx.Node) -> Product | None:
    """``x @ W.T`` where W is a parameter, or a range of its rows, and x has a constant number of rows a batch row."""
    bias: Any = None
    if node.target is aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
    elif node.target in (aten.matmul.default, aten.mm.default):
        x, weight = node.args[0], _transposed(node.args[1])
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args[0], node.args[1], _transposed(node.args[2])
    elif node.target is aten.einsum.default:
        x, weight = _einsum(node)
    else:
        return None
    found = _table_rows(program, weight)
    if found is None or not isinstance(x, fx.Node) or not is_tensor(x) or not value(x).is_floating_point():
        return None
    table, first, size = found
    if value(x).dim() < 2 or shape_of(x)[-1] != shape_of(table)[1] or rows_per_row(program, x) is None:
        return None
    if bias is not None and shape_of(bias) != [size]:
        return None
    return Product(node, x, table, first, size, bias)


def parameter_of(program: Program, table: fx.Node) -> str | None:
    """The parameter that a product's table is, or is computed of."""
    return program.parameter(table) or program.parameter(next(iter(computed_by_rows(program, table) or ()), None))


def rows_per_row(program: Program, x: fx.Node) -> int | None:
    """How many vectors (along its last dimension) a value has for each row of the batch; None if that is no number."""
    count = sympy.sympify(prod(shape_of(x)[:-1], start=sympy.Integer(1))) / program.batch
    return int(count) if count.is_Integer else None


def _transposed(node: Any) -> fx.Node | None:
    """The 2-D value that a node is the transpose of."""
    if not isinstance(node, fx.Node) or not is_tensor(node) or value(node).dim() != 2 or node.op != "call_function":
        return None
    arguments: Any = node.args
    if node.target in (aten.t.default, aten.numpy_T.default, aten.transpose.int):
        if node.target is aten.transpose.int and len({d % 2 for d in arguments[1:3]}) != 2:
            return None
        return operand(node)
    if node.target is aten.permute.default and [d % 2 for d in arguments[1]] == [1, 0]:
        return operand(node)
    return None


def _einsum(node: fx.Node) -> tuple[Any, Any]:
    """The operands (x, W) of ``...k,vk->...v``, in either order."""
    args = signature(node)
    equation, operands = args["equation"].replace(" ", ""), args["tensors"]
    inputs, _, output = equation.partition("->")
    names = inputs.split(",")
    if len(names) != 2 or "." in equation or not output:
        return None, None
    for (a, x), (b, w) in (zip(names, operands, strict=True), zip(names[::-1], operands[::-1], strict=True)):
        if len(b) == 2 and len(set(a)) == len(a) and a[-1:] == b[1] and output == a[:-1] + b[0] and b[0] not in a:
            return x, w
    return None, None


def _table_rows(program: Program, node: Any) -> tuple[fx.Node, int, int] | None:
    """(table, first row, rows) of a 2-D parameter, of what is computed of one row by row, or of a range of its rows."""
    if not isinstance(node, fx.Node) or not is_tensor(node) or value(node).dim() != 2:
        return None
    if program.parameter(node) is not None or (
        node.target is not aten.slice.Tensor and computed_by_rows(program, node)
    ):
        return node, 0, int(shape_of(node)[0])
    if node.target is aten.slice.Tensor:
        args = signature(node)
        inner = _table_rows(program, args["self"])
        if inner is not None and args["dim"] % 2 == 0 and args["step"] == 1:
            start, stop, _ = slice(args["start"], args["end"]).indices(inner[2])
            return inner[0], inner[1] + start, max(stop - start, 0)
    return None


def absorb(program: Program, p: Product) -> bool:
    """Move the only user of the product in front of it, if it is a scale, a reshape, a bias or a slice."""
    if len(p.node.users) != 1:
        return False
    user = next(iter(p.node.users))
    arguments: Any = user.args
    if user.target in OUTPUT_RESHAPES and arguments[0] is p.node:
        if shape_of(user)[-1:] != [p.size] or rows_per_row(program, user) is None:
            return False
        p.x = insert_call(user, aten.reshape.default, p.x, [*arguments[1][:-1], int(shape_of(p.x)[-1])])
    elif user.target is aten.flatten.using_ints:
        args, dims = signature(user), value(p.node).dim()
        if args["end_dim"] % dims == dims - 1 or rows_per_row(program, user) is None:
            return False
        p.x = insert_call(user, user.target, p.x, args["start_dim"], args["end_dim"])
    elif user.target in (aten.mul.Tensor, aten.div.Tensor) and p.bias is None:
        other = arguments[1] if arguments[0] is p.node else arguments[0]
        if arguments[0] is not p.node and user.target is aten.div.Tensor:
            return False
        if not _is_scale(p, other) or shape_of(user) != shape_of(p.node) or value(user).dtype != value(p.x).dtype:
            return False
        p.x = insert_call(user, user.target, p.x, other)
    elif user.target is aten.add.Tensor and p.bias is None and not user.kwargs:
        other = arguments[1] if arguments[0] is p.node else arguments[0]
        if not isinstance(other, fx.Node) or shape_of(other) != [p.size] or value(other).dtype != value(p.node).dtype:
            return False
        if not independent(program, other):
            return False
        p.bias = other
    elif user.target is aten.slice.Tensor:
        args = signature(user)
        if args["dim"] % value(p.node).dim() != value(p.node).dim() - 1 or args["step"] != 1:
            return False
        start, stop, _ = slice(args["start"], args["end"]).indices(p.size)
        if stop <= start:
            return False
        if p.bias is not None:
            p.bias = insert_call(user, aten.slice.Tensor, p.bias, 0, start, stop)
        p.first, p.size = p.first + start, stop - start
    else:
        return False
    p.node = user
    return True


def _is_scale(p: Product, other: Any) -> bool:
    """Whether a factor is the same for all logits of a row of x."""
    if not isinstance(other, fx.Node):
        return isinstance(other, int | float)
    if not is_tensor(other):
        return False
    shape = shape_of(other)
    return not shape or (shape[-1] == 1 and len(shape) <= value(p.x).dim())


def _kinds_of_sources(program: Program, node: fx.Node) -> set[str]:
    """What kinds of placeholders a value is computed from."""
    return {s.kind for n in ancestors([node]) if (s := program.source(n)) is not None}


def independent(program: Program, node: fx.Node) -> bool:
    """Whether a value depends on no input: it is the same on every rank."""
    return "input" not in _kinds_of_sources(program, node)


def only_data(program: Program, node: fx.Node) -> bool:
    """Whether a value is computed from inputs, buffers and constants alone, so that it is known before any exchange."""
    return "parameter" not in _kinds_of_sources(program, node)

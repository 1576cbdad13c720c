"""Nodes of a program's graph: what one is, what its value is, and whose memory it shares."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from descompiler.errors import LIBRARIES
from descompiler.graph.leaf import Leaf

aten = torch.ops.aten


DROPOUT_OPERATORS = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default})


MODE_ARGUMENTS = ("train", "training")
"""Arguments of batch norms and recurrent layers that say in which mode they run."""


@dataclass(frozen=True)
class Source:
    """Where a placeholder's value comes from: ``kind`` is parameter, buffer, constant or input."""

    kind: str
    name: str


def value(node: Any) -> Any:
    """The fake value of a node: a FakeTensor, a SymInt, or a tuple of them."""
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def is_tensor(node: Any) -> bool:
    return isinstance(value(node), Tensor)


def size_of(size: int | torch.SymInt) -> int | sympy.Expr:
    """An int if it is one, though a tracer divided it by the batch size to find it; else a sympy expression."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_number else size.node.expr


SIZES = "sizes"
"""Of a node's notes: its value, and what `sizes_of` it is. A trial of a plan asks for each shape dozens of times."""


def sizes_of(node: fx.Node) -> tuple[int | sympy.Expr, ...]:
    """Shape with ints where static and sympy expressions where the batch size enters."""
    x, known = value(node), node.meta.get(SIZES)
    if known is None or known[0] is not x:
        known = node.meta[SIZES] = x, tuple(size_of(s) for s in x.shape)
    sizes: tuple[int | sympy.Expr, ...] = known[1]
    return sizes


def shape_of(node: fx.Node) -> list[int | sympy.Expr]:
    """As `sizes_of`, to be changed."""
    return list(sizes_of(node))


def tail(node: fx.Node) -> tuple[int, ...]:
    """Static shape after the batch dimension, which is the first."""
    return tuple(map(int, sizes_of(node)[1:]))  # int() of torch's own sizes would make the batch a number


def shape_on(node: fx.Node, rows: int) -> list[int]:
    """Shape on so many rows of the batch, wherever they are in it."""
    return [_size_on(s, rows) for s in sizes_of(node)]


def _size_on(size: int | sympy.Expr, rows: int) -> int:
    if isinstance(size, int):
        return size
    return rows if size.is_Symbol else int(size.subs(dict.fromkeys(size.free_symbols, rows)))  # which is slow


def elements_per_row(node: fx.Node) -> int:
    """Elements of a tensor per row of the batch, wherever the batch lies in it."""
    one, two = (prod(shape_on(node, rows)) for rows in (1, 2))
    return two - one


def signature(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen call by the names of its schema, defaults filled in."""
    target: Any = node.target
    return named_arguments(target, node.args, node.kwargs)


def named_arguments(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """As `signature`, of a call that is no node."""
    found: dict[str, Any] = {}
    for i, a in enumerate(target._schema.arguments):
        if a.name in kwargs:
            found[a.name] = kwargs[a.name]
        elif i < len(args):
            found[a.name] = args[i]
        elif a.has_default_value():
            found[a.name] = a.default_value
    return found


def dim_of(node: fx.Node) -> int:
    """The ``dim`` that a call is along, counted from the front of its result."""
    return int(signature(node)["dim"]) % len(shape_of(node))


UNTAGGED_POINTWISE = frozenset(
    {
        aten.to.dtype,
        aten._to_copy.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.log_sigmoid.default,
        aten.hardswish.default,
    }
)
"""Elementwise operators that torch does not tag so."""


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result is made of the operands' at its place, by no chance."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not is_tensor(node) or is_random(node):
        return False
    return torch.Tag.pointwise in target.tags or target in UNTAGGED_POINTWISE


def is_random(node: fx.Node) -> bool:
    """Whether the operator draws random numbers (dropout of nothing does not)."""
    target = node.target
    if isinstance(target, Leaf):
        return target.call.drops
    return isinstance(target, torch._ops.OpOverload) and draws(target, node.args, node.kwargs)


def draws(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operator draws random numbers (dropout of nothing does not)."""
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    found = named_arguments(target, args, kwargs)
    rate = found.get("p", found.get("dropout_p", found.get("dropout", 1.0)))
    return bool(found.get("train", True)) and rate != 0


def stops_gradients(n: fx.Node) -> bool:
    """Whether no gradient goes through a node, whatever its operands are: numbers, integers, what is detached.

    >>> n = fx.Graph().placeholder("x")
    >>> n.meta["val"] = torch.zeros(2, dtype=torch.int64)
    >>> stops_gradients(n)
    True
    """
    x = value(n)
    if isinstance(x, Tensor):
        return n.target is aten.detach.default or not (x.is_floating_point() or x.is_complex())
    return x is not None and not isinstance(x, tuple | list)


def mutates(node: fx.Node) -> bool:
    """Whether an operator writes to an operand."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.to.other})
"""Operators that return their operand in another dtype or place, or itself if it is so already."""


def shares_memory(node: fx.Node) -> bool:
    """Whether what an operator returns may share memory with an operand, by what the operator says of itself."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def is_view(node: fx.Node) -> bool:
    """Whether what an operator returns shares memory with an operand."""
    if not shares_memory(node):
        return False
    if node.target not in CASTS:
        return True
    new: torch.dtype = value(node).dtype
    old: torch.dtype = value(node.args[0]).dtype
    # one of floating point to another is a copy too, except in float64, where capture compares graph and model
    return bool(new == old or (new.is_floating_point and old.is_floating_point))


def is_pure(node: fx.Node) -> bool:
    """Whether a call is known to change nothing: no buffer, no running statistics, no state of a user's forward."""
    return not (mutates(node) or node.target is aten.batch_norm.default or isinstance(node.target, Leaf))


def user_line(node: fx.Node) -> str:
    """``file:line`` of the user's code that made this node; empty if unknown."""
    lines = [x.strip() for x in (node.meta.get("stack_trace") or "").splitlines() if x.strip().startswith("File")]
    for line in reversed(lines):
        path = line.split('"')[1]
        if not path.startswith(LIBRARIES):
            return f"{path}:{line.split('line ')[1].split(',')[0]}"
    return ""


def where(node: fx.Node) -> str:
    """The node for an error text: operator and user's line."""
    line = user_line(node)
    return f"{target_name(node)}" + (f" at {line}" if line else "")


def target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


PURE_PYTHON = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.getitem}


def storage_roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The node whose storage each node's value may share."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        roots[node] = node
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        if is_view(node) or (node.target is operator.getitem and not is_tensor(source)):
            roots[node] = roots[source]
    return roots

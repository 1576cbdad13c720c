"""remove_noops: ``dropout(x, 0.5, False)  -->  x``, and the like

Operators that return their input: dropout that drops nothing, slices of everything, copies that nobody writes to. It
pays because each would need a rule of its own, and hides that two lookups read the same ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from descompiler.graph.nodes import CASTS, DROPOUT_OPERATORS, aten, is_tensor, mutates, shape_of, signature, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import propagate

COPIES = {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}


SAME_SHAPE = {
    aten.reshape.default,
    aten.view.default,
    aten.expand.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
}


@dataclass(frozen=True)
class RemoveNoops:
    name: str = "remove_noops"

    def __call__(self, program: Program) -> Program:
        written = {a for n in program.graph.nodes if mutates(n) for a in n.all_input_nodes}
        renamed = False
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node in written:
                continue
            if node.target is aten.cat.default and len(node.args[0]) == 1:
                node.args = (node.args[0][0],)
                node.target = aten.alias.default
            if is_noop(node) and node.args[0] not in written:
                renamed |= shape_of(node) != shape_of(node.args[0])
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
        if renamed:  # the batch size was an expression in the shapes that followed
            propagate(program.graph)
        return program


def _same_sizes(a: fx.Node, b: fx.Node) -> bool:
    """Whether two shapes are the same for all batch sizes tried: an end may be computed, ``x[: len(x) // 1]``."""
    for x, y in zip(shape_of(a), shape_of(b), strict=True):
        difference = sympy.sympify(x) - sympy.sympify(y)
        symbols = difference.free_symbols
        if len(symbols) > 1 or any(difference.subs(dict.fromkeys(symbols, n)) != 0 for n in (2, 3, 7, 8, 64, 1001)):
            return False
    return True


def is_noop(node: fx.Node) -> bool:
    """Whether the node's value is its first argument's."""
    target: Any = node.target
    if not node.args or not is_tensor(node) or not is_tensor(node.args[0]):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if target in DROPOUT_OPERATORS:
        return bool(not node.args[2] or node.args[1] == 0)
    if target in COPIES:
        return True
    same = shape_of(node) == shape_of(source) and value(node).dtype == value(source).dtype
    if target is aten.slice.Tensor:
        args = signature(node)
        if args["start"] not in (0, None) or args["step"] != 1:
            return False
        everything = args["end"] is None or args["end"] == torch.iinfo(torch.int64).max
        return (same and everything) or (isinstance(args["end"], fx.Node) and _same_sizes(node, source))
    if target in CASTS:
        return same and value(node).device == value(source).device
    return target in SAME_SHAPE and bool(same)

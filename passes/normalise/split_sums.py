"""split_sums: ``sum(x)  -->  sum(sum(x, [1, 2]))``, ``norm(x)  -->  sqrt(sum(sum(x * x, [1, 2])))``

A sum, mean or norm over the batch and all else is taken of each row first. It pays because the rows' sums can be taken
where the rows are divided (a regulariser of looked-up rows then leaves the region as one number a row), and because of
a sum over the batch only one number crosses, where a norm needs every rank's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx

from descompiler.graph.nodes import aten, is_tensor, shape_of, signature, tail, value
from descompiler.graph.program import Program, rowwise
from descompiler.graph.rewrite import insert_call
from descompiler.ops.local import sqrt_or_zero

BY_ROW = {aten.sum.default: aten.sum.dim_IntList, aten.mean.default: aten.mean.dim}


@dataclass(frozen=True)
class SplitSums:
    name: str = "split_sums"

    def __call__(self, program: Program) -> Program:
        for node in list(program.graph.nodes):
            new = None
            if node.target in BY_ROW:
                new = _by_row(program, node, node.target, node.args[0])
            elif node.target is aten.linalg_vector_norm.default:
                new = _norm(program, node)
            if new is not None:
                node.replace_all_uses_with(new)
                program.graph.erase_node(node)
                program.note(f"{self.name}: {node.name}")
        return program


def _by_row(program: Program, node: fx.Node, target: Any, x: Any) -> fx.Node | None:
    """A sum or mean of the rows' sums or means; None if there is nothing to take of each row."""
    if not rowwise(program, x) or prod(tail(x)) < 2 or not value(x).is_floating_point():
        return None
    if node.target is target and signature(node)["dtype"] is not None:
        return None
    of_rows = insert_call(node, BY_ROW[target], x, list(range(1, len(shape_of(x)))))
    return insert_call(node, target, of_rows)


def _norm(program: Program, node: fx.Node) -> fx.Node | None:
    """A norm of order 1 or 2 over everything, from a sum over the batch."""
    args = signature(node)
    x, order = args["self"], float(args["ord"])
    if order not in (1.0, 2.0) or args["keepdim"] or args["dtype"] is not None:
        return None
    if args["dim"] not in (None, [], list(range(len(shape_of(x))))):
        return None
    if not is_tensor(x) or not any(program.batch in s.free_symbols for s in shape_of(x) if not isinstance(s, int)):
        return None
    terms = insert_call(node, aten.square.default if order == 2 else aten.abs.default, x)
    total = _by_row(program, node, aten.sum.default, terms) or insert_call(node, aten.sum.default, terms)
    return insert_call(node, sqrt_or_zero, total) if order == 2 else total

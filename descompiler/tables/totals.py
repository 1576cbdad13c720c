"""Sums over a whole table: ``sum(f(W))`` of a table that ranks hold in part is a sum of the ranks' terms.

Regularisers and weight norms inside forward use every row of a table. Where f works element by element, each rank
computes its own piece's term; one number crosses in forward, and one in backward:

    s = sum over ranks of sum(f(own piece)) + sum(f(shared rows))       forward: an all-reduce of the first
    every rank's gradient of s is the mean over ranks of the ranks'     backward: an all-reduce

Gradients of pieces are averages over ranks, so the second makes them complete; rows that every rank holds get the same
gradient everywhere. Recognised are `sum`, `mean`, and `linalg_vector_norm` of order 1 and 2, of a table or of
elementwise operators of it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx

from descompiler.graph.nodes import aten, shape_of, signature, value
from descompiler.graph.program import Program
from descompiler.layout.global_values import GlobalValue, TableTotal
from descompiler.layout.pieces import Pieces
from descompiler.ops.local import sqrt_or_zero

ELEMENTWISE_OPERATORS = frozenset(
    {
        aten.pow.Tensor_Scalar,
        aten.square.default,
        aten.abs.default,
        aten.neg.default,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
    }
)


TOTALS = frozenset({aten.sum.default, aten.mean.default, aten.linalg_vector_norm.default})


@dataclass(frozen=True)
class Total:
    """``node``: a number made from all elements of one table.

    Attributes
    ----------
    table : str
    weight : torch.fx.Node
        The table.
    steps : tuple of torch.fx.Node
        The elementwise operators before it, in order.
    """

    node: fx.Node
    table: str
    weight: fx.Node
    steps: tuple[fx.Node, ...]


def find_totals(program: Program) -> list[Total]:
    """All sums over whole parameters, in the order of the graph."""
    result = []
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    for weight in program.graph.nodes:
        name = program.parameter(weight)
        if name is None or len(shape_of(weight)) != 2:
            continue
        steps: dict[fx.Node, None] = {}
        totals: list[fx.Node] = []
        for n in sorted(_elementwise_users(weight), key=order.__getitem__):
            known = (
                n.op == "call_function"
                and n.all_input_nodes
                and all(a is weight or a in steps for a in n.all_input_nodes)
            )
            if known and n.target in ELEMENTWISE_OPERATORS and shape_of(n) == shape_of(weight):
                steps[n] = None
            elif known and n.target in TOTALS and _is_total(n):
                totals.append(n)
        for n in reversed(list(steps)):  # a value that is used otherwise is needed whole
            if any(u not in steps and u not in totals for u in n.users):
                del steps[n]
        for n in list(steps):
            if any(a is not weight and a not in steps for a in n.all_input_nodes):
                del steps[n]
        kept = tuple(steps)
        result += [
            Total(n, name, weight, kept) for n in totals if all(a is weight or a in steps for a in n.all_input_nodes)
        ]
    return sorted(result, key=lambda t: order[t.node])


def _elementwise_users(weight: fx.Node) -> set[fx.Node]:
    """What elementwise operators lead to from a parameter: all that can be a step or a total of it."""
    found: set[fx.Node] = set()
    stack = [weight]
    while stack:
        for user in stack.pop().users:
            if user not in found:
                found.add(user)
                if user.target in ELEMENTWISE_OPERATORS:
                    stack.append(user)
    return found


def _is_total(n: fx.Node) -> bool:
    args = signature(n)
    if args.get("dtype") is not None:
        return False
    if n.target is aten.linalg_vector_norm.default:
        return float(args["ord"]) in (1.0, 2.0) and args["dim"] is None and not args["keepdim"]
    return True


def uses(totals: Sequence[Total]) -> set[fx.Node]:
    """The nodes that belong to totals: as users of a table, they leave it free to be divided."""
    return {n for t in totals for n in (*t.steps, t.node)}


def exchanges(program: Program, totals: Sequence[Total], received: Callable[[fx.Node], bool]) -> tuple[TableTotal, ...]:
    """What totals of divided tables send; ``received`` says which of them get a gradient."""

    def of(node: fx.Node) -> GlobalValue:
        dtype = program.wire_dtype(value(node).dtype)
        return GlobalValue(node.name, itemsize=None if dtype is None else dtype.itemsize)

    return tuple(TableTotal((of(t.node),), received(t.node)) for t in totals)


def emit_total(graph: fx.Graph, runtime: fx.Node, total: Total, weight: fx.Node, pieces: Pieces, rank: int) -> fx.Node:
    """A total of a table of which this rank holds pieces."""
    own, shared = pieces.own_size(rank), pieces.shared_size()

    def term(first: int, size: int) -> fx.Node:
        values = {total.weight: graph.call_function(aten.narrow.default, (weight, pieces.dim, first, size))}
        for n in total.steps:
            values[n] = graph.node_copy(n, values.__getitem__)
        x = values[total.node.all_input_nodes[0]]
        if total.node.target is aten.linalg_vector_norm.default:
            order = float(signature(total.node)["ord"])
            x = graph.call_function(aten.square.default if order == 2 else aten.abs.default, (x,))
        return graph.call_function(aten.sum.default, (x,))

    terms = [term(0, own)] + ([term(own, shared)] if shared else [])
    result = graph.call_method("total", (runtime, *terms))
    if total.node.target is aten.mean.default:
        return graph.call_function(aten.div.Tensor, (result, prod(pieces.shape)))
    if total.node.target is aten.linalg_vector_norm.default and float(signature(total.node)["ord"]) == 2:
        return graph.call_function(sqrt_or_zero, (result,))
    return result


def divided(totals: Sequence[Total], splits: Any) -> list[Total]:
    """The totals of tables that the reducer does not average."""
    return [t for t in totals if t.table in splits and not (splits[t.table].at_hand and not splits[t.table].gathered)]

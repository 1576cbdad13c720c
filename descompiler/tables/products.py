"""Products with divided tables in a program: what they exchange, where their biases are, what a rank emits.

They take each rank's own rows and return results for them, so they stay outside the substituted region, in any place
of the graph; what is exchanged in between is `descompiler.runtime.vocabulary`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import sympy
from torch import fx

from descompiler.graph.nodes import aten, shape_of, user_line, value
from descompiler.graph.program import Program
from descompiler.layout.division import Division
from descompiler.layout.id_checks import Check
from descompiler.layout.pieces import Pieces
from descompiler.layout.vocabulary import Vocabulary
from descompiler.ops.vocabulary import kinds_of
from descompiler.tables.form import Split
from descompiler.tables.tables import Operator, Output


def outputs_in_order(
    program: Program, operators: Sequence[Operator], splits: Mapping[str, Split]
) -> dict[fx.Node, tuple[Operator, Output]]:
    """The products with divided tables, in the order of the graph."""
    every = {x.node: (o, x) for o in operators for x in o.outputs if not splits[o.name].at_hand}
    return {n: every[n] for n in program.graph.nodes if n in every}


def layouts_of(
    program: Program, products: Mapping[fx.Node, tuple[Operator, Output]], splits: Mapping[str, Split]
) -> tuple[Vocabulary, ...]:
    """What each product with a divided table exchanges."""
    if not products:
        return ()
    trained = _trained(program)
    result = []
    for node, (o, x) in products.items():
        backward_x = x.x in trained
        result.append(
            Vocabulary(
                name=node.name,
                division=_one_range_each(splits[o.name].pieces),
                first=x.first,
                size=x.size,
                dim=int(shape_of(x.x)[-1]),
                per_row=_per_row(program, x.x),
                requests=kinds_of(x.requests, lambda ids: int(shape_of(ids)[-1])),
                id_bytes=4 if o.rows < 1 << 31 else 8,
                backward=backward_x or o.trained or x.bias in trained,
                backward_x=backward_x,
                wire_dtype=program.wire_dtype(value(x.x).dtype),
            )
        )
    return tuple(result)


def _one_range_each(pieces: Pieces) -> Division:
    """How the rows of a table that products are made with are divided."""
    division = pieces.division
    assert pieces.dim == 0 and len(pieces.owners) == sum(r.count for r in division.runs if r.size)
    return division


def _per_row(program: Program, x: fx.Node) -> int:
    return int(sympy.sympify(prod(shape_of(x)[:-1], start=sympy.Integer(1))) / program.batch)


def _trained(program: Program) -> set[fx.Node]:
    """Nodes that gradients flow into: computed from a trained parameter, and not detached."""
    result: set[fx.Node] = set()
    for n in program.graph.nodes:
        name = program.parameter(n)
        if name is not None:
            if program.parameters[name].requires_grad:
                result.add(n)
        elif n.target not in (aten.detach.default, aten.detach_.default) and any(
            a in result for a in n.all_input_nodes
        ):
            result.add(n)
    return result


def bias_pieces(
    program: Program, products: Mapping[fx.Node, tuple[Operator, Output]], splits: Mapping[str, Split]
) -> dict[str, Pieces]:
    """Biases that only products with one divided table add, cut like its rows: they need no all-reduce."""
    result: dict[str, Pieces] = {}
    for o, x in products.values():
        name = program.parameter(x.bias)
        if name is None or x.bias is None:
            continue
        whole = all(u in products and products[u][0] is o and products[u][1].size == o.rows for u in x.bias.users)
        if whole:
            p = splits[o.name].pieces
            result[name] = Pieces((o.rows,), 0, p.division, p.ranks)
    return result


def checks_of(operators: Sequence[Operator]) -> list[tuple[fx.Node, Check]]:
    """The ids whose logits are asked for, and what they have to be."""
    return [
        (r[1], Check(o.name, x.size, None, user_line(x.node), r[2]))
        for o in operators
        for x in o.outputs
        for r in x.requests
        if r[0] == "select"
    ]

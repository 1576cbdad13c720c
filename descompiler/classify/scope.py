"""Scopes: whether a value is computed from a rank's own rows, or mixes the rows of the batch.

Every node of a program gets a `Scope` (`descompiler.classify.classify`):

    constant   depends on no batch: parameters, buffers, constants
    size       a number made from the batch size: the rank's rows, or the global batch's, as its users need
    local      own rows suffice: rows lie along one dimension (`Rows`), and ranks' results side by side are the whole
    global     mixes rows, or has no batch dimension: means over the batch, in-batch negatives, sorted batches
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from torch import Tensor, fx

from descompiler.graph.nodes import value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import descendants
from descompiler.layout.rows import Rows

CONSTANT, SIZE, OWN_ROWS, GLOBAL = "constant", "size", "local", "global"


OWN, WHOLE, SIZED = "own", "whole", "sized"
"""Versions of a value: of the rank's own rows, of the global batch, or made from the number of own rows alone."""


@dataclass(frozen=True)
class Scope:
    """Where a node is computed, and from which versions of its operands.

    Attributes
    ----------
    kind : {"constant", "size", "local", "global"}
    rows : Rows or None
        How the batch lies in the value, where ranks have own rows of it.
    uses : tuple of str
        The version of each operand (in the order of ``node.all_input_nodes``) that the node takes.
    sized : bool
        A global value made from the batch size alone.
    reduced : bool
        A sum or mean over the batch, computed from the ranks' terms.
    drawn : bool
        A random draw.
    grad : bool
        Whether the outputs send it a gradient.
    """

    kind: str
    rows: Rows | None = None
    uses: tuple[str, ...] = ()
    sized: bool = False
    reduced: bool = False
    drawn: bool = False
    grad: bool = False


def scope_of(node: fx.Node) -> Scope:
    """The scope that `descompiler.classify.classify` gave to a node; nodes made by later passes are local."""
    return node.meta.get("scope") or Scope(OWN_ROWS, Rows())


def trained_parameters(program: Program) -> frozenset[str]:
    """Parameters that require a gradient and get one, not those that only choose (a top-k, a mask)."""
    found = {name for n in program.graph.nodes if (name := program.parameter(n)) is not None and scope_of(n).grad}
    return frozenset(n for n in found if program.parameters[n].requires_grad)


def is_coupled(program: Program) -> bool:
    """Whether any node mixes rows."""
    return any(scope_of(n).kind == GLOBAL for n in program.graph.nodes)


def coupled_nodes(program: Program) -> set[fx.Node]:
    """Nodes whose values for own rows need the rows of the global batch, or an exchange."""
    mixing = {n for n in program.graph.nodes if scope_of(n).kind == GLOBAL or WHOLE in scope_of(n).uses}
    return mixing | descendants(program.graph, mixing)


def size_terms(program: Program, n: fx.Node) -> tuple[int, ...] | None:
    """Coefficients of a ``sym_size`` in the batch size; None if it does not depend on it."""
    expr = value(n).node.expr
    return polynomial(expr, program) if program.batch in expr.free_symbols else None


def polynomial(expr: Any, program: Program) -> tuple[int, ...] | None:
    """Integer coefficients of an expression in the batch size, constant term first; None if it is none.

    A program's guards may say what a part of it is: that a third of the rows is 1.
    """
    equal = {g.lhs: g.rhs for g in program.guards if isinstance(g, sympy.Eq) and g.rhs.is_Integer}
    expr, batch = sympy.sympify(expr).subs(equal), program.batch
    if not expr.is_polynomial(batch):
        return None
    found = tuple(sympy.Poly(expr, batch).all_coeffs()[::-1])
    return tuple(int(c) for c in found) if all(c.is_Integer for c in found) else None


def symbols_of(size: Any) -> set[sympy.Symbol]:
    """What a size is made of; a number of nothing."""
    return set() if isinstance(size, int) else set(size.node.expr.free_symbols)


def symbols(x: Any) -> set[sympy.Symbol]:
    """What the sizes of a value are made of."""
    return set().union(*map(symbols_of, x.shape)) if isinstance(x, Tensor) else set()

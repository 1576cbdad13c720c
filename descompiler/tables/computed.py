"""Computed tables: what a model makes of whole tables before it looks rows up.

Graph propagation (LightGCN) looks up ``C[ids]``, C = mean over layers of A^l cat(U, I). Every operator on the way from
U and I to C treats each column by itself, so a rank that holds a range of columns of U and I has that range of C, and
nothing crosses for it. `find_groups` finds the tables that go into one such C: they have to be divided together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from descompiler.classify.scope import CONSTANT, scope_of
from descompiler.graph.arguments import LookupCall
from descompiler.graph.nodes import shape_of, target_name, user_line, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import ancestors
from descompiler.graph.slicing import follow
from descompiler.tables import totals as regularisers


@dataclass(frozen=True)
class Group:
    """Tables of one width, and what is computed of them column by column and looked up.

    Attributes
    ----------
    tables : tuple of str
    dims : mapping of node to int
        Tables and computed values, in the order of the graph, and which dimension the columns are.
    lookups : tuple of node
        Of computed values.
    others : tuple of node
        What uses any of them otherwise: it needs all columns.
    replicated : tuple of str
        Parameters that are used whole on the way.
    """

    tables: tuple[str, ...]
    dims: Mapping[fx.Node, int] = field(hash=False)
    lookups: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]
    replicated: tuple[str, ...]

    @property
    def nodes(self) -> list[fx.Node]:
        """The computed values."""
        return [n for n in self.dims if n.op == "call_function"]

    def __str__(self) -> str:
        return f"{', '.join(dict.fromkeys(map(target_name, self.nodes)))} of {', '.join(self.tables)}"


def find_groups(program: Program) -> list[Group]:
    """The groups of a program whose nodes have scopes (`descompiler.classify.classify`)."""
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    looked_up = [x for n in order if (x := LookupCall.of(n)) is not None and _is_computed(program, x.weight)]
    if not looked_up:
        return []
    dims = _divided(program, looked_up)
    groups: dict[fx.Node, set[fx.Node]] = {}
    for x in looked_up:
        if dims.get(x.weight) == 1:
            _join(groups, _above(x.weight, dims))
    for n in dims:  # in the order of the graph: what else is computed of them
        if any(a in groups for a in n.all_input_nodes):
            _join(groups, _above(n, dims))
    totals = regularisers.uses(regularisers.find_totals(program))
    result = []
    for members in {id(m): m for m in groups.values()}.values():
        ordered = sorted(members, key=order.__getitem__)
        lookups = [x.node for x in looked_up if x.weight in members]
        users = {u for n in ordered for u in n.users if u not in members}
        others = [u for u in users if u not in totals and not _is_own_lookup(u, members)]
        result.append(
            Group(
                tuple(str(program.parameter(n)) for n in ordered if n.op == "placeholder"),
                {n: dims[n] for n in ordered},
                tuple(lookups),
                tuple(sorted(others, key=order.__getitem__)),
                tuple(sorted(whole_parameters(program, members))),
            )
        )
    return sorted(result, key=lambda g: order[next(iter(g.dims))])


def whole_parameters(program: Program, divided: Collection[fx.Node]) -> set[str]:
    """Parameters that divided values are computed with, and that are no such values themselves."""
    inside = {a for n in divided for a in n.all_input_nodes if a not in divided}
    return {name for n in ancestors(inside) if (name := program.parameter(n)) is not None}


def computed_by_rows(program: Program, node: fx.Node) -> dict[fx.Node, int] | None:
    """Tables that a node is computed of row by row: a parameter first, then the values up to the node, and which of
    their dimensions the rows are; None if it is not."""
    above = ancestors({node})
    if any(s.kind == "input" for n in above if (s := program.source(n)) is not None):
        return None
    ordered = [n for n in program.graph.nodes if n in above]
    rows = shape_of(node)[0]
    bases = [n for n in ordered if program.parameter(n) and len(shape_of(n)) == 2 and shape_of(n)[0] == rows]
    for base in sorted(bases, key=lambda n: -value(n).numel()):  # the richest one; the others are narrowed
        dims = {base: 0}
        for n in ordered:
            if n.op == "call_function" and (step := follow(n, dims)) is not None:
                dims[n] = step.dim
        if dims.get(node) == 0:
            needed = _above(node, dims)
            return {n: d for n, d in dims.items() if n in needed}
    return None


def whole_tables(program: Program) -> list[str]:
    """Matrices that looked-up values are computed of."""
    looked_up = [x.weight for n in program.graph.nodes if (x := LookupCall.of(n)) is not None]
    computed = {n for n in looked_up if _is_computed(program, n)}
    above = [n for n in ancestors(computed) if program.parameter(n) and len(shape_of(n)) == 2]
    return [str(program.parameter(n)) for n in above if value(n).is_floating_point()]


def _is_computed(program: Program, weight: fx.Node) -> bool:
    return weight.op == "call_function" and scope_of(weight).kind == CONSTANT and len(shape_of(weight)) == 2


def _is_own_lookup(user: fx.Node, members: set[fx.Node]) -> bool:
    """Whether a node looks up rows of a member, and uses no member otherwise."""
    call = LookupCall.of(user)
    return call is not None and scope_of(user).kind != CONSTANT and call.ids not in members


def _divided(program: Program, looked_up: Sequence[LookupCall]) -> dict[fx.Node, int]:
    """Tables that lookups of computed values depend on, and what can be divided with their columns; along which dim."""
    above = ancestors({x.weight for x in looked_up})
    dims: dict[fx.Node, int] = {}
    for n in program.graph.nodes:
        if n.op == "placeholder":
            matrix = program.parameter(n) and len(shape_of(n)) == 2 and value(n).is_floating_point()
            if n in above and matrix:
                dims[n] = 1
        elif scope_of(n).kind == CONSTANT:
            step = follow(n, dims)
            if step is not None and len({shape_of(a)[dims[a]] for a in n.all_input_nodes if a in dims}) == 1:
                dims[n] = step.dim
    return dims


def _above(start: fx.Node, dims: Mapping[fx.Node, int]) -> set[fx.Node]:
    """A divided node and the divided ones that it is computed from."""
    found: set[fx.Node] = set()
    stack = [start]
    while stack:
        n = stack.pop()
        if n not in found:
            found.add(n)
            stack.extend(a for a in n.all_input_nodes if a in dims)
    return found


def _join(groups: dict[fx.Node, set[fx.Node]], members: set[fx.Node]) -> None:
    """Nodes that share an ancestor are one group."""
    joined = set(members)
    for n in members:
        joined |= groups.get(n, set())
    for n in joined:
        groups[n] = joined


def groups_of(operators: Iterable[Any]) -> list[Group]:
    """The groups that tables belong to, each once."""
    return list({id(o.group): o.group for o in operators if o.group is not None}.values())


def notes_of_computed(groups: Sequence[Group], by_columns: Collection[str]) -> list[str]:
    """For people: what is computed of whole tables, and on which ranks, given the tables divided by columns."""
    notes = []
    for g in groups:
        divided = all(name in by_columns for name in g.tables)
        where = "each rank computes its columns, nothing crosses" if divided else "every rank computes all of it"
        notes.append(f"computed table {g}: {where}  {user_line(g.nodes[-1])}".rstrip())
    return notes


def whole_notes(operators: Iterable[Any], splits: Mapping[str, Any]) -> list[str]:
    """For people: which tables are gathered whole, for what, and what that sends."""
    notes = []
    for o in operators:
        pieces = splits[o.name].pieces
        if splits[o.name].whole:
            size = o.size_bytes * 2 * (pieces.ranks - 1) // pieces.ranks
            uses = (*o.other_uses, *(x.node for x in o.outputs), *(x.node for x in o.lookups))
            notes.append(
                f"gathered table {o.name}: {target_name(uses[0])} needs all of it, {size:,} B a rank for its rows and "
                f"their gradients  {user_line(uses[0])}".rstrip()
            )
    return notes

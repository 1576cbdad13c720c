"""A model's graph as inline SVG, before and after: what is alike is one box, boxes in layers from top to bottom.

Layers, order and positions follow Sugiyama, Tagawa, Toda (1981): the longest path from the inputs gives the layer, an
edge over several layers goes through points in between, a few sweeps of barycentres order each layer, and boxes move
towards the mean of their neighbours as far as their neighbours let them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from descompiler.graph.nodes import elements_per_row, is_tensor, target_name
from descompiler.graph.program import Program, rowwise
from descompiler.planning.kinds import pattern_of
from descompiler.planning.plan import Plan
from descompiler.region.cut import Cut
from descompiler.tables.tables import Operator
from descompiler.units import format_bytes, format_count

CHAIN = 5
"""Operators of a chain that are named; of longer ones, the ends."""


@dataclass
class Box:
    """A node of a drawing.

    Attributes
    ----------
    kind : {"input", "ids", "table", "fetch", "region", "outside", "wire", "output"}
        Its colour: "wire" is a transfer, "fetch" a table whose rows are fetched from their owners.
    lines : list of str
        Its text.
    """

    kind: str
    lines: list[str]


@dataclass
class Drawing:
    """Boxes, edges between them, and the bytes on edges."""

    boxes: dict[str, Box] = field(default_factory=dict)
    edges: dict[tuple[str, str], str] = field(default_factory=dict)

    def connect(self, a: str, b: str, text: str = "") -> None:
        self.edges.setdefault((a, b), text)


@dataclass(frozen=True)
class _Group:
    kind: str
    nodes: tuple[fx.Node, ...]
    name: str


def _groups(program: Program, operators: Sequence[Operator], plan: Plan, cut: Cut) -> dict[fx.Node, _Group]:
    """Nodes that are alike: the same operator, at the same side, for the same users."""
    lookups = {x.node: o for o in operators for x in o.lookups}
    before_lookups: set[fx.Node] = set()
    stack = [x.ids for o in operators for x in o.lookups]
    while stack:
        n = stack.pop()
        if n not in before_lookups and n not in lookups:
            before_lookups.add(n)
            stack.extend(n.all_input_nodes)

    def kind_of(n: fx.Node) -> str:
        if n.op == "placeholder":
            return "input"
        if n.op == "output":
            return "output"
        if n in lookups:
            return "table"
        if n in cut.inside:
            return "region"
        return "ids" if n in before_lookups else "outside"

    keys: dict[fx.Node, object] = {}
    members: dict[object, list[fx.Node]] = {}
    for n in reversed(list(program.graph.nodes)):
        source = program.source(n)
        if n.op == "placeholder" and (source is None or source.kind != "input"):
            continue
        if n.op == "get_attr" or (n.op == "call_function" and not is_tensor(n) and not n.users):
            continue
        users = frozenset(id(keys[u]) if u in keys else -1 for u in n.users)
        key: object
        if n.op == "placeholder":
            key = n.name
        elif n in lookups:
            o = lookups[n]
            key = ("table", o.dim, plan.splits[o.name].form, n in cut.inside, n in cut.exits, users)
        else:
            key = (kind_of(n), target_name(n), n in cut.exits, users)
        if key in members:
            key = next(k for k in members if k == key)  # the same object, since users are compared by identity
        keys[n] = key
        members.setdefault(key, []).append(n)
    result = {}
    for number, (_, nodes) in enumerate(members.items()):
        group = _Group(kind_of(nodes[0]), tuple(reversed(nodes)), f"g{number}")
        result.update(dict.fromkeys(nodes, group))
    return result


def _chains(groups: Mapping[fx.Node, _Group], cut: Cut) -> dict[str, list[_Group]]:
    """Group name to the chain that it is part of: the only user of the one before, and that one's only user."""
    after: dict[str, set[str]] = {}
    before: dict[str, set[str]] = {}
    by_name = {g.name: g for g in groups.values()}
    for n, g in groups.items():
        for p in n.all_input_nodes:
            if p in groups and groups[p].name != g.name:
                after.setdefault(groups[p].name, set()).add(g.name)
                before.setdefault(g.name, set()).add(groups[p].name)
    chain = {name: [g] for name, g in by_name.items()}
    exits = {groups[n].name for n in cut.exits}
    for n in groups:  # in the order of the graph, reversed
        a = groups[n].name
        if a in exits or len(after.get(a, ())) != 1:
            continue
        (b,) = after[a]
        alike = by_name[a].kind == by_name[b].kind and by_name[a].kind in ("ids", "outside", "region")
        if alike and len(before[b]) == 1 and chain[a] is not chain[b]:
            joined = [*chain[a], *chain[b]]
            for g in joined:
                chain[g.name] = joined
    return chain


def _bytes_of(plan: Plan, nodes: Iterable[fx.Node], program: Program) -> int:
    """Bytes of values of own rows."""
    total = 0
    for n in nodes:
        if rowwise(program, n):
            width = plan.itemsize if n.meta["val"].is_floating_point() else plan.layout.id_bytes
            total += elements_per_row(n) * plan.rows * width
    return total


def _chain_lines(chain: Sequence[_Group]) -> list[str]:
    names = [target_name(g.nodes[0]).removeprefix("aten.").split(".")[0] for g in chain]
    count = f" × {len(chain[0].nodes)}" if len(chain) == 1 and len(chain[0].nodes) > 1 else ""
    if len(names) > CHAIN:
        return [" → ".join(names[:2]) + " → …", f"… → {names[-1]}  ({len(names)} operators)"]
    lines = [" → ".join(names[i : i + 3]) for i in range(0, len(names), 3)]
    return [line + (" →" if i + 1 < len(lines) else count) for i, line in enumerate(lines)]


def _tables_of(group: _Group, operators: Sequence[Operator]) -> list[Operator]:
    nodes = set(group.nodes)
    return [o for o in operators if any(x.node in nodes for x in o.lookups)]


def _table_lines(group: _Group, operators: Sequence[Operator]) -> list[str]:
    of = _tables_of(group, operators)
    sizes = sorted(o.rows for o in of)
    rows = format_count(sizes[0]) + (f" to {format_count(sizes[-1])}" if sizes[0] != sizes[-1] else "")
    count = f"{len(of)} tables, " if len(of) > 1 else ""
    return [pattern_of([o.name for o in of]), f"{count}{rows} rows × {of[0].dim}"]


def _table_box(group: _Group, operators: Sequence[Operator], plan: Plan, cut: Cut) -> Box:
    """Tables in the distributed model: their form, and what they send by themselves outside the region."""
    of = _tables_of(group, operators)
    splits = [plan.splits[o.name] for o in of]
    owners = {r for split in splits for r in split.pieces.owners}
    where = f"{len(owners)} of {plan.ranks}" if owners else f"all {plan.ranks}"
    sent: dict[str, int] = {}
    tables = {t.name: t for t in plan.tables}
    for o in of:
        if o.lookups[0].node in group.nodes:  # once, where a table is looked up several times
            for what, (_, size) in plan.sends(tables[o.name]).items():
                sent[what] = sent.get(what, 0) + size
    lines = [*_table_lines(group, operators), f"{splits[0].form} on {where} ranks"]
    lines += [f"{what}: {format_bytes(size)}" for what, size in sent.items()]
    inside = group.nodes[0] in cut.inside
    return Box("region" if inside else "fetch" if owners else "table", lines)


def drawing(program: Program, operators: Sequence[Operator], plan: Plan, cut: Cut, *, after: bool) -> Drawing:
    """The graph, before (bytes of each value for one rank's rows) or after (what crosses the wire, as boxes)."""
    groups = _groups(program, operators, plan, cut)
    chains = _chains(groups, cut)
    result = Drawing()

    def box_of(n: fx.Node) -> str:
        return chains[groups[n].name][0].name

    for n in program.graph.nodes:
        if n not in groups:
            continue
        g, name = groups[n], box_of(n)
        if name in result.boxes:
            continue
        if g.kind == "input":
            box = Box("input", [program.sources[n.name].name.replace("tensors_", "input ")])
        elif g.kind == "output":
            box = Box("output", ["output"])
        elif g.kind == "table":
            box = _table_box(g, operators, plan, cut) if after else Box("table", _table_lines(g, operators))
        else:
            kind = "outside" if g.kind == "region" and not after else g.kind
            box = Box(kind, _chain_lines(chains[g.name]))
        result.boxes[name] = box
    wires = _wires(program, plan) if after else {}
    for n in program.graph.nodes:
        if n not in groups:
            continue
        for p in n.all_input_nodes:
            if p not in groups or box_of(p) == box_of(n):
                continue
            crosses = after and (p in cut.inside) != (n in cut.inside)
            if crosses and p in wires:
                wire = f"wire-{groups[p].name}"
                same = [q for q in groups[p].nodes if q in wires]
                size = sum(wires[q][1] for q in same)
                result.boxes[wire] = Box("wire", [wires[p][0], format_bytes(size)])
                result.connect(box_of(p), wire)
                result.connect(wire, box_of(n))
            else:
                text = "" if after else format_bytes(_bytes_of(plan, groups[p].nodes, program))
                result.connect(box_of(p), box_of(n), text)
    return result


def _wires(program: Program, plan: Plan) -> dict[fx.Node, tuple[str, int]]:
    """By node that crosses the border of the region: what crosses, and bytes per rank and step."""
    nodes = {n.name: n for n in program.graph.nodes}
    what = {"ids": "ids to owners", "values": "values out, gradients back"}
    return {
        nodes[c.value]: (
            "partial sums out, gradients back" if c.sums else what[c.kind],
            plan.bytes_of(c.formula, **c.symbols),
        )
        for c in plan.crossings
        if c.kind in what
    }


CHAR_PX, LINE_PX, PAD_PX = 7.0, 16, 9


GAP_X, GAP_Y = 26, 46

"""A model's graph as inline SVG, before and after: what is alike is one box, boxes in layers from top to bottom.

Layers, order and positions follow Sugiyama, Tagawa, Toda (1981): the longest path from the inputs gives the layer, an
edge over several layers goes through points in between, a few sweeps of barycentres order each layer, and boxes move
towards the mean of their neighbours as far as their neighbours let them.
"""

from __future__ import annotations

import html
import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import fx

from descompiler.aggregate import Cut
from descompiler.operators import Operator
from descompiler.plan import Plan
from descompiler.program import Program, is_tensor, rowwise, tail, target_name
from descompiler.sheets import pattern_of
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


# --- what is drawn


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
            total += prod(tail(n)) * plan.rows * width
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
    wires = _wires(program, operators, plan, cut) if after else {}
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


def _wires(program: Program, operators: Sequence[Operator], plan: Plan, cut: Cut) -> dict[fx.Node, tuple[str, int]]:
    """By node that crosses: what crosses, and bytes per rank and step."""
    nodes = {n.name: n for n in program.graph.nodes}
    result: dict[fx.Node, tuple[str, int]] = {}
    values = iter([c for c in plan.crossings if c.kind == "values"])
    for c in plan.crossings:
        if c.kind == "ids":
            result[nodes[c.name]] = ("ids to owners", plan.bytes_of(c.formula, L=c.width))
    for node, c in zip(cut.exits, values, strict=True):
        what = "partial sums" if c.placement.startswith(("Partial", "Disjoint")) else "values"
        result[node] = (f"{what} out, gradients back", plan.bytes_of(c.formula, w=c.width))
    return result


# --- how it is drawn

CHAR_PX, LINE_PX, PAD_PX = 7.0, 16, 9
GAP_X, GAP_Y = 26, 46


@dataclass
class _Place:
    width: float
    height: float
    layer: int = 0
    x: float = 0.0  # centre
    y: float = 0.0  # top


def to_svg(d: Drawing, title: str) -> str:
    """The drawing, laid out."""
    places, paths = _layout(d)
    tip = f"tip-{zlib.crc32(title.encode()):08x}"  # one page has several drawings
    if not places:
        return f"<p class='note'>{html.escape(title)}: nothing to draw.</p>"
    width = max(p.x + p.width / 2 for p in places.values()) + 12
    height = max(p.y + p.height for p in places.values()) + 12
    out = [
        f"<svg class='graph' viewBox='0 0 {width:.0f} {height:.0f}' style='max-width:{width:.0f}px' role='img' "
        f"aria-label='{html.escape(title, quote=True)}'>",
        f"<title>{html.escape(title)}</title>",
        f"<defs><marker id='{tip}' viewBox='0 0 8 8' refX='7' refY='4' markerUnits='userSpaceOnUse' markerWidth='9' "
        "markerHeight='9' orient='auto'>"
        "<path class='tip' d='M 0 0 L 8 4 L 0 8 z'/></marker></defs>",
    ]
    taken: list[tuple[float, float, float]] = []
    labels = []
    for edge, points in paths.items():
        d_ = f"M {points[0][0]:.1f} {points[0][1]:.1f}"
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            middle = (y0 + y1) / 2
            d_ += f" C {x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
        wire = any(d.boxes[end].kind == "wire" for end in edge)
        out.append(f"<path class='edge{' wire' if wire else ''}' d='{d_}' marker-end='url(#{tip})'/>")
        if text := d.edges[edge]:
            x, y = _free_spot(points[-2], points[-1], 6.2 * len(text), taken)
            labels.append(f"<text class='bytes' x='{x:.1f}' y='{y + 4:.1f}' text-anchor='middle'>{text}</text>")
    out += labels
    for name, box in d.boxes.items():
        p = places[name]
        radius = p.height / 2 if box.kind == "wire" else 5
        out.append(
            f"<rect class='box {box.kind}' x='{p.x - p.width / 2:.1f}' y='{p.y:.1f}' width='{p.width:.1f}' "
            f"height='{p.height:.1f}' rx='{radius:.0f}'/>"
        )
        for i, line in enumerate(box.lines):
            y = p.y + PAD_PX + 12 + i * LINE_PX
            strong = " strong" if i == 0 else ""
            text = html.escape(line)
            out.append(f"<text class='box{strong}' x='{p.x:.1f}' y='{y:.1f}' text-anchor='middle'>{text}</text>")
    out.append("</svg>")
    return "\n".join(out)


def _free_spot(
    start: tuple[float, float], end: tuple[float, float], width: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float]:
    """Where on the curve from ``start`` to ``end`` a label of that width hides no other; adds it to ``taken``."""
    (x0, y0), (x1, y1) = start, end
    spots = []
    for t in (0.5, 0.35, 0.65, 0.22, 0.78):
        ease = 3 * t * t - 2 * t**3  # the curve's Bézier points are at x0, x0, x1, x1
        spots.append((x0 + (x1 - x0) * ease, y0 + (y1 - y0) * (1.5 * t - 1.5 * t * t + t**3)))
    free = [(x, y) for x, y in spots if all(abs(x - a) > (width + w) / 2 or abs(y - b) > 12 for a, b, w in taken)]
    x, y = (free or spots)[0]
    taken.append((x, y, width))
    return x, y


def _layout(d: Drawing) -> tuple[dict[str, _Place], dict[tuple[str, str], list[tuple[float, float]]]]:
    places = {
        name: _Place(
            max(CHAR_PX * max(map(len, box.lines)), 40) + 2 * PAD_PX + (12 if box.kind == "wire" else 0),
            len(box.lines) * LINE_PX + 2 * PAD_PX - 4,
        )
        for name, box in d.boxes.items()
    }
    before: dict[str, list[str]] = {n: [] for n in places}
    after: dict[str, list[str]] = {n: [] for n in places}
    for a, b in d.edges:
        before[b].append(a)
        after[a].append(b)
    order = _topological(before, after)
    for n in order:
        places[n].layer = max((places[p].layer + 1 for p in before[n]), default=0)
    for n in reversed(order):  # inputs stand just above what they feed
        if not before[n] and after[n]:
            places[n].layer = min(places[u].layer for u in after[n]) - 1
    # points in between of edges over several layers
    routes: dict[tuple[str, str], list[str]] = {}
    for number, (a, b) in enumerate(d.edges):
        route = [a]
        for layer in range(places[a].layer + 1, places[b].layer):
            name = f"point-{number}-{layer}"
            places[name] = _Place(14.0, 0.0, layer)
            route.append(name)
        routes[a, b] = [*route, b]
    near: dict[str, tuple[list[str], list[str]]] = {n: ([], []) for n in places}
    for nodes in routes.values():
        for above, below in itertools.pairwise(nodes):
            near[above][1].append(below)
            near[below][0].append(above)
    layers = _ordered(places, near)
    _positions(places, near, layers)
    y = 12.0
    for names in layers:
        tallest = max(places[n].height for n in names)
        for n in names:
            places[n].y = y + (tallest - places[n].height) / 2
        y += tallest + GAP_Y
    shift = min(p.x - p.width / 2 for p in places.values()) - 12
    for p in places.values():
        p.x -= shift
    paths = {}
    for edge, nodes in routes.items():
        first, last = places[nodes[0]], places[nodes[-1]]
        points = [(first.x, first.y + first.height)]
        points += [(places[n].x, places[n].y) for n in nodes[1:-1]]
        paths[edge] = [*points, (last.x, last.y - 1)]
    return {n: places[n] for n in d.boxes}, paths


def _topological(before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]]) -> list[str]:
    waiting = {n: len(set(p)) for n, p in before.items()}
    ready = [n for n, count in waiting.items() if not count]
    order = []
    while ready:
        n = ready.pop(0)
        order.append(n)
        for u in dict.fromkeys(after[n]):
            waiting[u] -= 1
            if not waiting[u]:
                ready.append(u)
    assert len(order) == len(waiting), "a drawing has no cycles"
    return order


def _ordered(places: Mapping[str, _Place], near: Mapping[str, tuple[list[str], list[str]]]) -> list[list[str]]:
    """The layers, ordered by barycentres."""
    layers: list[list[str]] = [[] for _ in range(max(p.layer for p in places.values()) + 1)]
    for n, p in places.items():
        layers[p.layer].append(n)
    rank = {n: float(i) for layer in layers for i, n in enumerate(layer)}
    for sweep in range(8):
        side = sweep % 2
        for layer in layers if side == 0 else reversed(layers):
            centre = {
                n: sum(rank[m] for m in near[n][side]) / len(near[n][side]) if near[n][side] else rank[n] for n in layer
            }
            layer.sort(key=lambda n: centre[n])
            rank.update({n: float(i) for i, n in enumerate(layer)})
    return layers


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _positions(
    places: Mapping[str, _Place], near: Mapping[str, tuple[list[str], list[str]]], layers: Sequence[Sequence[str]]
) -> None:
    """Centres along each layer: as near to the mean of the neighbours as the order and the widths allow."""
    for layer in layers:
        x = 0.0
        for n in layer:
            places[n].x = x + places[n].width / 2
            x += places[n].width + GAP_X
        for n in layer:
            places[n].x -= x / 2
    for sweep in range(24):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = {n: _mean([places[m].x for m in (*near[n][0], *near[n][1])], places[n].x) for n in layer}
            _spread(layer, wanted, places)


def _spread(layer: Sequence[str], wanted: Mapping[str, float], places: Mapping[str, _Place]) -> None:
    """Least squares to the wanted centres with the least distances kept: blocks that collide move as one."""
    blocks: list[tuple[float, int, list[tuple[str, float]]]] = []  # mean of wanted - offset, count, (name, offset)
    for n in layer:
        mean, count, members = wanted[n], 1, [(n, 0.0)]
        while blocks:
            other_mean, other_count, other = blocks[-1]
            last, offset = other[-1]
            gap = offset + (places[last].width + places[n if count == 1 else members[0][0]].width) / 2 + GAP_X
            if mean >= other_mean + gap:
                break
            blocks.pop()
            members = [*other, *((m, o + gap) for m, o in members)]
            mean = (other_mean * other_count + (mean - gap) * count) / (other_count + count)
            count += other_count
        blocks.append((mean, count, members))
    for mean, _, members in blocks:
        for n, offset in members:
            places[n].x = mean + offset

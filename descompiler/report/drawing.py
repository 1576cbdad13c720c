"""Drawings of graphs as inline SVG: boxes in layers, lines between them, labels where there is room."""

from __future__ import annotations

import html
import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from descompiler.report.graphs import CHAR_PX, GAP_X, GAP_Y, LINE_PX, PAD_PX, Drawing
from descompiler.sheet import printable


@dataclass
class _Place:
    width: float
    height: float
    layer: int = 0
    x: float = 0.0  # centre
    y: float = 0.0  # top


def to_svg(d: Drawing, title: str) -> str:
    """The drawing, laid out."""
    places, paths = _arrange(d)
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
            shown = html.escape(text)
            labels.append(f"<text class='bytes' x='{x:.1f}' y='{y + 4:.1f}' text-anchor='middle'>{shown}</text>")
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
            text = html.escape(printable(line))
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


def _arrange(d: Drawing) -> tuple[dict[str, _Place], dict[tuple[str, str], list[tuple[float, float]]]]:
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

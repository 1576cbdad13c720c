"""Charts as inline SVG, without a library and without scripts: lines on logarithmic or even axes, and bars.

Colours are classes (``c0`` ...) that the page's style sheet defines for light, dark and print; every line also has its
own dashes and its name at its end, so that no one needs the colours.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

WIDTH, HEIGHT = 860, 400


LEFT, RIGHT, TOP, BOTTOM = 76, 236, 20, 46


HEADING = 30
"""Above each chart of a file of several."""


LABEL_PX = 15
"""Least distance of two labels at the ends of lines."""


MOST_DOTS = 30
"""Points of a line up to which they are drawn as such."""


COLOURS = 7
"""Colour classes that the page defines."""


@dataclass(frozen=True)
class Line:
    """A curve: its name, and a value at each of the chart's positions."""

    name: str
    values: tuple[float, ...]
    strong: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happens at a position: a crossover."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Axis:
    """Where numbers between two are on an axis: by their logarithms, or evenly."""

    low: float
    high: float
    even: bool

    @staticmethod
    def of(values: Sequence[float], even: bool) -> Axis:
        """An axis with room around values."""
        low, high = min(values), max(values)
        if not even:
            return Axis(low / 1.3, high * 1.3, even)
        room = (high - low) / 20 or abs(high) / 20 or 1.0
        return Axis(low - room, high + room, even)

    def shows(self, value: float) -> bool:
        """Whether a number has a place."""
        return math.isfinite(value) and (self.even or value > 0)

    def at(self, value: float) -> float:
        """Where it is: 0 at the axis' beginning, 1 at its end."""
        if self.even:
            return (value - self.low) / (self.high - self.low)
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Round numbers."""
        if not self.even:
            return _ticks(self.low, self.high)
        span = (self.high - self.low) / 4
        step = 10.0 ** math.floor(math.log10(span))
        step *= max(f for f in (1, 2, 5) if f * step <= span)
        return [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def line_chart(
    title: str,
    x_title: str,
    xs: Sequence[float],
    lines: Sequence[Line],
    *,
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
    marks: Sequence[Mark] = (),
) -> str:
    """Lines over logarithmic axes; values that are not positive are left out.

    Parameters
    ----------
    marks : sequence of Mark
        Numbered on the chart, and listed below it.
    """
    if len(xs) < 2 or not any(v > 0 for line in lines for v in line.values):
        return f"<p class='note'>{html.escape(title)}: nothing to draw.</p>"
    out = [
        f"<svg class='chart' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{html.escape(title, quote=True)}'>",
        f"<title>{html.escape(title)}</title>",
        draw_lines(x_title, xs, lines, format_x=format_x, format_y=format_y, marks=marks),
        "</svg>",
    ]
    if marks:
        items = "".join(f"<li>{html.escape(m.text)}</li>" for m in marks)
        out.append(f"<ol class='marks'>{items}</ol>")
    return "\n".join(out)


def draw_lines(
    x_title: str,
    xs: Sequence[float],
    lines: Sequence[Line],
    *,
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
    marks: Sequence[Mark] = (),
    even: str = "",
) -> str:
    """What `line_chart` has inside of its ``svg``, of two positions or more.

    Parameters
    ----------
    even : {"", "x", "y", "xy"}
        Axes that are not logarithmic.
    """
    values = [v for line in lines for v in line.values if Axis(1, 1, "y" in even).shows(v)]
    across, up = Axis(xs[0], xs[-1], "x" in even), Axis.of(values, "y" in even)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x_px(x: float) -> float:
        return LEFT + (right - LEFT) * across.at(x)

    def y_px(y: float) -> float:
        return bottom - (bottom - TOP) * up.at(y)

    out = []
    for y in up.ticks():
        out.append(f"<line class='grid' x1='{LEFT}' y1='{y_px(y):.1f}' x2='{right}' y2='{y_px(y):.1f}'/>")
        out.append(f"<text class='tick' x='{LEFT - 8}' y='{y_px(y) + 4:.1f}' text-anchor='end'>{format_y(y)}</text>")
    for x in across.ticks() if across.even else xs:
        out.append(f"<line class='axis' x1='{x_px(x):.1f}' y1='{bottom}' x2='{x_px(x):.1f}' y2='{bottom + 5}'/>")
        label = html.escape(format_x(x))
        out.append(f"<text class='tick' x='{x_px(x):.1f}' y='{bottom + 19}' text-anchor='middle'>{label}</text>")
    out.append(f"<line class='axis' x1='{LEFT}' y1='{bottom}' x2='{right}' y2='{bottom}'/>")
    middle = (LEFT + right) / 2
    out.append(
        f"<text class='tick' x='{middle:.0f}' y='{HEIGHT - 8}' text-anchor='middle'>{html.escape(x_title)}</text>"
    )
    ends = []
    for number, line in enumerate(lines):
        points = [(x_px(x), y_px(v)) for x, v in zip(xs, line.values, strict=True) if up.shows(v)]
        if not points:
            continue
        kind = f"curve c{number % COLOURS}" + (" strong" if line.strong else "")
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f"<polyline class='{kind}' points='{path}'/>")
        if line.strong and len(points) <= MOST_DOTS:
            out += [f"<circle class='dot c{number % COLOURS}' cx='{x:.1f}' cy='{y:.1f}' r='3.2'/>" for x, y in points]
        ends.append((points[-1][1], number, line))
    for (y, number, line), label_y in zip(sorted(ends, key=lambda e: e[0]), _apart([e[0] for e in ends]), strict=True):
        c = f"c{number % COLOURS}"
        out.append(f"<path class='leader {c}' d='M {right + 3} {y:.1f} L {right + 16} {label_y:.1f}'/>")
        weight = " strong" if line.strong else ""
        text = html.escape(line.name)
        out.append(f"<text class='label {c}{weight}' x='{right + 20}' y='{label_y + 4:.1f}'>{text}</text>")
    for number, mark in enumerate(marks, 1):
        x, y = x_px(mark.x), y_px(mark.y)
        out.append(f"<line class='mark' x1='{x:.1f}' y1='{TOP}' x2='{x:.1f}' y2='{bottom}'/>")
        out.append(f"<circle class='mark' cx='{x:.1f}' cy='{y:.1f}' r='8'/>")
        out.append(f"<text class='mark' x='{x:.1f}' y='{y + 4:.1f}' text-anchor='middle'>{number}</text>")
    return "\n".join(out)


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and their halves and fifths where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(found) >= 3:
            return found
    return found


def _apart(positions: Sequence[float]) -> list[float]:
    """Sorted positions, moved so that neighbours are `LABEL_PX` apart and all are on the chart.

    >>> _apart([10.0, 12.0, 100.0])
    [20, 35, 100.0]
    """
    result: list[float] = []
    for y in sorted(positions):
        result.append(max(y, TOP, result[-1] + LABEL_PX if result else TOP))
    limit = float(HEIGHT - BOTTOM)
    for i in reversed(range(len(result))):
        result[i] = min(result[i], limit)
        limit = result[i] - LABEL_PX
    return result


def cheapest_changes(
    xs: Sequence[float], lines: Sequence[Line], what: str, format_x: Callable[[float], str]
) -> list[Mark]:
    """Where the cheapest of the lines changes: crossings of straight lines on the logarithmic chart."""
    marks = []
    for i, (x0, x1) in enumerate(itertools.pairwise(xs)):
        first = min(lines, key=lambda line: line.values[i])
        second = min(lines, key=lambda line: line.values[i + 1])
        if first is second or min(first.values[i], second.values[i]) <= 0:
            continue
        before = math.log(second.values[i] / first.values[i])
        after = math.log(second.values[i + 1] / first.values[i + 1])
        if before == after:
            continue
        t = before / (before - after)
        x = x0 * (x1 / x0) ** t
        y = first.values[i] * (first.values[i + 1] / first.values[i]) ** t
        marks.append(Mark(x, y, f"from about {format_x(x)} {what}: {second.name} below {first.name}"))
    return marks


def bars(
    title: str, rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[str], format_x: Callable[[float], str]
) -> str:
    """Horizontal stacked bars: a name and the sizes of its parts."""
    most = max((sum(sizes) for _, sizes in rows), default=0.0)
    if most <= 0:
        return f"<p class='note'>{html.escape(title)}: nothing to draw.</p>"
    height, left, right = 22, 150, WIDTH - 110
    total = height * len(rows) + 34
    out = [
        f"<svg class='chart' viewBox='0 0 {WIDTH} {total}' role='img' aria-label='{html.escape(title, quote=True)}'>",
        f"<title>{html.escape(title)}</title>",
    ]
    x = float(left)
    for number, part in enumerate(parts):
        out.append(f"<rect class='bar c{number}' x='{x:.0f}' y='4' width='12' height='12'/>")
        out.append(f"<text class='tick' x='{x + 18:.0f}' y='14'>{html.escape(part)}</text>")
        x += 34 + 7.2 * len(part)
    for row, (name, sizes) in enumerate(rows):
        y, x = 28 + row * height, float(left)
        out.append(f"<text class='tick' x='{left - 8}' y='{y + 13}' text-anchor='end'>{html.escape(name)}</text>")
        for number, size in enumerate(sizes):
            width = (right - left) * size / most
            if width > 0:
                out.append(
                    f"<rect class='bar c{number}' x='{x:.1f}' y='{y}' width='{width:.1f}' height='{height - 6}'/>"
                )
            x += width
        out.append(f"<text class='tick' x='{x + 6:.1f}' y='{y + 13}'>{format_x(sum(sizes))}</text>")
    out.append("</svg>")
    return "\n".join(out)


def standing_alone(title: str, drawn: Mapping[str, str]) -> str:
    """What `draw_lines` has drawn, below one another and by headings, as one SVG file with its style."""
    each = HEIGHT + HEADING
    total = each * len(drawn)
    style = (resources.files("descompiler.report") / "report.css").read_text(encoding="utf-8")
    out = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {total}' role='img'>",
        f"<title>{html.escape(title)}</title>",
        f"<style>{style} svg {{ max-width: {WIDTH}px; }} rect.sheet {{ fill: var(--bg); }}</style>",
        f"<rect class='sheet' width='{WIDTH}' height='{total}'/>",
    ]
    for number, (heading, chart) in enumerate(drawn.items()):
        out.append(f"<g transform='translate(0 {number * each})'>")
        out.append(f"<text class='strong' x='{LEFT}' y='{HEADING - 8}'>{html.escape(heading)}</text>")
        out.append(f"<g transform='translate(0 {HEADING})'>{chart}</g></g>")
    return "\n".join([*out, "</svg>", ""])

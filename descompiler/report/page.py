"""`page`: a plan as one self-contained HTML page, without scripts and without anything from elsewhere.

It opens offline, follows the reader's light or dark theme, and prints. Formulas are MathML, drawings inline SVG.
"""

from __future__ import annotations

import html
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources

from descompiler.captured import Captured
from descompiler.graph.nodes import target_name
from descompiler.planning import summary
from descompiler.planning.cluster import Cluster
from descompiler.planning.plan import Plan
from descompiler.region.cut import Candidates
from descompiler.report import charts, drawing, graphs, render
from descompiler.report.charts import Line, Mark
from descompiler.sheet import Column, Sheet, printable
from descompiler.units import format_bandwidth, format_bytes, format_count, format_seconds

BANDWIDTHS = tuple(x * 1e9 / 8 for x in (1, 2.5, 5, 10, 25, 50, 100, 200, 400))
"""Bytes per second of the links that the page's third chart goes through."""


DRAWN = (
    "data parallel, dense gradients",
    "data parallel, sparse gradients",
    "parameter server, unique ids",
    "mesh, the batch's rows gathered",
    "TorchRec table-wise",
    "TorchRec row-wise",
)
"""The strategies in the charts; the table has all."""


def sweep_ranks(plan: Plan) -> tuple[int, ...]:
    """Powers of two around a plan's ranks."""
    most = max(64, 2 * plan.ranks)
    return tuple(sorted({*(1 << e for e in range(1, most.bit_length())), plan.ranks} - {1}))


def sweep_rows(plan: Plan) -> tuple[int, ...]:
    """Rows per rank around a plan's."""
    return tuple(sorted({max(1, round(plan.rows * 2.0**e)) for e in range(-4, 5)}))


def page(
    captured: Captured,
    plan: Plan,
    over_ranks: Sequence[Plan],
    over_rows: Sequence[Plan],
    *,
    title: str,
    cluster: Cluster,
) -> str:
    """The page.

    Parameters
    ----------
    captured : Captured
        The model of ``plan``.
    over_ranks, over_rows : sequence of Plan
        Plans of the same model, ascending: the charts.
    cluster : Cluster
        For seconds; its bandwidth is varied in the third chart.
    """
    partition = captured.partition(plan)
    where, title = cluster.with_ranks(plan.ranks), printable(title)

    def drawn(after: bool) -> str:
        d = graphs.drawing(captured.program, captured.operators, plan, partition.cut, after=after)
        name = f"{title}, {'after' if after else 'before'}"
        return f"<div class='scroll'>{drawing.to_svg(d, name)}</div>"

    crossing = [summary.crossings(plan), *([summary.mixing(plan)] if plan.notes else []), summary.parts(plan)]
    sections = [
        (
            "Before",
            "<p>The model as it was captured; operators that are alike are one box. Numbers on edges: bytes of the "
            f"values for one rank's {plan.rows:,} rows.</p>" + drawn(after=False),
        ),
        (
            "After",
            f"<p>The same model on {plan.ranks} ranks. <span class='key region'>Blue</span> boxes are computed where "
            "the weights are, on the global batch; <span class='key wire'>orange</span> ones are transfers and tables "
            "that fetch rows, with the bytes that a rank sends in a step (mean over ranks). Each rank computes the "
            "rest on its own rows.</p>" + drawn(after=True),
        ),
        ("Bytes against ranks", _over_ranks(over_ranks)),
        ("Bytes against batch", _over_rows(over_rows)),
        ("Time against bandwidth", _over_bandwidth(plan, where)),
        ("Memory per rank", _memory(plan)),
        (
            "Operators: formulas, prices and what was rejected",
            render.to_html(summary.candidates(plan)) + render.to_html(summary.thresholds(plan)),
        ),
        ("What crosses the wire", "".join(map(render.to_html, crossing))),
        ("Strategies", render.to_html(summary.strategies(plan, where))),
        ("Operators that stay outside", render.to_html(declined(partition.candidates))),
    ]
    best = min(plan.priced(cluster=where), key=lambda x: x.sent_bytes)
    mine = summary.mean_bytes(plan)
    tiles = [
        (format_bytes(mine), "sent per rank and step, ids included"),
        (f"{best.sent_bytes / mine:.2f} ×" if mine else "–", f"the same with {best.name}, the best other strategy"),
        (format_seconds(summary.step_seconds(plan, cluster)), f"communication per step on {where.name}"),
        (summary.summary_of(plan) or "no tables", "forms of the tables"),
    ]
    style = resources.files("descompiler.report").joinpath("report.css").read_text(encoding="utf-8")
    head = "".join(f"<div><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>" for a, b in tiles)
    body = "\n".join(f"<section><h2>{html.escape(name)}</h2>\n{text}\n</section>" for name, text in sections)
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        "<meta name='color-scheme' content='light dark'>\n<link rel='icon' href='data:,'>\n"
        f"<title>{html.escape(title)}: plan for {plan.ranks} ranks</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(title)}</h1><p>Plan for {plan.ranks} ranks, {plan.rows:,} rows a rank; "
        f"{len(plan.tables)} tables; fingerprint <code>{html.escape(plan.fingerprint)}</code></p>"
        f"<div class='tiles'>{head}</div></header>\n<main>\n{body}\n</main>\n"
        f"<footer>{html.escape(NOTE)}</footer>\n</body>\n</html>\n"
    )


NOTE = (
    "Bytes are those that one rank sends in one training step, ids and gradients included. Symbols: N ranks; b rows of "
    "the batch per rank; L ids a row; V rows of a table and k its width; U unique ids of a rank's batch; w elements a "
    "row that leave the region, over all ranks; s bytes an element; i bytes an id."
)


def declined(candidates: Candidates) -> Sheet:
    """Operators next to the region that no rule could keep inside, with the reasons."""
    counts = Counter((target_name(n), reason) for n, reason in candidates.declined.items())
    rows = tuple((name, n, reason) for (name, reason), n in counts.items())
    columns = (Column("operator"), Column("times", "count"), Column("why no rule keeps it in the region"))
    notes = () if rows else ("none: rules could keep every operator that follows a lookup inside.",)
    return Sheet("not placed in the region", columns, rows, notes)


def _changes(plans: Sequence[Plan], x: Callable[[Plan], float], what: str) -> list[Mark]:
    """Where the chosen forms or aggregation points change along a sweep."""

    def chosen(p: Plan) -> str:
        exits = ", ".join(dict.fromkeys(summary.exits_of(p))) or "nowhere"
        return f"{summary.summary_of(p)}; aggregated at {exits}"

    marks = []
    for p, q in itertools.pairwise(plans):
        if chosen(p) != chosen(q):
            text = f"from {format_count(x(q))} {what} another choice: {chosen(q)}"
            marks.append(Mark(x(q), summary.mean_bytes(q), text))
    return marks


def _bytes_lines(plans: Sequence[Plan]) -> list[Line]:
    mine = Line(summary.MINE, tuple(float(summary.mean_bytes(p)) for p in plans), strong=True)
    others = [{x.name: float(x.sent_bytes) for x in p.priced()} for p in plans]
    return [mine, *(Line(name, tuple(o[name] for o in others)) for name in DRAWN)]


def _over_ranks(plans: Sequence[Plan]) -> str:
    lines, xs = _bytes_lines(plans), [float(p.ranks) for p in plans]
    marks = _changes(plans, lambda p: p.ranks, "ranks")
    marks += charts.cheapest_changes(xs, lines, "ranks", lambda x: format_count(round(x)))
    return charts.line_chart(
        "bytes per rank and step against ranks",
        f"ranks ({plans[0].rows:,} rows a rank)",
        xs,
        lines,
        format_x=format_count,
        format_y=format_bytes,
        marks=marks,
    )


def _over_rows(plans: Sequence[Plan]) -> str:
    lines, xs = _bytes_lines(plans), [float(p.rows) for p in plans]
    marks = _changes(plans, lambda p: p.rows, "rows a rank")
    marks += charts.cheapest_changes(xs, lines, "rows a rank", lambda x: format_count(round(x)))
    return charts.line_chart(
        "bytes per rank and step against batch",
        f"rows of the batch per rank ({plans[0].ranks} ranks)",
        xs,
        lines,
        format_x=format_count,
        format_y=format_bytes,
        marks=marks,
    )


def with_bandwidth(cluster: Cluster, bytes_per_s: float) -> Cluster:
    """The cluster with another bandwidth of its slowest links."""
    link = "inter" if "inter" in cluster.links else "intra"
    changed = {name: replace(x, bytes_per_s=bytes_per_s) for name, x in cluster.links[link].items()}
    return replace(cluster, links={**cluster.links, link: changed})


def _over_bandwidth(plan: Plan, cluster: Cluster) -> str:
    every = [with_bandwidth(cluster, x) for x in BANDWIDTHS]
    lines = [Line(summary.MINE, tuple(summary.step_seconds(plan, c) for c in every), strong=True)]
    others = [{x.name: x.seconds or 0.0 for x in plan.priced(cluster=c)} for c in every]
    lines += [Line(name, tuple(o[name] for o in others)) for name in DRAWN]
    marks = charts.cheapest_changes(BANDWIDTHS, lines, "", format_bandwidth)
    chart = charts.line_chart(
        "communication per step against bandwidth",
        f"bandwidth of a link ({plan.ranks} ranks, {plan.rows:,} rows a rank, latency of {cluster.name})",
        BANDWIDTHS,
        lines,
        format_x=lambda x: format_bandwidth(x).replace(".00", "").replace(".0", "").replace("bit/s", ""),
        format_y=format_seconds,
        marks=marks,
    )
    return chart + (
        "<p class='note'>Predicted seconds of the collectives, one after the other, this plan unchanged; see the "
        "cluster's sources for latencies.</p>"
    )


MOST_BARS = 32


def _memory(plan: Plan) -> str:
    rows = [(f"rank {r}", summary.memory_words(plan, r)) for r in range(plan.ranks)]
    more = ""
    if len(rows) > MOST_BARS:
        rows = sorted(rows, key=lambda x: -sum(x[1]))
        shown = MOST_BARS // 2
        more = f"<p class='note'>The {shown} ranks with most and the {shown} with least, of {plan.ranks}.</p>"
        rows = [*rows[:shown], *rows[-shown:]]
    chart = charts.bars("memory per rank", rows, summary.MEMORY, format_bytes)
    return chart + more + render.to_html(summary.memory(plan))

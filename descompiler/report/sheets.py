"""What a plan says, as tables: operators and their candidates, what crosses the wire, strategies, memory, sweeps.

Tables of a model that are alike (same width, ids, form and prices) share a row, under one pattern of their names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import sympy

from descompiler.check.audit import Audit
from descompiler.cost_models.crossovers import WORDS, crossovers
from descompiler.cost_models.exchange import IDS_IN, VALUES_OUT_AND_BACK
from descompiler.cost_models.symbols import L, N, U, V, b, i, k, p, s, w
from descompiler.layout.statistics import Statistics
from descompiler.planning.cluster import Cluster
from descompiler.planning.plan import Crossing, Plan, Table
from descompiler.report.render import Column, Sheet
from descompiler.report.units import format_bandwidth, format_bytes, format_count
from descompiler.tables.form import FORMS, form_named

MINE = "this plan"


@dataclass(frozen=True)
class Kind:
    """Tables that are alike, and the form that they take.

    Attributes
    ----------
    pattern : str
        Their names, with ``*`` where they differ.
    prices : mapping of str to int
        By form: bytes that the busiest rank sends in a step if these tables took it.
    """

    pattern: str
    tables: tuple[Table, ...]
    form: str
    prices: Mapping[str, int]

    @property
    def title(self) -> str:
        return self.pattern + (f"  ({len(self.tables)} tables)" if len(self.tables) > 1 else "")

    @property
    def rows(self) -> str:
        """Rows of one table, or from the smallest to the largest."""
        sizes = sorted(t.rows for t in self.tables)
        few, most = format_count(sizes[0]), format_count(sizes[-1])
        return few if sizes[0] == sizes[-1] else f"{few} to {most}"


def pattern_of(names: Sequence[str]) -> str:
    """A pattern of names that differ in numbers or in dotted parts.

    >>> pattern_of(["a.tables.0.weight", "a.tables.12.weight"]), pattern_of(["user.weight", "item.weight"])
    ('a.tables.*.weight', '*.weight')
    """
    parts = [n.split(".") for n in names]
    if len({len(p) for p in parts}) > 1:
        return "*"
    return ".".join(x[0] if len(set(x)) == 1 else "*" for x in zip(*parts, strict=True))


def kinds(plan: Plan) -> list[Kind]:
    """The plan's tables, those that are alike together, in the order of the model."""
    groups: dict[Any, list[Table]] = {}
    for t in plan.tables:
        prices = tuple(sorted(plan.prices.get(t.name, {}).items()))
        key = (
            _without_index(t.name),
            t.dim,
            t.ids,
            t.itemsize,
            t.sparse,
            t.uses,
            tuple(sorted(t.refusals.items())),
            prices,
        )
        groups.setdefault((*key, plan.splits[t.name].form), []).append(t)
    return [
        Kind(pattern_of([t.name for t in g]), tuple(g), plan.splits[g[0].name].form, plan.prices.get(g[0].name, {}))
        for g in groups.values()
    ]


def candidates(plan: Plan, only: str | None = None) -> Sheet:
    """Every operator (or one) with the forms that it can take, their formulas and prices, the chosen one first."""
    rows: list[tuple[Any, ...]] = []
    strong = set()
    for kind in kinds(plan):
        if only is not None and only not in {t.name for t in kind.tables}:
            continue
        t = kind.tables[0]
        others = sorted((price, form) for form, price in kind.prices.items() if form != kind.form)
        head = (kind.title, kind.rows, t.dim, t.ids)
        for number, (price, form) in enumerate([(kind.prices.get(kind.form, plan.price_bytes), kind.form), *others]):
            formula = formula_of(form, t.sparse)
            if number == 0:
                strong.add(len(rows))
            verdict = "chosen" if number == 0 else f"{price - plan.price_bytes:+,} B"
            rows.append((*(head if number == 0 else ("", "", "", "")), form, formula, price, verdict))
        for form, reason in t.refusals.items():
            rows.append(("", "", "", "", form, None, None, f"not possible: {reason}"))
    return Sheet(
        f"operators and the forms that they can take: {plan.ranks} ranks, {plan.rows:,} rows a rank",
        (
            Column("operator"),
            Column("rows"),
            Column("dim", "count"),
            Column("ids a row", "count"),
            Column("form"),
            Column("sends, per rank and step", "formula"),
            Column("busiest rank", "bytes"),
            Column("verdict"),
        ),
        tuple(rows),
        (
            "busiest rank: all bytes that it sends in a step if the operator and those like it took that form.",
            choice(plan),
        ),
        frozenset(strong),
    )


_VALUES = VALUES_OUT_AND_BACK.subs(w, p * k)


_SUMS = VALUES_OUT_AND_BACK.subs(w, N * w)  # each of N ranks sends a term


_VALUES_LEAVE, _SUMS_LEAVE = "all-to-all", "partial sums"


def curves() -> dict[str, sympy.Expr]:
    """What tables send in each form: one receiver of each id."""
    found = {}
    for form in FORMS:
        if form.curve is not None:
            found[form.name] = form.curve
    for form in FORMS:
        if form.has_owners:
            found[f"{form.name}, {_VALUES_LEAVE}"] = IDS_IN + _VALUES
            found[f"{form.name}, {_SUMS_LEAVE}"] = IDS_IN + _SUMS
    return found


def curve_of(plan: Plan, kind: Kind) -> tuple[str, sympy.Expr] | None:
    """What tables send in the form that was chosen; None for a form whose curve depends on frequencies of ids."""
    form = form_named(kind.form)
    if form.curve is not None:
        return kind.form, form.curve
    leave = _leaving(plan, kind)
    if not leave:
        return None
    sums = all(c.placement.startswith(("Partial", "Disjoint")) for c in leave)
    several = len(plan.splits[kind.tables[0].name].pieces.owners) > 1  # then every rank needs all ids
    ids = IDS_IN.subs(L, N * L) if several and not form.has_owners else IDS_IN
    return f"{kind.form}, {_SUMS_LEAVE if sums else _VALUES_LEAVE}", ids + (_SUMS if sums else _VALUES)


def _leaving(plan: Plan, kind: Kind) -> list[Crossing]:
    names = {t.name for t in kind.tables}
    return [c for c in plan.crossings if c.kind == "values" and names & set(c.tables)]


def thresholds(plan: Plan, only: str | None = None) -> Sheet:
    """Where other forms overtake those that were chosen, in closed form: against ranks, and rows of a table.

    What several kinds of tables share (their ids, the sums that they are in) counts for each of them in part.
    """
    rows: list[tuple[Any, ...]] = []
    for kind in kinds(plan):
        if only is not None and only not in {t.name for t in kind.tables}:
            continue
        mine = curve_of(plan, kind)
        if mine is None:
            continue
        numbers = _numbers(plan, kind)
        for other in curves().items():
            if other[0] == mine[0] or (w in other[1].free_symbols and not numbers[w]):
                continue
            # a table's rows change its unique ids, which no closed form knows
            for symbol in (N,) if U in other[1].free_symbols | mine[1].free_symbols else (N, V):
                known = {x: n for x, n in numbers.items() if x is not symbol}
                for c in crossovers(mine, other, symbol, known):
                    rows.append((kind.title, f"{c.first} beats {c.second}", WORDS[symbol.name], c.threshold, c.start))
    columns = (
        Column("operator"),
        Column("crossover"),
        Column("of"),
        Column("threshold", "formula"),
        Column("from", "count"),
    )
    notes = (
        f"all other numbers as here ({plan.ranks} ranks, {plan.rows:,} rows a rank, tables of the mean size); "
        "all-to-all: vectors leave the region; partial sums: w elements a row do, of every rank.",
    )
    return Sheet("crossovers, in closed form", columns, tuple(rows), notes)


def _numbers(plan: Plan, kind: Kind) -> dict[sympy.Symbol, float]:
    """The symbols' numbers, of one table of the kind's mean size."""
    count, t = len(kind.tables), kind.tables[0]
    names = {x.name for x in kind.tables}

    def shared(crossing: Crossing) -> float:
        return crossing.width * len(names & set(crossing.tables)) / len(crossing.tables) / count

    receivers = max(1, len(plan.splits[t.name].pieces.owners))
    ids = sum(shared(c) for c in plan.crossings if c.kind == "ids" and names & set(c.tables)) / receivers
    sums = sum(shared(c) for c in _leaving(plan, kind) if c.placement.startswith(("Partial", "Disjoint")))
    statistics = Statistics.assumed(kind.tables)
    return {
        N: plan.ranks,
        b: plan.rows,
        L: ids or t.ids,
        p: t.vectors,
        V: sum(x.rows for x in kind.tables) / count,
        k: t.dim,
        s: t.itemsize,
        i: plan.layout.id_bytes,
        U: sum(statistics.unique(x.name, plan.rows) for x in kind.tables) / count,
        w: sums / plan.ranks,
    }


def formula_of(form: str, sparse: bool) -> sympy.Expr:
    """Bytes that a form sends for a table, with or without sparse gradients: the mean over ranks."""
    return sum(form_named(form).costs(sparse).values(), sympy.Integer(0))


def crossings(plan: Plan) -> Sheet:
    """What enters and leaves the region in a step; what is alike shares a row."""
    groups: dict[Any, list[Crossing]] = {}
    for c in plan.crossings:
        key = (c.kind, re.sub(r"_\d+$", "", c.name), c.placement, _without_index(pattern_of(c.tables)), c.line)
        groups.setdefault(key, []).append(c)
    rows = []
    for (kind, name, placement, tables, line), group in groups.items():
        symbol = "L" if kind == "ids" else "w"
        width = sum(c.width for c in group)
        size = plan.bytes_of(group[0].formula, **{symbol: width})
        title = f"{name}  (× {len(group)})" if len(group) > 1 else name
        rows.append((kind, title, _short(placement), tables, group[0].formula, f"{symbol} = {width:,}", size, line))
    return Sheet(
        "what crosses the wire",
        (
            Column("what"),
            Column("operator"),
            Column("placement"),
            Column("tables"),
            Column("per rank and step", "formula"),
            Column("width"),
            Column("bytes", "bytes"),
            Column("line"),
        ),
        tuple(rows),
        ("the mean over ranks; values include their gradients on the way back.",) if rows else ("nothing: all local.",),
    ).without_empty("line")


def _without_index(name: str) -> str:
    """A table's name with ``*`` for numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _short(placement: str, most: int = 40) -> str:
    return placement if len(placement) <= most else placement[: most - 2] + " …"


def parts(plan: Plan) -> Sheet:
    """What the busiest rank sends, by collective."""
    every = [plan.traffic(r) for r in range(plan.ranks)]
    busiest = max(every, key=lambda t: t.total)
    rows = [
        (name, float(size), busiest.calls_by_collective.get(name)) for name, size in busiest.bytes_by_collective.items()
    ]
    rows.append(("total", float(busiest.total), busiest.calls))
    columns = (Column("collective"), Column("sent", "bytes"), Column("calls", "count"))
    return Sheet("what the busiest rank sends in a step, by collective", columns, tuple(rows))


def step_seconds(plan: Plan, cluster: Cluster) -> float:
    """Seconds of a step's collectives, each as long as on its busiest rank."""
    cluster = cluster.with_ranks(plan.ranks)
    return cluster.seconds([plan.traffic(r) for r in range(plan.ranks)])


def all_of(plan: Plan, cluster: Cluster | None = None) -> list[Sheet]:
    """All that one plan says."""
    return [
        candidates(plan),
        thresholds(plan),
        crossings(plan),
        parts(plan),
        strategies(plan, cluster),
        memory(plan),
    ]


def links(cluster: Cluster) -> Sheet:
    """A cluster's latencies and bandwidths."""
    rows = []
    for link, by_collective in cluster.links.items():
        for name, x in by_collective.items():
            rows.append((name, link, x.alpha_s, f"{format_bandwidth(x.bytes_per_s)}", x.source))
    columns = (
        Column("collective"),
        Column("links"),
        Column("latency of a message", "seconds"),
        Column("bandwidth"),
        Column("source"),
    )
    title = f"cluster {cluster.name}: {cluster.ranks} ranks, {cluster.ranks_per_node} on a node, {cluster.backend}"
    return Sheet(title, columns, tuple(rows))


def audited(audit: Audit) -> Sheet:
    """Predicted against measured, by collective."""
    rows: list[tuple[Any, ...]] = []
    for x in audit.collectives:
        rows.append((x.name, x.calls, x.predicted_bytes, x.sent_bytes, x.predicted_s, x.measured_s))
    rows.append(("total", None, None, None, audit.predicted_s, audit.measured_s))
    columns = (
        Column("collective"),
        Column("calls", "count"),
        Column("predicted", "bytes"),
        Column("sent", "bytes"),
        Column("predicted time", "seconds"),
        Column("measured time", "seconds"),
    )
    exact = "bytes and calls were predicted exactly." if not audit.mismatches else "; ".join(audit.mismatches)
    error = f"seconds: predicted {audit.relative_error:+.0%} of measured, on cluster {audit.cluster.name}."
    return Sheet(f"{audit.steps} steps on {audit.cluster.ranks} ranks", columns, tuple(rows), (exact, error))


def mean_bytes(plan: Plan) -> int:
    """Bytes sent per rank and step, the mean over ranks."""
    return round(sum(plan.traffic(r).total for r in range(plan.ranks)) / plan.ranks)


def strategies(plan: Plan, cluster: Cluster | None = None) -> Sheet:
    """The plan against the strategies that users know."""
    others = plan.priced(cluster=None if cluster is None else cluster.with_ranks(plan.ranks))
    mine = mean_bytes(plan)
    seconds = None if cluster is None else step_seconds(plan, cluster)
    rows: list[tuple[Any, ...]] = [(MINE, mine, plan.price_bytes, None, seconds)]
    for x in others:
        rows.append((x.name, x.sent_bytes, x.busiest_bytes, x.sent_bytes / mine if mine else None, x.seconds))
    columns = (
        Column("strategy"),
        Column("sent", "bytes"),
        Column("busiest rank", "bytes"),
        Column("× this plan", "ratio"),
        Column("communication", "seconds"),
    )
    width = 4 if cluster is None else 5
    notes = ["sent per rank and step, ids included, the mean over ranks; ids are as wide as this plan's."]
    if mine:
        best = min(others, key=lambda x: x.sent_bytes)
        notes.append(f"the best of the others, {best.name}, sends {best.sent_bytes / mine:.2f} times as much.")
    return Sheet(
        f"strategies: {plan.ranks} ranks, {plan.rows:,} rows a rank",
        columns[:width],
        tuple(r[:width] for r in rows),
        tuple(notes),
        frozenset({0}),
    )


MEMORY = ("weights", "gradients", "optimiser state", "activations")
"""What `memory_of` counts."""


def memory_of(plan: Plan, rank: int) -> tuple[int, int, int, int]:
    """Bytes that a rank keeps, in the order of `MEMORY`."""
    m = plan.memory(rank)
    return m.weights_bytes, m.gradients_bytes, m.state_bytes, m.activations_bytes


def memory(plan: Plan) -> Sheet:
    """What each rank keeps; ranks that keep as much, to three digits, share the row of the fullest."""
    alike: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for r in range(plan.ranks):
        sizes = memory_of(plan, r)
        alike.setdefault(tuple(map(format_bytes, sizes)), []).append(sizes)
    rows = []
    for group in sorted(alike.values(), key=lambda g: -sum(g[0])):
        most = max(group, key=sum)
        rows.append((f"{len(group)} rank{'s' * (len(group) > 1)}", *most, sum(most)))
    whole = sum(prod(p.shape) for p in plan.pieces.values()) * plan.itemsize
    columns = (Column("on"), *(Column(name, "bytes") for name in MEMORY), Column("total", "bytes"))
    limit = "" if plan.limit_bytes is None else f"; the limit is {format_bytes(plan.limit_bytes)}"
    notes = (
        f"optimiser {plan.optimizer}; activations at most; the whole model's weights: {format_bytes(whole)}{limit}.",
    )
    return Sheet("memory per rank", columns, tuple(rows), notes)


def choice(plan: Plan) -> str:
    """What was minimised, and how sure it is."""
    what = "bytes of the busiest rank" if plan.objective == "bytes" else "seconds of the collectives"
    where = f" on {plan.cluster.name}" if plan.cluster is not None and plan.objective == "seconds" else ""
    if plan.exact:
        return f"chosen: the least {what}{where}; no choice of forms is cheaper."
    if plan.bound > 0:
        return f"chosen: the least {what} that was found{where}; at most {100 * plan.gap:.1f} % above the best."
    return f"chosen: the least {what} that was found{where}."


def summary_of(plan: Plan) -> str:
    """The forms of a plan's tables in a few words.

    ``24 column_wise, 28 replicate``
    """
    forms = Counter(s.form for s in plan.splits.values())
    return ", ".join(f"{n} {form}" for form, n in sorted(forms.items(), key=lambda x: -x[1]))


def point_name(plan: Plan, ranks: bool, rows: bool) -> str:
    """Where a sweep's plan lies: what of ranks and rows varies."""
    name = [f"{plan.ranks} ranks"] if ranks or not rows else []
    return ", ".join([*name, f"{format_count(plan.rows)} rows"] if rows else name)


def sweep(plans: Sequence[Plan], cluster: Cluster | None = None) -> list[Sheet]:
    """Strategies against ranks or batch, and what is chosen at each point."""
    ranks, rows = len({p.ranks for p in plans}) > 1, len({p.rows for p in plans}) > 1
    names = [point_name(p, ranks, rows) for p in plans]
    mine = [mean_bytes(p) for p in plans]
    others = [p.baselines() for p in plans]
    table: list[tuple[Any, ...]] = [(MINE, *mine)]
    table += [(name, *(o[name] for o in others)) for name in others[0]]
    chosen = []
    for plan, name, size, other in zip(plans, names, mine, others, strict=True):
        best = min(other, key=lambda n: other[n])
        times = other[best] / size if size else None
        row = [name, summary_of(plan), ", ".join(dict.fromkeys(exits_of(plan))), size, best, times]
        chosen.append(tuple(row if cluster is None else [*row, step_seconds(plan, cluster)]))
    columns = [
        Column("at"),
        Column("tables"),
        Column("aggregates at"),
        Column("sent", "bytes"),
        Column("best other strategy"),
        Column("× this plan", "ratio"),
    ]
    if cluster is not None:
        columns.append(Column("communication", "seconds"))
    return [
        Sheet(
            "bytes sent per rank and step, by strategy",
            (Column("strategy"), *(Column(n, "bytes") for n in names)),
            tuple(table),
            ("ids included, the mean over ranks.",),
            frozenset({0}),
        ),
        Sheet("what is chosen", tuple(columns), tuple(chosen)),
    ]


def exits_of(plan: Plan) -> list[str]:
    """The operators at which a plan leaves the region."""
    return [c.name.removeprefix("aten.") for c in plan.crossings if c.kind == "values"]

"""What a plan says, as tables: operators and their candidates, what crosses the wire, strategies, memory.

The command line prints them, the page shows them, `Plan.explain` is their plain text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

from descompiler.cost_models.crossovers import WORDS
from descompiler.planning.chosen import NO_OPERATORS, Chosen, Crossing
from descompiler.planning.cluster import Cluster
from descompiler.planning.curves import bytes_alone, formula_of, overtakes
from descompiler.planning.kinds import kinds, pattern_of, without_index
from descompiler.sheet import Column, Sheet
from descompiler.units import format_bytes, format_seconds

MINE = "this plan"


def weights(plan: Chosen, only: str | None = None) -> Sheet:
    """Every table (or one), what each rank holds of it and what takes its rows; parameters that follow tables."""
    rows: list[tuple[Any, ...]] = []
    for t in plan.tables:
        if only in (None, t.name):
            uses = [", ".join(t.uses), *(f"multiplied with, for {output}" for output in t.outputs)]
            held = str(plan.splits[t.name])
            rows.append((t.name, t.rows, t.dim, t.size_bytes, t.ids, held, "; ".join(uses), t.line))
    for name, p in plan.pieces.items():
        if only is None and name not in plan.splits and not p.is_replicated:
            size = prod(p.shape) * plan.itemsize
            follows = f"co-located: dim {p.dim} follows its input; no all-reduce"
            rows.append((name, None, None, size, None, follows, None, ""))
    columns = (
        Column("weights"),
        Column("rows", "count"),
        Column("dim", "count"),
        Column("size", "bytes"),
        Column("ids a row", "count"),
        Column("held"),
        Column("used by"),
        Column("line"),
    )
    return Sheet("what each rank holds", columns, tuple(rows)).without_empty("line")


def candidates(plan: Chosen, only: str | None = None) -> Sheet:
    """Every operator (or one) with the forms that it can take, their formulas and prices, the chosen one first."""
    rows: list[tuple[Any, ...]] = []
    strong = set()
    for kind in kinds(plan, only):
        t = kind.tables[0]
        strong.add(len(rows))
        head: tuple[Any, ...] = (kind.title, kind.rows, t.dim, t.ids)
        for number, (price, form) in enumerate([(kind.price, kind.form), *kind.others]):
            verdict = f"{'runner-up, ' * (number == 1)}{price - kind.price:+,} B" if number else "chosen"
            if number and form in (seconds := plan.seconds.get(t.name, {})):
                verdict += f", {1e3 * (seconds[form] - plan.price):+,.3g} ms"
            if above := kind.missing.get(form):
                verdict += f"; {above:,} B above the limit of memory"
            alone = bytes_alone(plan, kind, form)
            rows.append((*head, form, formula_of(plan, t, form), alone, price, verdict))
            head = ("", "", "", "")
        rows += [(*head, form, None, None, None, f"not possible: {why}") for form, why in t.refusals.items()]
    columns = (
        Column("operator"),
        Column("rows"),
        Column("dim", "count"),
        Column("ids a row", "count"),
        Column("form"),
        Column("sends, per rank and step", "formula"),
        Column("by itself", "bytes"),
        Column("busiest rank", "bytes"),
        Column("verdict"),
    )
    notes = [
        "by itself: that formula for one table (of the mean size), where it does not depend on what else is chosen.",
        "busiest rank: all bytes that it sends in a step if the operator and those like it took that form.",
        choice(plan),
    ]
    if plan.statistics:
        notes.append(f"ids: {plan.statistics}.")
    title = f"operators and the forms that they can take: {plan.ranks} ranks, {plan.rows:,} rows a rank"
    return Sheet(title, columns, tuple(rows), tuple(notes if plan.tables else [f"{NO_OPERATORS}."]), frozenset(strong))


def thresholds(plan: Chosen, only: str | None = None) -> Sheet:
    """Where other forms overtake those that were chosen, in closed form: against ranks, and rows of a table.

    Of one table, where any form overtakes any other.
    """
    rows: list[tuple[Any, ...]] = []
    for kind in kinds(plan, only):
        for c in overtakes(plan, kind, every=only is not None):
            rows.append((kind.title, f"{c.first} beats {c.second}", WORDS[c.symbol.name], c.threshold, c.start))
    columns = (
        Column("operator"),
        Column("crossover"),
        Column("of"),
        Column("threshold", "formula"),
        Column("from", "count"),
    )
    notes = (
        f"all other numbers as here ({plan.ranks} ranks, {plan.rows:,} rows a rank, tables of the mean size); more "
        "rows of a table have more unique ids, U.",
        "all-to-all: vectors leave the region; partial sums: w elements a row do, of every rank.",
    )
    return Sheet("crossovers, in closed form", columns, tuple(rows), notes if rows else ("none has a closed form.",))


def crossings(plan: Chosen, only: str | None = None) -> Sheet:
    """What enters and leaves the region in a step (or what one table has part in), and what tables send by themselves.

    What is alike shares a row.
    """
    groups: dict[Any, list[Crossing]] = {}
    for c in plan.crossings:
        if only is None or only in c.tables:
            name, tables = re.sub(r"_\d+$", "", c.name), without_index(pattern_of(c.tables))
            key = (c.kind, name, c.placement, tables, c.line, c.wire_dtype)
            groups.setdefault(key, []).append(c)
    rows: list[tuple[Any, ...]] = []
    for (kind, name, placement, _, line, _), group in groups.items():
        symbols = {x: sum(c.symbols[x] for c in group) for x in group[0].symbols}
        size = plan.bytes_of(group[0].formula, **symbols)
        title = f"{name}  (× {len(group)})" if len(group) > 1 else name
        tables = _tables_text([n for c in group for n in c.tables])
        rows.append((kind, title, _short(placement), tables, group[0].formula, _numbers_text(symbols), size, line))
    rows += _by_themselves(plan, only)
    columns = (
        Column("what"),
        Column("operator"),
        Column("placement"),
        Column("tables"),
        Column("per rank and step", "formula"),
        Column("with"),
        Column("bytes", "bytes"),
        Column("line"),
    )
    notes = ["the mean over ranks; values include their gradients on the way back." if rows else "nothing: all local."]
    if plan.layout.given:
        notes.append("ids don't cross: every rank is given the global batch's.")
    if plan.wire_dtype is not None:
        notes.append(
            f"values and fetched rows, and gradients of both, are rounded to {plan.wire_dtype} and summed in their own "
            "dtype; the rest crosses as it is. des.verify(..., wire_dtype=...) says what the rounding does."
        )
    if any(c.kind == "product" and "logits" in c.name for c in plan.crossings):
        notes.append("the full logits cross: compute the loss, or topk, in forward to leave them with the owners.")
    return Sheet("what crosses the wire", columns, tuple(rows), tuple(notes)).without_empty("line")


def _by_themselves(plan: Chosen, only: str | None) -> list[tuple[Any, ...]]:
    """What tables send that are outside the region."""
    rows: list[tuple[Any, ...]] = []
    for kind in kinds(plan, only):
        every = [plan.sends(t) for t in kind.tables]
        numbers = [plan.numbers_of(t) for t in kind.tables]
        for what, (formula, _) in every[0].items():
            own = sorted(x.name for x in formula.free_symbols if x.name in numbers[0] and x.name != "k")
            symbols = {x: sum(n[x] for n in numbers) for x in own}
            size = sum(sent[what][1] for sent in every if what in sent)
            tables = _tables_text([t.name for t in kind.tables])
            rows.append((what, "", "", tables, formula, _numbers_text(symbols), size, ""))
    return rows


def _tables_text(names: Sequence[str]) -> str:
    several = list(dict.fromkeys(names))
    return ", ".join(several) if len(several) < 3 else f"{pattern_of(several)}  ({len(several)} tables)"


def _numbers_text(symbols: dict[str, Any]) -> str:
    return ", ".join(f"{x} = {n:,.1f}" if n != round(n) else f"{x} = {n:,.0f}" for x, n in symbols.items())


def _short(placement: str, most: int = 40) -> str:
    return placement if len(placement) <= most else placement[: most - 2] + " …"


def parts(plan: Chosen) -> Sheet:
    """What the busiest rank sends, by collective."""
    busiest = max(plan.layout.predict_kinds(plan.rows, plan.itemsize), key=lambda t: t.total)
    rows = [
        (name, float(size), busiest.calls_by_collective.get(name)) for name, size in busiest.bytes_by_collective.items()
    ]
    rows.append(("total", float(busiest.total), busiest.calls))
    columns = (Column("collective"), Column("sent", "bytes"), Column("calls", "count"))
    return Sheet("what the busiest rank sends in a step, by collective", columns, tuple(rows))


def mixing(plan: Chosen) -> Sheet:
    """What mixes the rows of the batch and crosses for it, and what is drawn at random."""
    rows = tuple((note,) for note in plan.notes)
    return Sheet("across the batch, and at random", (Column("what"),), rows, () if rows else ("nothing.",))


def step_seconds(plan: Chosen, cluster: Cluster) -> float:
    """Seconds of a step's collectives, each as long as on its busiest rank."""
    cluster = cluster.with_ranks(plan.ranks)
    return cluster.seconds([plan.traffic(r) for r in range(plan.ranks)])


def mean_bytes(plan: Chosen) -> int:
    """Bytes sent per rank and step, the mean over ranks."""
    alike = plan.layout.predict_alike(plan.rows, plan.itemsize)
    return round(sum(ranks * traffic.total for ranks, traffic in alike) / plan.ranks)


def strategies(plan: Chosen, cluster: Cluster | None = None) -> Sheet:
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
"""What `memory_words` counts."""


def memory_words(plan: Chosen, rank: int) -> tuple[int, int, int, int]:
    """Bytes that a rank keeps, in the order of `MEMORY`."""
    m = plan.memory(rank)
    return m.weights_bytes, m.gradients_bytes, m.state_bytes, m.activations_bytes


def memory(plan: Chosen) -> Sheet:
    """What each rank keeps; ranks that keep as much, to three digits, share the row of the fullest."""
    alike: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for r in range(plan.ranks):
        sizes = memory_words(plan, r)
        alike.setdefault(tuple(map(format_bytes, sizes)), []).append(sizes)
    rows = []
    for group in sorted(alike.values(), key=lambda g: -sum(g[0])):
        most = max(group, key=sum)
        rows.append((f"{len(group)} rank{'s' * (len(group) > 1)}", *most, sum(most)))
    whole = sum(prod(p.shape) for p in plan.pieces.values()) * plan.itemsize
    columns = (Column("on"), *(Column(name, "bytes") for name in MEMORY), Column("total", "bytes"))
    limit = "" if plan.limit_bytes is None else f"; the limit is {format_bytes(plan.limit_bytes)}"
    fullest = max(range(plan.ranks), key=lambda r: plan.memory(r).total)
    notes = (
        f"with {plan.optimizer}; most on rank {fullest}; activations at most; the whole model's weights: "
        f"{format_bytes(whole)}{limit}.",
    )
    return Sheet("memory per rank", columns, tuple(rows), notes)


def choice(plan: Chosen) -> str:
    """What was minimised, and how sure it is."""
    what, amount = "bytes of the busiest rank", f"{plan.price_bytes:,} B"
    if plan.objective == "seconds":
        where = "" if plan.cluster is None else f" on {plan.cluster.name}"
        what, amount = f"seconds of the collectives{where}", format_seconds(plan.price)
        if plan.work_s:
            what = f"seconds of the collectives and of the busiest rank's own work{where}"
            amount += f" ({format_seconds(plan.price - plan.work_s)} and {format_seconds(plan.work_s)})"
    sure = ""
    if plan.exact:
        sure = "; no choice of forms is cheaper"
    elif plan.bound > 0:
        sure = f"; at most {100 * plan.gap:.1f} % above the best"
    tried = f" ({plan.trials:,} choice{'s' * (plan.trials > 1)} priced)" if plan.trials else ""
    return f"chosen: the least {what}{'' if plan.exact else ' that was found'}, {amount}{sure}{tried}."


def summary_of(plan: Chosen) -> str:
    """The forms of a plan's tables in a few words.

    ``24 column, 28 replicate``
    """
    forms = Counter(s.form for s in plan.splits.values())
    return ", ".join(f"{n} {form}" for form, n in sorted(forms.items(), key=lambda x: -x[1]))


def exits_of(plan: Chosen) -> list[str]:
    """The operators at which a plan leaves the region."""
    return [c.name.removeprefix("aten.") for c in plan.crossings if c.kind == "values"]

"""A sweep: several plans of a model, over ranks or rows of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from descompiler.planning.cluster import Cluster
from descompiler.planning.plan import Plan
from descompiler.planning.summary import MINE, exits_of, mean_bytes, step_seconds, summary_of
from descompiler.sheet import Column, Sheet
from descompiler.units import format_count


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

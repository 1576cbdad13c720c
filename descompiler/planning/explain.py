"""A plan explained: which of its tables are shown, of the whole plan or of one table, and as plain text."""

from __future__ import annotations

from descompiler.errors import PlanError
from descompiler.planning import summary
from descompiler.planning.chosen import Chosen
from descompiler.planning.cluster import Cluster
from descompiler.sheet import Sheet, to_text


def costs(plan: Chosen, cluster: Cluster | None = None) -> list[Sheet]:
    """What a plan chose and rejected, what it sends and keeps; seconds are on the plan's cluster, or another one."""
    cluster = plan.cluster if cluster is None else cluster
    sheets = [summary.candidates(plan), summary.thresholds(plan), summary.crossings(plan)]
    if plan.notes:
        sheets.append(summary.mixing(plan))
    sheets.append(summary.parts(plan))
    if plan.memories:  # else it is a plan file of version 2, of a model in part: its layout lists no lookup
        sheets += [summary.strategies(plan, cluster), summary.memory(plan)]
    return sheets


def whole(plan: Chosen) -> list[Sheet]:
    """All that a plan says."""
    return [*costs(plan), *([summary.weights(plan)] if plan.tables else [])]


def of_table(plan: Chosen, table: str) -> list[Sheet]:
    """All that a plan says of one table, by its parameter's or its module's name.

    Raises
    ------
    PlanError
        If there is no such table.
    """
    for t in plan.tables:
        if t.name in (table, f"{table}.weight"):
            of = (summary.candidates, summary.thresholds, summary.crossings, summary.weights)
            return [sheet(plan, t.name) for sheet in of]
    names, most = [t.name for t in plan.tables], 6
    more = f" and {len(names) - most} more" if len(names) > most else ""
    raise PlanError(f"no table {table!r}; there are {', '.join(names[:most])}{more}")


def explain(plan: Chosen, table: str | None = None) -> str:
    """A plan, or one table of it, as text."""
    head = f"plan for {plan.ranks} ranks, {plan.rows:,} rows a rank, fingerprint {plan.fingerprint}"
    sheets = whole(plan) if table is None else of_table(plan, table)
    return "\n\n".join([head, *map(to_text, sheets)])

"""What was measured, as tables: a cluster's links, and a step's bytes and seconds against the prediction."""

from __future__ import annotations

from typing import Any

from descompiler.check.audit import Audit
from descompiler.planning.cluster import Cluster
from descompiler.sheet import Column, Sheet
from descompiler.units import format_bandwidth


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

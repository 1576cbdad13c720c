"""Which columns of ids a rank reads, so that a loader need not bring it the others."""

from __future__ import annotations

from torch import fx

from descompiler.graph.nodes import aten, shape_of
from descompiler.layout.layout import Layout
from descompiler.region.partition import Partition

KEEP_COLUMNS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten._to_copy.default, aten.clamp.default})
"""Operators that make each column of its own column."""

Columns = frozenset[int] | None
"""Of dim 1; None: all."""


def columns_read(partition: Partition, layout: Layout, rank: int) -> dict[int, Columns]:
    """By position, of the inputs that are the global batch's: the columns that this rank's tables read."""
    entries = {n: e.columns_on(rank) for n, e in zip(partition.readers, layout.entries, strict=True)}
    found: dict[fx.Node, Columns] = {}
    for n in reversed(partition.program.graph.nodes):
        columns: Columns = frozenset()
        if n in entries:
            columns = None if (own := entries[n]) is None else frozenset(own)
        for u in n.users:
            if u in found and found[u] != frozenset() and u not in partition.inside:
                columns = _joined(columns, _above(n, u, found[u]))
        found[n] = columns
    return {i: found[n] for i, n in zip(layout.given, partition.given, strict=True)}


def _above(n: fx.Node, user: fx.Node, columns: Columns) -> Columns:
    """The columns of a value that a user needs, of which some are read."""
    if user.target is aten.select.int and user.args[1] == 1:
        return frozenset({int(user.args[2]) % shape_of(n)[1]})  # type: ignore[arg-type]
    keeps = user.target in KEEP_COLUMNS and user.args[0] is n and shape_of(user)[1:] == shape_of(n)[1:]
    return columns if keeps else None


def _joined(a: Columns, b: Columns) -> Columns:
    return None if a is None or b is None else a | b

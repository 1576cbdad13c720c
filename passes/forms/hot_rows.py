"""hot_rows: ``E[R,D]  -->  E[hot rows,D] on every rank, cat_0(E[cold rows of r,D]@r)``

Rows that nearly every rank's batch has are held by all ranks, and their gradients are all-reduced; the others are
pulled. A row is hot where being replicated sends less than being pulled, `HOT_THRESHOLD` of the probability that a
batch has it: an all-reduced row needs no ids. That is little for wide rows and up to a half for a table of width 1;
beyond bytes, popular rows then load no owner. With sparse gradients, the all-reduce also counts which rows were looked
up, so that exactly those get a gradient. With ``wire_dtype`` pulled rows are rounded on their way, and sums are not, so
that rows of half as many bytes are hot only where ids are wider than they are.

Which rows are hot is measured (`descompiler.layout.statistics`). Without, the first sixteenth is, as in a vocabulary
that is sorted by frequency; nothing chooses that by itself.

Of a dynamic table ranks share slices of its key space, since who has a row is decided slice by slice: the sixteenth
that batches look most rows up in. Every rank tells the others what it looks up there, and sends them its gradients
(`descompiler.runtime.dynamic`), so each has the table that the owner of those slices would have. An owner serves fewer
rows then; bytes are never fewer than by pulling, as each gradient goes to all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import sympy

from descompiler.cost_models.forms import HOT_ROWS, HOT_SLICES, hot_threshold
from descompiler.cost_models.table import Table
from descompiler.dynamic.stand_in import DynamicIds
from descompiler.graph.program import Program
from descompiler.layout.keys import expected_bytes
from descompiler.layout.pieces import ALL, Pieces, even_sizes
from descompiler.layout.statistics import Statistics
from descompiler.tables.blocks import OwnRows, not_fetched, whole_rows
from descompiler.tables.form import Choice, Split
from descompiler.tables.tables import Operator

MOST_RANGES = 4096
"""Of hot rows of one table: a plan lists them."""

HOT_SHARE = 16
"""Of so many rows, or slices, one is hot where nothing says how many are."""


@dataclass(frozen=True)
class HotRows(OwnRows):
    name: str = "hot_rows"
    needs_statistics: ClassVar[bool] = True
    takes_dynamic: ClassVar[bool] = True

    def refuses(self, program: Program, operator: Operator) -> str | None:
        if not operator.trained:
            return "it is not trained: hot rows would save nothing that replicating does not"
        return whole_rows(operator) or not_fetched(operator)

    def choose(
        self,
        operator: Operator,
        ranks: int,
        statistics: Statistics,
        batch_rows: int,
        by_memory: bool = False,
        itemsize: int | None = None,
    ) -> Choice:
        """Hot rows by cost, the cold ones balanced."""
        if operator.name not in statistics.measured:
            return Choice()
        ids, present, _ = statistics.presence(operator.name, batch_rows)
        if operator.dynamic is not None:
            return Choice(hot=hot_slices(operator.dynamic, ids, present))
        unique = np.array([statistics.unique(operator.name, batch_rows)])
        id_bytes = float(expected_bytes(unique, np.array([operator.rows]))[0] / unique[0])
        threshold = hot_threshold(operator.dim, operator.dtype.itemsize, id_bytes, operator.sparse, itemsize)
        chosen = present > threshold
        hot = hot_ranges(ids[chosen])
        if len(hot) > MOST_RANGES:  # the most frequent rows, of which there are at least as many as ranges
            least = np.partition(present[chosen], -MOST_RANGES)[-MOST_RANGES]
            hot = hot_ranges(ids[present > least])
        if by_memory:
            return Choice(hot=hot)
        return Choice(sizes=tuple(statistics.balanced_rows(operator.name, ranks, batch_rows, without=hot)), hot=hot)

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        hot = ((0, -(-operator.rows // HOT_SHARE)),) if choice.hot is None else choice.hot
        if operator.dynamic is not None:
            shared = np.zeros(operator.dynamic.slices, dtype=bool)
            for start, stop in hot:
                shared[start // operator.dynamic.rows_of_slice : stop // operator.dynamic.rows_of_slice] = True
            held = operator.dynamic.divided(ranks)
            divided = [(n, ALL if every else owner) for (n, owner), every in zip(held, shared, strict=True)]
            return Split(self.name, Pieces.of(operator.shape, 0, divided, ranks), gathered=True)
        sizes = even_sizes(operator.rows, ranks) if choice.sizes is None else choice.sizes
        ends_of_ranks = np.cumsum(sizes)
        cuts = sorted({0, *ends_of_ranks.tolist(), *(x for h in hot for x in h)})
        starts = np.array(cuts[:-1])
        owner = np.searchsorted(ends_of_ranks, starts, side="right")
        if hot:
            firsts, ends = (np.array(x) for x in zip(*hot, strict=True))
            at = np.searchsorted(firsts, starts, side="right") - 1
            owner = np.where((at >= 0) & (starts < ends[at]), ALL, owner)
        pieces = Pieces.of(operator.shape, 0, zip(np.diff(cuts).tolist(), owner.tolist(), strict=True), ranks)
        return Split(self.name, pieces, gathered=pieces.is_replicated and operator.sparse)

    def fetches(self, split: Split) -> bool:
        """If all rows are hot, the reducer averages dense gradients."""
        return split.gathered or not split.pieces.is_replicated

    def costs(self, table: Table) -> Mapping[str, sympy.Expr]:
        if table.dynamic:
            return {"cold rows pulled, hot slices' gradients gathered": HOT_SLICES}
        return {"cold rows pulled, hot rows' gradients all-reduced": HOT_ROWS}

    def least_bytes(
        self, operator: Operator, ranks: int, statistics: Statistics, batch_rows: int, itemsize: int
    ) -> float | None:
        """Every row the cheaper way; ids as plans are priced with: as many as were measured, among rows by presence."""
        _, present, other = statistics.presence(operator.name, batch_rows)
        total = present.sum() + other * (operator.rows - len(present))
        share = statistics.unique(operator.name, batch_rows) / max(float(total), 1e-300)
        present, other = present * share, other * share
        fetched, reduced = 1 + 2 * operator.dim * itemsize, 2 * operator.dim * operator.dtype.itemsize
        some = float(np.minimum(present * fetched, reduced).sum())
        return (ranks - 1) * (some + (operator.rows - len(present)) * min(other * fetched, reduced))


def hot_slices(table: DynamicIds, ids: np.ndarray, present: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The slices that batches look most rows up in, as ranges of a stand-in's rows.

    >>> table = DynamicIds(salt=0, slices=32, rows=320)
    >>> hot_slices(table, np.array([3, 15, 17, 24]), np.array([0.9, 0.5, 0.5, 0.4]))
    ((0, 20),)
    """
    looked_up = np.bincount(ids // table.rows_of_slice, present, minlength=table.slices)
    hot = np.sort(np.argsort(-looked_up, kind="stable")[: table.slices // HOT_SHARE])
    ranges = hot_ranges(hot)
    return tuple((start * table.rows_of_slice, stop * table.rows_of_slice) for start, stop in ranges)


def hot_ranges(rows: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Sorted rows as ranges ``[start, stop)``.

    >>> hot_ranges(np.array([1, 2, 3, 7]))
    ((1, 4), (7, 8))
    """
    if not len(rows):
        return ()
    breaks = np.flatnonzero(np.diff(rows) > 1)
    starts = rows[np.concatenate([[0], breaks + 1])]
    stops = rows[np.concatenate([breaks, [len(rows) - 1]])] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))

"""hot_rows: ``E[R,D]  -->  E[hot rows,D] on every rank, cat_0(E[cold rows of r,D]@r)``

Rows that nearly every rank's batch has are held by all ranks, and their gradients are all-reduced; the others are
pulled. A row is hot where being replicated sends less than being pulled, `HOT_THRESHOLD` of the probability that a
batch has it: an all-reduced row needs no ids. That is little for wide rows and up to a half for a table of width 1;
beyond bytes, popular rows then load no owner. With sparse gradients, the all-reduce also counts which rows were looked
up, so that exactly those get a gradient. With ``wire_dtype`` pulled rows are rounded on their way, and sums are not, so
that rows of half as many bytes are hot only where ids are wider than they are.

Which rows are hot is measured (`descompiler.layout.statistics`). Without, the first sixteenth is, as in a vocabulary
that is sorted by frequency; nothing chooses that by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import sympy

from descompiler.cost_models.forms import HOT_ROWS, hot_threshold
from descompiler.graph.program import Program
from descompiler.layout.keys import expected_bytes
from descompiler.layout.pieces import ALL, Pieces, even_sizes
from descompiler.layout.statistics import Statistics
from descompiler.tables.blocks import OwnRows, not_fetched, whole_rows
from descompiler.tables.form import Choice, Split
from descompiler.tables.tables import Operator

MOST_RANGES = 4096
"""Of hot rows of one table: a plan lists them."""


@dataclass(frozen=True)
class HotRows(OwnRows):
    name: str = "hot_rows"
    needs_statistics: ClassVar[bool] = True

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
        hot = ((0, -(-operator.rows // 16)),) if choice.hot is None else choice.hot
        sizes = even_sizes(operator.rows, ranks) if choice.sizes is None else choice.sizes
        ends_of_ranks = np.cumsum(sizes)
        cuts = sorted({0, *ends_of_ranks.tolist(), *(x for h in hot for x in h)})
        starts = np.array(cuts[:-1])
        owner = np.searchsorted(ends_of_ranks, starts, side="right")
        if hot:
            firsts, ends = (np.array(x) for x in zip(*hot, strict=True))
            at = np.searchsorted(firsts, starts, side="right") - 1
            owner = np.where((at >= 0) & (starts < ends[at]), ALL, owner)
        held = zip(np.diff(cuts).tolist(), owner.tolist(), strict=True)
        pieces = Pieces.of(operator.shape, 0, held, ranks)
        return Split(self.name, pieces, gathered=pieces.is_replicated and operator.sparse)

    def fetches(self, split: Split) -> bool:
        """If all rows are hot, the reducer averages dense gradients."""
        return split.gathered or not split.pieces.is_replicated

    def costs(self, sparse: bool) -> Mapping[str, sympy.Expr]:
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

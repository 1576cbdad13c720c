"""Layouts: what crosses the wire in one program, known at compile time, the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from descompiler.layout import traffic as wire
from descompiler.layout.exchanges import Entry, Exchange, Exit, Vocabulary, Whole
from descompiler.layout.fetches import Counts, Fetch
from descompiler.layout.pieces import ALL
from descompiler.layout.statistics import Statistics
from descompiler.layout.traffic import Traffic


@dataclass(frozen=True)
class Layout:
    """All that crosses, in one program.

    Attributes
    ----------
    norm_channels : tuple of int
        Channels of each batch norm whose statistics are made from the ranks'.
    norm_shares : tuple of tuple of int
        Channels on each rank of each batch norm inside the region, whose running statistics go to all ranks.
    fetches : tuple of Fetch
        Lookups outside the region whose unique rows are fetched, or whose rows' gradients are gathered.
    early : bool
        Whether the first fetch's ids are known before the header.
    shared_columns : tuple of int
        Elements of each slice of a co-located weight that all ranks hold.
    exchanges : tuple of Exchange
        What values that mix the rows of the batch cost.
    wholes : tuple of Whole
        Tables that are gathered whole, in one collective, and their gradients in another.
    leaves : int
        Runs of opaque leaves after the header: after each, ranks tell each other whether it failed.
    leaves_backward : bool
        Whether gradients go through opaque leaves: at the end of backward, ranks tell whether one failed in it.
    """

    ranks: int
    entries: tuple[Entry, ...] = ()
    exits: tuple[Exit, ...] = ()
    id_bytes: int = 8
    norm_channels: tuple[int, ...] = ()
    norm_shares: tuple[tuple[int, ...], ...] = ()
    fetches: tuple[Fetch, ...] = ()
    early: bool = False
    shared_columns: tuple[int, ...] = ()
    dense_elements: int = 0
    exchanges: tuple[Exchange, ...] = ()
    vocabularies: tuple[Vocabulary, ...] = ()
    wholes: tuple[Whole, ...] = ()
    leaves: int = 0
    leaves_backward: bool = False

    @cached_property
    def whole_elements(self) -> list[int]:
        """Elements that each rank owns of the tables that are gathered whole."""
        elements = np.zeros(self.ranks, dtype=np.int64)
        for t in self.wholes:
            elements += t.pieces.elements
        return elements.tolist()

    @cached_property
    def enter_widths(self) -> list[int]:
        """Ids per row that go to each rank."""
        return self._by_rank(self.entries)

    @cached_property
    def exit_widths(self) -> list[int]:
        """Elements per row that each rank sends out of the region."""
        return self._by_rank(self.exits)

    def _by_rank(self, values: Sequence[Entry] | Sequence[Exit]) -> list[int]:
        """The widths of values together, on each rank."""
        widths = np.zeros(self.ranks, dtype=np.int64)
        for v in values:
            for first, stop, width in v.widths:
                widths[first:stop] += width
        return widths.tolist()

    def expected(self, rows: Sequence[int], statistics: Statistics | None = None) -> dict[str, Counts]:
        """Expected unique ids by table, of every rank, where rank r has ``rows[r]`` rows; of assumed statistics by
        default."""
        result: dict[str, Counts] = {}
        batches = Counter(rows)
        for t in {t.name: t for f in self.fetches for t in f.tables}.values():
            stats = Statistics.assumed([t]) if statistics is None else statistics
            asked, served, shared = np.zeros((3, self.ranks))
            for batch, ranks in batches.items():
                unique, shares = stats.unique(t.name, batch), stats.shares(t.name, t.pieces, batch)
                own, here = shares[:ALL], np.equal(rows, batch)
                asked[here] = unique * (1 - own[here] - shares[ALL])
                served += (ranks - here) * unique * own
                shared[here] = unique * shares[ALL]
            result[t.name] = Counts(asked, served, shared)
        return result

    def predict_kinds(self, rows: int, itemsize: int, statistics: Statistics | None = None) -> list[Traffic]:
        """What ranks are expected to send in a step in which each has ``rows`` rows: once for ranks that send alike."""
        return [traffic for _, traffic in self.predict_alike(rows, itemsize, statistics)]

    def predict_alike(
        self, rows: int, itemsize: int, statistics: Statistics | None = None
    ) -> list[tuple[int, Traffic]]:
        """As `predict_kinds`, with how many ranks send so."""
        every = [rows] * self.ranks
        demands = self._demands(self.expected(every, statistics))
        sizes = [self.enter_widths, self.exit_widths, self.whole_elements, *self.norm_shares]
        sizes += [[width(r) for r in range(self.ranks)] for v in self.vocabularies for width in (v.width, v.ids_width)]
        by_rank = np.vstack([*sizes, *(d.T for d in demands)])
        _, first, counts = np.unique(by_rank, axis=1, return_index=True, return_counts=True)
        return [
            (n, self._predict(r, every, itemsize, True, [d[r] for d in demands]))
            for r, n in sorted(zip(first.tolist(), counts.tolist(), strict=True))
        ]

    def predict(
        self,
        rank: int,
        rows: Sequence[int],
        itemsize: int,
        *,
        backward: bool = True,
        unique: Mapping[str, Counts] | None = None,
    ) -> Traffic:
        """What ``rank`` sends in a step in which rank r has ``rows[r]`` rows: bytes and calls.

        Parameters
        ----------
        backward : bool
            Whether gradients are sent; False is a forward without gradients.
        unique : mapping of str to Counts, optional
            Unique ids of the step, by table: exact if they are those of the step
            (`descompiler.DistributedModule.unique`). `expected` by default.
        """
        demands = self._demands(self.expected(rows) if unique is None else unique)
        return self._predict(rank, rows, itemsize, backward, [d[rank] for d in demands])

    def _predict(
        self, rank: int, rows: Sequence[int], itemsize: int, backward: bool, demands: Sequence[np.ndarray]
    ) -> Traffic:
        n, result = self.ranks, Traffic()
        if n == 1:
            return result
        mine = rows[rank]
        rest = sum(rows) - mine
        ids, values = self.enter_widths, self.exit_widths
        result.add(wire.HEADER, (n - 1) * wire.HEADER_BYTES)
        if self.entries:
            result.add(wire.ENTER, self.id_bytes * mine * (sum(ids) - ids[rank]))
            result.add(wire.EXIT, itemsize * values[rank] * rest)
        if self.norm_shares:
            result.add(wire.NORM_INSIDE, (n - 1) * 2 * sum(x[rank] for x in self.norm_shares) * itemsize)
        result.add(wire.LEAVES, self.leaves * (n - 1) * wire.LEAF_BYTES, self.leaves)
        for channels in self.norm_channels:
            result.add(wire.NORM_FORWARD, (n - 1) * (2 * channels + 1) * itemsize)
        if self.wholes:
            own = self.whole_elements[rank]
            result.add(wire.WHOLE, (n - 1) * own * itemsize)
            if backward and any(t.backward for t in self.wholes):
                result.add(wire.WHOLE_BACK, (sum(self.whole_elements) - own) * itemsize)
        for v in self.vocabularies:
            v.add(result, rank, rows, itemsize, backward=backward)
        if self.fetches:
            self._predict_fetches(result, itemsize, backward, demands)
        for e in self.exchanges:
            if backward or not wire.IN_BACKWARD[e.kind]:
                size = e.elements(sum(rows)) * (e.itemsize or itemsize)
                by_rows = e.kind in ("gather", "slice")
                sent = (n - 1) * mine * size if by_rows else wire.all_reduce_bytes(size, n)
                result.add(wire.COUPLING[e.kind], sent, e.calls)
        if backward:
            if self.exits:
                result.add(wire.RETURN, itemsize * mine * (sum(values) - values[rank]))
            for channels in self.norm_channels:
                result.add(wire.NORM_BACKWARD, wire.all_reduce_bytes(2 * channels * itemsize, n))
            if self.shared_columns:
                result.add(wire.SHARED_COLUMNS, wire.all_reduce_bytes(sum(self.shared_columns) * itemsize, n))
            if self.dense_elements:
                result.add(wire.DENSE_GRADIENTS, wire.all_reduce_bytes(self.dense_elements * itemsize, n))
            if self.leaves_backward:
                result.add(wire.LEAVES_BACK, (n - 1) * wire.LEAF_BYTES)
        return result

    def _demands(self, unique: Mapping[str, Counts]) -> list[np.ndarray]:
        """What ranks need in each fetch, ``[ranks, 5]``: see `descompiler.layout.fetches.Fetch.demand`."""
        result, counted = [], set[str]()
        for f in self.fetches:
            # a table's counts are those of all its fetches together
            counts = {t.name: unique[t.name] for t in f.tables if t.name in unique and t.name not in counted}
            counted.update(t.name for t in f.tables)
            result.append(np.broadcast_to(f.demand(counts), (self.ranks, 5)))
        return result

    def _predict_fetches(self, result: Traffic, itemsize: int, backward: bool, demands: Sequence[np.ndarray]) -> None:
        others = self.ranks - 1
        for position, (f, demand) in enumerate(zip(self.fetches, demands, strict=True)):
            asked, served, asked_trained, gathered_ids, gathered = demand.tolist()
            if position or not self.early:
                result.add(wire.FETCH_COUNTS, others * wire.FETCH_COUNTS_BYTES)
            if f.divided:
                result.add(wire.FETCH_IDS, round(f.id_bytes * asked))
                result.add(wire.FETCH_ROWS, round(itemsize * served))
            if not backward:
                continue
            if f.divided:
                result.add(wire.FETCH_BACK, round(itemsize * asked_trained))
            if f.gathered_classes:
                result.add(wire.GATHER_IDS, round(others * f.id_bytes * gathered_ids))
                result.add(wire.GATHER_BACK, round(others * itemsize * gathered))
            if f.reduced_tables:
                result.add(wire.SHARED_ROWS, wire.all_reduce_bytes(f.reduced_elements * itemsize, self.ranks))

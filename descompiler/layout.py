"""Layouts: what crosses the wire in one program, known at compile time, the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from descompiler import traffic as wire
from descompiler.fetch_layout import Counts, Fetch
from descompiler.pieces import ALL, Pieces
from descompiler.spans import Spans, at
from descompiler.statistics import Statistics
from descompiler.traffic import Traffic

Columns = tuple[int, ...] | None
"""Of dim 1 of some ids; None: all of them."""


@dataclass(frozen=True)
class Entry:
    """Ids ``[b, *tail]`` that enter the region; ``columns`` of dim 1 go to which ranks (None: all of them)."""

    name: str
    tail: tuple[int, ...]
    columns: Spans[Columns]

    def columns_on(self, rank: int) -> Columns:
        """The columns that go to ``rank`` (None: all, (): none)."""
        return at(self.columns, rank, ())

    def tail_on(self, rank: int) -> tuple[int, ...]:
        return self._tail(self.columns_on(rank))

    def _tail(self, columns: Columns) -> tuple[int, ...]:
        return self.tail if columns is None else (len(columns), *self.tail[1:])

    @cached_property
    def widths(self) -> Spans[int]:
        """Ids per row that go to each rank."""
        return tuple((first, stop, prod(self._tail(columns))) for first, stop, columns in self.columns)

    def width(self, rank: int) -> int:
        """Ids per row that go to ``rank``."""
        return at(self.widths, rank, 0)


@dataclass(frozen=True)
class Exit:
    """A value that leaves the region: ranks send ``[rows, *tail]``, of the tail that ``tails`` has for them.

    ``segments`` are the (size, owner) of the sharded dimension ``dim``; None: the ranks' terms are summed.
    """

    name: str
    tails: Spans[tuple[int, ...]]
    dim: int = 0
    segments: tuple[tuple[int, int], ...] | None = None

    def tail_on(self, rank: int) -> tuple[int, ...]:
        """What a row of what ``rank`` sends is like, if it sends anything."""
        return at(self.tails, rank, ())

    @cached_property
    def widths(self) -> Spans[int]:
        """Elements per row that each rank sends."""
        return tuple((first, stop, prod(tail)) for first, stop, tail in self.tails)

    def width(self, rank: int) -> int:
        """Elements per row that ``rank`` sends."""
        return at(self.widths, rank, 0)


@dataclass(frozen=True)
class Exchange:
    """A value that crosses between a rank's own rows and the computation that all ranks repeat.

    Attributes
    ----------
    kind : {"gather", "reduce", "slice", "spread", "total", "total back"}
        As in `descompiler.coupling`: gather and reduce send values in forward, slice and spread gradients in backward;
        or a sum over a whole table (`descompiler.regularisers`).
    terms : tuple of tuple of int
        Elements: per row of the batch (gather, slice), or in all, as a product of polynomials in the rows of the
        global batch (coefficients, constant term first).
    itemsize : int or None
        Bytes of an element; None: those of the model's parameters.
    calls : int
        0 for values that share the collective of an earlier one.
    """

    kind: str
    name: str
    terms: tuple[tuple[int, ...], ...]
    itemsize: int | None = None
    calls: int = 1

    def elements(self, rows: int) -> int:
        """Elements that cross, for a global batch of ``rows``.

        >>> Exchange("spread", "logits", ((0, 1), (0, 2))).elements(3)  # [b, 2b]
        18
        """
        result = 1
        for coefficients in self.terms:
            result *= sum(c * rows**power for power, c in enumerate(coefficients))
        return result


@dataclass(frozen=True)
class Vocabulary:
    """A product with a table whose rows are divided among owners (`descompiler.vocabulary`).

    Attributes
    ----------
    name : str
    ranges : tuple of (int, int, int, int)
        (rank, start, size, offset) of each owner, in order: the part of the vocabulary, and where it is in the piece.
    dim : int
        Elements of a row of x.
    per_row : int
        Rows of x for each row of the batch.
    requests : tuple of (str, int)
        What is asked of the logits, and for how many of them.
    id_bytes : int
    backward : bool
        Whether anything that is trained needs gradients of the results.
    backward_x : bool
        Whether x needs gradients.
    """

    name: str
    ranges: tuple[tuple[int, int, int, int], ...]
    dim: int
    per_row: int
    requests: tuple[tuple[str, int], ...]
    id_bytes: int = 4
    backward: bool = True
    backward_x: bool = True

    @cached_property
    def owners(self) -> tuple[int, ...]:
        return tuple(self.parts)

    @cached_property
    def parts(self) -> dict[int, tuple[int, int, int]]:
        """(start, size, offset) by owner, in the order of the vocabulary."""
        return {rank: (start, size, offset) for rank, start, size, offset in self.ranges}

    def widths(self, rank: int) -> list[int]:
        """Elements per row of x of each partial result of an owner, by request."""
        size = self.parts[rank][1]
        sizes = {"top": size, "logits": size}
        return [size if kind == "logits" else min(n, sizes.get(kind, n)) for kind, n in self.requests]

    def ids_widths(self, rank: int) -> list[int]:
        """Ids per row of x that an owner sends with its best logits, by request that asks for them."""
        widths = zip(self.requests, self.widths(rank), strict=True)
        return [w for (kind, _), w in widths if kind in ("max", "top")]

    def width(self, rank: int) -> int:
        return sum(self.widths(rank)) if rank in self.parts else 0

    def ids_width(self, rank: int) -> int:
        return sum(self.ids_widths(rank)) if rank in self.parts else 0

    @cached_property
    def total_width(self) -> int:
        """Elements per row of x of all owners' partial results."""
        return sum(self.width(r) for r in self.owners)

    @cached_property
    def elements(self) -> int:
        """Elements per row of the batch that a training step sends to or from owners, over all of them."""
        values = self.total_width * (2 if self.backward else 1)
        rows = len(self.owners) * self.dim * (2 if self.backward and self.backward_x else 1)
        return self.per_row * (values + rows)

    @cached_property
    def ids(self) -> int:
        """Ids per row of the batch that are sent to or from owners, over all of them."""
        best = sum(self.ids_width(r) for r in self.owners)
        return self.per_row * (best + len(self.owners) * self.selected)

    @cached_property
    def selected(self) -> int:
        """Ids per row of x whose logits are asked for."""
        return sum(n for kind, n in self.requests if kind == "select")

    def add(self, result: Traffic, rank: int, rows: Sequence[int], itemsize: int, *, backward: bool) -> None:
        """Add what ``rank`` sends for this product."""
        mine, rest = self.per_row * rows[rank], self.per_row * (sum(rows) - rows[rank])
        own = rank in self.parts
        others = len(self.owners) - own
        result.add(wire.VOCABULARY_ROWS, mine * others * (self.dim * itemsize + self.selected * self.id_bytes))
        sent = self.width(rank) * itemsize + self.ids_width(rank) * self.id_bytes
        result.add(wire.VOCABULARY_PARTIAL, rest * sent)
        if backward and self.backward:
            result.add(wire.VOCABULARY_GRADIENTS, mine * itemsize * (self.total_width - self.width(rank)))
            if self.backward_x:
                result.add(wire.VOCABULARY_TERMS, own * rest * self.dim * itemsize)


@dataclass(frozen=True)
class Whole:
    """A table that every rank gathers whole before it is used.

    Attributes
    ----------
    backward : bool
        Whether it gets a gradient.
    """

    name: str
    pieces: Pieces
    backward: bool = True


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
        every = [rows] * self.ranks
        demands = self._demands(self.expected(every, statistics))
        sizes = [self.enter_widths, self.exit_widths, self.whole_elements, *self.norm_shares]
        sizes += [[width(r) for r in range(self.ranks)] for v in self.vocabularies for width in (v.width, v.ids_width)]
        _, kinds = np.unique(np.vstack([*sizes, *(d.T for d in demands)]), axis=1, return_index=True)
        return [self._predict(r, every, itemsize, True, [d[r] for d in demands]) for r in sorted(kinds.tolist())]

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
        """What ranks need in each fetch, ``[ranks, 5]``: see `descompiler.fetch_layout.Fetch.demand`."""
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

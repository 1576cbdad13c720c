"""What a layout lists, one class for each kind of crossing: ids in, values out, products, wholes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from descompiler.layout import traffic as wire
from descompiler.layout.pieces import Pieces
from descompiler.layout.spans import Spans, at
from descompiler.layout.traffic import Traffic

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
        As in `descompiler.classify.coupling`: gather and reduce send values in forward, slice and spread gradients in
        backward; or a sum over a whole table (`descompiler.tables.totals`).
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
    """A product with a table whose rows are divided among owners (`descompiler.runtime.vocabulary`).

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

"""What crosses the border of the region: ids in, values out, and gradients of what several ranks hold in part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from descompiler.layout.division import Division
from descompiler.layout.spans import Spans, at, summed
from descompiler.layout.traffic import Collective, Stage
from descompiler.layout.transfer import Crossed, Sent, Step, Transfer

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

    def goes_to(self, rank: int) -> bool:
        """Whether ``rank`` gets them, though they may be none: those of sequences of length 0."""
        return self.columns_on(rank) != ()

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


class Part(NamedTuple):
    """What one rank gets of an entry: its columns of ``tail``, ``width`` ids of each row."""

    entry: int
    columns: list[int] | None
    width: int
    tail: tuple[int, ...]


def parts_on(entries: Sequence[Entry], rank: int) -> tuple[Part, ...]:
    """What ``rank`` gets of some entries; those that it gets nothing of are left out."""
    columns = ((i, e, e.columns_on(rank)) for i, e in enumerate(entries))
    return tuple(
        Part(i, None if c is None else list(c), e.width(rank), e.tail_on(rank)) for i, e, c in columns if c != ()
    )


@dataclass(frozen=True)
class IdsIn(Transfer):
    """ids in: Local --> the global batch's, on the ranks that look them up.

    Attributes
    ----------
    given : tuple of int
        Positions of the inputs that are the global batch's on every rank already: all that entries are made of. Then
        nothing crosses.
    """

    kind = "ids in"
    SEND = Collective("all_to_all (ids in)", Stage.IDS_IN)

    entries: tuple[Entry, ...]
    id_bytes: int = 8
    given: tuple[int, ...] = ()

    def crossed(self) -> Iterator[Crossed]:
        return iter(()) if self.given else (Crossed("ids", e.name, summed(e.widths), 0, None) for e in self.entries)

    def sent(self, step: Step) -> Iterator[Sent]:
        if self.given:
            return
        widths = by_rank([e.widths for e in self.entries], len(step.rows))
        yield Sent(self.SEND, self.id_bytes * step.rows * (widths.sum() - widths))


@dataclass(frozen=True)
class Exit:
    """A value that leaves the region: ranks send ``[rows, *tail]``, of the tail that ``tails`` has for them.

    ``division`` is that of the sharded dimension ``dim``; None: the ranks' terms are summed. ``wire_dtype`` is None if
    it is the model's.
    """

    name: str
    tails: Spans[tuple[int, ...]]
    dim: int = 0
    division: Division | None = None
    wire_dtype: torch.dtype | None = None

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
class ValuesOut(Transfer):
    """values out: Owned, Shard, Partial or Disjoint --> Local; their gradients the other way.

    A region without exits, whose values nobody reads, makes its forward collective all the same.
    """

    kind = "values out"
    SEND = Collective("all_to_all (aggregation, forward)", Stage.VALUES_OUT)
    BACK = Collective("all_to_all (aggregation, backward)", Stage.GRADIENTS_BACK)

    exits: tuple[Exit, ...]

    def crossed(self) -> Iterator[Crossed]:
        return (Crossed("values", e.name, summed(e.widths), 0, e.wire_dtype) for e in self.exits)

    def sent(self, step: Step) -> Iterator[Sent]:
        ranks = len(step.rows)
        sizes = by_rank([e.widths for e in self.exits], ranks, [step.narrow_size_of(e.wire_dtype) for e in self.exits])
        yield Sent(self.SEND, sizes * step.rest)
        if self.exits:
            yield Sent(self.BACK, step.rows * (sizes.sum() - sizes))


@dataclass(frozen=True)
class SharedColumns(Transfer):
    """shared columns: gradients of a slice that every rank holds, every rank's terms --> their mean on every rank.

    Attributes
    ----------
    elements : tuple of int
        Of the slice of each co-located weight.
    wire_dtypes : tuple of (dtype or None)
        Of each; empty: the model's of all. Those of one dtype are summed together.
    """

    kind = "shared columns"
    AVERAGE = Collective("all_reduce (shared columns)", Stage.GRADIENTS_BACK)

    elements: tuple[int, ...]
    wire_dtypes: tuple[torch.dtype | None, ...] = ()

    def sent(self, step: Step) -> Iterator[Sent]:
        dtypes = self.wire_dtypes or (None,) * len(self.elements)
        size = sum(n * step.size_of(dtype) for n, dtype in zip(self.elements, dtypes, strict=True))
        yield Sent(self.AVERAGE, size, len(set(dtypes)))


def by_rank(several: list[Spans[int]], ranks: int, sizes: list[int] | None = None) -> np.ndarray:
    """The sums of several values' widths, on each rank; or of their bytes, with the ``sizes`` of their elements."""
    widths = np.zeros(ranks, dtype=np.int64)
    for i, spans in enumerate(several):
        for first, stop, width in spans:
            widths[first:stop] += width if sizes is None else width * sizes[i]
    return widths

"""Pieces: which part of an original parameter each rank holds, and the way back.

One description serves every split. A parameter is divided along one dimension into contiguous ranges; each range
belongs to one rank or to all of them. A rank's piece is the concatenation of its own ranges, in order, followed by
the ranges that all ranks hold, in order.

    split          dim   ranges of a [6, 4] table on 2 ranks (start, stop, owner)   as runs (size, owner, count)
    replicate      0     (0, 6, ALL)                                                (6, ALL, 1)
    whole table    0     (0, 6, 1)                                                  (6, 1, 1)
    rows           0     (0, 3, 0) (3, 6, 1)                                        (3, 0, 2)
    columns        1     (0, 2, 0) (2, 4, 1)                                        (2, 0, 2)
    co-located     1     columns that follow the shards of a Linear's input; dense features' columns are ALL's

Equal ranges of ranks that follow each other are kept as one `Run`: a table that is dealt out evenly takes two of them
at most, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

ALL = -1
"""Owner of a range that every rank holds."""


Index = tuple[slice, ...]


@dataclass(frozen=True)
class Range:
    """A contiguous range ``[start, stop)`` of a dimension and the rank that owns it (or `ALL`)."""

    start: int
    stop: int
    owner: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` ranges of one size, side by side, of the ranks ``owner``, ``owner + 1`` ...; or one range of `ALL`."""

    size: int
    owner: int
    count: int = 1


@dataclass(frozen=True)
class Pieces:
    """How one parameter of ``shape`` is cut among ``ranks``; `join` undoes `cut` bit for bit.

    Examples
    --------
    >>> pieces = Pieces.by_sizes((5, 2), dim=0, sizes=[3, 2], ranks=2)
    >>> w = torch.arange(10.).reshape(5, 2)
    >>> [p.shape[0] for p in (pieces.cut(w, 0), pieces.cut(w, 1))]
    [3, 2]
    >>> torch.equal(pieces.join([pieces.cut(w, 0), pieces.cut(w, 1)]), w)
    True
    """

    shape: tuple[int, ...]
    dim: int
    runs: tuple[Run, ...]
    ranks: int

    def __post_init__(self) -> None:
        owned = all(r.count == 1 if r.owner == ALL else 0 <= r.owner <= self.ranks - r.count for r in self.runs)
        tiled = sum(r.size * r.count for r in self.runs) == (self.shape[self.dim] if self.shape else 1)
        if not owned or not tiled or any(r.size < 0 or r.count < 1 for r in self.runs):
            raise ValueError(f"{self.runs} do not tile dimension {self.dim} of {self.shape} on {self.ranks} ranks")

    @staticmethod
    def of(shape: Sequence[int], dim: int, ranges: Iterable[tuple[int, int]], ranks: int) -> Pieces:
        """The (size, owner) of consecutive ranges, or `ALL` for the owner.

        >>> Pieces.of((9, 2), 0, [(2, 0), (2, 1), (1, ALL), (4, 0)], 2).runs
        (Run(size=2, owner=0, count=2), Run(size=1, owner=-1, count=1), Run(size=4, owner=0, count=1))
        """
        runs: list[list[int]] = []
        for size, owner in ranges:
            if runs and ALL not in (owner, runs[-1][1]) and runs[-1][0] == size and sum(runs[-1][1:]) == owner:
                runs[-1][2] += 1
            else:
                runs.append([size, owner, 1])
        return Pieces(tuple(shape), dim, tuple(Run(*r) for r in runs), ranks)

    @staticmethod
    def replicate(shape: Sequence[int], ranks: int) -> Pieces:
        """Every rank holds everything."""
        return Pieces.whole(shape, ALL, ranks)

    @staticmethod
    def whole(shape: Sequence[int], owner: int, ranks: int) -> Pieces:
        """One rank holds everything."""
        return Pieces(tuple(shape), 0, (Run(shape[0] if len(shape) else 1, owner),), ranks)

    @staticmethod
    def by_sizes(shape: Sequence[int], dim: int, sizes: Sequence[int], ranks: int) -> Pieces:
        """Rank r holds the r-th of consecutive ranges of the given sizes (zero sizes are left out)."""
        held = [(size, owner) for owner, size in enumerate(sizes) if size]
        return Pieces.of(shape, dim, held or [(0, 0)], ranks)

    @staticmethod
    def even(shape: Sequence[int], dim: int, ranks: int) -> Pieces:
        """Ranks hold consecutive ranges as equal as can be, larger ones first.

        >>> Pieces.even((7, 2), 0, 3) == Pieces.by_sizes((7, 2), 0, even_sizes(7, 3), 3)
        True
        """
        small, larger = divmod(shape[dim], ranks)
        runs = [Run(small + 1, 0, larger)] if larger else []
        if small or not larger:
            runs.append(Run(small, larger, ranks - larger if small else 1))
        return Pieces(tuple(shape), dim, tuple(runs), ranks)

    def ranges(self) -> Iterator[Range]:
        """All ranges, in order."""
        start = 0
        for run in self.runs:
            for i in range(run.count):
                yield Range(start, start + run.size, run.owner if run.owner == ALL else run.owner + i)
                start += run.size

    def sizes_and_owners(self) -> tuple[np.ndarray, np.ndarray]:
        """The size and the owner of each range, in order."""
        sizes, owners, counts = np.array([(r.size, r.owner, r.count) for r in self.runs]).T
        before = np.cumsum(counts) - counts
        return np.repeat(sizes, counts), np.repeat(owners - before, counts) + np.arange(counts.sum())

    @cached_property
    def is_replicated(self) -> bool:
        return all(r.owner == ALL for r in self.runs)

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The ranks that own a non-empty range, in order."""
        found = np.flatnonzero(self.sizes[:ALL])
        if len(found) and found[-1] - found[0] == len(found) - 1:
            return _consecutive(int(found[0]), int(found[-1]) + 1)
        return tuple(found.tolist())

    @cached_property
    def sizes(self) -> np.ndarray:
        """Size of the divided dimension that each rank owns alone, ``[ranks + 1]``; that of all at the end."""
        sizes, owners = self.sizes_and_owners()
        return np.bincount(np.where(owners == ALL, self.ranks, owners), sizes, minlength=self.ranks + 1).astype(int)

    def own(self, rank: int) -> list[Range]:
        """The ranges that belong to ``rank`` alone."""
        return self._ranges_of(rank)

    def shared(self) -> list[Range]:
        """The ranges that every rank holds."""
        return self._ranges_of(ALL)

    def _ranges_of(self, owner: int) -> list[Range]:
        result, start = [], 0
        for run in self.runs:
            if run.size and run.owner <= owner < run.owner + run.count:
                first = start + (owner - run.owner) * run.size
                result.append(Range(first, first + run.size, owner))
            start += run.size * run.count
        return result

    def own_size(self, rank: int) -> int:
        return int(self.sizes[rank])

    def shared_size(self) -> int:
        return int(self.sizes[ALL])

    def piece_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the rank's piece; the divided dimension may be 0."""
        if not self.shape:
            return ()
        shape = list(self.shape)
        shape[self.dim] = self.own_size(rank) + self.shared_size()
        return tuple(shape)

    def numel(self, rank: int) -> int:
        return prod(self.piece_shape(rank))

    def blocks(self, rank: int, elements: int) -> Iterator[tuple[Index, Index]]:
        """Where a rank's piece is in the full tensor, and where in the piece, part by part.

        A part has at most ``elements`` elements, or one row's; a copy of each in turn moves a piece of any size through
        little memory.

        >>> pieces = Pieces.by_sizes((5, 2), dim=0, sizes=[3, 2], ranks=2)
        >>> [(whole, piece) for whole, piece in pieces.blocks(1, elements=2)]
        [((slice(3, 4, None),), (slice(0, 1, None),)), ((slice(4, 5, None),), (slice(1, 2, None),))]
        """
        if not self.shape:
            yield (), ()
            return
        position = 0
        for r in [*self.own(rank), *self.shared()]:
            shape = [*self.shape[: self.dim], r.size, *self.shape[self.dim + 1 :]]
            step = max(1, elements // max(prod(shape[1:]), 1))
            for a in range(0, shape[0], step):
                b = min(a + step, shape[0])
                if self.dim == 0:
                    yield (slice(r.start + a, r.start + b),), (slice(position + a, position + b),)
                else:
                    before = (slice(a, b), *[slice(None)] * (self.dim - 1))
                    yield (*before, slice(r.start, r.stop)), (*before, slice(position, position + r.size))
            position += r.size

    @property
    def elements(self) -> np.ndarray:
        """Elements of each rank's piece."""
        whole = self.shape[self.dim] if self.shape else 1
        return (self.sizes[:ALL] + self.sizes[ALL]) * (prod(self.shape) // max(whole, 1))

    def cut(self, weight: Tensor, rank: int) -> Tensor:
        """The rank's piece of a full tensor (new storage, also where it is all of it)."""
        if not self.shape:
            return weight.clone()
        ranges = [*self.own(rank), *self.shared()]
        if not ranges:
            return weight.narrow(self.dim, 0, 0).clone()
        return torch.cat([weight.narrow(self.dim, r.start, r.size) for r in ranges], self.dim)

    def place(self, full: Tensor, piece: Tensor, rank: int) -> None:
        """Copy the rank's piece to its place in a full tensor."""
        for whole, part in self.blocks(rank, full.numel()):
            full[whole] = piece[part]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The full tensor from all ranks' pieces: the inverse of `cut`."""
        full = parts[0].new_empty(self.shape)
        for rank, part in enumerate(parts):
            self.place(full, part, rank)
        return full


@cache
def _consecutive(start: int, stop: int) -> tuple[int, ...]:
    """Ranks side by side, once for all tables that they own."""
    return tuple(range(start, stop))


def even_sizes(size: int, parts: int) -> list[int]:
    """Sizes of ``parts`` consecutive ranges that tile ``size``, as equal as can be, larger ones first.

    >>> even_sizes(7, 3)
    [3, 2, 2]
    """
    small, rest = divmod(size, parts)
    return [small + (i < rest) for i in range(parts)]


def locate(pieces: Pieces, ids: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Owner of each row, and its position in the owner's piece; rows that all ranks hold are taken from this one."""
    held = [r for r in pieces.ranges() if r.size]
    offset = dict.fromkeys(range(pieces.ranks), 0)
    owners, bases = [], []
    for r in held:
        if r.owner == ALL:
            position = pieces.own_size(rank) + sum(s.size for s in pieces.shared() if s.stop <= r.start)
            owners.append(rank)
        else:
            position = offset[r.owner]
            offset[r.owner] += r.size
            owners.append(r.owner)
        bases.append(position - r.start)
    starts = torch.tensor([r.start for r in held], dtype=torch.int64, device=ids.device)
    index = torch.bucketize(ids.long(), starts, right=True) - 1
    return torch.tensor(owners, device=ids.device)[index], ids.long() + torch.tensor(bases, device=ids.device)[index]

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

The ranges are a `Division`, which keeps equal ones of ranks that follow each other as one run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from descompiler.layout.division import SHARED, Division, Range, Run

ALL = SHARED
"""Owner of a range that every rank holds."""


Index = tuple[slice, ...]


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
    division: Division
    ranks: int

    def __post_init__(self) -> None:
        tiled = self.division.size == (self.shape[self.dim] if self.shape else 1)
        if not tiled or not self.division.fits(self.ranks):
            runs = self.division.runs
            raise ValueError(f"{runs} do not tile dimension {self.dim} of {self.shape} on {self.ranks} ranks")

    @staticmethod
    def of(shape: Sequence[int], dim: int, ranges: Iterable[tuple[int, int]], ranks: int) -> Pieces:
        """The (size, owner) of consecutive ranges, or `ALL` for the owner."""
        return Pieces(tuple(shape), dim, Division.of(ranges), ranks)

    @staticmethod
    def replicate(shape: Sequence[int], ranks: int) -> Pieces:
        """Every rank holds everything."""
        return Pieces.whole(shape, ALL, ranks)

    @staticmethod
    def whole(shape: Sequence[int], owner: int, ranks: int) -> Pieces:
        """One rank holds everything."""
        return Pieces(tuple(shape), 0, Division((Run(shape[0] if len(shape) else 1, owner),)), ranks)

    @staticmethod
    def by_sizes(shape: Sequence[int], dim: int, sizes: Sequence[int], ranks: int) -> Pieces:
        """Rank r holds the r-th of consecutive ranges of the given sizes (zero sizes are left out)."""
        held = [(size, owner) for owner, size in enumerate(sizes) if size]
        return Pieces.of(shape, dim, held or [(0, 0)], ranks)

    @staticmethod
    def even(shape: Sequence[int], dim: int, ranks: int) -> Pieces:
        """Ranks hold consecutive ranges as equal as can be, larger ones first."""
        return Pieces(tuple(shape), dim, Division.even(shape[dim], ranks), ranks)

    @cached_property
    def is_replicated(self) -> bool:
        return all(r.owner == ALL for r in self.division.runs)

    @property
    def owners(self) -> tuple[int, ...]:
        """The ranks that own a non-empty range, in order."""
        return self.division.owners

    @cached_property
    def sizes(self) -> np.ndarray:
        """Size of the divided dimension that each rank owns alone, ``[ranks + 1]``; that of all at the end."""
        sizes, owners = self.division.arrays()
        return np.bincount(np.where(owners == ALL, self.ranks, owners), sizes, minlength=self.ranks + 1).astype(int)

    def own(self, rank: int) -> list[Range]:
        """The ranges that belong to ``rank`` alone."""
        return self.division.of_owner(rank)

    def shared(self) -> list[Range]:
        """The ranges that every rank holds."""
        return self.division.of_owner(ALL)

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


def even_sizes(size: int, parts: int) -> list[int]:
    """Sizes of ``parts`` consecutive ranges that tile ``size``, as equal as can be, larger ones first.

    >>> even_sizes(7, 3), even_sizes(1, 2)
    ([3, 2, 2], [1, 0])
    """
    small, rest = divmod(size, parts)
    return [small + (i < rest) for i in range(parts)]


def locate(pieces: Pieces, ids: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Owner of each row, and its position in the owner's piece; rows that all ranks hold are taken from this one."""
    sizes, owners = pieces.division.arrays()
    starts, shared, held = np.cumsum(sizes) - sizes, owners == ALL, sizes > 0
    positions = pieces.division.offsets() + np.where(shared, pieces.own_size(rank), 0)
    columns = (starts, np.where(shared, rank, owners), positions - starts)
    first, owner, base = (torch.from_numpy(x[held]).to(ids.device) for x in columns)
    index = torch.bucketize(ids.long(), first, right=True) - 1
    return owner[index], ids.long() + base[index]

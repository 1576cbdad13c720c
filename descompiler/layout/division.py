"""Divisions: who has which stretch of a dimension; of a weight (`Pieces`), of a value (`Shard`), of what is sent.

A dimension is tiled by ranges, side by side; each belongs to one rank, or to none alone (`SHARED`). Ranges of one size
whose ranks follow each other are kept as one `Run`: what is dealt out evenly takes two of them at most, whatever the
number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

SHARED = -1
"""Owner of a range that no rank has alone: of a weight, all hold it; of a value, each has it for its own rows."""


@dataclass(frozen=True)
class Range:
    """A contiguous range ``[start, stop)`` of a dimension and the rank that owns it (or `SHARED`)."""

    start: int
    stop: int
    owner: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` ranges of one size, side by side, of the ranks ``owner``, ``owner + 1`` ...; one if it is `SHARED`."""

    size: int
    owner: int
    count: int = 1


@dataclass(frozen=True)
class Division:
    """The ranges of a dimension, in order, as runs.

    Examples
    --------
    >>> division = Division.of([(2, 0), (2, 1), (1, SHARED), (4, 0)])
    >>> division.runs
    (Run(size=2, owner=0, count=2), Run(size=1, owner=-1, count=1), Run(size=4, owner=0, count=1))
    >>> division.size, division.owners, division.widths, division.positions(0)
    (9, (0, 1), {0: 6, 1: 2, -1: 1}, (0, 1, 5, 6, 7, 8))
    >>> division.offsets().tolist()
    [0, 0, 0, 2]
    """

    runs: tuple[Run, ...]

    @staticmethod
    def of(ranges: Iterable[tuple[int, int]]) -> Division:
        """The division into consecutive ranges of given (size, owner)."""
        runs: list[list[int]] = []
        for size, owner in ranges:
            if runs and SHARED not in (owner, runs[-1][1]) and runs[-1][0] == size and sum(runs[-1][1:]) == owner:
                runs[-1][2] += 1
            else:
                runs.append([size, owner, 1])
        return Division(tuple(Run(*r) for r in runs))

    @staticmethod
    def even(size: int, ranks: int) -> Division:
        """Ranks have consecutive ranges as equal as can be, larger ones first.

        >>> Division.even(7, 3) == Division.of([(3, 0), (2, 1), (2, 2)])
        True
        """
        small, larger = divmod(size, ranks)
        runs = [Run(small + 1, 0, larger)] if larger else []
        if small or not larger:
            runs.append(Run(small, larger, ranks - larger if small else 1))
        return Division(tuple(runs))

    @cached_property
    def size(self) -> int:
        """Of the whole dimension."""
        return sum(r.size * r.count for r in self.runs)

    @property
    def count(self) -> int:
        """How many ranges there are."""
        return sum(r.count for r in self.runs)

    def fits(self, ranks: int) -> bool:
        """Whether there are no other owners than those ranks, and no sizes or counts that mean nothing."""
        owned = all(r.count == 1 if r.owner == SHARED else 0 <= r.owner <= ranks - r.count for r in self.runs)
        return owned and all(r.size >= 0 and r.count >= 1 for r in self.runs)

    # ---- range by range

    def __iter__(self) -> Iterator[Range]:
        """All ranges, in order."""
        start = 0
        for run in self.runs:
            for i in range(run.count):
                yield Range(start, start + run.size, run.owner if run.owner == SHARED else run.owner + i)
                start += run.size

    def within(self, start: int, stop: int) -> Iterator[tuple[Range, int]]:
        """The parts of ranges that lie in an interval, and how far into its range each begins."""
        for r in self:
            a, b = max(r.start, start), min(r.stop, stop)
            if b > a:
                yield Range(a, b, r.owner), a - r.start

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The (size, owner) of each range, in order: what `of` takes."""
        return tuple((r.size, r.owner) for r in self)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The size and the owner of each range, in order."""
        sizes, owners, counts = np.array([(r.size, r.owner, r.count) for r in self.runs]).T
        before = np.cumsum(counts) - counts
        return np.repeat(sizes, counts), np.repeat(owners - before, counts) + np.arange(counts.sum())

    def offsets(self) -> np.ndarray:
        """Where each range begins in what its owner has, side by side."""
        sizes, owners = self.arrays()
        order = np.argsort(owners, kind="stable")
        before = np.cumsum(sizes[order]) - sizes[order]  # of all ranges that come first by owner
        of_owner = np.searchsorted(owners[order], owners[order])
        result = np.empty_like(sizes)
        result[order] = before - before[of_owner]
        return result

    # ---- by owner

    def of_owner(self, owner: int) -> list[Range]:
        """The ranges of one owner that are not empty."""
        result, start = [], 0
        for run in self.runs:
            if run.size and run.owner <= owner < run.owner + run.count:
                first = start + (owner - run.owner) * run.size
                result.append(Range(first, first + run.size, owner))
            start += run.size * run.count
        return result

    @cached_property
    def widths(self) -> dict[int, int]:
        """Size by owner, `SHARED` included, of those that have a range."""
        result: dict[int, int] = {}
        for size, owner in self.pairs:
            result[owner] = result.get(owner, 0) + size
        return result

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The ranks that own a range that is not empty, in order."""
        sizes, owners = self.arrays()
        found = np.unique(owners[(sizes > 0) & (owners != SHARED)])
        if len(found) and found[-1] - found[0] == len(found) - 1:
            return _consecutive(int(found[0]), int(found[-1]) + 1)
        return tuple(found.tolist())

    @cached_property
    def owner_of_each(self) -> tuple[int, ...]:
        """The owner of each element of the dimension."""
        return tuple(owner for size, owner in self.pairs for _ in range(size))

    @cached_property
    def _positions(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, list[int]] = {}
        for r in self:
            found.setdefault(r.owner, []).extend(range(r.start, r.stop))
        return {owner: tuple(positions) for owner, positions in found.items()}

    def positions(self, owner: int) -> tuple[int, ...]:
        """The elements of the dimension that an owner has, in order."""
        return self._positions.get(owner, ())


@cache
def _consecutive(start: int, stop: int) -> tuple[int, ...]:
    """Ranks side by side, once for all that they divide."""
    return tuple(range(start, stop))

"""Spans of ranks: what ranks side by side have in common is said once for all of them.

What each rank has is a tuple of (first, stop, value), in order: ranks ``first`` to ``stop - 1`` have that value, and
ranks in no span have none. A plan for a thousand ranks takes room for the kinds of ranks that it has.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import TypeVar

T = TypeVar("T")


D = TypeVar("D")


Spans = tuple[tuple[int, int, T], ...]


def spans_of(values: Iterable[tuple[int, T]]) -> Spans[T]:
    """The spans of (rank, value), ranks rising.

    >>> spans_of([(0, "a"), (1, "a"), (2, "b"), (4, "b")])
    ((0, 2, 'a'), (2, 3, 'b'), (4, 5, 'b'))
    """
    result: list[tuple[int, int, T]] = []
    for rank, value in values:
        if result and result[-1][1:] == (rank, value):
            result[-1] = (result[-1][0], rank + 1, value)
        else:
            result.append((rank, rank + 1, value))
    return tuple(result)


def alike(ranks: Sequence[int], value: T) -> Spans[T]:
    """The spans of rising ranks that all have one value; in time that grows with the spans, not with the ranks.

    >>> alike((0, 1, 2, 5, 6), "a")
    ((0, 3, 'a'), (5, 7, 'a'))
    """
    result, start = [], 0
    while start < len(ranks):
        # how far a rank is ahead of its position is the same within a span, and more behind it
        ahead = ranks[start] - start
        end = bisect_right(range(len(ranks)), ahead, lo=start, key=lambda i: ranks[i] - i)
        result.append((ranks[start], ranks[end - 1] + 1, value))
        start = end
    return tuple(result)


def at(spans: Spans[T], rank: int, none: D) -> T | D:
    """What a rank has; ``none`` if it has nothing.

    >>> spans = ((0, 3, "a"), (5, 7, "b"))
    >>> [at(spans, rank, "-") for rank in (2, 3, 5, 7)]
    ['a', '-', 'b', '-']
    """
    position = bisect_right(spans, rank, key=itemgetter(0)) - 1
    return spans[position][2] if position >= 0 and rank < spans[position][1] else none


def summed(spans: Spans[int]) -> int:
    """The sum over ranks.

    >>> summed(((0, 3, 2), (5, 7, 1)))
    8
    """
    return sum((stop - first) * value for first, stop, value in spans)


def union(several: Sequence[Spans[T]], combine: Callable[[list[T]], T]) -> Spans[T]:
    """What ranks have of several things together: ``combine`` makes one value of a rank's.

    >>> union([((0, 4, 1),), ((2, 6, 10),)], sum)
    ((0, 2, 1), (2, 4, 11), (4, 6, 10))
    """
    if all(spans == several[0] for spans in several):
        return tuple((first, stop, combine([value] * len(several))) for first, stop, value in several[0])
    borders = sorted({border for spans in several for first, stop, _ in spans for border in (first, stop)})
    result: list[tuple[int, int, T]] = []
    for first, stop in itertools.pairwise(borders):
        values = [value for spans in several for a, b, value in spans if a <= first < b]
        if values:
            result.append((first, stop, combine(values)))
    return tuple(result)

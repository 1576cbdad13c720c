"""Eviction: which rows go at the end of a step, slice by slice: by when or how often their ids were seen.

A strategy is a frozen class. It says which slices it looks at, and there which rows go: by what it is given of them,
and nothing else, so that the same rows go wherever a slice is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from descompiler.errors import InputError

RANKINGS = ("lru", "lfu")


@dataclass(frozen=True)
class Seen:
    """What a strategy knows of rows: the slice of each, its key, the last step that saw it, and in how many it was."""

    slices: Tensor
    keys: Tensor
    last: Tensor
    counts: Tensor | None


class Eviction(Protocol):
    """Which rows go at the end of a step."""

    @property
    def capacity(self) -> int | None:
        """Rows that it is about, of which the number of slices is a function; None if it keeps any number."""
        ...

    @property
    def counts(self) -> bool:
        """Whether it has to know in how many steps a row was seen."""
        ...

    def visited(self, live: Tensor, step: int) -> Tensor:
        """The slices that it looks at when a step ends, of the rows that are live in each."""
        ...

    def gone(self, seen: Seen, live: Tensor, step: int, kept: Tensor) -> Tensor:
        """For each row of these slices whether it goes; none of those that have to be kept."""
        ...


@dataclass(frozen=True)
class Capacity:
    """At most so many rows: a slice that has more than its share loses those seen longest ago, or in fewest steps.

    As in a cache of sets the share is of each slice: ``rows`` divided by the number of slices, rounded down. A slice
    above it goes down to 7/8 of it at once, so that few slices have to be looked at in each step.

    Parameters
    ----------
    rows : int
        From 64 on.
    by : {"lru", "lfu"}
        "lru": those whose last step is longest ago; "lfu": those seen in the fewest steps since they came, of these
        longest ago. Among equals the smaller key goes (`descompiler.dynamic.hashing`).
    """

    rows: int
    by: str = "lru"

    def __post_init__(self) -> None:
        if self.rows < 64:
            raise InputError(f"rows={self.rows}; a table has 64 slices or more, and each at least one row")
        if self.by not in RANKINGS:
            raise InputError(f"by={self.by!r}; it is one of {', '.join(RANKINGS)}")

    @property
    def capacity(self) -> int | None:
        return self.rows

    @property
    def counts(self) -> bool:
        return self.by == "lfu"

    def visited(self, live: Tensor, step: int) -> Tensor:
        return torch.from_numpy((live.numpy() > self.rows // len(live)).nonzero()[0])

    def gone(self, seen: Seen, live: Tensor, step: int, kept: Tensor) -> Tensor:
        share = self.rows // len(live)
        ranks = [seen.keys, seen.last, *([] if seen.counts is None else [seen.counts]), kept, seen.slices]
        order = np.lexsort([rank.numpy() for rank in ranks])  # the last one matters most
        slices = seen.slices.numpy()[order]
        ends = np.bincount(slices, minlength=len(live)).cumsum()
        place = np.arange(len(order)) - np.concatenate([[0], ends[:-1]])[slices]  # among those of the slice
        gone = np.empty(len(order), dtype=bool)
        gone[order] = place < (live.numpy() - (share - share // 8))[slices]
        return torch.from_numpy(gone).logical_and_(~kept)


@dataclass(frozen=True)
class TimeToLive:
    """Rows that no step has looked up for so many steps go.

    Slices are looked at in turn, every one once in ``steps // 8`` steps, so that no step looks at all rows: a row goes
    when its slice is next looked at, an eighth later at most.
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps}; a row lives one step or more")

    @property
    def capacity(self) -> int | None:
        return None

    @property
    def counts(self) -> bool:
        return False

    def visited(self, live: Tensor, step: int) -> Tensor:
        turns = min(max(self.steps // 8, 1), len(live))
        return torch.arange(step % turns, len(live), turns)

    def gone(self, seen: Seen, live: Tensor, step: int, kept: Tensor) -> Tensor:
        return (step - seen.last >= self.steps).logical_and_(~kept)

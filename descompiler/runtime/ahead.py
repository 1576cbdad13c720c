"""What is sent of a batch before its step: it depends on the batch alone, not on what earlier steps change.

    announcement (rows, program, how many unique ids, or that there is no batch)  ->  ids into the region, unique ids

Both on process groups of their own, whose collectives are made in the order of the batches. A step whose forward gets
this very batch on every rank, which its header tells, goes on with what has arrived; else all make the usual exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field

from torch import Tensor

from descompiler.layout.fetches import Counts
from descompiler.layout.step import AHEAD, AHEAD_BYTES, EARLY, StepHeader
from descompiler.layout.traffic import Traffic
from descompiler.runtime.agreement import Agreement, Header
from descompiler.runtime.border import Handle
from descompiler.runtime.early_rows import EarlyRows
from descompiler.runtime.fetching import Fetching
from descompiler.runtime.pulling import Pulling

NO_BATCH = -1
"""Rows of what a rank announces whose loader has come to its end."""


@dataclass(frozen=True)
class Announcement(Header):
    """What a rank tells another one of a batch ahead of its step: of one that has ``failed`` nothing else is sent.

    Attributes
    ----------
    batch : int
        Which one, of all that this process group has seen.
    """

    batch: int = 0

    def encode(self) -> list[int]:
        return [*super().encode(), self.batch]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Announcement:
        *first, batch = numbers
        h = Header.decode(first)
        return cls(h.failed, h.asked, h.gathered, h.rows, h.call, batch)


@dataclass(frozen=True)
class Seen:
    """Tensors as they were: the same objects, which nobody has changed in place since.

    >>> import torch
    >>> x, y = torch.zeros(2), torch.zeros(2)
    >>> seen = Seen.of([x, y])
    >>> seen.is_now([x, y]), seen.is_now([x, x.clone()])
    (True, False)
    >>> seen.is_now([x, y.add_(1)])
    False
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Seen:
        return cls(tuple(tensors), tuple(x._version for x in tensors))

    def is_now(self, tensors: Sequence[Tensor]) -> bool:
        if len(tensors) != len(self.tensors):
            return False
        known = zip(tensors, self.tensors, self.versions, strict=True)
        return all(x is y and x._version == version for x, y, version in known)


@dataclass
class Ahead:
    """What was sent of a batch, on its way or here.

    Attributes
    ----------
    batch : int
    rows : list of int
        Of all ranks.
    entering : Handle or None
        Ids into the region, as `Runtime.enter_start` returns them.
    fetching : Fetching or Pulling or None
        Unique ids, as `fetch_start` returns it.
    traffic : Traffic
        What it took.
    early : EarlyRows or None
        Rows, of what ``fetching`` asks.
    taken : bool
        Whether a step went on with it.
    """

    batch: int
    rows: list[int]
    entering: Handle | None
    fetching: Fetching | Pulling | None
    traffic: Traffic
    early: EarlyRows | None = None
    taken: bool = False


@dataclass
class TakesAhead(Agreement):
    """Ranks whose steps may begin with what has gone ahead.

    Attributes
    ----------
    unique : dict of str to Counts
        Unique ids of this step, by table.
    ahead : Ahead or None
        Of this step's batch.
    then : callable or None
        To be done once when rows that this rank waits for have come: other ranks' links are free.
    beside : Traffic
        What this step has sent and no layout says.
    """

    _: KW_ONLY
    unique: dict[str, Counts] = field(default_factory=dict)
    ahead: Ahead | None = None
    then: Callable[[], object] | None = None
    beside: Traffic = field(default_factory=Traffic)

    def take_ahead(self) -> Ahead | None:
        """What has gone ahead of this step's batch, if anything has: the step begins with it, unless ranks differ."""
        if (ahead := self.ahead) is not None:
            self.traffic.include(ahead.traffic)
            self.beside.add(AHEAD, (self.ranks - 1) * AHEAD_BYTES)
            ahead.taken, early = True, ahead.early
            if early is not None:
                self.beside.add(EARLY, early.bytes_told)
            self.header_ahead(ahead.batch, ahead.rows, early is not None and early.changed)
        return ahead

    def leave_ahead(self) -> None:
        """Not all ranks take what has gone ahead: the step begins again, with another header."""
        if self.ahead is not None:
            self.ahead.taken = False
        self.traffic, self.unique, self.beside, self.ahead = Traffic(), {}, Traffic(), None
        self.traffic.add(StepHeader.SEND, (self.ranks - 1) * StepHeader.BYTES)
        self.another_header()

    def early_of(self, fetching: Fetching) -> EarlyRows | None:
        """Rows of a fetch that have gone ahead."""
        ahead = self.ahead
        return ahead.early if ahead is not None and ahead.fetching is fetching else None

    def rows_have_come(self) -> None:
        """Rows that this rank waited for are here; others may cross."""
        if self.then is not None:
            then, self.then = self.then, None
            then()

    def count_unique(self, table: str, counts: Counts) -> None:
        """Add to this step's unique ids."""
        known = self.unique.get(table)
        self.unique[table] = counts if known is None else known + counts

    def another_header(self) -> None:
        """This step has one more than layouts say."""
        self.beside.add(StepHeader.SEND, (self.ranks - 1) * StepHeader.BYTES)

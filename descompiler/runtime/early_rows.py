"""Rows that travel before their step: those that the step before does not ask for, if nothing else changes them.

    ids of batch k + 1 have come   which of its rows batch k asks for too, and so will change: a bit each   `offered`
    rows of batch k have come      the others                                                              `send`
    step k + 1 begins              are they what was sent? its header tells                                `look`
    its rows are answered          the rest; all, from a rank whose rows have changed                      `rest`

Rows are compared with what was sent bit by bit, so that training is what it is without, whatever has changed one: an
optimiser that moves all rows, a user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from descompiler.layout.fetches import Fetch
from descompiler.layout.step import EARLY
from descompiler.layout.traffic import Traffic
from descompiler.runtime.collectives import Pending
from descompiler.runtime.communicator import Communicator
from descompiler.runtime.fetching import Fetching, collected, cross_as, dealt, hear_asked, message_sizes, owned_rows
from descompiler.runtime.messages import bytes_of

Flags = list[list[Tensor]]
"""``[rank][class]``: of each row, in the order of their keys, whether it goes ahead."""


@dataclass
class EarlyRows:
    """Rows of a fetch that go ahead.

    Attributes
    ----------
    runtime : Communicator
        What sends them, in the order of batches; it is no step's.
    traffic : Traffic
        Where they are counted.
    given : Flags
        Of the rows that ranks ask of this one.
    came : Flags
        Of those that this rank asks for, once `send` was called.
    bytes_told : int
        That this rank sends to say which they are.
    changed : bool
        Whether some that this rank sent are others now.
    changes : sequence of bool
        By rank, the same, once they have told.
    """

    runtime: Communicator
    traffic: Traffic
    fetching: Fetching
    given: Flags
    bytes_told: int
    telling: Pending
    came: Flags = field(default_factory=list)
    changed: bool = False
    changes: Sequence[bool] = ()
    _sent: list[Tensor] = field(default_factory=list)  # by class
    _bytes_sent: int = 0
    _answering: Pending | None = None

    @classmethod
    def offered(
        cls, runtime: Communicator, traffic: Traffic, fetching: Fetching, before: Sequence[Tensor]
    ) -> EarlyRows:
        """Tell each rank which rows go ahead: those of no key ``before``, by class. Collective."""
        runtime.traffic = traffic
        hear_asked(fetching, runtime.rank)
        free = [~torch.isin(keys, of) for keys, of in zip(fetching.served_keys, before, strict=True)]
        given = _by_rank(free, fetching.served)
        given[runtime.rank] = [torch.zeros_like(x) for x in given[runtime.rank]]  # they don't cross
        told = [_bits(torch.cat(x)) for x in given]
        told[runtime.rank] = told[runtime.rank][:0]
        sent = [len(x) for x in told]
        telling = runtime.exchange(torch.cat(told), sent, _sizes_told(fetching, runtime.rank), EARLY)
        return cls(runtime, traffic, fetching, given, sum(sent), telling)

    def send(self, weights: Sequence[Tensor], narrow: torch.dtype | None) -> None:
        """Send rows of this rank's pieces, ``weights``; ``narrow`` as `cross_as` has it. Collective; once."""
        if self._answering is not None:
            return
        runtime, fetching = self.runtime, self.fetching
        runtime.traffic = self.traffic
        told = self.telling.wait().split(_sizes_told(fetching, runtime.rank))
        self.came = [list(_flags(x, sum(of)).split(of)) for x, of in zip(told, fetching.asked, strict=True)]
        self._sent = self._rows(weights)
        cross_as(fetching, self._sent, narrow)
        given, came = _counts(self.given), _counts(self.came)
        message = dealt(fetching, self._sent, given)
        self._bytes_sent = message.nbytes
        sent, received = (message_sizes(fetching, x) for x in (given, came))
        self._answering = runtime.exchange(message, sent, received, Fetch.ROWS)

    def look(self, weights: Sequence[Tensor]) -> None:
        """See whether the rows of this rank's pieces are what was sent."""
        self.changed = not all(map(_same, self._rows(weights), self._sent))

    def _rows(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Those that go ahead, by class."""
        flags = zip(self.fetching.served_keys, _by_class(self.given), strict=True)
        return owned_rows(self.fetching, weights, self.runtime.rank, [keys[given] for keys, given in flags])

    @property
    def bytes_in_vain(self) -> int:
        """Of rows that this rank has to send again."""
        return self._bytes_sent if self.changed else 0

    def rest(
        self, owned: Sequence[Tensor], changes: Sequence[bool]
    ) -> tuple[list[Tensor], list[list[int]], list[list[int]]]:
        """What the step itself sends of the rows that are asked of this rank, ``owned``, by class.

        Returns the rows, and ``[rank][class]`` how many go to a rank, and come from it.
        """
        self.changes = changes
        served = self.fetching.served
        if not self.changed:
            owned = [rows[~given] for rows, given in zip(owned, _by_class(self.given), strict=True)]
            served = _less(served, self.given)
        return list(owned), served, self._rest_asked()

    def _rest_asked(self) -> list[list[int]]:
        rest = _less(self.fetching.asked, self.came)
        every = zip(self.changes, self.fetching.asked, rest, strict=True)
        return [whole if changed else some for changed, whole, some in every]

    def with_rest(self, rest: Tensor) -> list[list[Tensor]]:
        """By class, the rows ``[n, dim]`` of each rank: what came ahead, and those in the message ``rest``."""
        assert self._answering is not None
        ahead, late = self._answering.wait(), collected(self.fetching, rest, self._rest_asked())
        if all(self.changes):  # of another dtype by now, perhaps
            return late
        early = collected(self.fetching, ahead, _counts(self.came))
        result: list[list[Tensor]] = []
        for c, of_class in enumerate(zip(early, late, strict=True)):
            result.append([])
            for changed, of, came, rest_of in zip(self.changes, self.came, *of_class, strict=True):
                rows = rest_of
                if not changed:
                    rows = came.new_empty(len(came) + len(rest_of), came.shape[1])
                    rows[of[c]], rows[~of[c]] = came, rest_of
                result[-1].append(rows)
        return result


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same bits.

    >>> zero, nan = torch.zeros(1), torch.full((1,), float("nan"))
    >>> _same(nan, nan.clone()), _same(zero, -zero)
    (True, False)
    """
    return (x.dtype, x.device) == (y.dtype, y.device) and torch.equal(bytes_of(x), bytes_of(y))


def _by_rank(flags: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> Flags:
    """Of flags by class; ``counts`` ``[rank][class]``."""
    parts = [x.split([row[c] for row in counts]) for c, x in enumerate(flags)]
    return [[of[r] for of in parts] for r in range(len(counts))]


def _by_class(flags: Flags) -> list[Tensor]:
    return [torch.cat(of) for of in zip(*flags, strict=True)]


def _counts(flags: Flags) -> list[list[int]]:
    """``[rank][class]``: how many go ahead."""
    return [[int(x.sum()) for x in of] for of in flags]


def _less(counts: Sequence[Sequence[int]], flags: Flags) -> list[list[int]]:
    """``[rank][class]``: how many don't."""
    every = zip(counts, _counts(flags), strict=True)
    return [[n - some for n, some in zip(row, ahead, strict=True)] for row, ahead in every]


def _sizes_told(fetching: Fetching, rank: int) -> list[int]:
    """Bytes by which each rank says which rows it sends to this one."""
    return [0 if r == rank else -(-sum(of) // 8) for r, of in enumerate(fetching.asked)]


def _bits(flags: Tensor) -> Tensor:
    """Flags, eight in a byte.

    >>> _bits(torch.tensor([True, False, True] + [False] * 6 + [True])).tolist()
    [5, 2]
    """
    eight = functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8)).view(-1, 8)
    return (eight << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(1, dtype=torch.uint8)


def _flags(bits: Tensor, count: int) -> Tensor:
    """The inverse of `_bits`; none where no byte came.

    >>> _flags(torch.tensor([5, 2], dtype=torch.uint8), 10).nonzero().flatten().tolist()
    [0, 2, 9]
    """
    if not len(bits):
        return bits.new_zeros(count, dtype=torch.bool)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1) >> places & 1).view(-1)[:count].bool()

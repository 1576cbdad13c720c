"""What one rank sends in one step, by collective: bytes and calls, predicted by a plan or counted by the runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from fractions import Fraction


@dataclass
class Traffic:
    """Bytes sent by one rank, and calls of the collectives that sent them.

    A ring all-reduce of S bytes among N ranks counts as 2(N-1)/N·S, an all-gather of S bytes as (N-1)·S, an all-to-all
    as what goes to other ranks. Fractions keep the sums exact. A call counts also where this rank sends nothing: the
    others wait for it. The reducer's buckets are one call, as they are under way together.

    Names are ``kind (purpose)``; the kind is what a `descompiler.planning.cluster.Cluster` has latencies and bandwidths
    of.
    """

    bytes_by_collective: dict[str, int | Fraction] = field(default_factory=dict)
    calls_by_collective: dict[str, int] = field(default_factory=dict)

    def add(self, collective: str, sent_bytes: int | Fraction, calls: int = 1) -> None:
        """Add bytes, and ``calls`` calls of the collective that sent them."""
        if sent_bytes or calls:
            self.bytes_by_collective[collective] = self.bytes_by_collective.get(collective, 0) + sent_bytes
            self.calls_by_collective[collective] = self.calls_by_collective.get(collective, 0) + calls

    def include(self, other: Traffic) -> None:
        """Add what was sent besides."""
        for collective, sent_bytes in other.bytes_by_collective.items():
            self.add(collective, sent_bytes, other.calls_by_collective[collective])

    @property
    def total(self) -> int:
        """All bytes, rounded to an integer."""
        return round(sum(self.bytes_by_collective.values()))

    @property
    def calls(self) -> int:
        """All calls."""
        return sum(self.calls_by_collective.values())

    def __str__(self) -> str:
        lines = [
            f"  {name:<46} {float(n):>14,.0f} B {self.calls_by_collective[name]:>4} x"
            for name, n in self.bytes_by_collective.items()
        ]
        return "\n".join([*lines, f"  {'total':<46} {self.total:>14,} B {self.calls:>4} x"])


def kind_of(collective: str) -> str:
    """The collective, without its purpose.

    >>> kind_of("all_to_all (ids in)")
    'all_to_all'
    """
    return collective.partition(" (")[0]


class Stage(IntEnum):
    """When in a step something crosses, in order."""

    HEADER = 0
    """Before all else: what ranks have to know of one another."""
    IDS_IN = 1
    """What the header's answer is enough for: ids to where they are looked up, weights that are used whole."""
    VALUES_OUT = 2
    """What is looked up, and what is computed from it, to the rows that it is for."""
    GRADIENTS_BACK = 3
    """The way of the values, back."""
    END_OF_BACKWARD = 4
    """When backward has come to every parameter."""


class Collective(str):
    """The name of a collective, ``kind (purpose)``, which knows when in a step it is made, and what it sends.

    Attributes
    ----------
    stage : Stage
    trained : bool
        Whether it is made only where gradients are: in backward, or for backward.

    Examples
    --------
    >>> back = Collective("all_reduce (sums)", Stage.GRADIENTS_BACK)
    >>> back.trained, back.sent_bytes(100, ranks=4)
    (True, Fraction(150, 1))
    """

    stage: Stage
    trained: bool

    def __new__(cls, name: str, stage: Stage, *, trained: bool = False) -> Collective:
        self = super().__new__(cls, name)
        self.stage, self.trained = stage, trained or stage >= Stage.GRADIENTS_BACK
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)  # in what ranks send one another it is a name

    def sent_bytes(self, size_bytes: int | Fraction, ranks: int) -> int | Fraction:
        """Bytes that a rank sends.

        Parameters
        ----------
        size_bytes : int or Fraction
            Of the sum (all-reduce), of a rank's own part (all-gather), of what goes to other ranks (all-to-all).
        """
        kind = kind_of(self)
        if kind == "all_reduce":
            return all_reduce_bytes(size_bytes, ranks)
        return all_gather_bytes(size_bytes, ranks) if kind == "all_gather" else size_bytes


def all_reduce_bytes(size_bytes: int | Fraction, ranks: int) -> Fraction:
    """Bytes sent per rank by a ring all-reduce.

    >>> all_reduce_bytes(100, 4)
    Fraction(150, 1)
    """
    return Fraction(2 * (ranks - 1) * size_bytes, ranks)


def all_gather_bytes(size_bytes: int | Fraction, ranks: int) -> int | Fraction:
    """Bytes sent by a rank of whose part every other rank gets a copy."""
    return (ranks - 1) * size_bytes

"""What one rank sends in one step, by collective: bytes and calls, predicted by a plan or counted by the runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
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

    bytes_by_collective: dict[str, Fraction] = field(default_factory=dict)
    calls_by_collective: dict[str, int] = field(default_factory=dict)

    def add(self, collective: str, sent_bytes: int | Fraction, calls: int = 1) -> None:
        """Add bytes, and ``calls`` calls of the collective that sent them."""
        if sent_bytes or calls:
            self.bytes_by_collective[collective] = self.bytes_by_collective.get(collective, Fraction(0)) + sent_bytes
            self.calls_by_collective[collective] = self.calls_by_collective.get(collective, 0) + calls

    @property
    def total(self) -> int:
        """All bytes, rounded to an integer."""
        return round(sum(self.bytes_by_collective.values(), Fraction(0)))

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

    >>> kind_of(ENTER)
    'all_to_all'
    """
    return collective.partition(" (")[0]


# The names of the collectives, in the order in which a step makes them.
HEADER = "all_to_all (header)"


FETCH_COUNTS = "all_to_all (unique ids, counts)"


FETCH_IDS = "all_to_all (unique ids)"


WHOLE = "all_gather (whole tables)"


ENTER = "all_to_all (ids in)"


FETCH_ROWS = "all_to_all (rows of unique ids)"


EXIT = "all_to_all (aggregation, forward)"


RETURN = "all_to_all (aggregation, backward)"


SHARED_COLUMNS = "all_reduce (shared columns)"


FETCH_BACK = "all_to_all (gradients of unique ids)"


GATHER_IDS = "all_to_all (gathered gradients, ids)"


GATHER_BACK = "all_to_all (gathered gradients)"


SHARED_ROWS = "all_reduce (shared rows)"


NORM_INSIDE = "all_to_all (running statistics)"


LEAVES = "all_gather (opaque leaves, status)"


WHOLE_BACK = "all_to_all (gradients of whole tables)"


NORM_FORWARD = "all_gather (batch norm, forward)"


NORM_BACKWARD = "all_reduce (batch norm, backward)"


VOCABULARY_ROWS = "all_to_all (vocabulary, rows to owners)"


VOCABULARY_PARTIAL = "all_to_all (vocabulary, partial results)"


VOCABULARY_GRADIENTS = "all_to_all (vocabulary, their gradients)"


VOCABULARY_TERMS = "all_to_all (vocabulary, gradients of rows)"


DENSE_GRADIENTS = "all_reduce (dense gradients)"


LEAVES_BACK = "all_gather (opaque leaves, status of backward)"


COUPLING = {
    "gather": "all_gather (batch-coupled values)",
    "reduce": "all_reduce (sums over the batch)",
    "slice": "all_gather (gradients of batch-coupled rows)",
    "spread": "all_reduce (gradients of batch-coupled values)",
    "total": "all_reduce (sums over whole tables)",
    "total back": "all_reduce (gradients of sums over whole tables)",
}
"""By the kind of exchange; see `descompiler.classify.coupling`."""


IN_BACKWARD = {"gather": False, "reduce": False, "slice": True, "spread": True, "total": False, "total back": True}


HEADER_BYTES = 5 * 8  # rows, status, mode, unique ids asked, unique ids gathered: int64 each


FETCH_COUNTS_BYTES = 3 * 8  # status, unique ids asked, unique ids gathered


LEAF_BYTES = 1  # status, of a run and of a backward


def all_reduce_bytes(size_bytes: int, ranks: int) -> Fraction:
    """Bytes sent per rank by a ring all-reduce.

    >>> all_reduce_bytes(100, 4)
    Fraction(150, 1)
    """
    return Fraction(2 * (ranks - 1) * size_bytes, ranks)

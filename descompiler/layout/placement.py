"""Placements: what each rank holds of a tensor of the original graph.

The original graph's tensors have a leading batch dimension. Outside the substituted region a rank holds its own rows
(`Local`, torch's ``Shard(0)``). Inside it, ranks hold the *global* batch of what their weights produce:

    Owned(r)      rank r holds the tensor whole, the others nothing
    Shard(d, v)   dimension d is divided into ranges, each held by one rank (or, `LOCAL`, held by nobody for the
                  global batch: every rank holds that range for its own rows)
    Partial(R)    the ranks of R hold terms whose sum is the tensor (`local`: plus a term that every rank holds for its
                  own rows: a bias, a product with dense features)
    Disjoint(R)   as Partial, and every row is non-zero on at most one rank; `key` names the pattern of rows, so that
                  two tensors with one key may be multiplied before they are summed

A rank's share of a value is thus up to two tensors: one for the global batch, one for its own rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from descompiler.layout.division import SHARED, Division
from descompiler.layout.spans import alike

LOCAL = SHARED
"""Owner of a range that every rank holds for its own rows only."""


@dataclass(frozen=True)
class Local:
    """Own rows, whole (``Shard(0)`` of the global batch): everything outside the region."""

    def __str__(self) -> str:
        return "Shard(0)"


@dataclass(frozen=True)
class Owned:
    rank: int

    def __str__(self) -> str:
        return f"Owned({self.rank})"


@dataclass(frozen=True)
class Shard:
    dim: int
    division: Division

    @property
    def widths(self) -> dict[int, int]:
        """Size of the sharded dimension by owner, `LOCAL` included."""
        return self.division.widths

    def width(self, rank: int) -> int:
        """Size of the sharded dimension on a rank (``LOCAL`` for the local part)."""
        return self.widths.get(rank, 0)

    def positions(self, rank: int) -> list[int]:
        """Which elements of the sharded dimension a rank has (`LOCAL`: the local part), in order."""
        return list(self.division.positions(rank))

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.division.owners

    @property
    def local(self) -> bool:
        return LOCAL in self.widths

    def __str__(self) -> str:
        parts = ",".join(f"{size}@{'local' if owner == LOCAL else owner}" for size, owner in self.division.pairs)
        return f"Shard({self.dim}: {parts})"


@dataclass(frozen=True)
class Partial:
    ranks: tuple[int, ...]
    local: bool = False

    def __str__(self) -> str:
        own = "+local" if self.local else ""
        return f"Partial({_in_words(self.ranks)}{own})"


@dataclass(frozen=True)
class Disjoint:
    ranks: tuple[int, ...]
    key: Hashable = field(default=None)
    lead: int = 1  # leading dimensions that the row pattern spans: those of the ids

    def __str__(self) -> str:
        return f"Disjoint({_in_words(self.ranks)})"


def _in_words(ranks: tuple[int, ...]) -> str:
    """Ranks as text.

    >>> _in_words((0, 1, 4, 6, 7, 8, 9))
    '0,1,4,6..9'
    """
    spans = (range(first, stop) for first, stop, _ in alike(ranks, None))
    return ",".join(f"{s[0]}..{s[-1]}" if len(s) > 2 else ",".join(map(str, s)) for s in spans)


Region = Owned | Shard | Partial | Disjoint


Placement = Local | Region


def shard(dim: int, ranges: Iterable[tuple[int, int]]) -> Owned | Shard:
    """A `Shard` of the (size, owner) of consecutive ranges, in canonical form.

    Empty ranges are dropped, neighbours of one owner merged, and what one owner has whole is `Owned`.
    """
    merged: list[tuple[int, int]] = []
    for size, owner in ranges:
        if not size:
            continue
        if merged and merged[-1][1] == owner:
            merged[-1] = merged[-1][0] + size, owner
        else:
            merged.append((size, owner))
    if len(merged) == 1 and merged[0][1] != LOCAL:
        return Owned(merged[0][1])
    return Shard(dim, Division.of(merged))


def ranks_of(placement: Region) -> tuple[int, ...]:
    """The ranks that hold something of the global batch."""
    return (placement.rank,) if isinstance(placement, Owned) else placement.ranks


def has_local(placement: Region) -> bool:
    """Whether ranks also hold a part for their own rows."""
    return isinstance(placement, Shard | Partial) and placement.local

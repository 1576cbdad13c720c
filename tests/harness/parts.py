"""Numbers cut into the parts that a placement says, and put together again."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from descompiler.layout.placement import LOCAL, Disjoint, Owned, Region, Shard, has_local, ranks_of

RANKS = 3
ROWS = (5, 0, 4)
"""Rows of the batch that each rank has: uneven, and none on one."""

BATCH = sum(ROWS)


@dataclass(frozen=True)
class Held:
    """What ranks hold of a value.

    Attributes
    ----------
    whole : mapping of int to Tensor
        By rank, its part for the global batch.
    own : mapping of int to Tensor
        By rank, its part for its own rows.
    """

    whole: Mapping[int, Tensor] = field(default_factory=dict)
    own: Mapping[int, Tensor] = field(default_factory=dict)

    def part(self, rank: int, owner: int) -> Tensor | None:
        """The part of a rank that a rule is asked for as ``owner``'s: its own rows' if that is `LOCAL`."""
        return (self.own if owner == LOCAL else self.whole).get(rank)

    def every(self) -> Iterator[tuple[int, bool, Tensor]]:
        """All parts: (rank, whether of its own rows, numbers)."""
        for own, parts in ((False, self.whole), (True, self.own)):
            for rank, x in parts.items():
                yield rank, own, x


def own_rows(x: Tensor, rank: int) -> Tensor:
    """The rows of the global batch that are a rank's."""
    return x.narrow(0, sum(ROWS[:rank]), ROWS[rank])


def by_rank(x: Tensor) -> dict[int, Tensor]:
    """Each rank's own rows, in storage of its own."""
    return {r: own_rows(x, r).clone() for r in range(RANKS)}


def pattern(key: Hashable, shape: tuple[int, ...], ranks: tuple[int, ...]) -> Tensor:
    """The rank of each position of the leading dimensions, all ranks about equally often: always the same for a key."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((key, shape)).encode()))
    order = torch.randperm(prod(shape), generator=generator)
    return torch.tensor(ranks)[order % len(ranks)].reshape(shape)


def cut(x: Tensor, placement: Region, generator: torch.Generator) -> Held:
    """What ranks hold of a value for the global batch; terms are drawn at random, patterns follow their keys."""
    if isinstance(placement, Owned):
        return Held({placement.rank: x.clone()})
    if isinstance(placement, Shard):
        shares = {r: x[_along(placement.dim, placement.positions(r))] for r in placement.ranks}
        own = x[_along(placement.dim, placement.positions(LOCAL))]
        return Held(shares, by_rank(own) if placement.local else {})
    if isinstance(placement, Disjoint):
        lead = x.shape[: placement.lead]
        owner = pattern(placement.key, tuple(lead), placement.ranks).reshape(*lead, *[1] * (x.dim() - placement.lead))
        return Held({r: torch.where(owner == r, x, 0) for r in placement.ranks})
    *rest, last = placement.ranks
    terms = {r: torch.randn(x.shape, generator=generator, dtype=x.dtype) for r in rest}
    own = torch.randn(x.shape, generator=generator, dtype=x.dtype) if placement.local else torch.zeros_like(x)
    terms[last] = x - sum(terms.values()) - own
    return Held(terms, by_rank(own) if placement.local else {})


def join(held: Held, placement: Region, shape: torch.Size) -> Tensor:
    """The value of a shape that ranks hold.

    Raises
    ------
    ValueError
        If the ranks that hold something, or the shapes of what they hold, are not what the placement says.
    """
    own = range(RANKS) if has_local(placement) else ()
    if set(held.whole) != set(ranks_of(placement)) or set(held.own) != set(own):
        raise ValueError(f"parts on ranks {sorted(held.whole)}, and of own rows on {sorted(held.own)}")
    if isinstance(placement, Shard):
        result = torch.full(shape, torch.nan, dtype=torch.float64)
        pieces = {r: (x, placement.positions(r)) for r, x in held.whole.items()}
        if placement.local:
            pieces[LOCAL] = torch.cat([held.own[r] for r in range(RANKS)]), placement.positions(LOCAL)
        for x, positions in pieces.values():
            _check(x, (*shape[: placement.dim], len(positions), *shape[placement.dim + 1 :]))
            result[_along(placement.dim, positions)] = x.double()
        return result
    terms = list(held.whole.values())
    if held.own:
        terms.append(torch.cat([held.own[r] for r in range(RANKS)]))
    for x in terms:
        _check(x, shape)
    return sum(terms[1:], terms[0].double())


def support(held: Held, lead: int) -> Tensor | None:
    """The rank that has each position of the leading dimensions, -1 where none has; None if several have one."""
    has = torch.stack([(x != 0).reshape(*x.shape[:lead], -1).any(-1) for x in held.whole.values()])
    if has.sum(0).max() > 1:
        return None
    return torch.where(has.any(0), torch.tensor(list(held.whole))[has.int().argmax(0)], -1)


def _along(dim: int, positions: list[int]) -> tuple[slice | list[int], ...]:
    return (*[slice(None)] * dim, positions)


def _check(x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"a part of shape {tuple(x.shape)} where {tuple(shape)} belongs")

"""Owners: which rank has which slices of a dynamic table's key space; with them move rows, counters and sketches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from descompiler.dynamic.hashing import slice_of
from descompiler.errors import InputError


@dataclass(frozen=True)
class Owners:
    """Who owns each slice: one function of the number of slices and of ranks, which every rank computes for itself.

    Ranks have equally many slices, or one more or less. One rank more takes its share from the others, and nothing
    moves between these: from N to N + 1 ranks as many slices move as the new one has, 1/(N + 1), and no division with
    equal shares moves fewer.

    Parameters
    ----------
    slices : int
        A power of two.
    ranks : int

    Examples
    --------
    >>> [Owners(8, n).of_slices.tolist() for n in (1, 2, 3)]
    [[0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 2, 1, 1, 1, 2]]
    """

    slices: int
    ranks: int

    def __post_init__(self) -> None:
        if self.slices < 2 or self.slices & (self.slices - 1):
            raise InputError(f"slices={self.slices}; it is a power of two, from 2 on")
        if self.ranks < 1:
            raise InputError(f"ranks={self.ranks}; there is at least one")

    @cached_property
    def of_slices(self) -> Tensor:
        """The rank of each slice."""
        held = [list(range(self.slices))]
        for ranks in range(2, self.ranks + 1):
            new: list[int] = []
            for rank, mine in enumerate(held):
                kept = (self.slices - rank - 1) // ranks + 1  # its share, which falls with the number of ranks
                new += mine[kept:]
                del mine[kept:]
            held.append(new)
        owners = torch.empty(self.slices, dtype=torch.int64)
        for rank, mine in enumerate(held):
            owners[mine] = rank
        return owners

    def of(self, keys: Tensor) -> Tensor:
        """The rank of each key."""
        return self.of_slices[slice_of(keys, self.slices)]


def as_ranges(slices: Tensor) -> str:
    """Slices that are sorted, as text.

    >>> as_ranges(torch.tensor([0, 1, 2, 7, 9, 10])), as_ranges(torch.tensor([]))
    ('0-2 7-7 9-10', '')
    """
    ends = (slices.diff() != 1).nonzero()[:, 0] + 1
    parts = [part for part in slices.tensor_split(ends) if len(part)]
    return " ".join(f"{int(part[0])}-{int(part[-1])}" for part in parts)


def in_ranges(text: str) -> Tensor:
    """The slices of what `as_ranges` has written.

    >>> in_ranges("0-2 7-7").tolist(), in_ranges("").tolist()
    ([0, 1, 2, 7], [])
    """
    found = [torch.empty(0, dtype=torch.int64)]
    for part in text.split():
        first, _, last = part.partition("-")
        found.append(torch.arange(int(first), int(last) + 1))
    return torch.cat(found)

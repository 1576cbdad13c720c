"""Draws for the whole batch, the same on every rank, from a seed that rank 0 tells once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from descompiler.model.random_state import generators_kept, put_back, seed_generators, taken
from descompiler.runtime.collectives import broadcast_object


@dataclass
class Draws:
    """Draws that are the same on every rank of a group.

    Attributes
    ----------
    seed : int or None
        Rank 0's `torch.initial_seed` at the first draw.
    forward : int
        The number of the forward whose draws have begun.
    """

    group: Any
    ranks: int
    seed: int | None = None
    forward: int = -1
    after: tuple[Any, ...] = ()  # states of the generators after the latest draw of that forward

    @contextmanager
    def of_forward(self, forward: int, device: torch.device) -> Iterator[None]:
        """The generators as the draws of a forward, from its first, find them. Collective, once."""
        if self.seed is None:
            seed = torch.initial_seed()
            self.seed = seed if self.ranks == 1 else broadcast_object(seed, self.group)
        with generators_kept(device):
            seed_generators(hash((self.seed, forward)) & ((1 << 63) - 1))
            yield

    @contextmanager
    def next_of_forward(self, forward: int, device: torch.device) -> Iterator[None]:
        """The generators as the next draw of a forward finds them. Collective, once."""
        with self.of_forward(forward, device):
            if forward == self.forward:
                put_back(self.after, device)
            yield
            self.forward, self.after = forward, taken(device)

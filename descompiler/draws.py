"""Random numbers for the whole batch: those of one process that seeds its generators in front of each forward.

A draw that concerns all rows (`randperm`, negatives that rows share) has to be one draw. Every rank makes it, from a
seed that rank 0 tells once: torch's, NumPy's and Python's generators are seeded for each forward, further draws of the
same forward follow, and the generators are put back, so that ranks' own numbers don't move.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

ONE_DRAW = "one draw, equal on all ranks"
EACH_ITS_OWN = "each rank draws for its own rows"
"""What notes of a plan say of a random operator."""


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """torch's, NumPy's and Python's generators are afterwards as they were before."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Generators seeded, and put back; yields what tells whether any of them has been drawn from."""
    with generators_kept(device):
        seed_generators(seed)
        before = _taken(device)
        yield lambda: not _same(before, _taken(device))


def seed_generators(seed: int) -> None:
    """Seed torch's, Python's and NumPy's global generators; a model's own generators are its own."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


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
            box = [torch.initial_seed()]
            if self.ranks > 1:
                dist.broadcast_object_list(box, group_src=0, group=self.group)
            self.seed = box[0]
        with generators_kept(device):
            seed_generators(hash((self.seed, forward)) & ((1 << 63) - 1))
            yield

    @contextmanager
    def next_of_forward(self, forward: int, device: torch.device) -> Iterator[None]:
        """The generators as the next draw of a forward finds them. Collective, once."""
        with self.of_forward(forward, device):
            if forward == self.forward:
                _put(self.after, device)
            yield
            self.forward, self.after = forward, _taken(device)


def _taken(device: torch.device) -> tuple[Any, ...]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device, random.getstate(), np.random.get_state()


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    on_device = a[1] is b[1] is None or torch.equal(a[1], b[1])
    by_numpy = all(np.array_equal(x, y) for x, y in zip(a[3], b[3], strict=True))
    return torch.equal(a[0], b[0]) and on_device and a[2] == b[2] and by_numpy


def _put(states: tuple[Any, ...], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
    random.setstate(states[2])
    np.random.set_state(states[3])

"""Random numbers for the whole batch: those of one process that seeds its generators in front of each forward.

A draw that concerns all rows (`randperm`, negatives that rows share) has to be one draw. Every rank makes it, from a
seed that rank 0 tells once: torch's, NumPy's and Python's generators are seeded for each forward, further draws of the
same forward follow, and the generators are put back, so that ranks' own numbers don't move.
"""

from __future__ import annotations

import pickle
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

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
        before = taken(device)
        yield lambda: not _same_state(before, taken(device))


def seed_generators(seed: int) -> None:
    """Seed torch's, Python's and NumPy's global generators; a model's own generators are its own."""
    seed_torch(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def seed_torch(seed: int) -> None:
    """Seed torch's generators: the CPU's, and CUDA's if it is in use.

    `torch.manual_seed` has a stack trace taken for each kind of device that is not in use, which takes longer than a
    small forward, and has it seeded when it is: the user's own numbers there would be these.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def taken(device: torch.device) -> tuple[Any, ...]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device, random.getstate(), np.random.get_state()


def _same_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    on_device = a[1] is b[1] is None or torch.equal(a[1], b[1])
    by_numpy = all(np.array_equal(x, y) for x, y in zip(a[3], b[3], strict=True))
    return torch.equal(a[0], b[0]) and on_device and a[2] == b[2] and by_numpy


def drawn_by_python() -> tuple[Any, ...]:
    """The states of Python's and NumPy's generators, to be compared: who draws moves them."""
    _, keys, *rest = np.random.get_state()
    return random.getstate(), bytes(np.asarray(keys)), rest


def own_generators(model: nn.Module) -> dict[str, str]:
    """Generators that a model keeps as plain attributes, by name: a digest of the state of each.

    >>> module = nn.Linear(1, 1)
    >>> module.rng = random.Random(3)
    >>> list(own_generators(module))
    ['rng']
    """
    found = {}
    for path, module in model.named_modules():
        for name, x in vars(module).items():
            if isinstance(x, np.random.Generator):
                state: Any = x.bit_generator.state
            elif isinstance(x, np.random.RandomState):
                state = x.get_state(legacy=False)
            elif isinstance(x, random.Random):
                state = x.getstate()
            elif isinstance(x, torch.Generator):
                state = x.get_state().tolist()
            else:
                continue
            found[f"{path}.{name}".lstrip(".")] = f"{zlib.crc32(pickle.dumps(state)):08x}"
    return found


def put_back(states: tuple[Any, ...], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
    random.setstate(states[2])
    np.random.set_state(states[3])

"""Initial rows: numbers that depend on seed, table, id and column alone, made of integers.

Column c of a row takes the outputs of splitmix64 whose state is the id's key. From them come sums of integers, which
are exact, and of these one product and one sum of float64: the same numbers for one id as among a million, on any
machine.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from descompiler.dynamic.hashing import mix, signed, unit
from descompiler.errors import InputError

_GOLDEN = signed(0x9E3779B97F4A7C15)
"""What splitmix64 adds to its state."""

_WORDS, _LANES, _LANE = 3, 4, 16
"""A normal number is a sum of the lanes of so many words, so many lanes each, of so many bits."""

_MOST = (1 << _LANE) - 1
_EVERY_OTHER = _MOST << 2 * _LANE | _MOST


class Initial(Protocol):
    """What rows are before they are trained; a frozen class, of which equal ones give equal rows."""

    def values(self, keys: Tensor, dim: int) -> Tensor:
        """float64 rows of keys: a function of each key alone."""
        ...


def words(keys: Tensor, columns: int) -> Tensor:
    """The first outputs of splitmix64 for each key as its state."""
    return torch.from_numpy(_words(keys, columns))


def _words(keys: Tensor, columns: int) -> np.ndarray:
    """As an array: its calls cost less than a tensor's, and steps have few new ids."""
    return mix(keys.numpy()[:, None] + np.arange(1, columns + 1) * _GOLDEN)


@dataclass(frozen=True)
class Uniform:
    """Uniform numbers in ``[low, high)``.

    >>> Uniform(-1, 1).values(torch.tensor([1, 2]), 2).shape
    torch.Size([2, 2])
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_finite(self, self.low, self.high)
        if self.low > self.high:
            raise InputError(f"{self}: low is above high")

    def values(self, keys: Tensor, dim: int) -> Tensor:
        return unit(words(keys, dim)).mul_(self.high - self.low).add_(self.low)


@dataclass(frozen=True)
class Normal:
    """Normal numbers, as the sum of twelve uniform ones (Irwin and Hall): none is 6 standard deviations from the mean.

    >>> bool(Normal(0, 1).values(torch.arange(9), 4).abs().max() < 6)
    True
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_finite(self, self.mean, self.std)
        if self.std < 0:
            raise InputError(f"{self}: a standard deviation is not negative")

    def values(self, keys: Tensor, dim: int) -> Tensor:
        drawn = _words(keys, dim * _WORDS)
        pairs = (drawn & _EVERY_OTHER) + (drawn >> _LANE & _EVERY_OTHER)  # two sums a word, which don't meet
        sums = functools.reduce(np.add, (pairs[:, word::_WORDS] for word in range(_WORDS)))
        whole = (sums & 0xFFFFFFFF) + (sums >> 32)
        count = _WORDS * _LANES
        # of integers from 0 to n - 1 the mean is (n - 1) / 2, and the variance (n ** 2 - 1) / 12
        deviation = math.sqrt(count * ((_MOST + 1) ** 2 - 1) / 12)
        return torch.from_numpy((whole - count * _MOST // 2) * (self.std / deviation) + self.mean)


@dataclass(frozen=True)
class Constant:
    """One number everywhere: ``Constant(0.0)`` for zeros.

    >>> Constant(0.5).values(torch.tensor([7]), 2).tolist()
    [[0.5, 0.5]]
    """

    value: float

    def __post_init__(self) -> None:
        _check_finite(self, self.value)

    def values(self, keys: Tensor, dim: int) -> Tensor:
        return torch.full((len(keys), dim), float(self.value), dtype=torch.float64)


def _check_finite(init: Initial, *numbers: float) -> None:
    if not all(math.isfinite(x) for x in numbers):
        raise InputError(f"{init}: initial rows are finite numbers")

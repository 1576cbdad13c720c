"""Admission: which ids that have no row get one; by what their own slice has seen in earlier steps, or by their hash.

A strategy is a frozen class. Several lookups of one step agree, as what this step sights counts when it has ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from descompiler.dynamic.hashing import mix, signed, unit
from descompiler.dynamic.sketch import Sketch
from descompiler.errors import InputError

_DRAW = signed(0xD1B54A32D192ED03)
"""What draws of admission differ by from step to step: other words than those of initial rows."""


class Admission(Protocol):
    """Which ids without a row get one."""

    def sketch(self, slices: int) -> Sketch | None:
        """What counts in how many steps an id was looked up without a row; None if nothing has to."""
        ...

    def admits(self, keys: Tensor, step: int, sketch: Sketch | None) -> Tensor:
        """For each key whether it gets a row in this step: a function of the key, the step and earlier sightings."""
        ...


@dataclass(frozen=True)
class Always:
    """Each id gets a row when it is first looked up."""

    def sketch(self, slices: int) -> Sketch | None:
        return None

    def admits(self, keys: Tensor, step: int, sketch: Sketch | None) -> Tensor:
        return torch.ones(len(keys), dtype=torch.bool)


@dataclass(frozen=True)
class AfterSightings:
    """An id gets a row in the n-th step that looks it up; until then it has the default row.

    Sightings are counted in a count-min sketch, one of each slice: never too few, and too many where other ids of the
    slice share all of an id's cells. It takes ``4 * width`` counters for each slice.

    Parameters
    ----------
    sightings : int
        n; with 1 each id is admitted at once.
    width : int
        Counters of a slice in each of the sketch's four lines: twice the ids that a slice sights, or more.
    bits : {8, 16}
        Of a counter, which stays at its largest number.
    halve_every : int, optional
        Steps after which all counters are halved, so that ids of long ago are forgotten. Without, an endless stream
        fills the sketch until it admits everything.
    """

    sightings: int
    width: int = 1024
    bits: int = 8
    halve_every: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in Sketch.DTYPES:
            raise InputError(f"bits={self.bits}; a counter has 8 or 16")
        if not 1 <= self.sightings <= Sketch.most(self.bits):
            raise InputError(f"sightings={self.sightings}; with bits={self.bits} it is 1 to {Sketch.most(self.bits)}")
        if not 1 <= self.width <= Sketch.WIDEST:
            raise InputError(f"width={self.width}; it is 1 to {Sketch.WIDEST}")
        if self.halve_every is not None and self.halve_every < 1:
            raise InputError(f"halve_every={self.halve_every}; it is a number of steps, or None")

    def sketch(self, slices: int) -> Sketch | None:
        return Sketch(slices, self.width, self.bits, self.halve_every)

    def admits(self, keys: Tensor, step: int, sketch: Sketch | None) -> Tensor:
        assert sketch is not None
        return sketch.estimate(keys) >= self.sightings - 1


@dataclass(frozen=True)
class WithProbability:
    """An id without a row gets one with a probability, in each step that looks it up: by a hash of the id and the step.

    >>> keys = torch.arange(4)
    >>> WithProbability(0.5).admits(keys, 3, None).tolist() == WithProbability(0.5).admits(keys, 3, None).tolist()
    True
    """

    probability: float

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise InputError(f"probability={self.probability}; it is 0 to 1")

    def sketch(self, slices: int) -> Sketch | None:
        return None

    def admits(self, keys: Tensor, step: int, sketch: Sketch | None) -> Tensor:
        return unit(mix(mix(keys + signed(_DRAW * (2 * step + 1))))) < self.probability

"""Count-min sketches: in bounded memory, in how many steps ids were sighted; one for each slice of the key space."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from descompiler.dynamic.hashing import mix, signed, slice_of

_OTHER = signed(0x8CB92BA72F3D8DD7)
"""Makes other words of keys than those that chose their slices."""

_LINES, _LANE = 4, 16


class Sketch:
    """Counters of all slices, ``[slices, 4, width]``; of an id's four the smallest is the estimate.

    Updates are conservative (Estan and Varghese, 2002): of a set of ids each raises its counters to its estimate plus
    one, and no counter that is above. So the order within a step doesn't matter, and no estimate is too small.

    Examples
    --------
    >>> seen = Sketch(64, 16, 8)
    >>> keys = torch.tensor([1, 2])
    >>> seen.add(keys)
    >>> seen.add(keys[:1])
    >>> seen.estimate(keys).tolist()
    [2, 1]
    """

    DTYPES: ClassVar[dict[int, torch.dtype]] = {8: torch.uint8, 16: torch.int16}
    WIDEST: ClassVar[int] = 1 << _LANE

    def __init__(self, slices: int, width: int, bits: int, halve_every: int | None = None):
        self.slices, self.width, self.halve_every = slices, width, halve_every
        self._most = self.most(bits)
        self.counters = torch.zeros(slices * _LINES * width, dtype=self.DTYPES[bits])

    @classmethod
    def most(cls, bits: int) -> int:
        """The largest number of a counter."""
        return torch.iinfo(cls.DTYPES[bits]).max

    def estimate(self, keys: Tensor) -> Tensor:
        """In how many of the steps that ended each key was sighted; not less, and at most the largest number."""
        return torch.from_numpy(self._least(self._cells(keys.numpy())))

    def add(self, keys: Tensor) -> None:
        """One more sighting of each key; they differ."""
        if not len(keys):
            return
        cells, counters = self._cells(keys.numpy()), self.counters.numpy()
        raised = np.minimum(self._least(cells) + 1, self._most).astype(counters.dtype)
        np.maximum.at(counters, cells.ravel(), np.tile(raised, _LINES))  # numpy 2.4: wrong where it broadcasts

    def end_step(self, step: int) -> None:
        """Halve all counters, if it is time."""
        if self.halve_every is not None and (step + 1) % self.halve_every == 0:
            self.counters.bitwise_right_shift_(1)

    def halvings(self, since: int, until: int) -> int:
        """How often counters were halved, of steps that ended since a step."""
        return 0 if self.halve_every is None else until // self.halve_every - since // self.halve_every

    def _least(self, cells: np.ndarray) -> np.ndarray:
        """The smallest of each key's counters, int64."""
        held: np.ndarray = self.counters.numpy()[cells].min(0)
        return held.astype(np.int64)

    def _cells(self, keys: np.ndarray) -> np.ndarray:
        """Where each line has a key's counter (``[4, n]``)."""
        lines = np.arange(_LINES)[:, None]
        within = mix(keys ^ _OTHER) >> lines * _LANE
        within &= self.WIDEST - 1
        within *= self.width
        within >>= _LANE
        within += (slice_of(keys, self.slices) * _LINES + lines) * self.width
        return within

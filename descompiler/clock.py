"""`Clock`: how long collectives take, for `descompiler.calibrate` and `descompiler.audit`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from descompiler.collectives import Pending

T = TypeVar("T")


@dataclass
class Clock:
    """Seconds of collectives, one at a time.

    Ranks meet in a barrier first, so that a time is the collective's and not that of waiting for a rank which computes
    longer; and each collective is waited for at once, so that none runs beside another. A step is slower so.

    Attributes
    ----------
    seconds : dict of str to list of float
        By name, on this rank; the collective took as long as on its slowest rank.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, group: Any, call: Callable[[], T]) -> T:
        """What ``call()`` returns, waited for."""
        self._synchronize()
        dist.barrier(group)
        self._synchronize()
        begin = time.perf_counter()
        work = call()
        if isinstance(work, dist.Work | Pending):
            work.wait()
        self._synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begin)
        return work

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

"""The ranks that compile together: what the first one tells the others, and steps that all of them make or none.

All but `Ranks.warn` is collective: every rank calls it, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from descompiler.errors import RankError, warn
from descompiler.runtime.runtime import Runtime
from descompiler.runtime.shutdown import rest_at_exit

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """A process group, or one process without any.

    Attributes
    ----------
    group : process group or None
    rank : int
        This one.
    count : int
    """

    group: Any
    rank: int
    count: int

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """Those of a process group, all by default; under torchrun the default group is initialised if it is not."""
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
                if torch.cuda.is_available():  # collectives of Python objects use the current device
                    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
                dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            else:
                return cls(None, 0, 1)
        rest_at_exit()
        group = dist.group.WORLD if group is None else group
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def runtime(self, loss: str) -> Runtime:
        return Runtime(self.group, self.rank, self.count, loss)

    def of_first(self, value: T) -> T:
        """What the first rank says."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group_src=0, group=self.group)
        return box[0]

    def of_every(self, value: T) -> list[T]:
        """What every rank says."""
        if self.count == 1:
            return [value]
        every: list[Any] = [None] * self.count
        dist.all_gather_object(every, value, group=self.group)
        return every

    def everywhere(self, step: Callable[[], T]) -> T:
        """What ``step()`` returns; if it raises on any rank, every rank raises, and none waits in a collective."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = step()
        except Exception as e:  # raised below, once the other ranks know
            error = e
        texts = self.of_every(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if any(texts):
            raise RankError("\n".join(f"rank {r} could not compile: {t}" for r, t in enumerate(texts) if t))
        return cast(T, result)

    def warn(self, text: str) -> None:
        """Warn on one rank."""
        if self.rank == 0:
            warn(text)

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

from descompiler.errors import DescompilerError, RankError, warn
from descompiler.runtime.agreement import say, settle
from descompiler.runtime.channels import TIMEOUT_S, Channels
from descompiler.runtime.collectives import broadcast_object
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
    channels: Channels | None = None

    @classmethod
    def of(cls, group: Any, timeout: float = TIMEOUT_S) -> Ranks:
        """Those of a process group, all by default, on groups of their own; see `Channels`. Collective.

        Under torchrun the default group is initialised if it is not.
        """
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
                if torch.cuda.is_available():  # collectives of Python objects use the current device
                    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
                _initialise("nccl" if torch.cuda.is_available() else "gloo")
            else:
                return cls(None, 0, 1)
        rest_at_exit()
        group = dist.group.WORLD if group is None else group
        rank, count = dist.get_rank(group), dist.get_world_size(group)
        if count == 1:
            return cls(group, rank, count)
        channels = Channels.of(group, timeout)
        return cls(channels.data, rank, count, channels)

    def runtime(self, loss: str) -> Runtime:
        return Runtime(self.group, self.rank, self.count, loss, channels=self.channels)

    def name_next(self, name: str) -> None:
        """What the next collectives are, for those that wait in them."""
        if self.channels is not None:
            self.channels.watch.name = name

    def of_first(self, value: T) -> T:
        """What the first rank says."""
        if self.count == 1:
            return value
        return cast(T, broadcast_object(value, self.group))

    def of_every(self, value: T) -> list[T]:
        """What every rank says."""
        return say(value, self.group, self.count)

    def same(self, what: str, value: str, told: str = "", *, doing: str = "compile") -> None:
        """Raise on every rank unless all have the same value; ``told``: more of it, for people."""
        every = self.of_every((value, f"{value} {told}".rstrip()))
        if len({v for v, _ in every}) > 1:
            lines = "\n".join(f"rank {r}: {text}" for r, (_, text) in enumerate(every))
            raise RankError(f"ranks {doing} different {what}s:\n{lines}")

    def everywhere(self, step: Callable[[], T], what: str = "could not compile") -> T:
        """What ``step()`` returns; if it raises on any rank, every rank raises, and none waits in a collective."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = step()
        except Exception as e:  # raised below, once the other ranks know
            error = e
        try:
            text = None if error is None else f"{type(error).__name__}: {error}"
            settle(text, self.group, self.count, RankError, what=f" {what}")
        except RankError:
            if error is not None:
                raise error from None
            raise
        return cast(T, result)

    def by_first(self, step: Callable[[], T]) -> T | None:
        """What ``step()`` returns, on the first rank; None on the others. What it raises there, every rank raises."""
        result: T | None = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                result = step()
            except Exception as e:  # raised below, once the other ranks know
                error = e
        told = error
        if error is not None and not isinstance(error, DescompilerError):  # it may be what no other process can read
            told = RankError(f"rank 0 raised {type(error).__name__}: {error}")
        if raised := self.of_first(told):
            raise error or raised
        return result

    def warn(self, text: str) -> None:
        """Warn on one rank."""
        if self.rank == 0:
            warn(text)


def _initialise(backend: str) -> None:
    """The default process group under torchrun.

    Its agent's store outlives an attempt: those that torchrun starts again would find the addresses of the dead.
    """
    store, rank, count = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=count)

"""The collectives of torch.distributed that the package uses, on tensors of any device, and their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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


_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def through_host(x: Tensor, group: Any) -> bool:
    """Whether a tensor has to be copied to the host to be sent."""
    return x.is_cuda and dist.get_backend(group) == "gloo"


@dataclass
class Pending:
    """A collective under way: `out` is complete once `wait` has returned."""

    work: Any
    out: Tensor
    host: Tensor | None = None

    def wait(self) -> Tensor:
        self.work.wait()
        if self.host is not None:
            self.out.copy_(self.host)
            self.host = None
        return self.out


def all_to_all(send: Tensor, sent: Sequence[int], received: Sequence[int], group: Any) -> Pending:
    """Start ``all_to_all_single`` of a flat tensor; ``sent`` and ``received`` are elements by rank."""
    out = send.new_empty(sum(received))
    host = torch.empty(out.shape, dtype=out.dtype) if through_host(send, group) else None
    source = send if host is None else send.cpu()
    target = out if host is None else host
    work = dist.all_to_all_single(target, source, list(received), list(sent), group=group, async_op=True)
    return Pending(work, out, host)


def all_gather(mine: Tensor, group: Any) -> Tensor:
    """All ranks' tensors of one size, one after another: ``[ranks * n]`` of ``[n]``."""
    mine = mine.contiguous().reshape(-1)
    source = mine.cpu() if through_host(mine, group) else mine
    every = source.new_empty(dist.get_world_size(group) * source.numel())
    _all_gather_single(every, source, group=group)
    return every.to(mine.device)


def send(x: Tensor, rank: int, group: Any) -> None:
    """Send a tensor to a rank of the group; it calls `receive`."""
    dist.send(x.cpu() if through_host(x, group) else x.contiguous(), group_dst=rank, group=group)


def receive(out: Tensor, rank: int, group: Any) -> Tensor:
    """Receive into ``out`` what a rank of the group sends."""
    host = torch.empty(out.shape, dtype=out.dtype) if through_host(out, group) else out
    dist.recv(host, group_src=rank, group=group)
    return out if host is out else out.copy_(host)

"""The collectives of torch.distributed that the package uses, on tensors of any device, and their times."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from descompiler.runtime.channels import entered, over
from descompiler.runtime.watch import Entered

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
        if isinstance(work, Pending):
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
    entered: Entered | None = None

    def wait(self) -> Tensor:
        if self.entered is None:
            self.work.wait()
        else:
            self.entered.wait(self.work)
        if self.host is not None:
            self.out.copy_(self.host)
            self.host = None
        return self.out


def all_to_all(send: Tensor, sent: Sequence[int], received: Sequence[int], group: Any) -> Pending:
    """Start ``all_to_all_single`` of a flat tensor; ``sent`` and ``received`` are elements by rank."""
    out = send.new_empty(sum(received))
    host = torch.empty(out.shape, dtype=out.dtype) if through_host(send, group) else None
    source = send if host is None else send.cpu()
    target, mark = out if host is None else host, entered(group)
    work = dist.all_to_all_single(target, source, list(received), list(sent), group=group, async_op=True)
    return Pending(work, out, host, mark)


def all_gather(mine: Tensor, group: Any) -> Tensor:
    """All ranks' tensors of one size, one after another: ``[ranks * n]`` of ``[n]``."""
    mine = mine.contiguous().reshape(-1)
    source = mine.cpu() if through_host(mine, group) else mine
    every, mark = source.new_empty(dist.get_world_size(group) * source.numel()), entered(group)
    work = _all_gather_single(every, source, group=group, async_op=True)
    return Pending(work, every, entered=mark).wait().to(mine.device)


@dataclass
class _SumOfTwo(Pending):
    """A sum under way: `out` is the other rank's tensor, until it is added to this one's, ``mine``."""

    mine: Tensor | None = None

    def wait(self) -> Tensor:
        if self.mine is not None:
            other, mine, self.mine = super().wait(), self.mine, None
            with torch.no_grad():  # of values that have a history, too: as a collective, it is none of autograd's
                self.out = mine.add_(other.view_as(mine))
        return self.out


SMALL_SUM_BYTES = 1 << 16
"""What two ranks send each other as it is. A ring sends parts of more, one after the other, and leaves room on the link
for rows: a step of DeepFM on 100 Mbit/s, with 1.3 MB of dense gradients, takes 280 ms so, and 400 in one message."""


def all_reduce(x: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Pending:
    """Start a sum, or another reduction, over ranks, in place.

    Two ranks under gloo send each other theirs if that is `SMALL_SUM_BYTES` at most, and add: as many bytes as in a
    ring, in one message. Both have the same bits, as addition commutes.
    """
    is_sum = op == dist.ReduceOp.SUM and x.nbytes <= SMALL_SUM_BYTES
    if is_sum and dist.get_world_size(group) == 2 and dist.get_backend(group) == "gloo":
        sizes = [0, 0]
        sizes[1 - dist.get_rank(group)] = x.numel()
        sent = all_to_all(x.reshape(-1), sizes, sizes, group)
        return _SumOfTwo(sent.work, sent.out, sent.host, sent.entered, x)
    mark = entered(group)
    return Pending(dist.all_reduce(x, op=op, group=group, async_op=True), x, entered=mark)


def broadcast(x: Tensor, rank: int, group: Any) -> Tensor:
    """Give every rank a rank's tensor, in place."""
    mark = entered(group)
    return Pending(dist.broadcast(x, group_src=rank, group=group, async_op=True), x, entered=mark).wait()


def gather_objects(value: Any, group: Any) -> list[Any]:
    """Every rank's object, which is pickled."""
    mine = _pickled(value, group)
    sizes = all_gather(torch.tensor([len(mine)], device=mine.device), group).tolist()
    padded = mine.new_zeros(max(sizes))
    padded[: len(mine)] = mine
    every = all_gather(padded, group).cpu().reshape(len(sizes), -1)
    return [pickle.loads(row[:n].numpy().tobytes()) for row, n in zip(every, sizes, strict=True)]


def broadcast_object(value: Any, group: Any) -> Any:
    """The first rank's object, which is pickled; the others' are not looked at."""
    first = dist.get_rank(group) == 0
    mine = _pickled(value if first else None, group)
    size = int(broadcast(torch.tensor([len(mine)], device=mine.device), 0, group))
    told = broadcast(mine if first else mine.new_empty(size), 0, group)
    return value if first else pickle.loads(told.cpu().numpy().tobytes())


def _pickled(value: Any, group: Any) -> Tensor:
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)


def send(x: Tensor, rank: int, group: Any) -> None:
    """Send a tensor to a rank of the group; it calls `receive`."""
    with over(group):
        dist.send(x.cpu() if through_host(x, group) else x.contiguous(), group_dst=rank, group=group)


def receive(out: Tensor, rank: int, group: Any) -> Tensor:
    """Receive into ``out`` what a rank of the group sends."""
    host = torch.empty(out.shape, dtype=out.dtype) if through_host(out, group) else out
    with over(group):
        dist.recv(host, group_src=rank, group=group)
    return out if host is out else out.copy_(host)

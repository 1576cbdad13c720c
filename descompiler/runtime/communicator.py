"""The communicator: a module's ranks, and collectives that are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from descompiler.layout.traffic import Traffic, all_gather_bytes, all_reduce_bytes
from descompiler.runtime.channels import Channels
from descompiler.runtime.collectives import Clock, Pending, all_gather, all_reduce, all_to_all

T = TypeVar("T")


@dataclass
class Communicator:
    """One per compiled module.

    Attributes
    ----------
    traffic : Traffic
        What the latest step has sent.
    wire_dtype : torch.dtype
        The model's: the one that holds the numbers of all parameters.
    clock : Clock, optional
        Set while `descompiler.audit` runs.
    due : callable, optional
        What has to be heard before anything else is sent; see `settle`.
    """

    group: Any
    rank: int
    ranks: int
    _: KW_ONLY
    traffic: Traffic = field(default_factory=Traffic)
    wire_dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    clock: Clock | None = None
    channels: Channels | None = None
    due: Callable[[], object] | None = None

    def settle(self) -> None:
        """Hear what is due. Nothing that can't be done twice is done before."""
        if self.due is not None:
            due, self.due = self.due, None
            due()

    def dtype_of(self, wire_dtype: torch.dtype | None) -> torch.dtype:
        """The dtype in which something crosses, as layouts say it."""
        return self.wire_dtype if wire_dtype is None else wire_dtype

    def collective(self, name: str, sent_bytes: int | Fraction, call: Callable[[], T]) -> T:
        """Make a collective, ``call()``: count it, and time it under a clock."""
        self.settle()
        self.traffic.add(name, sent_bytes)
        self.name_next(name)
        return call() if self.clock is None else self.clock.time(name, self.group, call)

    def gather(self, name: str, mine: Tensor) -> Tensor:
        """All ranks' tensors of one size, flat, one after another."""
        size = all_gather_bytes(mine.numel() * mine.element_size(), self.ranks)
        return self.collective(name, size, lambda: all_gather(mine, self.group))

    def gather_uneven(self, name: str, mine: Tensor, sizes: Sequence[int]) -> Tensor:
        """All ranks' flat tensors of ``sizes`` elements, one after another."""

        def call() -> Tensor:
            if len(set(sizes)) == 1:
                return all_gather(mine, self.group)
            return all_to_all(mine.repeat(self.ranks), [len(mine)] * self.ranks, list(sizes), self.group).wait()

        return self.collective(name, all_gather_bytes(mine.numel() * mine.element_size(), self.ranks), call)

    def all_reduce(self, name: str, x: Tensor) -> None:
        """Sum over ranks, in place."""
        self.all_reduce_start(name, x).wait()

    def all_reduce_start(self, name: str, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Pending:
        """Start a sum, or another reduction, over ranks, in place."""
        size = all_reduce_bytes(x.numel() * x.element_size(), self.ranks)
        return self.collective(name, size, lambda: all_reduce(x, self.group, op))

    def exchange(
        self, send: Tensor, sent: list[int], received: list[int], name: str, *, control: bool = False
    ) -> Pending:
        """Start an all-to-all of flat tensors; ``sent`` and ``received`` are elements by rank.

        ``control``: it is what ranks agree by, which no other collective may be taken for.
        """
        size = (sum(sent) - sent[self.rank]) * send.element_size()
        group = self.channels.control if control and self.channels is not None else self.group
        return self.collective(name, size, lambda: all_to_all(send, sent, received, group))

    def exchange_rows(self, send: Tensor, sent: Sequence[int], received: Sequence[int], name: str) -> Tensor:
        """All-to-all of rows: ``sent[r]`` rows of ``send`` to rank r, ``received[r]`` from it."""
        if self.ranks == 1:
            return send
        width = send.shape[1:].numel()
        counts = [n * width for n in sent], [n * width for n in received]
        out = self.exchange(send.contiguous().reshape(-1), *counts, name).wait()
        return out.reshape(sum(received), *send.shape[1:])

    def name_next(self, name: str) -> None:
        """What the next collective is, for those that wait in it."""
        if self.channels is not None:
            self.channels.watch.name = name

    def header_device(self) -> torch.device:
        """Where small control tensors live: NCCL needs them on the GPU."""
        return self.device if self.ranks > 1 and dist.get_backend(self.group) == "nccl" else torch.device("cpu")

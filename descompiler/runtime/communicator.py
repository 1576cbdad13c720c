"""The communicator: a module's ranks, collectives that are counted, and what keeps all ranks in step.

A step begins with a header, which every rank sends, also one that has failed: row counts, modes, errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from descompiler.errors import InputError, RankError
from descompiler.layout.step import Header, LeafStatus
from descompiler.layout.traffic import Traffic, all_gather_bytes, all_reduce_bytes
from descompiler.runtime.carriers import carries
from descompiler.runtime.collectives import Clock, Pending, all_gather, all_to_all

T = TypeVar("T")


@dataclass
class Communicator:
    """One per compiled module.

    Attributes
    ----------
    traffic : Traffic
        What the latest step has sent.
    mode, mode_name
        What this rank runs; ranks in different ones raise.
    modes, rows : list of int
        Of all ranks, at the latest header.
    started : bool
        Whether the step's header was sent.
    clock : Clock, optional
        Set while `descompiler.audit` runs.
    """

    group: Any
    rank: int
    ranks: int
    _: KW_ONLY
    traffic: Traffic = field(default_factory=Traffic)
    mode: int = 0
    mode_name: str = ""
    modes: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    started: bool = False
    wire_dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    clock: Clock | None = None

    def collective(self, name: str, sent_bytes: int | Fraction, call: Callable[[], T]) -> T:
        """Make a collective, ``call()``: count it, and time it under a clock."""
        self.traffic.add(name, sent_bytes)
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

    def all_reduce_start(self, name: str, x: Tensor) -> dist.Work:
        """Start a sum over ranks, in place."""
        size = all_reduce_bytes(x.numel() * x.element_size(), self.ranks)
        work: dist.Work = self.collective(name, size, lambda: dist.all_reduce(x, group=self.group, async_op=True))
        return work

    def exchange(self, send: Tensor, sent: list[int], received: list[int], name: str) -> Pending:
        """Start an all-to-all of flat tensors; ``sent`` and ``received`` are elements by rank."""
        size = (sum(sent) - sent[self.rank]) * send.element_size()
        return self.collective(name, size, lambda: all_to_all(send, sent, received, self.group))

    def header_device(self) -> torch.device:
        """Where small control tensors live: NCCL needs them on the GPU."""
        return self.device if self.ranks > 1 and dist.get_backend(self.group) == "nccl" else torch.device("cpu")

    @carries(Header)
    def header(
        self,
        rows: int,
        problem: str | None,
        asked: Sequence[int] | None = None,
        gathered: int = 0,
        *,
        same_mode: bool = True,
    ) -> tuple[list[int], list[int]]:
        """Every rank calls this once a step, also when it has failed: then all ranks raise.

        Parameters
        ----------
        asked : sequence of int, optional
            How many rows this rank will ask of each rank (`descompiler.runtime.fetch`).
        gathered : int
            Of how many shared rows it will send a gradient to every rank.
        same_mode : bool
            Whether ranks in different modes raise; ``modes`` has those of all.

        Returns
        -------
        list of int, list of int
            What each rank asks of this one, and how many shared rows' gradients it will send.
        """
        self.started = True
        asked = [0] * self.ranks if asked is None else asked
        if self.ranks == 1:
            self.rows, self.modes = [rows], [self.mode]
            if problem is not None:
                raise InputError(problem)
            return [0], [0]
        device = self.header_device()
        mine = [[rows, int(problem is not None), self.mode, n, gathered] for n in asked]
        send = torch.tensor(mine, dtype=torch.int64, device=device)
        sizes = [send.shape[1]] * self.ranks
        table = self.exchange(send.reshape(-1), sizes, sizes, Header.SEND).wait().reshape(send.shape)
        self.rows, failed, self.modes, served, gathering = table.cpu().T.tolist()
        if any(failed):
            self.raise_everywhere(problem, InputError)
        if same_mode and len(set(self.modes)) > 1:
            self.raise_different()
        return served, gathering

    @carries(LeafStatus)
    def agree(self, problem: str | None) -> None:
        """Every rank calls this after code of the user's has run, also when that has failed: then all ranks raise.

        Before the header of a step nothing is sent: it will tell.
        """
        if self.ranks == 1 or not self.started:
            if problem is not None:
                raise InputError(problem)
            return
        self._agree(LeafStatus.RUN, problem)

    def _agree(self, name: str, problem: str | None) -> None:
        mine = torch.tensor([problem is not None], dtype=torch.uint8, device=self.header_device())
        if bool(self.gather(name, mine).any()):
            self.raise_everywhere(problem, InputError)

    @carries(LeafStatus)
    def agree_after_backward(self, failures: list[tuple[str, Exception]]) -> None:
        """At the end of the backward that is under way, ranks tell whether a leaf's failed: then all ranks raise.

        The last of all that is done then: the reducer, and the exchange of gradients, have to end as in any backward.
        """
        queue = torch.autograd.Variable._execution_engine.queue_callback

        def tell() -> None:
            problem, cause = failures[0] if failures else (None, None)
            failures.clear()
            try:
                self._agree(LeafStatus.BACKWARD, problem)
            except InputError as error:
                raise error from cause

        failures.clear()  # of another backward through a graph that was kept
        queue(lambda: queue(tell))

    def raise_different(self) -> None:
        """Raise on every rank, with the modes of all."""
        self.raise_everywhere(f"runs in mode {self.mode_name}", RankError, "ranks call forward in different modes")

    def raise_everywhere(self, problem: str | None, kind: type[Exception], title: str = "") -> None:
        """Raise on every rank what any of them has to say. Collective."""
        texts: list[Any] = [None] * self.ranks
        dist.all_gather_object(texts, problem, group=self.group)
        lines = [f"rank {r}: {t}" for r, t in enumerate(texts) if t is not None]
        raise kind("\n".join([title, *lines] if title else lines))

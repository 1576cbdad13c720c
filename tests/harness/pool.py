"""Local gloo processes that stay: many calls in turn on one set of ranks.

`descompiler.check.processes.on_ranks` starts processes for one call; here importing torch, its tracers and tests is
paid once. Each call has a process group of its own, and finds the process as it was when it started: see `_isolated`. A
call that fails on any rank, or does not answer in time, ends the processes, and the next call starts new ones: one
model can't take down the rest.
"""

from __future__ import annotations

import gc
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from descompiler.check.processes import local_context
from descompiler.errors import EquivalenceError
from descompiler.tables.form import FORMS
from tests.harness.traces import remember_traces

GRACE_S = 10.0
"""How long the other ranks may still answer once one has failed."""


THRESHOLDS = 20_000, 20, 50
"""Of the collector: a graph is many objects, and looking for garbage among them took a twelfth of all tests' time."""


def collect_rarely() -> None:
    """What is there now stays, and collections look at what comes, less often than by default."""
    collect_garbage()
    gc.set_threshold(*THRESHOLDS)


def collect_garbage() -> None:
    """Now, and what is no garbage is not looked at again: a search among all that ranks keep takes half a second.

    After each call of a rank. Modules are in cycles with their groups, and each group has three threads, one of which
    wakes a hundred times a second: with hundreds of groups nothing else gets to run.
    """
    gc.collect()
    gc.freeze()


def serve_ready_ranks() -> None:
    """Let ranks be forked from a process that has compiled a model; called before the first is."""
    local_context().set_forkserver_preload(["descompiler", "tests.harness.ready"])


class RankPoolError(EquivalenceError):
    """What each rank that failed said, or the ranks that did not answer; as `on_ranks` of descompiler raises it."""


class RankPools:
    """A pool for each number of ranks that is asked for, called as `on_ranks` of descompiler; a context."""

    def __init__(self, *, traces: Path | None = None) -> None:
        self._pools: dict[int, RankPool] = {}
        self.traces = traces

    def __enter__(self) -> RankPools:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in self._pools.values():
            pool.close()

    def __call__(
        self, function: Callable[..., Any], ranks: int, *arguments: Any, timeout_s: float = 240.0
    ) -> list[Any]:
        pool = self._pools.setdefault(ranks, RankPool(ranks, traces=self.traces))
        return pool(function, *arguments, timeout_s=timeout_s)


class RankPool:
    """``pool(function, *arguments)`` is ``[function(rank, ranks, *arguments) for each rank]``, on the ranks.

    Used as a context manager; functions and arguments are pickled. ``traces``: a folder, see `tests.harness.traces`.
    """

    def __init__(self, ranks: int, *, traces: Path | None = None):
        self.ranks, self.traces = ranks, traces
        self.started = 0
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        for p in self._processes:
            if p.is_alive():
                p.kill()
            p.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        context = local_context()
        self._folder = tempfile.TemporaryDirectory()
        self.started += 1
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, self.ranks, self._folder.name, theirs, self.traces)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __call__(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 240.0) -> list[Any]:
        if not self._processes:
            self._start()
        message = pickle.dumps((timeout_s, function, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        answers: list[Any] = [("error", f"rank {r} did not answer within {timeout_s:.0f} s") for r in range(self.ranks)]
        waiting = {pipe: r for r, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + timeout_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    answers[rank] = ("error", f"rank {rank} ended without an answer")
                if answers[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures := [text for kind, text in answers if kind == "error"]:
            self.close()
            raise RankPoolError("\n".join(failures))
        return [result for _, result in answers]


def _serve(rank: int, ranks: int, folder: str, pipe: Any, traces: Path | None) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()
    if traces is not None:
        remember_traces(traces)
    collect_rarely()
    for call in count():
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):  # the caller has ended
            return
        try:
            timeout_s, function, arguments = pickle.loads(message)
            with _isolated(*draws), _process_group(f"{folder}/{call}", rank, ranks, timeout_s):
                answer = pickle.dumps(("ok", function(rank, ranks, *arguments)))
        except Exception:  # whatever it is, the caller raises it with this rank's name
            pipe.send_bytes(pickle.dumps(("error", f"rank {rank}: {traceback.format_exc()}")))
            return  # and the connections to this process end, which whoever waits for it notices
        pipe.send_bytes(answer)
        del message, function, arguments, answer  # what they hold would not be looked at again
        collect_garbage()


@contextmanager
def _process_group(file: str, rank: int, ranks: int, timeout_s: float) -> Iterator[None]:
    """The default group, for one call; it ends together with those that were made of it.

    Collectives wait for half of the call's time at most, so that a rank left alone says where it waited.
    """
    timeout = timedelta(seconds=timeout_s / 2)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks, timeout=timeout)
    yield
    dist.barrier()  # no rank leaves while another still waits for it; a call that fails ends the process instead
    dist.destroy_process_group()


@contextmanager
def _isolated(draws: torch.Tensor, python_draws: Any, numpy_draws: Any) -> Iterator[None]:
    """What a call changes in its process is as before afterwards; random numbers are those of a new process."""
    dtype, deterministic, environment = (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        dict(os.environ),
    )
    forms = dict(FORMS._items)  # a form from outside stays known after the call that is given it
    torch.set_rng_state(draws)
    random.setstate(python_draws)
    np.random.set_state(numpy_draws)
    with warnings.catch_warnings():  # filters, and which warnings were shown
        try:
            yield
        finally:
            FORMS._items = forms
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic)
            os.environ.clear()
            os.environ.update(environment)
            if dynamo := sys.modules.get("torch._dynamo"):  # how often it may compile a function anew is counted
                dynamo.reset()


def here(function: Callable[..., Any], ranks: int, *arguments: Any, timeout_s: float = 0.0) -> list[Any]:
    """For `des.verify`'s ``launch``, when every rank of a pool calls it: this process is one of the ranks."""
    return [function(dist.get_rank(), ranks, *arguments)]

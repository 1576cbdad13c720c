"""Local gloo processes that stay: many calls in turn on one set of ranks.

`descompiler.verify.on_ranks` starts processes for one call; here importing torch is paid once. A call that fails on any
rank, or does not answer in time, ends the processes, and the next call starts new ones: one model can't take down the
rest.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

from descompiler.verify import local_context

GRACE_S = 10.0
"""How long the other ranks may still answer once one has failed."""

COLLECTIVE_S = 60.0
"""Time-out of a collective: less than a call's, so that a rank left alone says where it waited."""


class RankPoolError(Exception):
    """What each rank that failed said, or the ranks that did not answer."""


class RankPool:
    """``pool(function, *arguments)`` is ``[function(rank, ranks, *arguments) for each rank]``, on the ranks.

    Used as a context manager; functions and arguments are pickled.
    """

    def __init__(self, ranks: int):
        self.ranks = ranks
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
        for pipe in self._pipes:
            pipe.close()
        for p in self._processes:
            if p.is_alive():
                p.kill()
            p.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        context = local_context()
        self._folder = tempfile.TemporaryDirectory()
        self.started += 1
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, self.ranks, self._folder.name, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __call__(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
        if not self._processes:
            self._start()
        message = pickle.dumps((function, arguments))
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
                except EOFError:
                    answers[rank] = ("error", f"rank {rank} ended without an answer")
                if answers[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures := [text for kind, text in answers if kind == "error"]:
            self.close()
            raise RankPoolError("\n".join(failures))
        return [result for _, result in answers]


def _serve(rank: int, ranks: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):  # the caller has ended
            return
        try:
            answer = pickle.dumps(("ok", function(rank, ranks, *arguments)))
        except Exception:  # whatever it is, the caller raises it with this rank's name
            answer = pickle.dumps(("error", f"rank {rank}: {traceback.format_exc()}"))
        try:
            pipe.send_bytes(answer)
        except OSError:  # the caller has given up
            return


def here(function: Callable[..., Any], ranks: int, *arguments: Any, timeout_s: float = 0.0) -> list[Any]:
    """For `des.verify`'s ``launch``, when every rank of a pool calls it: this process is one of the ranks."""
    return [function(dist.get_rank(), ranks, *arguments)]

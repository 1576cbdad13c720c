"""Local gloo processes: a function called on every rank, and what each returned."""

from __future__ import annotations

import functools
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
import torch.multiprocessing as mp

from descompiler.errors import EquivalenceError

GRACE_S = 20.0
"""How long the other ranks may still answer once one has failed."""


@functools.cache
def local_context() -> Any:
    """Processes forked from a server that has imported the package and done nothing else: no threads, no CUDA."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["descompiler"])
    return context


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call ``function(rank, ranks, *arguments)`` on local gloo processes; what each returned.

    Raises
    ------
    EquivalenceError
        With the traceback of each rank that raised, or the ranks that did not answer in time; all are ended.
    """
    context = local_context()
    answers: list[Any] = [("error", f"rank {r} did not answer within {timeout_s:.0f} s") for r in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        readers: list[Any] = []
        processes: list[Any] = []
        for rank in range(ranks):
            reader, writer = context.Pipe(duplex=False)
            arguments_of = (function, rank, ranks, folder, writer, timeout_s, arguments)
            processes.append(context.Process(target=_rank_main, args=arguments_of, daemon=True))
            processes[-1].start()
            writer.close()
            readers.append(reader)
        deadline, waiting = time.monotonic() + timeout_s, dict(zip(readers, range(ranks), strict=True))
        try:
            while waiting and (left := deadline - time.monotonic()) > 0:
                ready: list[Any] = wait(list(waiting), left)
                for reader in ready:
                    rank = waiting.pop(reader)
                    try:
                        answers[rank] = pickle.loads(reader.recv_bytes())
                    except EOFError:
                        answers[rank] = ("error", f"rank {rank} ended without an answer")
                    if answers[rank][0] == "error":  # the others may wait for it: give them time to say so
                        deadline = min(deadline, time.monotonic() + GRACE_S)
            for p in processes:
                p.join(max(0.0, deadline - time.monotonic()))
        finally:
            for p in processes:
                if p.is_alive():
                    p.kill()
    if failures := [text for kind, text in answers if kind == "error"]:
        raise EquivalenceError("\n".join(failures))
    return [result for _, result in answers]


def _rank_main(
    function: Callable[..., Any], rank: int, ranks: int, folder: str, answer: Any, timeout_s: float, arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout_s),
        )
        result = function(rank, ranks, *arguments)
        dist.barrier()
        answer.send_bytes(pickle.dumps(("ok", result)))  # by value: this process and its shared memory end
        dist.destroy_process_group()
    except Exception:  # whatever it is, the parent raises it with this rank's name
        answer.send_bytes(pickle.dumps(("error", f"rank {rank}: {traceback.format_exc()}")))

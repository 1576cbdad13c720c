"""A process that has imported what takes long, and runs pytest in forks of itself: `python warm.py [module ...]`.

What a mutation may change, descompiler and its tests, is imported in the fork, from its work tree. The server that
local ranks are forked from (`descompiler.check.processes.local_context`) is a fork too, made before the first imports
anything of these. Requests and answers are lines of JSON: a tree, pytest's arguments, a log file and a timeout; the
exit status, or null after the timeout.

Run as a file, so that it imports nothing from the tree that it lies in.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing.util
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from typing import Any

GRANULE_S = 0.05


def main(modules: Sequence[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_answer(**json.loads(line))), flush=True)


def _answer(tree: str, arguments: list[str], log: str, timeout_s: float) -> int | None:
    pid = os.fork()
    if not pid:
        _as_if_started(tree, log)
        _serve_ranks()
        _end(lambda: importlib.import_module("pytest").main(arguments))
    deadline, status = time.monotonic() + timeout_s, 0
    ended = 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            time.sleep(GRANULE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # with what it started: ranks that wait for each other
    if ended:
        return os.waitstatus_to_exitcode(status)
    os.waitpid(pid, 0)
    return None


def _as_if_started(tree: str, log: str) -> None:
    """This process as `python -m pytest` in the tree would be."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(tree)
    sys.path[0] = tree
    os.environ["PYTHONPATH"] = tree
    # pytest keeps what it made of the tests; the product's are checked by their sources' hashes (`run._work_tree`)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    sys.modules["__main__"] = types.ModuleType("__main__")  # which ranks import too


def _serve_ranks() -> None:
    """Start the server that ranks are forked from, by a fork in place of an interpreter that imports torch anew."""
    started = multiprocessing.util.spawnv_passfds

    def forked(path: Any, arguments: Sequence[Any], kept: Sequence[int]) -> int:
        code = os.fsdecode(arguments[-1])
        if forkserver.__name__ not in code:
            return started(path, arguments, kept)
        if pid := os.fork():
            return pid
        for low, high in zip((2, *sorted(kept)), (*sorted(kept), os.sysconf("SC_OPEN_MAX")), strict=True):
            os.closerange(low + 1, high)
        forkserver._forkserver.__init__()  # its lock is held where this fork was made
        _end(lambda: exec(code, {"__name__": "__main__"}))

    multiprocessing.util.spawnv_passfds = forked
    try:
        forkserver.set_forkserver_preload(["descompiler"])
        forkserver.ensure_running()
    finally:
        multiprocessing.util.spawnv_passfds = started


def _end(call: Callable[[], int | None]) -> Any:
    """End this fork with what a call returns: nothing of the process that it is a copy of runs on."""
    status = 70
    try:
        status = int(call() or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])

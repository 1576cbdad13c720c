"""Processes that are killed: at the n-th of the calls that may leave something half done, or by a signal."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from descompiler.dynamic.id_map import IdMap
from descompiler.dynamic.rows import Rows
from descompiler.dynamic.stores import Summed

PLACES: tuple[tuple[Any, str], ...] = (
    (os, "fsync"),
    (os, "replace"),
    (os, "unlink"),
    (Summed, "__call__"),  # each part of a file that is written
    (Rows, "_widen"),
    (IdMap, "keep"),  # a slice loses rows
)
"""Where a process is killed: before the call."""

DIED = 9


def die_at(number: int, come: list[int]) -> None:
    """Let this process die at the n-th of these calls from here on; how many have come is written there."""
    for owner, name in PLACES:
        _count(owner, name, come, number)


def killed_at(number: int, work: Callable[[], None]) -> int | None:
    """Let a child do some work, and die at its n-th of these calls: how many there were, if it did not die."""

    status, come = _child(lambda come: die_at(number, come), work)
    assert status in (0, DIED), status
    return come if status == 0 else None


def killed_after(seconds: float, work: Callable[[], None]) -> bool:
    """Let a child do some work, and kill it after a time: whether it died of it."""
    status, _ = _child(lambda come: None, work, seconds)
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def _count(owner: Any, name: str, come: list[int], number: int) -> None:
    called = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        come[0] += 1
        if come[0] == number:
            os._exit(DIED)
        return called(*args, **kwargs)

    setattr(owner, name, counted)


def _child(
    prepare: Callable[[list[int]], None], work: Callable[[], None], seconds: float | None = None
) -> tuple[int, int]:
    """How a child that does this ends, and what it has counted."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        status, come = 1, [0]
        try:
            prepare(come)
            work()
            os.write(writes, come[0].to_bytes(8, "little"))
            status = 0
        finally:
            os._exit(status)  # whatever was raised is the child's, and its traceback is not pytest's
    os.close(writes)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # one that has ended waits to be asked how
    with os.fdopen(reads, "rb") as pipe:
        come_bytes = pipe.read()
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended), int.from_bytes(come_bytes, "little")

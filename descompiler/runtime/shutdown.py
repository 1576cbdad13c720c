"""The end of a process: gloo's threads are at rest before the interpreter goes.

The thread of gloo's that is the last to hold a collective destroys it, together with the thread-local state in which it
was started. For a collective of a backward that state holds a Python object (`torch.autograd` keeps a copy of its
context variables there), so the thread needs the interpreter's lock. Until Python 3.13 a thread that asks for the lock
while the interpreter is finalised is ended with ``pthread_exit``, here in the middle of a C++ destructor: "terminate
called without an active exception", and a process whose work was all done dies with SIGABRT. DistributedDataParallel
alone does so, under gloo. Functions of `atexit` run before that, when the lock can still be had.
"""

from __future__ import annotations

import atexit
import functools
import time
from pathlib import Path

GLOO_THREADS = "pt_gloo_runloop"
"""Name of the threads that run gloo's collectives: ``ProcessGroupGloo`` gives it to them."""


TASKS = Path("/proc/self/task")


LOOK_S = 0.002
"""Between two looks, during which the interpreter's lock is free: whoever waits for it takes it."""


LIMIT_S = 5.0
"""How long a process waits at most. A thread that is stuck in a collective sleeps, and counts as at rest."""


@functools.cache
def rest_at_exit() -> None:
    """Let this process wait for gloo's threads when it ends; however often it is called, it waits once."""
    atexit.register(wait_for_rest)


def wait_for_rest(limit_s: float = LIMIT_S) -> bool:
    """Wait until no thread of gloo's has anything left to do; whether that was seen within ``limit_s`` seconds."""
    calm, deadline = 0, time.monotonic() + limit_s
    while calm < 3 and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        calm = 0 if any(map(_is_running, TASKS.glob("*"))) else calm + 1
    return calm >= 3


def _is_running(task: Path) -> bool:
    """Whether a thread is gloo's and not asleep."""
    try:
        if (task / "comm").read_text().strip() != GLOO_THREADS:
            return False
        # pid (name) state ...; a name may hold blanks and brackets
        return (task / "stat").read_text().rpartition(")")[2].split()[0] != "S"
    except OSError:  # the thread has ended
        return False

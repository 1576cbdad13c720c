"""Processes end with status 0 once their work is done, however their script ends."""

import ctypes
import hashlib
import threading
import time

import pytest

from benchmarks.exits import run
from descompiler.runtime.shutdown import GLOO_THREADS, wait_for_rest
from tests.harness.cases import cases

PR_SET_NAME = 15


def test_the_end_waits_for_threads_of_gloo():
    """A thread of that name which computes, without the interpreter's lock, is waited for."""
    started, ended = threading.Event(), []

    def work():
        ctypes.CDLL(None).prctl(PR_SET_NAME, GLOO_THREADS.encode(), 0, 0, 0)
        started.set()
        hashlib.sha256(bytes(200 << 20))
        ended.append(time.monotonic())

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    assert wait_for_rest(60.0)
    assert ended or not thread.is_alive()
    thread.join()


def test_the_end_does_not_wait_for_ever():
    stop = threading.Event()

    def work():
        ctypes.CDLL(None).prctl(PR_SET_NAME, GLOO_THREADS.encode(), 0, 0, 0)
        while not stop.is_set():
            hashlib.sha256(bytes(16 << 20))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert not wait_for_rest(0.3)
    finally:
        stop.set()
        thread.join()


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    cases(["ends", "destroys", "sys.exit(0)", "after backward"], ["ends"]),
)
def test_scripts_end_with_status_0(tmp_path, name):
    """Once each: `make exits` runs them often enough to see what happens in one run of a hundred."""
    status, out = run(name, 2, tmp_path, 200.0)
    assert status == 0, out[-2000:]

"""The pool of ranks: a call finds its process as a new one would be, and one that fails takes nothing down with it."""

import os
import random
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.harness.pool import RankPool, RankPoolError


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as ranks:
        yield ranks


def _state(rank, ranks):
    """Whatever a test might find changed, and the process."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn("as ever", stacklevel=1)
    drawn = torch.rand(2).tolist(), random.random(), np.random.rand()
    kept = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), os.environ.get("CHANGED")
    return os.getpid(), [drawn, kept, len(shown), list(warnings.filters), len(dist.distributed_c10d._world.pg_map)]


def _changes(rank, ranks):
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    os.environ["CHANGED"] = "1"
    warnings.simplefilter("ignore")
    dist.new_group([0, 1])
    return _state(rank, ranks)


def test_a_call_finds_nothing_of_those_before(pool):
    before, changed, after = pool(_state), pool(_changes), pool(_state)
    assert before == after
    for (process, was), (same, now) in zip(before, changed, strict=True):
        assert process == same and all(a != b for a, b in zip(was[1:], now[1:], strict=True))


def _fails(rank, ranks, how):
    if rank == 1 and how == "ends":
        os._exit(3)
    if rank == 1 and how == "raises":
        raise ValueError("no such thing")
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "said"), [("raises", "rank 1: .*ValueError: no such thing"), ("ends", "rank 1 ended without an answer")]
)
def test_a_call_that_fails_is_told_and_the_next_one_has_new_processes(pool, how, said):
    before = {process for process, _ in pool(_state)}
    with pytest.raises(RankPoolError, match=f"(?s){said}"):
        pool(_fails, how)
    assert not before & {process for process, _ in pool(_state)}


def _is_ready(rank, ranks):
    return getattr(sys.modules.get("tests.harness.ready"), "is_ready", None)


def test_ranks_are_forked_from_a_process_that_has_compiled_a_model(on_ranks):
    """Not to be ready is no failure of theirs, and would show in nothing but the time that all tests take."""
    assert on_ranks(_is_ready, 2) == [True, True]

"""Ranks that do different things, raise, die or stall: every other rank raises, in seconds, and says what happened."""

import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import descompiler as des
from descompiler.check.processes import local_context
from tests.harness.cases import cases
from tests.harness.failures import raised

IDS = torch.randint(50, (6, 3), generator=torch.Generator().manual_seed(0))
DENSE = torch.ones(6, 4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.dense, self.top = nn.Embedding(50, 6), nn.Linear(4, 6), nn.Linear(18, 1)

    def forward(self, ids, dense):
        return self.top(self.table(ids).flatten(1)) + self.dense(dense).sum(1, keepdim=True)


def compiled(timeout=60.0, **options):
    options = {"plan": {"*": "row_wise"}} | options
    return des.compile(Model(), (IDS, DENSE), timeout=timeout, **options)


# ---- told before anything is sent


WRONG = {
    "width": (IDS, torch.ones(6, 7)),
    "one dim": (IDS, torch.ones(6)),
    "items": (IDS[:, :2], DENSE),
    "ids of one dim": (IDS[:, 0], DENSE),
    "dtype": (IDS, DENSE.double()),
    "integers": (IDS, DENSE.long()),
}


def _inputs(rank, ranks):
    module = compiled()
    said = {what: raised(lambda x=x: module(*(x if rank else (IDS, DENSE)))) for what, x in WRONG.items()}
    module(IDS, DENSE).sum().backward()
    return said


def test_inputs_of_another_kind_on_one_rank(on_ranks):
    for said in on_ranks(_inputs, 2):
        for what in ("width", "one dim", "items", "ids of one dim"):
            assert said[what].startswith("InputError: rank 1: inputs of shapes"), said
        assert "float64 inputs" in said["dtype"] and "rank 0" in said["dtype"]
        assert said["integers"].startswith("InputError: rank 1")


def _options(rank, ranks):
    first = raised(lambda: compiled(loss="sum" if rank else "rank_mean"))
    second = raised(lambda: compiled(in_place=rank == 0))
    module = compiled()
    state = des.full_state_dict(module)
    other = {n: x + (rank if n == "top.bias" else 0) for n, x in state.items()}
    less = {n: x for n, x in state.items() if n != "top.bias" or rank == 0}
    texts = [first, second, *(raised(lambda s=s: des.load_full_state_dict(module, s)) for s in (other, less))]
    same = all(torch.equal(x, state[n]) for n, x in des.full_state_dict(module).items())
    return texts, same


def test_options_and_states_that_differ(on_ranks):
    for texts, same in on_ranks(_options, 2):
        assert "rank 1: loss='sum', in_place=False" in texts[0]
        assert "rank 0: loss='rank_mean', in_place=True" in texts[1]
        assert texts[2].startswith("RankError: ranks load different state_dicts")
        assert "missing ['top.bias']" in texts[3]
        assert same, "nothing is loaded"


# ---- ranks that wait for each other, and for one that has raised


def _apart(rank, ranks, what):
    module = compiled()
    loss = module(IDS, DENSE).square().mean()
    begin = time.monotonic()

    def step():
        if rank == 0:
            loss.backward()
        elif what == "asks":
            torch.autograd.grad(loss, list(module.parameters()))
        elif what == "saves":
            des.full_state_dict(module)
        module(IDS, DENSE)

    text = raised(step)
    return text, time.monotonic() - begin, raised(lambda: module(IDS, DENSE))


@pytest.mark.long(but=1)
@pytest.mark.parametrize("what", cases(["skips", "asks", "saves"], ["skips", "saves"]))
def test_ranks_that_wait_for_each_other(on_ranks, what):
    rank_1 = {
        "skips": "rank 1: step 2, all_to_all (header)",
        "saves": "rank 1: step 1, all_to_all (header): full_state_dict",
    }
    for text, seconds, after in on_ranks(_apart, 2, what):
        assert text.startswith("RankError: ranks wait for each other")
        assert "rank 0: step 1, " in text
        assert rank_1.get(what, "rank 1: step 1, all_to_all (header): gradients of table.weight") in text
        assert seconds < 30
        assert "an earlier step has failed" in after


def _goes_on(rank, ranks):
    """Rank 0 raises within a step, and compiles anew; rank 1 looks what it does when it waits there."""
    module, begin = compiled(), time.monotonic()
    runtime, wait_there = module._runtime, module._runtime.exit_wait

    def broken(*_):
        raise des.InputError("no room")

    def late(*arguments):
        time.sleep(3)
        return wait_there(*arguments)

    if rank == 0:
        runtime.exit_start = broken
    else:
        runtime.exit_wait = late
    return raised(lambda: module(IDS, DENSE)), raised(compiled), time.monotonic() - begin


@pytest.mark.long
def test_a_rank_that_has_raised_does_something_else(on_ranks):
    first, second = on_ranks(_goes_on, 2)
    assert first[0] == "InputError: no room" and second[0].startswith("RankError"), (first, second)
    for texts in (first[1:], second):
        assert "InputError: no room" in texts[0] and texts[-1] < 30, texts


# ---- ranks that die


def _dies(rank, folder, how, answer):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    module = compiled(timeout=4.0)
    module(IDS, DENSE).sum().backward()
    if rank == 1:
        answer.send("ready")
        if isinstance(how, int):
            os.kill(os.getpid(), how)
        sys.excepthook(how, how("no more data"), None)  # as the interpreter calls it; multiprocessing does not
        os._exit(1)
    answer.send(raised(lambda: [module(IDS, DENSE).sum().backward() for _ in range(3)]))
    os._exit(0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (signal.SIGKILL, "did not come: rank 1, which has ended"),
        pytest.param(signal.SIGSTOP, "nothing came for 4 s", marks=pytest.mark.slow),
        (ValueError, "rank 1 raised in step 1: ValueError: no more data"),
    ],
)
def test_the_others_end_when_a_rank_does(how, said):
    context, pipes, processes = local_context(), [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(2):
                reader, writer = context.Pipe(duplex=False)
                arguments = (rank, folder, how if not isinstance(how, signal.Signals) else int(how), writer)
                processes.append(context.Process(target=_dies, args=arguments, daemon=True))
                processes[-1].start()
                writer.close()
                pipes.append(reader)
            assert wait([pipes[1]], 100) and pipes[1].recv() == "ready"
            begin = time.monotonic()
            assert wait([pipes[0]], 60), "rank 0 still waits"
            text, seconds = pipes[0].recv(), time.monotonic() - begin
        finally:
            for p in processes:
                p.kill()
                p.join()
    assert text.startswith("RankError") and said in text, text
    assert "step 2" in text or how is ValueError
    assert seconds < 40


WHEN = ("capture", "forward", "backward", "between")


def _fails(rank, folder, how, when, answer):
    """Rank 1 of three ends, or stops, at a certain place of the job."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)

    def fails(*_):
        if rank == 1:
            answer.send("fails")
            os.kill(os.getpid(), how)

    def job():
        model = Model()
        if when == "capture":
            model.register_forward_pre_hook(fails)
        module = des.compile(model, (IDS, DENSE), plan={"*": "row_wise"}, timeout=4.0)
        module(IDS, DENSE).sum().backward()
        if when == "between":
            fails()
        if when == "forward":
            runtime, calls, exchange = module._runtime, itertools.count(), module._runtime.exchange

            def counted(*args, **kwargs):
                if next(calls) == 1:  # behind the header
                    fails()
                return exchange(*args, **kwargs)

            runtime.exchange = counted
        for _ in range(2):
            out = module(IDS, DENSE)
            if when == "backward":
                out.register_hook(fails)
            out.sum().backward()

    answer.send(raised(job))
    os._exit(0)


FAILS = [(how, when) for how in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP) for when in WHEN]


@pytest.mark.long
@pytest.mark.parametrize(("how", "when"), cases(FAILS, [FAILS[2]]))
def test_two_of_three_ranks_end_when_one_does(how, when):
    context, pipes, processes = local_context(), [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(3):
                reader, writer = context.Pipe(duplex=False)
                processes.append(
                    context.Process(target=_fails, args=(rank, folder, int(how), when, writer), daemon=True)
                )
                processes[-1].start()
                writer.close()
                pipes.append(reader)
            assert wait([pipes[1]], 100) and pipes[1].recv() == "fails"
            begin, texts = time.monotonic(), []
            for rank in (0, 2):
                assert wait([pipes[rank]], 60), f"rank {rank} still waits"
                texts.append(pipes[rank].recv())
            seconds = time.monotonic() - begin
        finally:
            for p in processes:
                p.kill()
                p.join()
    said = r"step 0, des\.compile: " if when == "capture" else "step 2, (all_to_all|all_gather|all_reduce|broadcast)"
    for text in texts:
        assert text.startswith("RankError") and re.search(said, text), text
        assert "did not come: rank 1, which has ended" in text, text
    assert seconds < 30


# ---- torchrun starts them again


AGAIN = """
import os, signal, sys, torch, torch.nn as nn, descompiler as des
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 1))
module = des.compile(model, (torch.arange(8),), loss="sum", timeout=60)
for step in range(3):
    loss = module(torch.arange(8)).square().sum()
    if step == 1 and rank == 1 and not attempt:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()
print("ended", rank, attempt, flush=True)
"""


@pytest.mark.slow
def test_torchrun_starts_all_ranks_again(tmp_path):
    script = tmp_path / "again.py"
    script.write_text(AGAIN)
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    out = subprocess.run([*run, str(script)], env=environment, capture_output=True, text=True, timeout=200)
    assert out.returncode == 0, out.stderr[-3000:]
    assert sorted(x for x in out.stdout.splitlines() if x.startswith("ended")) == ["ended 0 1", "ended 1 1"]

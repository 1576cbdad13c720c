"""Where the time of a training step goes: waiting, operators, Python and autograd; contestants side by side.

    python benchmarks/where.py              LR, FM and DeepFM on 2 ranks; writes benchmarks/results/where.md

On loopback, one thread a rank, the contestants of `benchmarks/steps.py`. Of rank 0, medians of steps that all ranks
begin together: a step's seconds, and how many of them its thread computes (the rest it waits, for other ranks or for a
core). How much of that is in operators (PyTorch's and FBGEMM's kernels, and what calls them in C++) is asked in other
steps, of PyTorch's profiler; what is left is Python, autograd's engine, and making tensors.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import descompiler as des
from benchmarks.contestants import BATCHES, Case, compiled
from benchmarks.ranks import ROOT, on_ranks, tell
from benchmarks.steps import CONTESTANTS, Runner, build_all, commit
from benchmarks.workloads import WORKLOADS

KERNELS = ("aten::", "fbgemm::")
WARM_UP, STEPS = 12, 40
OTHERS = ("TorchRec planner", "dedup pull", "field partials")
HEAD = "model | contestant | step | waits | operators | Python and autograd"


def measured(runner: Runner, batches: Any) -> dict[str, float]:
    """Milliseconds of a step on this rank."""
    walls, threads = [], []
    for i in range(WARM_UP + STEPS):
        dist.barrier()
        begin, own = time.perf_counter(), time.thread_time()
        runner.contestant.step(*batches[i % len(batches)])
        if i >= WARM_UP:
            walls.append(time.perf_counter() - begin)
            threads.append(time.thread_time() - own)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for batch in batches:
            runner.contestant.step(*batch)
    found = [e for e in seen.key_averages() if e.key.startswith(KERNELS)]
    wall, computes = 1e3 * statistics.median(walls), 1e3 * statistics.median(threads)
    operators = sum(e.self_cpu_time_total for e in found) / len(batches) / 1e3
    return {"step": wall, "waits": wall - computes, "operators": operators, "rest": computes - operators}


def worker(task: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    rank, ranks = task["rank"], task["ranks"]
    store = f"file://{task['folder']}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    cluster = des.calibrate(seconds_per_size=0.2)
    chosen = partial(compiled.by_bytes, cluster=cluster)
    contestants = {
        f"{compiled.BY_CLUSTER}{compiled.FUSED}": partial(chosen, fused="auto"),
        f"{compiled.BY_CLUSTER}{compiled.PURE}": partial(chosen, fused="torch"),
        f"{compiled.BY_CLUSTER}{compiled.AHEAD}": partial(chosen, fused="auto", ahead=True),
        **{name: CONTESTANTS[name] for name in OTHERS},
    }
    for name in task["only"]:
        case = Case(WORKLOADS[name](task["rows"]), task["batch"], True, rank, ranks)
        batches = [case.batch(i) for i in range(BATCHES)]
        runners, _ = build_all(case, contestants)
        for contestant, runner in runners.items():
            tell(rank, {"model": case.workload.name, "contestant": contestant, **measured(runner, batches)})
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", default=["lr", "fm", "deepfm"], choices=list(WORKLOADS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1024, help="rows of each rank")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of all tables")
    parser.add_argument("--to", type=Path, default=ROOT / "benchmarks" / "results" / "where.md")
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    lines = []

    def result(x: dict[str, Any]) -> None:
        cells = [f"{x[k]:.1f}" for k in ("step", "waits", "operators", "rest")]
        lines.append(" | ".join([x["model"], x["contestant"], *cells]))
        print(lines[-1], flush=True)

    task = {name: getattr(options, name) for name in ("only", "batch", "rows")}
    on_ranks(__file__, options.ranks, task, False, result)
    about = (
        f"Milliseconds of rank 0 of {options.ranks} on loopback, batch {options.batch:,}, {options.rows:,} rows, "
        f"{datetime.date.today().isoformat()}, commit {commit()} (`python benchmarks/where.py`)."
    )
    rows = [f"| {row} |" for row in (HEAD, " | ".join(["---"] * (HEAD.count("|") + 1)), *lines)]
    options.to.write_text("\n".join(["## Where a step's time goes", "", about, "", *rows, ""]))


if __name__ == "__main__":
    main()

"""Seconds and bytes of a training step: descompiler's compiled module against every other way, side by side.

    make bench-quick                    under three minutes: LR, FM and DeepFM, 2 ranks, two links
    make bench                          everything, hours (ARGS="--only deepfm --links '1 Gbit/s' --ranks 2")

One process a rank, with one thread, each in a namespace of its own behind a link of a given rate (root, ip and tc;
else on loopback). All contestants of a case are built in the same processes, from the same weights, and take turns:
each trains for a few steps, then the next; the median of such rounds is kept, with the least and the most. A round
takes as long as on its slowest rank. Bytes are those that left the interface of the busiest rank, and those that a
compiled module counts itself. A contestant whose losses differ from the others' is void.

Results go to a JSON file for each workload, by case; ``python benchmarks/page.py`` writes docs/benchmarks.md of them.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import gc
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import descompiler as des
from benchmarks.contestants import (
    BATCHES,
    Build,
    Case,
    Contestant,
    NotPossible,
    compiled,
    ddp,
    dedup_pull,
    eager,
    field_partials,
    torch_rec,
)
from benchmarks.network import counters, why_not
from benchmarks.ranks import LINKS, LOOPBACK, ROOT, ask_link, on_ranks, tell
from benchmarks.workloads import WORKLOADS

CONTESTANTS: dict[str, Build] = {
    compiled.BY_BYTES: compiled.by_bytes,
    **ddp.CONTESTANTS,
    **torch_rec.CONTESTANTS,
    **dedup_pull.CONTESTANTS,
    **field_partials.CONTESTANTS,
    **compiled.CONTESTANTS,
}
"""In the order in which they are built: the last ones are left out where memory does not suffice for all."""
WARM_UP, ROUND_S, MOST_STEPS = 2, 0.1, 5
RTOL = 1e-4
"""Of losses, float32 after the same steps; their sums have other orders."""


# ---- on each rank


class Runner:
    """A contestant in training: its steps so far, and their losses."""

    def __init__(self, contestant: Contestant):
        self.contestant, self.losses, self.steps_in_a_round = contestant, [], 1

    def train(self, batches: Any, steps: int) -> float:
        """Seconds of a step, on this rank; all ranks start together."""
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(steps):
            self.losses.append(self.contestant.step(*batches[len(self.losses) % len(batches)]))
        return (time.perf_counter() - begin) / steps


def everywhere(value: Any) -> list[Any]:
    """What each rank says."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_room(case: Case, kept_free: int) -> None:
    """Refuse what may not fit: three times the tables on each rank, weights, Adagrad's state and gradients.

    ``kept_free``: how many times more are left, for gradients of steps and for the plan by the cluster.
    """
    one = case.ranks * case.workload.table_bytes
    available = everywhere(_available())[0]  # rank 0's: all decide alike
    if available < (3 + kept_free) * one:
        raise NotPossible(f"memory: {available / 2**30:.1f} GiB are left")


def _available() -> int:
    """Bytes that Linux would give without swapping."""
    of = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(of["MemAvailable"].split()[0])


def build_all(
    case: Case, contestants: Mapping[str, Build], progress: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Runner], dict[str, str]]:
    """The contestants that can run the case, and why the others can't."""
    runners, refused = {}, {}
    for name, build in contestants.items():
        begin = time.perf_counter()
        try:
            check_room(case, 0 if name == compiled.BY_CLUSTER else 2)
            why, contestant = None, build(case)
        except NotPossible as error:
            why, contestant = str(error), None
        if said := [text for text in everywhere(why) if text]:
            refused[name] = said[0]
        else:
            assert contestant is not None
            runners[name] = Runner(contestant)
        del contestant
        gc.collect()
        progress(f"  {name}: {refused.get(name, 'built')} in {time.perf_counter() - begin:.1f} s")
    return runners, refused


def measure(runners: Mapping[str, Runner], batches: Any, rounds: int, most_s: float, wire: bool) -> dict[str, Any]:
    """Rounds in which every contestant has its turn; those that are slow have fewer steps, or fewer rounds."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    sent: dict[str, list[int]] = {name: [] for name in runners}
    left = {}
    for name, runner in runners.items():
        for _ in range(WARM_UP):
            seconds = max(everywhere(runner.train(batches, 1)))
            if seconds > most_s:
                break
        runner.steps_in_a_round = max(1, min(MOST_STEPS, round(ROUND_S / seconds)))
        left[name] = max(1, min(rounds, int(most_s / seconds)))
    for turn in range(rounds):
        for name, runner in runners.items():
            if turn >= left[name]:
                continue
            dist.barrier()
            before = counters()[0] if wire else 0
            times[name].append(runner.train(batches, runner.steps_in_a_round))
            dist.barrier()
            if wire:
                sent[name].append(round((counters()[0] - before) / runner.steps_in_a_round))
    of_ranks = everywhere((times, sent, {name: r.contestant.about() for name, r in runners.items()}))
    answer = {}
    for name in runners:
        seconds = [max(round_) for round_ in zip(*(t[name] for t, _, _ in of_ranks), strict=True)]
        about = [a[name] for _, _, a in of_ranks]
        answer[name] = {
            **about[0],
            "median_s": statistics.median(seconds),
            "least_s": min(seconds),
            "most_s": max(seconds),
            "rounds": len(seconds),
            "steps": runners[name].steps_in_a_round,
        }
        if wire:
            answer[name]["wire_bytes"] = max(statistics.median(s[name]) for _, s, _ in of_ranks)
        if "traffic" in about[0]:
            answer[name]["traffic"] = max(a["traffic"] for a in about)
    return answer


def means(runners: Mapping[str, Runner]) -> dict[str, Tensor]:
    """Each contestant's losses, step by step, the mean of all ranks'."""
    answer = {name: torch.stack(runner.losses).double() for name, runner in runners.items()}
    for losses in answer.values():
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    return answer


def void(runners: Mapping[str, Runner]) -> dict[str, str]:
    """Contestants whose losses are not those that most have."""
    of = means(runners)

    def error(name: str, other: str) -> float:
        steps = min(len(of[name]), len(of[other]))
        a, b = of[name][:steps], of[other][:steps]
        return ((a - b).abs() / b.abs()).max().item()

    agreeing = {name: sum(error(name, other) <= RTOL for other in of) for name in of}
    reference = max(of, key=lambda name: agreeing[name])
    return {n: f"losses differ by {error(n, reference):.1e}" for n in of if not error(n, reference) <= RTOL}


def worker(task: dict[str, Any]) -> None:
    faulthandler.enable()  # contestants are C++ underneath
    torch.set_num_threads(1)
    rank, ranks = task["rank"], task["ranks"]
    store = f"file://{task['folder']}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    clusters: dict[str, des.Cluster] = {}

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    def wanted(contestant: str) -> bool:
        asked = task["contestants"]
        return any(part in contestant for part in asked) if asked else contestant != ddp.AS_WRITTEN

    contestants = CONTESTANTS | (eager.CONTESTANTS if ranks == 1 else {})

    for name, rows, batch, gradients in task["cases"]:
        say(f"{name}, {rows:,} rows, batch {batch}, {ranks} ranks, {gradients} gradients")
        case = Case(WORKLOADS[name](rows), batch, gradients == "sparse", rank, ranks)
        chosen = {n: b for n, b in contestants.items() if wanted(n)}
        batches = [case.batch(i) for i in range(BATCHES)]
        runners, refused = build_all(case, chosen, say)
        for link in task["links"]:
            dist.barrier()
            ask_link(rank, link)
            dist.barrier()
            if link not in clusters and ranks > 1:
                clusters[link] = des.calibrate(seconds_per_size=task["calibrate_s"])
            chosen = partial(compiled.by_bytes, cluster=clusters.get(link, "bytes"))
            by_cluster = {
                compiled.BY_CLUSTER: chosen,
                f"{compiled.BY_CLUSTER}{compiled.FUSED}": partial(chosen, fused="auto"),
                f"{compiled.BY_CLUSTER}{compiled.PURE}": partial(chosen, fused="torch"),
                f"{compiled.BY_CLUSTER}{compiled.AHEAD}": partial(chosen, fused="auto", ahead=True),
                f"{compiled.BY_CLUSTER}{compiled.ROWS_AHEAD}": partial(chosen, fused="auto", ahead=True, rows=True),
            }
            by_cluster = {n: b for n, b in by_cluster.items() if wanted(n) and link in clusters}
            added, refused_here = build_all(case, by_cluster, say)
            every = {**added, **runners}
            of = measure(every, batches, task["rounds"], task["most_s"], link != LOOPBACK)
            voided = void(every)
            run = {"workload": name, "rows": rows, "batch": batch, "ranks": ranks, "gradients": gradients, "link": link}
            run |= {"contestants": of, "refused": refused | refused_here, "void": voided}
            run["predicted_s"] = compiled.predicted(case, clusters[link]) if link in clusters else {}
            tell(rank, run)
            del added, every
    dist.barrier()
    dist.destroy_process_group()


# ---- the results


def machine() -> dict[str, Any]:
    """Cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cores": os.cpu_count(), "memory_gib": round(memory / 2**30)}


def commit() -> str:
    """Of the checkout; marked where files differ from it, beside those that results go to."""
    written = [":!benchmarks/results", ":!docs/benchmarks.md"]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return (_git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def key(run: Mapping[str, Any]) -> str:
    """What a run is about; a later run of the same replaces it."""
    return "{rows} rows, batch {batch}, {ranks} ranks, {gradients}, {link}".format(**run)


def store(folder: Path, run: dict[str, Any]) -> None:
    """Put a run into its workload's file."""
    file = folder / f"{run['workload']}.json"
    runs = json.loads(file.read_text()) if file.exists() else {}
    runs[key(run)] = run
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")


def table(run: Mapping[str, Any]) -> str:
    """A run for a terminal, the fastest first."""
    lines = [f"{run['workload']}, {key(run)}"]
    of = run["contestants"]
    for name in sorted(of, key=lambda n: of[n]["median_s"]):
        x = of[name]
        lines.append(
            f"  {name:<26}{x['median_s'] * 1e3:9.1f} ms  {x['least_s'] * 1e3:8.1f} to {x['most_s'] * 1e3:<9.1f}"
            f"{x.get('wire_bytes', 0) / 1e6:8.3f} MB  {run['void'].get(name, x.get('plan', ''))}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--links", nargs="+", default=list(LINKS), choices=list(LINKS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--batch", nargs="+", type=int, default=[1024, 4096], help="rows of each rank")
    parser.add_argument("--rows", nargs="+", type=int, default=[1_000_000, 10_000_000], help="of all tables")
    parser.add_argument("--gradients", nargs="+", default=["sparse", "dense"], choices=["sparse", "dense"])
    parser.add_argument("--contestants", nargs="+", help=f"parts of names; all but '{ddp.AS_WRITTEN}' by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--most-s", type=float, default=30, help="of all rounds of one contestant")
    parser.add_argument("--calibrate-s", type=float, default=1, help="for each size and collective")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `network` cleans up
    links = options.links
    if reason := why_not():
        print(f"on loopback, without shaped links or bytes from interfaces: {reason}")
        links = [LOOPBACK]
    cases = list(itertools.product(options.only, options.rows, options.batch, options.gradients))
    task = {name: getattr(options, name) for name in ("contestants", "rounds", "most_s", "calibrate_s")}
    facts = {"machine": machine(), "commit": commit(), "date": datetime.date.today().isoformat()}

    def result(run: dict[str, Any]) -> None:
        store(options.out, run | facts)
        print(table(run), flush=True)

    for ranks in options.ranks:
        on_ranks(__file__, ranks, {**task, "cases": cases, "links": links}, not reason, result)


if __name__ == "__main__":
    main()

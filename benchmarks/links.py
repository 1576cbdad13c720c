"""Predicted bytes and seconds against the kernel's counters and the clock, one gloo rank per network namespace.

    make bench-links                    needs root, ip and tc (Debian: apt-get install iproute2)

Each rank lives in a namespace of its own, behind a veth pair on a bridge, shaped by tc at both ends. For each model,
ranks and rate: the module is trained, and the bytes that its layout predicts are compared with what the interfaces of
all ranks counted; then `des.calibrate` fits the links, and `des.audit` compares predicted and measured seconds of the
step's collectives. Everything that it makes is removed at the end, also after an error or a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import descompiler as des
from benchmarks.network import counters, network, why_not
from descompiler.examples import FM, DeepFM

FIELDS, ROWS, DIM = 26, 38_462, 16  # a million rows in all
TIMEOUT_S = 300
N_DENSE = 13
MBIT = {"100 Mbit/s": 100, "1 Gbit/s": 1000}


def fm() -> torch.nn.Module:
    return FM([ROWS] * FIELDS, n_dense=N_DENSE, dim=DIM)


def deepfm() -> torch.nn.Module:
    return DeepFM([ROWS] * FIELDS, n_dense=N_DENSE, dim=DIM, hidden=(400, 400))


FACTORIES = {"fm": fm, "deepfm": deepfm}


def inputs(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense features, and ids with Zipf's distribution of exponent 1.05; popular rows lie anywhere in a table.

    Rows sorted by frequency would need samples to plan for: see `des.compile`.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, ROWS + 1, dtype=torch.float64) ** -1.05
    ranks = torch.multinomial(weights, rows * FIELDS, replacement=True, generator=generator).reshape(rows, FIELDS)
    order = torch.Generator().manual_seed(-1)  # the same for all batches
    ids = torch.stack([torch.randperm(ROWS, generator=order)[ranks[:, f]] for f in range(FIELDS)], dim=1)
    return torch.randn(rows, N_DENSE, generator=generator), ids


def on_namespaces(names: Sequence[str], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Run `worker` in each namespace; what each rank returns."""
    with tempfile.TemporaryDirectory() as folder:
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": root}
        processes = []
        try:
            for rank, name in enumerate(names):
                task = json.dumps({**arguments, "rank": rank, "ranks": len(names), "folder": folder})
                command = ["ip", "netns", "exec", name, sys.executable, __file__, "--worker", task]
                log = open(f"{folder}/log{rank}", "w")  # noqa: SIM115, the child owns it
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
                log.close()
            deadline = time.monotonic() + TIMEOUT_S
            while any(p.poll() is None for p in processes):
                failed = [r for r, p in enumerate(processes) if p.poll() not in (None, 0)]
                if failed or time.monotonic() > deadline:
                    break
                time.sleep(0.2)
            failed = [r for r, p in enumerate(processes) if p.poll() != 0]
            if failed:
                text = Path(f"{folder}/log{failed[0]}").read_text()
                raise RuntimeError(f"rank {failed[0]} failed or took more than {TIMEOUT_S} s:\n{text[-3000:]}")
            return [json.loads(Path(f"{folder}/answer{rank}").read_text()) for rank in range(len(names))]
        finally:
            for p in processes:
                if p.poll() is None:
                    p.kill()
                p.wait()


# ---- on each rank


@contextlib.contextmanager
def realtime() -> Iterator[None]:
    """This process before any other of the machine: others delay a collective by milliseconds."""

    def schedule(policy: int, priority: int) -> None:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))

    schedule(os.SCHED_RR, 1)
    try:
        yield
    finally:
        schedule(os.SCHED_OTHER, 0)


def worker(task: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    rank, ranks, rows = task["rank"], task["ranks"], task["rows"]
    store = f"file://{task['folder']}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    torch.manual_seed(0)
    example = inputs(rows, rank)
    module = des.compile(FACTORIES[task["model"]](), example, plan=task["plan"])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    def step() -> None:
        module(*example).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    dist.barrier()
    before, begin = counters(), time.perf_counter()
    for _ in range(task["steps"]):
        step()
    dist.barrier()
    seconds = (time.perf_counter() - begin) / task["steps"]
    after = counters()
    answer: dict[str, Any] = {
        "predicted_bytes": task["steps"] * module.plan.traffic(rank, rows).total,
        "sent_bytes": task["steps"] * module.traffic().total,
        "interface_bytes": after[0] - before[0],
        "packets": after[1] - before[1],
        "step_s": seconds,
    }
    if task["audit"]:
        with realtime() if task["realtime"] else contextlib.nullcontext():
            cluster = des.calibrate()
            audited = des.audit(module, [example] * (2 + task["audit"]), cluster=cluster)
        answer |= {"audit": json.loads(audited.to_json()), "text": str(audited)}
    Path(f"{task['folder']}/answer{rank}").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


# ---- the tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", default=list(FACTORIES), choices=list(FACTORIES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=list(MBIT), choices=list(MBIT))
    parser.add_argument("--rows", type=int, default=4096, help="of each rank's batch")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--plan", default=None, help='forms to pin for every table, such as "row_wise"')
    parser.add_argument(
        "--realtime", action="store_true", help="measure collectives at real-time priority: see `realtime`"
    )
    parser.add_argument("--verbose", action="store_true", help="each collective, and the calibration")
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    if reason := why_not():
        print(f"skipped: {reason}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `network` cleans up
    plan = {"*": options.plan} if options.plan else None
    machine = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.0f}{', real-time' if options.realtime else ''}"
    print(f"{options.rows} rows a rank; MB and ms per rank and step; {machine}\n")
    print("| model | ranks | link | predicted MB | interface MB | error | predicted ms | measured ms | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    details = []
    for ranks in options.ranks:
        for rate in options.rates:
            with network(ranks, MBIT[rate]) as names:
                for model in options.models:
                    task = {"model": model, "rows": options.rows, "steps": options.steps, "plan": plan, "audit": 15}
                    task["realtime"] = options.realtime
                    answers = on_namespaces(names, task)
                    print(line(model, ranks, rate, options.steps, answers), flush=True)
                    if options.verbose:
                        print(answers[0]["text"], links(answers[0]), sep="\n", file=sys.stderr, flush=True)
                    details.append(f"\n{model}, {ranks} ranks, {rate}\n{answers[0]['text']}\n{links(answers[0])}")
    if options.verbose:
        print("\n".join(details))


def line(model: str, ranks: int, rate: str, steps: int, answers: list[dict[str, Any]]) -> str:
    """A row of the table: bytes per rank and step, the mean over ranks."""
    predicted = statistics.mean(a["predicted_bytes"] for a in answers) / steps
    counted = statistics.mean(a["interface_bytes"] for a in answers) / steps
    audited = answers[0]["audit"]["collectives"]
    expected, measured = (sum(x[key] for x in audited) for key in ("predicted_s", "measured_s"))
    return (
        f"| {model} | {ranks} | {rate} | {predicted / 1e6:.3f} | {counted / 1e6:.3f} | {predicted / counted - 1:+.1%} "
        f"| {expected * 1e3:.1f} | {measured * 1e3:.1f} | {expected / measured - 1:+.0%} |"
    )


def links(answer: dict[str, Any]) -> str:
    """What calibration measured and fitted."""
    cluster = answer["audit"]["cluster"]
    lines = []
    for name, of in cluster["provenance"]["collectives"].items():
        link = cluster["links"]["inter"][name]
        lines.append(
            f"  {name:<16} alpha {link['alpha_s'] * 1e6:8.0f} us  {link['bytes_per_s'] * 8 / 1e6:8.0f} Mbit/s  "
            + "  ".join(f"{x:.0f}B:{t * 1e3:.2f}ms" for x, t in zip(of["sent_bytes"], of["median_s"], strict=True))
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Steps on one GPU: the compiled module against the original, and on two gloo ranks that share the GPU.

    python benchmarks/gpu.py --rows 10000000 --dim 64 --batch 16384 65536 --profile

26 tables in one model, DeepFM-like: lookups, a factorisation machine, two layers. Forward, backward and an optimiser
step, median of `REPEATS` after a warm-up, interleaved; the device is waited for around each step. Contestants: the
model as it is (`eager`), the same with one table for all fields and offsets, as an expert writes it (`one table`), the
compiled module with the same optimiser (`compiled`), and with `des.fuse_optimizer` (`fused`).

``bandwidth`` is what a step has to read and write of embedding rows (read and written by lookups, written and read as
gradients, read and written by the update), by its time, as a share of what a copy on the device reaches: a lower bound
of what the memory moved. ``syncs`` counts how often a step waits for the device.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import descompiler as des
from descompiler.check.processes import on_ranks
from descompiler.check.rates import measured_rates

FIELDS = 26
REPEATS = 7
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}


class Model(nn.Module):
    """Lookups in 26 tables, or in one with offsets; pairwise products of them, two layers."""

    offsets: Tensor

    def __init__(self, rows: int, dim: int, sparse: bool, one_table: bool = False):
        super().__init__()
        each = rows // FIELDS
        sizes = [FIELDS * each] if one_table else [each] * FIELDS
        self.tables = nn.ModuleList(nn.Embedding(n, dim, sparse=sparse) for n in sizes)
        self.register_buffer("offsets", torch.arange(FIELDS) * each)
        self.first, self.last = nn.Linear(FIELDS * dim, 400), nn.Linear(400, 1)

    def forward(self, ids: Tensor) -> Tensor:
        if len(self.tables) == 1:
            v = self.tables[0](ids + self.offsets)
        else:
            v = torch.stack([t(ids[:, i]) for i, t in enumerate(self.tables)], 1)
        pairs = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1)
        return pairs + self.last(self.first(v.flatten(1)).relu()).squeeze(1)


def wait(device: str) -> None:
    """Wait for what was given to the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def stepper(module: Any, ids: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """One step of training."""

    def step() -> None:
        module(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def milliseconds(steps: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Median time of each, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(REPEATS + 3):
        for name, step in steps.items():
            wait(device)
            begin = time.perf_counter()
            step()
            wait(device)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - begin)
    return {name: 1000 * statistics.median(x) for name, x in seconds.items()}


def syncs(step: Callable[[], None]) -> dict[str, int]:
    """Lines that wait for the device in one step, with how often each did."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    found: dict[str, int] = {}
    for warning in caught:
        if "synchronizing" in str(warning.message):
            line = f"{'/'.join(warning.filename.split('/')[-3:])}:{warning.lineno}"
            found[line] = found.get(line, 0) + 1
    return found


def kernels(step: Callable[[], None]) -> str:
    """What a step spends the device's time on, and Python's."""
    with torch.profiler.profile() as profile:
        step()
        torch.cuda.synchronize()
    averages = profile.key_averages()
    launches = sum(e.count for e in averages if "LaunchKernel" in e.key)
    top = sorted(averages, key=lambda e: -e.self_device_time_total)[:12]
    lines = [f"    {e.self_device_time_total / 1000:8.3f} ms {e.count:5} x {e.key[:100]}" for e in top]
    return "\n".join([f"    {launches} launches", *lines])


def measure(
    rank: int, ranks: int, rows: int, dim: int, batch: int, sparse: bool, optimizer: str, device: str, profile: bool
) -> dict[str, float]:
    """Times of a step on one rank of several, which share the GPU."""
    begin = time.perf_counter()
    torch.manual_seed(0)
    make: Any = OPTIMIZERS[optimizer]
    ids = (torch.rand(batch, FIELDS, device=device) ** 4 * (rows // FIELDS)).long()
    with torch.device(device):
        model = Model(rows, dim, sparse)
    forwards: dict[str, Callable[[], Any]] = {}
    steps: dict[str, Callable[[], None]] = {}

    def contest(name: str, module: Any, fused: bool) -> None:
        if rank == 0 and ranks > 1:
            forms = sorted(set(module.plan.forms.values()))
            print(f"  {name}: {forms}, {time.perf_counter() - begin:.1f} s after the start", flush=True)
        if fused:
            des.fuse_optimizer(module, make, lr=0.01)
        parameters = [p for n, p in module.named_parameters() if not (fused and n.startswith("tables"))]
        steps[name], forwards[name] = stepper(module, ids, make(parameters, lr=0.01)), lambda: module(ids)

    if ranks == 1:
        contest("eager", model, False)
        with torch.device(device):
            contest("one table", Model(rows, dim, sparse, one_table=True), False)
    contest("compiled", des.compile(model, (ids[:8],), batch=batch), False)
    if sparse:
        contest("fused", des.compile(model, (ids[:8],), batch=batch), True)
    found = {f"{name} forward": x for name, x in milliseconds(forwards, device).items()} | milliseconds(steps, device)
    if profile and device == "cuda" and rank == 0:
        for name, step in steps.items():
            print(f"  {name}: syncs {syncs(step)}\n{kernels(step)}", flush=True)
    return found


def copy_rate(device: str) -> float:
    """GB/s that a copy on the device reads and writes."""
    x = torch.empty(2**29 if device == "cuda" else 2**24, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / 1e6 / milliseconds({"copy": lambda: y.copy_(x)}, device)["copy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[16_384, 65_536])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--profile", action="store_true", help="kernels and waits of one step of each")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    rate = copy_rate(args.device)
    print(measured_rates(torch.device(args.device)))
    print(f"{name}, torch {torch.__version__}, {args.rows:,} rows in all, dim {args.dim}, a copy: {rate:.0f} GB/s")
    for batch in args.batch:
        for sparse, optimizer in ((True, "sgd"), (True, "adagrad"), (False, "sgd")):
            kind = f"batch {batch:,}, {optimizer}, {'sparse' if sparse else 'dense'} gradients"
            given = (args.rows, args.dim)
            last = (sparse, optimizer, args.device, args.profile)
            row_bytes = 6 * batch * FIELDS * args.dim * 4
            for ranks in args.ranks:
                if ranks == 1:
                    found = measure(0, 1, *given, batch, *last)
                elif sparse:
                    found = on_ranks(measure, ranks, *given, batch // ranks, *last, timeout_s=200)[0]
                else:
                    continue
                shares = {k: row_bytes / 1e6 / found[k] / rate for k in ("compiled", "fused") if k in found}
                print(f"{kind}, {ranks} ranks: " + ", ".join(f"{k} {x:.2f} ms" for k, x in found.items()))
                print("  bandwidth: " + ", ".join(f"{k} {x:.1%}" for k, x in shares.items()), flush=True)
                if args.device == "cuda":
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

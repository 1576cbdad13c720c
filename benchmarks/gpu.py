"""Steps on one GPU: the compiled module against the original, and on two gloo ranks that share the GPU.

    python benchmarks/gpu.py --rows 10000000 --dim 64 --batch 16384 65536

26 tables in one model, DeepFM-like: lookups, a factorisation machine, two layers. Forward, backward and an optimiser
step, median of `REPEATS` after a warm-up, interleaved; the device is waited for around each step. ``bandwidth`` is what
a step of the compiled module has to read and write of embedding rows (values in forward, gradient and update), by its
time: a lower bound of what the memory moved.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import descompiler as des
from descompiler.check.processes import on_ranks

FIELDS = 26
REPEATS = 7


class Model(nn.Module):
    """Lookups in 26 tables, pairwise products of them, two layers."""

    def __init__(self, rows: int, dim: int, sparse: bool):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows // FIELDS, dim, sparse=sparse) for _ in range(FIELDS))
        self.first, self.last = nn.Linear(FIELDS * dim, 400), nn.Linear(400, 1)

    def forward(self, ids: Tensor) -> Tensor:
        v = torch.stack([t(ids[:, i]) for i, t in enumerate(self.tables)], 1)
        pairs = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1)
        return pairs + self.last(self.first(v.flatten(1)).relu()).squeeze(1)


def stepper(module: Any, ids: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """One step of training."""

    def step() -> None:
        module(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def milliseconds(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median time of each, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(REPEATS + 3):
        for name, step in steps.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - begin)
    return {name: 1000 * statistics.median(x) for name, x in seconds.items()}


def measure(rank: int, ranks: int, rows: int, dim: int, batch: int, sparse: bool) -> dict[str, float]:
    """Times of a step on one rank of several, which share the GPU."""
    torch.manual_seed(0)
    ids = (torch.rand(batch, FIELDS, device="cuda") ** 4 * (rows // FIELDS)).long()
    with torch.device("cuda"):
        model = Model(rows, dim, sparse)
    steps = {}
    if ranks == 1:
        steps["eager"] = stepper(model, ids, torch.optim.SGD(model.parameters(), 0.01))
    module = des.compile(model, (ids[:8],), batch=batch)
    steps["compiled"] = stepper(module, ids, torch.optim.SGD(module.parameters(), 0.01))
    found = milliseconds(steps)
    row_bytes = batch * FIELDS * dim * 4
    return found | {"GB/s": 4 * row_bytes / 1e6 / found["compiled"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[16_384, 65_536])
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.rows:,} rows in all, dim {args.dim}")
    for batch in args.batch:
        for sparse in (True, False):
            what = f"batch {batch:,}, {'sparse' if sparse else 'dense'} gradients"
            one = measure(0, 1, args.rows, args.dim, batch, sparse)
            print(f"{what}: " + ", ".join(f"{k} {x:.2f}" for k, x in one.items()), flush=True)
            torch.cuda.empty_cache()
            if sparse:
                two = on_ranks(measure, 2, args.rows, args.dim, batch // 2, sparse, timeout_s=300)
                print(f"{what}, 2 gloo ranks: " + ", ".join(f"{k} {x:.2f}" for k, x in two[0].items()), flush=True)


if __name__ == "__main__":
    main()

"""Steps of a compiled model with dynamic tables beside the same with static ones, interleaved; two ranks.

    python benchmarks/dynamic_steps.py                    # row_wise, unique_rows, table_wise; about a minute
    python benchmarks/dynamic_steps.py --forms unique_rows --batch 4096

A factorisation of two tables (dim 16, float32, Adagrad, sparse gradients), ids drawn by Zipf's law from as many as the
tables have rows. In dynamic tables all ids are resident after the warm-up, but for a few that each step brings (1 %),
and rows go by `Capacity`; static ones have the ids modulo their rows. Printed are medians of the wall clock of rank 0,
and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import descompiler as des
from descompiler.check.processes import on_ranks

ROWS, DIM = 200_000, 16


class Factors(nn.Module):
    """Scores of users and items."""

    def __init__(self, *, dynamic: bool):
        super().__init__()
        if dynamic:
            evict = des.dynamic.Capacity(ROWS)
            self.user, self.item = (des.DynamicEmbedding(DIM, name=n, evict=evict) for n in ("user", "item"))
        else:
            self.user, self.item = (nn.Embedding(ROWS, DIM, sparse=True) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return (self.user(users) * self.item(items)).sum(1) + self.bias


def batch_of(step: int, rows: int, rank: int) -> tuple[Tensor, Tensor]:
    """Ids of a step; one of a hundred was never there before."""
    g = np.random.default_rng([step, rank])
    drawn = [(g.zipf(1.2, rows) - 1) % (ROWS // 2) for _ in range(2)]
    for ids in drawn:
        new = g.random(rows) < 0.01
        ids[new] = ROWS + step * rows + np.arange(rows)[new]
    return tuple(torch.from_numpy(x) for x in drawn)  # type: ignore[return-value]


def measure(rank: int, ranks: int, form: str, rows: int, steps: int) -> tuple[float, float]:
    """Median milliseconds of a step with dynamic tables, and with static ones."""
    torch.set_num_threads(1)
    contestants: list[Any] = []
    for dynamic in (True, False):
        example = tuple(x % ROWS for x in batch_of(0, rows, rank))
        module = des.compile(Factors(dynamic=dynamic), example, plan={"*": form})
        contestants.append((module, torch.optim.Adagrad(module.parameters(), lr=0.1), dynamic))
    found: list[list[float]] = [[], []]
    for step in range(steps + 20):
        users, items = batch_of(step, rows, rank)
        for times, (module, optimizer, dynamic) in zip(found, contestants, strict=True):
            ids = (users, items) if dynamic else (users % ROWS, items % ROWS)
            begin = time.perf_counter()
            F.softplus(module(*ids)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(1e3 * (time.perf_counter() - begin))
    dynamic_ms, static_ms = (statistics.median(times[20:]) for times in found)
    return dynamic_ms, static_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=["row_wise", "unique_rows", "table_wise"])
    parser.add_argument("--batch", type=int, default=1024, help="rows of a rank")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    print(
        f"2 ranks, {options.batch} rows a rank, {ROWS:,} rows a table, dim {DIM}; medians of {options.steps} steps, ms"
    )
    for form in options.forms:
        dynamic_ms, static_ms = on_ranks(measure, 2, form, options.batch, options.steps)[0]
        print(f"{form:12} dynamic {dynamic_ms:6.2f}  static {static_ms:6.2f}  ratio {dynamic_ms / static_ms:.2f}")


if __name__ == "__main__":
    main()

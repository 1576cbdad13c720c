"""How long it takes, and how much memory, to plan a model of very many tables for very many ranks, without its weights.

    python benchmarks/plan_scale.py                                 # all sizes, as Markdown
    python benchmarks/plan_scale.py --tables 1000 --ranks 1024

DeepFM on the meta device: half of the tables are embeddings, half the linear term's. Vocabularies are log-uniform from
10 to 10 million rows, or all have ``--rows``. Each case runs in a process of its own. Prints seconds of capture
(torch.export and its checks) and of planning, wall clock and of the process's CPU; the peak of its resident memory
after each; and the gap: how far the plan may be above the best.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from descompiler.captured import Captured
from descompiler.examples import MODELS

TIMES = ("capture, s (CPU)", "peak, MB", "planning, s (CPU)", "peak, MB")
COLUMNS = ("tables", "ranks", "their rows", *TIMES, "trials", "gap")


def timed(function: Callable[[], Any]) -> tuple[Any, str, str]:
    """What a function returns, the seconds that it took, and the peak of this process's memory so far."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    seconds = f"{time.perf_counter() - wall:.1f} ({time.process_time() - cpu:.1f})"
    return result, seconds, f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:,.0f}"


def measure(tables: int, ranks: int, batch: int, dim: int, rows: int | None) -> tuple[str, ...]:
    """One line of the table."""
    fields = tables // 2
    generator = torch.Generator().manual_seed(0)
    sizes = (10 ** (1 + 6 * torch.rand(fields, generator=generator))).long().tolist()
    if rows is not None:
        sizes = [rows] * fields
    with torch.device("meta"):
        model = MODELS["deepfm"]("fields", vocab_sizes=sizes, dim=dim, hidden=(400, 400))
    inputs = (torch.randn(4, 3), torch.zeros(4, fields, dtype=torch.int64))
    captured, *captured_in = timed(lambda: Captured.of(model, inputs))
    plan, *planned_in = timed(lambda: captured.plan(ranks=ranks, batch=batch))
    sizes_of = (f"{len(plan.tables):,}", f"{ranks:,}", f"{sum(t.rows for t in plan.tables):,}")
    return (*sizes_of, *captured_in, *planned_in, str(plan.trials), f"{plan.gap:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, nargs="+", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--batch", type=int, default=1024, help="rows a rank")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--rows", type=int, help="of every table")
    args = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'--:|' * len(COLUMNS)}")
    # a process's peak is that of all that it ever did
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for tables in args.tables:
            for ranks in args.ranks:
                line = pool.apply(measure, (tables, ranks, args.batch, args.dim, args.rows))
                print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()

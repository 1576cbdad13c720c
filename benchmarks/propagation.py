"""Bytes and seconds of one training step of LightGCN: its tables by columns, gathered, and replicated.

The model is `examples.models.LightGCN`; each way trains it for the same steps on local gloo processes:

    column          each rank propagates its columns of all nodes; ids and partial dot products cross
    fsdp            each rank owns rows; all ranks gather the tables, and send their gradients back
    replicate       data parallel: the tables' gradients are all-reduced

    PYTHONPATH=. python benchmarks/propagation.py --ranks 2 4
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

import descompiler as des
from descompiler.check.processes import on_ranks
from examples.models import LightGCN, zipf_ids

WAYS = ("column_wise", "fsdp", "replicate")


def graph_of(users: int, items: int, edges: int) -> Tensor:
    """Pairs ``[2, pairs]`` of a user and an item, items Zipf(1.05), each pair once."""
    user = torch.randint(users, (edges,), generator=torch.Generator().manual_seed(5))
    return torch.stack([user, zipf_ids([items], (edges,), seed=6)[:, 0]]).unique(dim=1)


def step(rank: int, ranks: int, way: str, users: int, items: int, edges: int, dim: int, batch: int, steps: int) -> Any:
    """Train ``steps`` steps; the latest one's bytes, predicted and counted, memory, and the median seconds."""
    torch.manual_seed(0)
    model = LightGCN(users, items, graph_of(users, items, edges), dim)
    generator = torch.Generator().manual_seed(rank)
    inputs = [torch.randint(n, (batch,), generator=generator) for n in (users, items, items)]
    module = des.compile(model, tuple(inputs), plan={"*": way}, optimizer="adam")
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = module(*inputs).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return {
        "predicted": module.plan.traffic(rank).total,
        "counted": module.traffic().total,
        "memory": module.plan.memory(rank).total,
        "seconds": sorted(times)[len(times) // 2],
        "loss": float(loss.detach()) / ranks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--edges", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024, help="rows a rank")
    parser.add_argument("--steps", type=int, default=3)
    a = parser.parse_args()
    print(f"{a.users:,} users, {a.items:,} items, dim {a.dim}, {a.batch} rows a rank; busiest rank, float32, Adam\n")
    print("| ranks | way | predicted (B) | counted (B) | memory, by the plan (B) | s a step | loss |")
    print("|---|---|---|---|---|---|---|")
    for ranks in a.ranks:
        for way in WAYS:
            arguments = (way, a.users, a.items, a.edges, a.dim, a.batch, a.steps)
            results = on_ranks(step, ranks, *arguments, timeout_s=1800.0)
            worst = {k: max(r[k] for r in results) for k in ("predicted", "counted", "memory", "seconds")}
            sizes = " | ".join(f"{worst[k]:,}" for k in ("predicted", "counted", "memory"))
            loss = sum(r["loss"] for r in results)
            print(f"| {ranks} | {way} | {sizes} | {worst['seconds']:.2f} | {loss:.6f} |", flush=True)


if __name__ == "__main__":
    main()

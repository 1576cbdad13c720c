"""Bytes and seconds of one training step of a sequential recommender with a full softmax over a million items.

Three ways to train the same model (`examples.models.SequentialRecommender`: GRU, one item table for histories and the
output layer), on local gloo processes:

    owners          the compiler's own plan: the table's rows have owners, which answer with partial results
    logits          the same split, but the loss is outside of forward: the logits cross, and their gradients
    data parallel   the table replicated, its gradient all-reduced

    PYTHONPATH=. python benchmarks/item_softmax.py --ranks 2 4
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

import descompiler as des
from descompiler.check.processes import on_ranks
from examples.models import SequentialRecommender, zipf_ids


class Scores(SequentialRecommender):
    """The same model; forward returns the scores of all items, and the loss is the caller's."""

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        return self.scores(history)


WAYS: dict[str, tuple[type[nn.Module], Any]] = {
    "owners": (SequentialRecommender, None),
    "logits": (Scores, {"items.weight": "unique_rows"}),
    "data parallel": (SequentialRecommender, {"items.weight": "replicate"}),
}


def inputs_of(rank: int, items: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Histories ``[batch, length]`` and targets ``[batch]``, ids Zipf(1.05)."""
    ids = zipf_ids([items] * (length + 1), (batch,), seed=rank) + 1
    return ids[:, :-1].contiguous(), ids[:, -1].contiguous()


def step(rank: int, ranks: int, way: str, items: int, dim: int, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Train ``steps`` steps; the latest one's bytes, predicted and counted, and the median seconds."""
    kind, plan = WAYS[way]
    with torch.device("meta"):
        model = kind(items, dim, length=length)  # type: ignore[call-arg]
    history, target = inputs_of(rank, items, batch, length)
    module = des.compile(model, (history, target), plan=plan, seed=1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    times, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        out = module(history, target)
        loss = out.mean() if way != "logits" else nn.functional.cross_entropy(out, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    predicted = module.plan.traffic(rank, unique=module.unique())
    return {
        "predicted": predicted.total,
        "counted": module.traffic().total,
        "expected": module.plan.traffic(rank).total,
        "seconds": sorted(times)[len(times) // 2],
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="rows a rank")
    parser.add_argument("--length", type=int, default=20, help="items of a history")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    a = parser.parse_args()
    print(f"{a.items:,} items, dim {a.dim}, {a.batch} rows a rank, histories of {a.length}; busiest rank, float32\n")
    print("| ranks | way | expected (B) | predicted, unique ids known (B) | counted (B) | s a step | loss |")
    print("|---|---|---|---|---|---|---|")
    for ranks in a.ranks:
        for way in a.ways:
            arguments = (way, a.items, a.dim, a.batch, a.length, a.steps)
            results = on_ranks(step, ranks, *arguments, timeout_s=1800.0)
            worst = {k: max(r[k] for r in results) for k in ("expected", "predicted", "counted", "seconds")}
            loss = sum(r["losses"][-1] for r in results) / ranks
            sizes = " | ".join(f"{worst[k]:,}" for k in ("expected", "predicted", "counted"))
            print(f"| {ranks} | {way} | {sizes} | {worst['seconds']:.2f} | {loss:.6f} |", flush=True)


if __name__ == "__main__":
    main()

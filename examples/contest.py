"""Two models on one click stream, with dynamic tables and with hashed ids: their steps, and what is known of them.

Every batch is predicted before it is trained on, so that AUC and log loss are those of clicks not seen yet.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from clicks import HOURS, Clicks, Inputs, Stream
from data import auc, log_loss, row_counts
from torch import Tensor, nn
from train_ctr import Ranks, mean_loss

import descompiler as des
from descompiler.dynamic.hashing import shifted, slices_for

Record = dict[str, float]

DYNAMIC, HASHED, BEST = "dynamic", "hashed", "best"
SKETCH_WIDTH, HALVE_EVERY = 256, 200
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Hashed(nn.Embedding):
    """The row of an id is the id modulo the number of rows: ids share rows, and none is ever given back."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.remainder(self.num_embeddings))


class Towers(nn.Module):
    """What a user and an item have in common, by their product and by a perceptron; with the hour and the position."""

    def __init__(self, user: nn.Module, item: nn.Module, dim: int):
        super().__init__()
        self.user, self.item, self.hour = user, item, nn.Embedding(HOURS, 4)
        self.top = nn.Sequential(nn.Linear(2 * dim + 4 + 1, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, users: Tensor, items: Tensor, hours: Tensor, positions: Tensor) -> Tensor:
        user, item = self.user(users), self.item(items)
        top = self.top(torch.cat([user, item, self.hour(hours), positions.unsqueeze(1)], 1))
        return top.squeeze(1) + (user * item).sum(1)


def hashed_rows(args: argparse.Namespace, ranks: int) -> int:
    """Rows of a hashed table of at least as many bytes as a dynamic one may take, on all ranks together.

    That has room for a quarter more rows than its capacity, if few of them are new in one step, and beside each row
    and its Adagrad sum 12 bytes: its key and the last step that saw it. Each rank has cells of the map and counters of
    the sketch for every slice.
    """
    row = 2 * args.dim * torch.get_default_dtype().itemsize
    of_ranks = 10 * args.capacity + 4 * SKETCH_WIDTH * slices_for(args.capacity)
    return (5 * args.capacity // 4 * (row + 12) + ranks * of_ranks) // row


def models(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The two models, from the same weights beside the tables."""
    start = des.dynamic.Normal(std=0.05)
    options = {
        "admit": des.dynamic.AfterSightings(2, width=SKETCH_WIDTH, halve_every=HALVE_EVERY),
        "evict": des.dynamic.Capacity(args.capacity),
        "init": start,
        "seed": args.seed,
    }
    dynamic = [des.DynamicEmbedding(args.dim, name=name, **options) for name in ("user", "item")]
    hashed = [Hashed(args.hashed_rows, args.dim, sparse=True) for _ in range(2)]
    made = {}
    for name, tables in ((DYNAMIC, dynamic), (HASHED, hashed)):
        torch.manual_seed(args.seed)
        made[name] = Towers(*tables, args.dim)
    for table in hashed:
        nn.init.normal_(table.weight, std=start.std)
    return made


class Contestant:
    """A model in training, and what it has predicted since the last report."""

    def __init__(self, model: nn.Module, example: Inputs, args: argparse.Namespace):
        plan = dict.fromkeys(("user", "item"), args.form) if args.form else None
        rows = len(example.users)
        self.module = des.compile(model, tuple(example), plan=plan, loss="row_mean", batch=rows)
        self.optimizer = torch.optim.Adagrad(self.module.parameters(), lr=args.lr)
        self.logits: list[Tensor] = []
        self.sent = 0

    def step(self, clicks: Clicks) -> None:
        """Predict a batch, then train on it: its logits are those of the forward, before the optimiser steps."""
        logits = self.module(*clicks.inputs)
        mean_loss(logits, clicks.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.logits.append(logits.detach())
        self.sent += self.module.traffic().total


class Distinct:
    """How many ids there have been, in bounded memory: of hashes in [0, 1) the k-th smallest is about k / distinct."""

    KEPT = 4096

    def __init__(self) -> None:
        self.smallest = torch.empty(0, dtype=torch.int64)

    def add(self, ids: Tensor) -> None:
        """Note ids, which are hashes already."""
        self.smallest = torch.cat([self.smallest, shifted(ids, 1)]).unique()[: self.KEPT]

    def __len__(self) -> int:
        if len(self.smallest) < self.KEPT:
            return len(self.smallest)
        return round((self.KEPT - 1) * 2**63 / int(self.smallest[-1]))


class Contest:
    """Both models on one stream: a step, a report, a checkpoint."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks, stream: Stream):
        self.args, self.ranks, self.stream, self.done = args, ranks, stream, 0
        counts = row_counts(args.batch, ranks.size)
        self._first = sum(counts[: ranks.rank])
        self._end = self._first + counts[ranks.rank]
        example, made = stream.batch(0, args.batch).part(0, max(counts)).inputs, models(args)
        # rows, and what Adagrad keeps for them
        self._hashed_bytes = sum(2 * x.weight.nbytes for x in made[HASHED].modules() if isinstance(x, Hashed))
        self.contestants = {name: Contestant(model, example, args) for name, model in made.items()}
        self.history: list[Record] = []
        self.seen = Distinct()
        self._asked = self._unique = 0
        self._clicks: deque[Clicks] = deque(maxlen=args.window)
        self._logits: dict[str, deque[Tensor]] = {n: deque(maxlen=args.window) for n in self.contestants}

    def step(self) -> None:
        """One batch."""
        clicks = self.stream.batch(self.done, self.args.batch)
        own = clicks.part(self._first, self._end)
        for contestant in self.contestants.values():
            contestant.step(own)
        ids = own.inputs[:2]
        self._asked += sum(map(len, ids))
        self._unique += sum(len(x.unique()) for x in ids)
        for x in clicks.inputs[:2]:
            self.seen.add(x)
        self._clicks.append(clicks)
        self.done += 1

    def report(self, stopped: bool) -> bool:
        """Add to the history what the steps since the last report were; whether a rank is to stop. Collective."""
        told = from_all(self.ranks, (self._told(), stopped))
        for name, contestant in self.contestants.items():
            parts = [mine["logits"][name] for mine, _ in told]
            self._logits[name].extend(torch.cat(x) for x in zip(*parts, strict=True))
            contestant.logits.clear()
            contestant.sent = 0
        self._asked = self._unique = 0
        labels = torch.cat([c.labels for c in self._clicks])
        scores = {name: torch.cat(tuple(x)) for name, x in self._logits.items()}
        scores[BEST] = torch.cat([c.odds for c in self._clicks])
        record: Record = {"step": self.done, "seen": len(self.seen)}
        for name, values in scores.items():
            record |= {f"{name} auc": auc(labels, values), f"{name} log loss": log_loss(labels, values)}
        record |= {name: sum(mine[name] for mine, _ in told) for name in told[0][0] if name != "logits"}
        self.history.append(record)
        return any(stop for _, stop in told)

    def _told(self) -> dict[str, Any]:
        """What a rank tells the others: what it has predicted, and sums of its own; of bytes those of a step."""
        args, ranks = self.args, self.ranks.size
        itemsize = torch.get_default_dtype().itemsize
        tables = [self.contestants[DYNAMIC].module.get_submodule(n) for n in ("user", "item")]
        # pulled: id out, row in; pushed: id and gradient out; of servers on the ranks one is the rank's own
        each = 2 * (8 + args.dim * itemsize) * (ranks - 1) / ranks / args.every / ranks
        return {
            "logits": {name: c.logits for name, c in self.contestants.items()},
            "rows": sum(map(len, tables)),
            "dynamic bytes": sum(t.memory_bytes() for t in tables),
            "hashed bytes": self._hashed_bytes / ranks,
            "process bytes": resident_bytes(),
            **{f"{name} sent": c.sent / args.every / ranks for name, c in self.contestants.items()},
            "pushed": self._asked * each,
            "pushed unique": self._unique * each,
        }

    def state(self) -> dict[str, Any]:
        """Beside the models, what a run that goes on has to know; the same on every rank."""
        return {
            "history": json.dumps(self.history),
            "seen": self.seen.smallest,
            **{f"logits_{name}": torch.stack(tuple(x)) for name, x in self._logits.items()},
        }

    def go_on(self, step: int, state: dict[str, Any]) -> None:
        """Have what `state` returned at a step; what it was about the stream tells again."""
        self.done, self.history, self.seen.smallest = step, json.loads(state["history"]), state["seen"]
        for name, logits in self._logits.items():
            logits.extend(state[f"logits_{name}"])
        self._clicks.extend(self.stream.batch(s, self.args.batch) for s in range(max(0, step - self.args.window), step))


SETTINGS = ("seed", "batch", "dim", "lr", "capacity", "hashed_rows", "every", "window", "smaller")
"""Options that a run goes on with as it began."""


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What makes runs the same."""
    return {name: getattr(args, name) for name in SETTINGS}


def from_all(ranks: Ranks, value: Any) -> list[Any]:
    """Every rank's value in order of rank, on every rank. Collective."""
    if ranks.size == 1:
        return [value]
    values = [None] * ranks.size
    dist.all_gather_object(values, value)
    return values


def resident_bytes() -> int:
    """Memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES

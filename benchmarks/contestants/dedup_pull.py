"""Rows pulled once a rank, written by hand: the unique ids of all tables go to their owners, gradients go back.

A row's owner is its id modulo the ranks. A step has one exchange of counts, one of ids, one of rows and one of
gradients; dense gradients are averaged in one bucket, meanwhile.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.contestants import Build, Case, NotPossible, adagrad
from benchmarks.contestants.tables import DenseGradients, Tables, exchange
from benchmarks.workloads import take_tables


class DedupPull:
    """The contestant."""

    def __init__(self, case: Case):
        workload, self.ranks = case.workload, case.ranks
        if not workload.tables:
            raise NotPossible("the table is used whole, not only looked up")
        self.rest, tables = take_tables(workload)
        self.loss, self.hots, self.pooled = workload.loss, workload.ids_per_row, workload.pooled
        starts = torch.tensor(list(accumulate(workload.sizes, initial=0))[:-1])
        self.starts = starts.repeat_interleave(torch.tensor(self.hots))
        rows = torch.cat(tables)
        self.owned = -(-len(rows) // self.ranks)  # an owner's rows, at most
        self.tables = Tables([rows[case.rank :: self.ranks]])
        self.dense = DenseGradients(self.rest.parameters())
        self.optimizer = adagrad(self.dense.parameters)

    def step(self, inputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        *features, ids = inputs
        ids = ids + self.starts
        # sorted by owner, and then by the row's number there
        keys, place = torch.unique(ids % self.ranks * self.owned + ids // self.ranks, return_inverse=True)
        sent = torch.searchsorted(keys, torch.arange(self.ranks + 1) * self.owned).diff()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        gives, takes = sent.tolist(), received.tolist()
        asked = exchange((keys % self.owned).int(), gives, takes)
        rows = self.tables(asked.long().unsqueeze(0))[:, 0]
        pulled = exchange(rows.detach(), takes, gives).requires_grad_()

        looked_up = torch.nn.functional.embedding(place, pulled)
        if self.pooled and max(self.hots) > 1:
            looked_up = torch.stack([bag.sum(1) for bag in looked_up.split(self.hots, dim=1)], dim=1)
        loss = self.loss(self.rest(looked_up, *features), labels)
        self.dense.bucket.zero_()
        loss.backward()
        self.dense.start()
        assert pulled.grad is not None
        rows.backward(exchange(pulled.grad / self.ranks, gives, takes))
        self.dense.finish()
        self.optimizer.step()
        return loss.detach()

    def about(self) -> dict[str, Any]:
        return {}


CONTESTANTS: dict[str, Build] = {"dedup pull": DedupPull}

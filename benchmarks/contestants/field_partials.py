"""Whole tables on ranks and partial sums of what is linear in them, written by hand.

Ids go to the owners of their tables. An owner computes, for the global batch, what its tables add: to the logit
(first-order weights, minus half the squares of the factorisation machine), to the sum of vectors, and to the first
linear layer, whose columns for its own tables it holds. Each rank gets the sums of its rows, and sends their gradients
to all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.contestants import Build, Case, NotPossible, adagrad
from benchmarks.contestants.tables import DenseGradients, Tables, exchange
from benchmarks.workloads import take_tables


class FieldPartials:
    """The contestant."""

    def __init__(self, case: Case):
        w, self.rank, self.ranks = case.workload, case.rank, case.ranks
        if w.first_order is None:
            raise NotPossible("written for LR, FM, Wide&Deep and DeepFM")
        self.loss, self.dim, self.factorised = w.loss, w.dim, w.factorised
        rest, tables = take_tables(w)
        fields = [range(rank, len(tables), self.ranks) for rank in range(self.ranks)]
        self.order = torch.tensor([f for of in fields for f in of])  # of columns of ids, grouped by owner
        self.counts = [len(of) for of in fields]
        self.tables = Tables([tables[f] for f in fields[self.rank]])
        first = rest.model.get_submodule(w.first_order)
        self.linear, self.bias = first.dense, first.bias
        dense: list[nn.Parameter] = [*first.dense.parameters(), first.bias]
        self.columns: nn.Parameter | None = None
        if w.deep is not None:  # its first columns are for the fields in their order, `dim` each
            layer = rest.model.get_submodule(w.deep)
            parts = layer.weight.detach().split([w.dim] * len(tables) + [w.n_dense], dim=1)
            self.columns = nn.Parameter(torch.cat([parts[f] for f in fields[self.rank]], dim=1))
            self.of_dense = nn.Linear(w.n_dense, len(layer.weight))
            with torch.no_grad():
                self.of_dense.weight.copy_(parts[-1])
                self.of_dense.bias.copy_(layer.bias)
            self.above = rest.model.deep[1:]
            dense += [*self.of_dense.parameters(), *self.above.parameters()]
        self.dense = DenseGradients(dense)
        self.optimizer = adagrad([*dense, *([] if self.columns is None else [self.columns])])

    def partial(self, rows: Tensor) -> Tensor:
        """What own tables add, ``[global batch, width]``, of their rows ``[global batch, tables, width]``."""
        vectors, weights = rows.split([self.dim, 1], dim=2)
        parts = [weights.sum(1)]
        if self.factorised:
            parts = [parts[0] - 0.5 * vectors.square().sum((1, 2)).unsqueeze(1), vectors.sum(1)]
        if self.columns is not None:
            parts.append(vectors.flatten(1) @ self.columns.t())
        return torch.cat(parts, dim=1)

    def outputs(self, sums: Tensor, dense: Tensor) -> Tensor:
        """Logits of own rows."""
        widths = [1, self.dim if self.factorised else 0]
        first, vectors, hidden = sums.split([*widths, sums.shape[1] - sum(widths)], dim=1)
        logit = first + self.linear(dense) + self.bias
        if self.factorised:
            logit = logit + 0.5 * vectors.square().sum(1, keepdim=True)
        if self.columns is not None:
            logit = logit + self.above(hidden + self.of_dense(dense))
        return logit.squeeze(1)

    def step(self, inputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        dense, ids = inputs
        rows, own = len(ids), self.counts[self.rank]
        columns = ids.int().t()[self.order].flatten()
        asked = exchange(columns, [n * rows for n in self.counts], [own * rows] * self.ranks)
        asked = asked.view(self.ranks, own, rows).transpose(0, 1).reshape(own, self.ranks * rows)
        partial = self.partial(self.tables(asked.long()))
        parts = torch.empty_like(partial)
        dist.all_to_all_single(parts, partial.detach())
        sums = parts.view(self.ranks, rows, -1).sum(0).requires_grad_()

        loss = self.loss(self.outputs(sums, dense), labels)
        self.dense.bucket.zero_()
        loss.backward()
        self.dense.start()
        assert sums.grad is not None
        gradient = torch.empty_like(partial)
        dist.all_gather_into_tensor(gradient, sums.grad / self.ranks)
        if self.columns is not None:
            self.columns.grad = None
        partial.backward(gradient)
        self.dense.finish()
        self.optimizer.step()
        return loss.detach()

    def about(self) -> dict[str, Any]:
        return {}


CONTESTANTS: dict[str, Build] = {"field partials": FieldPartials}

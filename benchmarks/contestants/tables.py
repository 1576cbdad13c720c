"""What hand-written contestants share: FBGEMM's tables on CPU, exchanges of rows, and dense gradients in one bucket."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.contestants import EPSILON, RATE, NotPossible

MULTIPLE = 4
"""FBGEMM's rows are so many elements wide, or a multiple."""


class Tables(nn.Module):
    """FBGEMM's tables with exact Adagrad in backward; a row for each id, as wide as the given ones.

    Ids are bags of one: on CPU the backward of FBGEMM's unpooled lookups takes five to ten times as long as of bags.
    """

    def __init__(self, tables: Sequence[Tensor]):
        super().__init__()
        try:
            from fbgemm_gpu import split_table_batched_embeddings_ops_training as fbgemm
            from fbgemm_gpu.split_embedding_configs import EmbOptimType
        except ImportError as error:
            raise NotPossible(f"fbgemm_gpu is not installed: {error}") from None
        super().__init__()
        self.width = tables[0].shape[1]
        padded = -(-self.width // MULTIPLE) * MULTIPLE
        place = (fbgemm.EmbeddingLocation.HOST, fbgemm.ComputeDevice.CPU)
        self.tables = fbgemm.SplitTableBatchedEmbeddingBagsCodegen(
            [(len(t), padded, *place) for t in tables],
            optimizer=EmbOptimType.EXACT_ADAGRAD,
            learning_rate=RATE,
            eps=EPSILON,
            pooling_mode=fbgemm.PoolingMode.SUM,
            device=torch.device("cpu"),
        )
        for into, values in zip(self.tables.split_embedding_weights(), tables, strict=True):
            into.zero_()
            into[:, : self.width] = values

    def forward(self, ids: Tensor) -> Tensor:
        """Ids ``[tables, n]`` to rows ``[n, tables, width]``."""
        rows = self.tables(ids.reshape(-1), torch.arange(ids.numel() + 1))
        return rows.view(ids.shape[1], len(ids), -1)[..., : self.width]


def exchange(give: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Rows to each rank and from each, grouped by rank."""
    take = give.new_empty(sum(received), *give.shape[1:])
    dist.all_to_all_single(take, give.contiguous(), list(received), list(sent))
    return take


class DenseGradients:
    """Average gradients of parameters in one bucket, in the background."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.bucket = torch.zeros(sum(p.numel() for p in self.parameters))
        self.work: Any = None
        begin = 0
        for p in self.parameters:  # gradients are views of the bucket: nothing is copied
            p.grad = self.bucket[begin : begin + p.numel()].view_as(p)
            begin += p.numel()

    def start(self) -> None:
        """When backward has filled the gradients."""
        self.bucket /= dist.get_world_size()
        self.work = dist.all_reduce(self.bucket, async_op=True)

    def finish(self) -> None:
        """Before the optimiser's step."""
        self.work.wait()

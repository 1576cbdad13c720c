"""TorchRec: tables sharded by its planner, or by tables, the rest under DistributedDataParallel.

First-order weights are a column of the vectors' tables, padded to FBGEMM's multiple of four: one lookup for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.contestants import EPSILON, RATE, Build, Case, Module, NotPossible, adagrad
from benchmarks.contestants.tables import MULTIPLE
from benchmarks.workloads import Rest, Workload, take_tables

DATA_PARALLEL = "data_parallel"


class Sharded(nn.Module):
    """What TorchRec shards: one bag collection, and the rest of the model."""

    def __init__(self, bags: nn.Module, rest: Rest, workload: Workload, jagged: Any, rows: int):
        super().__init__()
        self.bags, self.rest, self.jagged = bags, rest, jagged
        self.hots = hots = workload.ids_per_row
        self.keys = [f"f{i}" for i in range(len(hots))]
        self.lengths = torch.tensor(hots, dtype=torch.int32).repeat_interleave(rows)

    def forward(self, *inputs: Tensor) -> Tensor:
        *features, ids = inputs
        if max(self.hots) == 1:
            values = ids.t().reshape(-1)
        else:
            values = torch.cat([of.reshape(-1) for of in ids.split(self.hots, dim=1)])
        pooled = self.bags(self.jagged(self.keys, values, lengths=self.lengths))
        columns = pooled.values().view(len(ids), len(self.hots), -1)
        if list(pooled.keys()) != self.keys:  # grouped by how tables are sharded
            columns = columns[:, [pooled.keys().index(k) for k in self.keys]]
        return self.rest(columns[..., : sum(self.rest.widths)], *features)


def torch_rec(case: Case, sharding: Sequence[str] = ()) -> Module:
    """``sharding``: the types that the planner may choose; all by default."""
    try:
        import torchrec
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
        from torchrec.distributed.model_parallel import DistributedModelParallel
        from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    except ImportError as error:
        raise NotPossible(f"torchrec is not installed: {error}") from None
    workload, ranks = case.workload, case.ranks
    if not workload.tables or not workload.pooled:
        raise NotPossible("written for bags of ids")
    rest, tables = take_tables(workload)
    width = -(-tables[0].shape[1] // MULTIPLE) * MULTIPLE
    configs = [
        torchrec.EmbeddingBagConfig(name=f"t{i}", embedding_dim=width, num_embeddings=len(t), feature_names=[f"f{i}"])
        for i, t in enumerate(tables)
    ]
    bags = torchrec.EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    module = Sharded(bags, rest, workload, torchrec.KeyedJaggedTensor, case.rows)
    fused = {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": RATE, "eps": EPSILON}
    sharders: list[Any] = [EmbeddingBagCollectionSharder(fused_params=fused)]
    constraints = {
        config.name: ParameterConstraints(sharding_types=list(sharding) or None, pooling_factors=[float(hot)])
        for config, hot in zip(configs, workload.ids_per_row, strict=True)
    }
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=ranks, local_world_size=1, compute_device="cpu"),
        batch_size=case.rows,
        constraints=constraints,
        debug=False,
    )
    plan = planner.collective_plan(module, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(module, device=torch.device("cpu"), plan=plan, sharders=sharders)
    fill(sharded, tables)
    of_tables = plan.plan["bags"]
    # FBGEMM steps tables in backward, but for those that every rank holds whole
    whole = [f".{name}." for name, of in of_tables.items() if of.sharding_type == DATA_PARALLEL]
    own = [p for name, p in sharded.named_parameters() if "bags" not in name or any(t in name for t in whole)]
    types = sorted({of.sharding_type for of in of_tables.values()})
    says = {"plan": " + ".join(types), "release": torchrec.__version__}
    return Module(sharded, workload.loss, [adagrad(own)], lambda: says)


def fill(sharded: nn.Module, tables: Sequence[Tensor]) -> None:
    """Write weights into the shards that this rank has."""
    for name, held in sharded.state_dict().items():
        if "embedding_bags." not in name:
            continue
        values = tables[int(name.split("embedding_bags.t")[1].split(".")[0])]
        pieces = [((0, 0), held)]
        if hasattr(held, "local_shards"):
            pieces = [(shard.metadata.shard_offsets, shard.tensor) for shard in held.local_shards()]
        for (row, column), piece in pieces:
            part = values[row : row + piece.shape[0], column : column + piece.shape[1]]
            piece.detach().zero_()[:, : part.shape[1]] = part


CONTESTANTS: dict[str, Build] = {
    "TorchRec planner": torch_rec,
    "TorchRec table-wise": partial(torch_rec, sharding=("table_wise",)),
}

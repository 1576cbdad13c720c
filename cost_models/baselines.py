"""What the strategies that the field knows send, per rank and step, ids included, on one footing.

Per table, S given to each collective (`descompiler.cost_models.collectives` makes sent bytes of it); b rows a rank, L
ids a row, p vectors a row that lookups return (1 for a bag), U unique ids in a rank's batch, U_G in the global batch:

    data parallel, dense gradients      all-reduce V k s                                        `DDP_DENSE`
    data parallel, sparse gradients     all-gather N U (k s + 8)                                `DDP_SPARSE`
    parameter server                    all-to-all b L (i + 2 k s)                              `SERVER`
    parameter server, unique ids        all-to-all U (i + 2 k s)                                `SERVER_UNIQUE`
    mesh, whole weights                 all-gather V k s, reduce-scatter V k s                  `MESH`
    mesh, the batch's rows              all-gather N U i + U_G k s, reduce-scatter U_G k s      `MESH_ROWS`
    TorchRec table-wise                 all-to-all b (L i + l + 2 p k s)                        `TABLE_WISE`
    TorchRec column-wise, c shards      all-to-all b (c (L i + l) + 2 p k s)                    `COLUMN_WISE`
    TorchRec row-wise                   all-to-all b (L i + N l), reduce-scatter and all-gather N b p k s   `ROW_WISE`
    TorchRec table-row-wise             all-to-all b (L i + g l); between nodes of g ranks, 2 (N-g)/N b p k s sent; in
                                        the owner's node, reduce-scatter and all-gather, 2 (g-1) b p k s sent, the mean
                                        over all ranks                                          `TABLE_ROW_WISE`
    TorchRec 2D, table-wise in nodes    in a node of g ranks as table-wise, (g-1)/g b (L i + l + 2 p k s) sent; weights
                                        averaged over N/g nodes, 2 (N-g)/N V k s/g sent         `TWO_D`
    TorchRec data-parallel              as data parallel, dense gradients                       `DATA_PARALLEL`

Dense parameters, P elements: all-reduce P s; parameter server: pushed and pulled, all-to-all 2 P s; mesh: all-gather
and reduce-scatter of P s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy

from descompiler.cost_models.cost import Cost, fused
from descompiler.cost_models.symbols import UG, L, N, P, U, V, b, c, g, i, k, l, p, s
from descompiler.cost_models.table import OfTable, Table
from descompiler.registry import Registry

ALL_REDUCE = 2 * (N - 1) / N * V * k * s
"""A table's dense gradient, all-reduced: sent bytes."""


@dataclass(frozen=True)
class Baseline:
    """A strategy, priced.

    Attributes
    ----------
    table, dense : Cost
        Of one table, and of the dense parameters.
    source : str
        Where the formula is from.
    """

    name: str
    table: Cost
    dense: Cost
    source: str


def _dense(*collectives: str) -> Cost:
    return Cost(dict.fromkeys(collectives, P * s), dict.fromkeys(collectives, 1), memory=2 * P * s)


_ALL_REDUCED = _dense("all_reduce")

DDP_DENSE = Baseline(
    "data parallel, dense gradients",
    Cost({"all_reduce": V * k * s}, {"all_reduce": 1}, memory=2 * V * k * s),
    _ALL_REDUCED,
    "Li et al., PyTorch Distributed, VLDB 2020: every gradient is all-reduced, once, in buckets",
)
DDP_SPARSE = Baseline(
    "data parallel, sparse gradients",
    Cost({"all_gather": N * U * (k * s + 8)}, {"all_gather": 3}, memory=V * k * s + U * (k * s + 8)),
    _ALL_REDUCED,
    "torch ProcessGroupGloo, sparse all-reduce: of the coalesced gradient, sizes, indices (int64), values are gathered",
)
SERVER = Baseline(
    "parameter server",
    Cost({"all_to_all": b * L * (i + 2 * k * s)}, {"all_to_all": 3}, memory=V * k * s / N),
    Cost({"all_to_all": 2 * P * s}, {"all_to_all": 2}, memory=2 * P * s),
    "Li et al., Scaling Distributed Machine Learning with the Parameter Server, OSDI 2014: every rank is worker and "
    "server, keys are pulled, values returned, gradients pushed; keys are cached (sent once)",
)
SERVER_UNIQUE = Baseline(
    "parameter server, unique ids",
    Cost({"all_to_all": U * (i + 2 * k * s)}, {"all_to_all": 3}, memory=V * k * s / N),
    SERVER.dense,
    "as the parameter server; the worker asks for each id of its batch once and sends its gradient summed",
)
MESH = Baseline(
    "mesh, whole weights gathered",
    Cost(
        {"all_gather": V * k * s, "reduce_scatter": V * k * s},
        {"all_gather": 1, "reduce_scatter": 1},
        memory=V * k * s * (1 + 1 / N),
    ),
    _dense("all_gather", "reduce_scatter"),
    "Rajbhandari et al., ZeRO, SC 2020, with weights kept from forward to backward (FSDP that frees them gathers "
    "twice: half as much again)",
)
MESH_ROWS = Baseline(
    "mesh, the batch's rows gathered",
    Cost(
        {"all_gather": N * U * i + UG * k * s, "reduce_scatter": UG * k * s},
        {"all_gather": 2, "reduce_scatter": 1},
        memory=V * k * s / N,
    ),
    MESH.dense,
    "as the mesh, of the rows that the global batch looks up",
)
TABLE_WISE = Baseline(
    "TorchRec table-wise",
    Cost({"all_to_all": b * (L * i + l + 2 * p * k * s)}, {"all_to_all": 4}, memory=V * k * s / N),
    _ALL_REDUCED,
    "torchrec/distributed/sharding/tw_sharding.py: lengths and ids to the owner, pooled vectors back, gradients",
)
COLUMN_WISE = Baseline(
    "TorchRec column-wise",
    Cost({"all_to_all": b * (c * (L * i + l) + 2 * p * k * s)}, {"all_to_all": 4}, memory=V * k * s / N),
    _ALL_REDUCED,
    "torchrec/distributed/sharding/cw_sharding.py: as table-wise, and the ids go to each shard of columns",
)
ROW_WISE = Baseline(
    "TorchRec row-wise",
    Cost(
        {
            "all_to_all": b * (L * i + N * l),
            "reduce_scatter": N * b * p * k * s,
            "all_gather": N * b * p * k * s,
        },
        {"all_to_all": 2, "reduce_scatter": 1, "all_gather": 1},
        memory=V * k * s / N,
    ),
    _ALL_REDUCED,
    "torchrec/distributed/sharding/rw_sharding.py: ids to the ranks that own the rows, with a length for every rank; "
    "partial sums of the global batch reduce-scattered, gradients all-gathered",
)
TABLE_ROW_WISE = Baseline(
    "TorchRec table-row-wise",
    Cost(
        {
            # S such that (N-1)/N S is sent: vectors cross between nodes, (N-g)/N of them, by N/g ranks' all-to-alls
            "all_to_all": b * (L * i + g * l + 2 * p * k * s * (N - g) / (N - 1)),
            # and g of N ranks, those of the node that owns the table, send (g-1)/g · N b p k s each
            "reduce_scatter": N * b * p * k * s * (g - 1) / (N - 1),
            "all_gather": N * b * p * k * s * (g - 1) / (N - 1),
        },
        {"all_to_all": 4, "reduce_scatter": 1, "all_gather": 1},
        memory=V * k * s / N,
    ),
    _ALL_REDUCED,
    "torchrec/distributed/sharding/twrw_sharding.py: rows over one node's ranks, summed there, then table-wise",
)
TWO_D = Baseline(
    "TorchRec 2D, table-wise in nodes",
    Cost(
        {
            # S such that (N-1)/N S is sent, or 2 (N-1)/N S: between the g ranks of a node, and between N/g nodes
            "all_to_all": b * (L * i + l + 2 * p * k * s) * N * (g - 1) / (g * (N - 1)),
            "all_reduce": V * k * s * (N - g) / (g * (N - 1)),
        },
        {"all_to_all": 4, "all_reduce": 2},  # the weights', and beside it the dense gradients' own
        memory=V * k * s / g,
    ),
    _ALL_REDUCED,
    "torchrec/distributed/model_parallel.py, DMPCollection with use_inter_host_allreduce: every node holds all tables, "
    "and sync() averages their weights over nodes after each step; not the same training, and without the optimiser's "
    "state, which it averages too by default",
)
DATA_PARALLEL = Baseline(
    "TorchRec data-parallel",
    DDP_DENSE.table,
    _ALL_REDUCED,
    "torchrec/distributed/sharding/dp_sharding.py: the table is replicated, DistributedDataParallel reduces it",
)

BASELINES: Registry[Baseline] = Registry(
    "baseline",
    (
        DDP_DENSE,
        DDP_SPARSE,
        SERVER,
        SERVER_UNIQUE,
        MESH,
        MESH_ROWS,
        TABLE_WISE,
        COLUMN_WISE,
        ROW_WISE,
        TABLE_ROW_WISE,
        TWO_D,
        DATA_PARALLEL,
    ),
)
LENGTH_BYTES = 4
"""TorchRec's KeyedJaggedTensor has int32 lengths."""
MIN_COLUMNS = 128
"""TorchRec's planner makes no narrower column shards (``MIN_CW_DIM`` of torchrec/distributed/planner/constants.py)."""


@dataclass(frozen=True)
class ExpectedUse(OfTable):
    """A table, and how many of its ids are expected to differ.

    Attributes
    ----------
    unique : float, optional
        Expected unique ids in one rank's batch; by default all ids differ, as far as the table has rows.
    unique_global : float, optional
        The same in the global batch; by default ranks have no id in common.
    """

    unique: float | None = None
    unique_global: float | None = None

    def values(self, ranks: int, rows: int) -> dict[sympy.Symbol, Any]:
        """Its symbols' values for ``ranks`` ranks with ``rows`` rows each."""
        unique = min(rows * self.ids, self.rows) if self.unique is None else self.unique
        everywhere = min(ranks * unique, self.rows) if self.unique_global is None else self.unique_global
        shards = min(ranks, max(1, self.dim // MIN_COLUMNS))
        return {V: self.rows, k: self.dim, L: self.ids, p: self.vectors, U: unique, UG: everywhere, c: shards}


class TableUse(ExpectedUse):
    """The same of a table that is no model's.

    Parameters
    ----------
    ids : int
        Per row of the batch, over all its lookups.
    vectors : int, optional
        That its lookups return per row of the batch; ``ids`` (no pooling) by default.
    unique, unique_global : float, optional
        As `ExpectedUse` has them.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        ids: int,
        vectors: int | None = None,
        unique: float | None = None,
        unique_global: float | None = None,
    ):
        table = Table("", rows, dim, ids=ids, vectors=ids if vectors is None else vectors)
        super().__init__(table, unique, unique_global)


@dataclass(frozen=True)
class Priced:
    """A strategy with a model's numbers.

    Attributes
    ----------
    sent_bytes : int
        Per rank and step, the mean over ranks.
    busiest_bytes : int
        What the busiest rank sends.
    memory_bytes : int
        Weights and gradients of a rank, the mean over ranks, without optimiser state.
    cost : Cost
        Of one table, in symbols.
    seconds : float or None
        Of the step's collectives, if a cluster was given.
    """

    name: str
    sent_bytes: int
    busiest_bytes: int
    memory_bytes: int
    cost: Cost
    source: str
    seconds: float | None = None


def price(
    tables: Sequence[ExpectedUse],
    dense_elements: int,
    *,
    ranks: int,
    rows: int,
    itemsize: int = 4,
    id_bytes: int = 8,
    ranks_per_node: int | None = None,
    backend: str = "nccl",
    seconds_of: Callable[[str, float, int], float] | None = None,
) -> list[Priced]:
    """Every baseline with a model's numbers, in the order of `BASELINES`.

    Parameters
    ----------
    rows : int
        Of the batch of one rank.
    ranks_per_node : int, optional
        For table-row-wise; all ranks are on one node by default.
    backend : {"nccl", "gloo"}
        Whose algorithms send: gloo's reduce-scatter moves twice a ring's bytes.
    seconds_of : callable, optional
        ``(collective, sent bytes, calls) -> seconds``: `descompiler.planning.cluster.Cluster.seconds_of`.

    >>> dense, *_ = price([TableUse(1000, 4, 1)], 10, ranks=2, rows=8)
    >>> dense.sent_bytes
    16040
    """
    common = {N: ranks, b: rows, s: itemsize, i: id_bytes, l: LENGTH_BYTES, P: dense_elements}
    common[g] = min(ranks, ranks_per_node or ranks)
    alike = Counter(tuple(t.values(ranks, rows).items()) for t in tables)
    result = []
    for base in BASELINES:
        total = fused([base.table, base.dense]) if tables else base.dense
        sent: dict[str, float] = {}
        memory = _number(base.dense.memory, common)
        for collective, payload in base.dense.payload.items():
            sent[collective] = _sent(collective, payload, backend, common)
        for own, count in alike.items():
            values = common | dict(own)
            memory += count * _number(base.table.memory, values)
            for collective, payload in base.table.payload.items():
                more = count * _sent(collective, payload, backend, values)
                sent[collective] = sent.get(collective, 0.0) + more
        mean = sum(sent.values())
        seconds = None
        if seconds_of is not None:
            seconds = sum(seconds_of(name, size, int(total.calls[name])) for name, size in sent.items())
        uneven = _owner_excess(base, tables, common) if ranks > 1 else 0.0
        result.append(
            Priced(base.name, round(mean), round(mean + uneven), round(memory), base.table, base.source, seconds)
        )
    return result


def baselines(
    tables: Sequence[ExpectedUse], dense_elements: int, *, ranks: int, rows: int, itemsize: int, id_bytes: int = 8
) -> dict[str, int]:
    """Bytes per rank and step of each baseline, the mean over ranks, dense parameters included.

    >>> baselines([TableUse(1000, 4, 1)], 10, ranks=2, rows=8, itemsize=4)["data parallel, dense gradients"]
    16040
    """
    priced = price(tables, dense_elements, ranks=ranks, rows=rows, itemsize=itemsize, id_bytes=id_bytes)
    return {x.name: x.sent_bytes for x in priced}


@cache
def _function(formula: sympy.Expr) -> tuple[list[sympy.Symbol], Callable[..., float]]:
    symbols = sorted(formula.free_symbols, key=str)
    return symbols, sympy.lambdify(symbols, formula, "math")


def _number(formula: Any, values: dict[sympy.Symbol, Any]) -> float:
    symbols, function = _function(sympy.sympify(formula))
    return function(*(values[x] for x in symbols))


def _sent(collective: str, payload: Any, backend: str, values: dict[sympy.Symbol, Any]) -> float:
    return 0.0 if values[N] == 1 else _number(Cost({collective: payload}).sent_bytes(backend), values)


def _owner_excess(base: Baseline, tables: Sequence[ExpectedUse], values: dict[sympy.Symbol, Any]) -> float:
    """What the busiest rank sends beyond the mean where whole tables, or column shards, have owners.

    The owner of w elements a row sends (N-1) b w s forward; backward every rank sends b s for the others' elements. So
    a rank with w elements sends ((N-2) w + W) b s of W in all. Owners are chosen greedily, the widest first. Where
    every node holds all tables, N is a node's ranks.
    """
    ranks = values[g] if base is TWO_D else values[N]
    if base not in (TABLE_WISE, COLUMN_WISE, TWO_D) or ranks == 1:
        return 0.0
    widths: list[float] = []
    ids: list[float] = []
    for t in tables:
        of = t.values(ranks, values[b])
        shards = of[c] if base is COLUMN_WISE else 1
        widths += [of[p] * t.dim / shards] * shards
        ids += [t.ids * values[i] + values[l]] * shards
    load, received = [0.0] * ranks, [0.0] * ranks
    for width, size in sorted(zip(widths, ids, strict=True), reverse=True):
        owner = min(range(ranks), key=load.__getitem__)
        load[owner] += width
        received[owner] += size
    rows, itemsize = values[b], values[s]
    sent = [
        rows * ((ranks - 2) * w * itemsize + sum(load) * itemsize + sum(received) - r)
        for w, r in zip(load, received, strict=True)
    ]
    return max(sent) - math.fsum(sent) / ranks

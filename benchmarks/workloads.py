"""What the bench trains: models, their tables, and batches of ids with Zipf's distribution.

A workload is a model as users write it, one table a field, built from one seed. `one_table` gives the same model, with
the same weights, with all fields in one table; `take_tables` takes the tables out, for contestants that hold
them in their own way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.examples import (
    DLRM,
    FM,
    DeepFM,
    LogisticRegression,
    Offset,
    PerField,
    SequentialRecommender,
    WideDeep,
    initialise_tables,
    zipf_ids,
)

FIELDS, N_DENSE, HIDDEN = 26, 13, (400, 400)
SEQUENCE = 50
# MLPerf's DLRM-DCNv2: ids of each field in a sample, and rows of each table (here at most 100,000).
# fmt: off
MLPERF_HOTS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
MLPERF_ROWS = (
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209, 11_938,
    155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
)
# fmt: on
MOST_ROWS = 100_000


class MultiHot(nn.Module):
    """A bag table a field, with a fixed number of ids in each field's bag: ids ``[rows, sum of hots]``."""

    def __init__(self, sizes: Sequence[int], hots: Sequence[int], dim: int, *, sparse: bool = False):
        super().__init__()
        self.hots = tuple(hots)
        self.tables = nn.ModuleList(nn.EmbeddingBag(v, dim, mode="sum", sparse=sparse) for v in sizes)

    def forward(self, ids: Tensor) -> Tensor:
        bags = ids.split(self.hots, dim=1)
        return torch.stack([table(bag) for table, bag in zip(self.tables, bags, strict=True)], dim=1)


class OneMultiHot(nn.Module):
    """`MultiHot` with all fields in one bag table."""

    starts: Tensor
    lengths: Tensor

    def __init__(self, sizes: Sequence[int], hots: Sequence[int], dim: int, *, sparse: bool = False):
        super().__init__()
        self.hots = tuple(hots)
        self.table = nn.EmbeddingBag(sum(sizes), dim, mode="sum", sparse=sparse)
        of_fields = torch.tensor(list(accumulate(sizes, initial=0))[:-1])
        self.register_buffer("starts", of_fields.repeat_interleave(torch.tensor(hots)))
        self.register_buffer("lengths", torch.tensor(hots))

    def forward(self, ids: Tensor) -> Tensor:
        lengths = self.lengths.repeat(len(ids))
        vectors = self.table((ids + self.starts).flatten(), lengths.cumsum(0) - lengths)
        return vectors.view(len(ids), len(self.hots), -1)


class DCNv2(nn.Module):
    """DCN-V2 with low-rank crosses (Wang et al., arXiv 2008.13535), as MLPerf's DLRM-DCNv2, smaller."""

    def __init__(self, sizes: Sequence[int], hots: Sequence[int], dim: int, rank: int = 64, *, sparse: bool = False):
        super().__init__()
        self.embeddings = MultiHot(sizes, hots, dim, sparse=sparse)
        self.bottom = nn.Sequential(nn.Linear(N_DENSE, 64), nn.ReLU(), nn.Linear(64, dim), nn.ReLU())
        width = (len(sizes) + 1) * dim
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(rank, width) for _ in range(3))
        self.top = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x0 = torch.cat([self.embeddings(sparse).flatten(1), self.bottom(dense)], dim=1)
        x = x0
        for down, up in zip(self.down, self.up, strict=True):
            x = x0 * up(down(x)) + x
        return self.top(x).squeeze(1)


class HSTULayer(nn.Module):
    """A layer of HSTU (Zhai et al., arXiv 2402.17152): pointwise attention, without a softmax, gated."""

    causal: Tensor

    def __init__(self, dim: int, length: int, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_attended = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.project, self.out = nn.Linear(dim, 4 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(length, length))
        self.register_buffer("causal", torch.ones(length, length).tril(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, values, queries, keys = nn.functional.silu(self.project(self.norm(x))).chunk(4, dim=2)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (queries, keys, values))
        weights = nn.functional.silu(q @ k.transpose(2, 3) + self.bias) * self.causal / x.shape[1]
        attended = (weights @ v).transpose(1, 2).flatten(2)
        return x + self.out(self.norm_attended(attended) * gate)


class HSTU(nn.Module):
    """Will the user click on the candidate, the last of the ids? Two HSTU layers over a history, one item table."""

    def __init__(self, items: int, dim: int, length: int = SEQUENCE, *, sparse: bool = False):
        super().__init__()
        self.items = nn.Embedding(items, dim, sparse=sparse)
        self.layers = nn.ModuleList(HSTULayer(dim, length) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self.items(ids)
        x = vectors[:, :-1]
        for layer in self.layers:
            x = layer(x)
        return (x[:, -1] * vectors[:, -1]).sum(1)


@dataclass(frozen=True)
class Workload:
    """A model, and what it looks up.

    Attributes
    ----------
    sizes : tuple of int
        Rows of each table, one for each field.
    hots : tuple of int
        Ids of each field in a sample; one of each by default.
    dim : int
        Width of the vectors.
    build : callable
        ``(sparse)`` to the model, weights drawn from the current seed.
    tables : tuple of str
        Modules of the model that look up, all with the same ids: of vectors, of first-order weights. None where a table
        is used otherwise too.
    pooled : bool
        Whether a lookup gives one vector a field; else one for each id.
    first_order : str, optional
        The module of the first-order weights, with the linear term and the bias.
    deep : str, optional
        The linear layer on ``cat(vectors, dense)``.
    factorised : bool
        Whether the logit has the factorisation machine's term.
    n_dense : int
        Dense features.
    per_row : bool
        Whether the model returns each row's loss, rather than its logit.
    """

    name: str
    sizes: tuple[int, ...]
    dim: int
    build: Callable[[bool], nn.Module]
    tables: tuple[str, ...]
    hots: tuple[int, ...] = ()
    pooled: bool = True
    first_order: str | None = None
    deep: str | None = None
    factorised: bool = False
    n_dense: int = N_DENSE
    per_row: bool = False
    _orders: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def model(self, sparse: bool, seed: int = 0) -> nn.Module:
        """The model with the weights of a seed."""
        torch.manual_seed(seed)
        return initialise_tables(self.build(sparse))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean over the rank's rows."""
        return outputs.mean() if self.per_row else nn.functional.binary_cross_entropy_with_logits(outputs, labels)

    @property
    def table_bytes(self) -> int:
        """Of all tables, float32."""
        return 4 * sum(self.sizes) * (self.dim + (self.first_order is not None))

    @property
    def ids_per_row(self) -> tuple[int, ...]:
        """Ids of each field in a sample."""
        return self.hots or (1,) * len(self.sizes)

    def batch(self, rows: int, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Inputs and labels. Popular ids lie anywhere in a table: sorted ones would need ``samples`` to plan for."""
        generator = torch.Generator().manual_seed(seed)
        columns = []
        for i, (size, hot) in enumerate(zip(self.sizes, self.ids_per_row, strict=True)):
            if i not in self._orders:  # the same in all batches
                self._orders[i] = torch.randperm(size, generator=torch.Generator().manual_seed(i))
            columns.append(self._orders[i][zipf_ids([size], (rows, hot), seed=1000 * seed + i)[:, 0]])
        ids = torch.cat(columns, dim=1)
        labels = torch.randint(2, (rows,), generator=generator).float()
        if self.per_row:  # a history and its next item
            return (ids[:, :-1] + 1, ids[:, -1] + 1), labels
        return ((torch.randn(rows, self.n_dense, generator=generator), ids) if self.n_dense else (ids,)), labels


def _ctr(name: str, model: Any, rows: int, dim: int, tables: Sequence[str], **of: Any) -> Workload:
    sizes = (rows // FIELDS,) * FIELDS
    more = {} if model is LogisticRegression else {"dim": dim}
    if model not in (LogisticRegression, FM):
        more["hidden"] = HIDDEN

    def build(sparse: bool) -> nn.Module:
        return model(sizes, N_DENSE, sparse=sparse, **more)

    return Workload(name, sizes, dim, build, tuple(tables), **of)


def lr(rows: int) -> Workload:
    """Logistic regression."""
    first = "first_order"
    return _ctr("LR", LogisticRegression, rows, 0, [f"{first}.weights"], first_order=first)


def fm(rows: int) -> Workload:
    """Factorisation machine."""
    first = "first_order"
    return _ctr("FM", FM, rows, 16, ["embeddings", f"{first}.weights"], first_order=first, factorised=True)


def wide_deep(rows: int) -> Workload:
    """Wide & Deep."""
    return _ctr("Wide&Deep", WideDeep, rows, 16, ["embeddings", "wide.weights"], first_order="wide", deep="deep.0")


def deepfm(rows: int) -> Workload:
    """DeepFM."""
    of: dict[str, Any] = {"first_order": "first_order", "deep": "deep.0", "factorised": True}
    return _ctr("DeepFM", DeepFM, rows, 16, ["embeddings", "first_order.weights"], **of)


def dlrm(rows: int) -> Workload:
    """DLRM, width 64."""
    return _ctr("DLRM", DLRM, rows, 64, ["embeddings"])


def dcnv2(rows: int) -> Workload:
    """DCN-V2 with MLPerf's 214 ids a sample in 26 bags; each table has at most 100,000 rows, and ``rows`` in all."""
    capped = [min(MOST_ROWS, v) for v in MLPERF_ROWS]
    sizes = tuple(max(3, min(v, round(v * rows / sum(capped)))) for v in capped)
    build = lambda sparse: DCNv2(sizes, MLPERF_HOTS, 16, sparse=sparse)  # noqa: E731
    return Workload("DCNv2-mini", sizes, 16, build, ("embeddings",), MLPERF_HOTS)


def sasrec(rows: int) -> Workload:
    """SASRec with a softmax over all items; a tenth of the rows, since each is a column of the softmax."""
    items = rows // 100

    def build(sparse: bool) -> nn.Module:
        return SequentialRecommender(items, 16, length=SEQUENCE, encoder="attention", layers=2)

    return Workload("SASRec", (items,), 16, build, (), (SEQUENCE + 1,), pooled=False, n_dense=0, per_row=True)


def hstu(rows: int) -> Workload:
    """HSTU, two layers, histories of 50 items and a candidate."""
    build = lambda sparse: HSTU(rows, 16, sparse=sparse)  # noqa: E731
    return Workload("HSTU-mini", (rows,), 16, build, ("items",), (SEQUENCE + 1,), pooled=False, n_dense=0)


WORKLOADS = {
    "lr": lr,
    "fm": fm,
    "wide_deep": wide_deep,
    "deepfm": deepfm,
    "dlrm": dlrm,
    "dcnv2": dcnv2,
    "sasrec": sasrec,
    "hstu": hstu,
}
"""Workloads by name, given how many rows the tables have in all."""


# ---- the same model, held otherwise


def one_table(model: nn.Module) -> nn.Module:
    """The model with all fields in one table (two, where it has first-order weights), weights as they were; changed."""
    for name, of in list(model.named_modules()):
        if not isinstance(of, PerField | MultiHot):
            continue
        tables = [t.weight for t in of.tables]
        sizes, dim, sparse = [len(t) for t in tables], tables[0].shape[1], of.tables[0].sparse
        hots = (of.hots,) if isinstance(of, MultiHot) else ()
        one = (OneMultiHot if hots else Offset)(sizes, *hots, dim, sparse=sparse)
        with torch.no_grad():
            one.table.weight.copy_(torch.cat(tables))
        model.set_submodule(name, one)
    return model


class Given(nn.Module):
    """Stands for a module that looks up: returns what it was given."""

    value: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return self.value


class Rest(nn.Module):
    """A model without its tables: called with the looked-up rows in the place of ids.

    Rows are ``[rows, fields, width]``, the columns of all table modules side by side.
    """

    def __init__(self, model: nn.Module, tables: Sequence[str], widths: Sequence[int]):
        super().__init__()
        self.model, self.widths = model, tuple(widths)
        self.given = [Given() for _ in tables]
        for name, given in zip(tables, self.given, strict=True):
            model.set_submodule(name, given)

    def forward(self, looked_up: Tensor, *features: Tensor) -> Tensor:
        for given, value in zip(self.given, looked_up.split(self.widths, dim=2), strict=True):
            given.value = value
        return self.model(*features, looked_up)


def take_tables(workload: Workload, sparse: bool = False) -> tuple[Rest, list[Tensor]]:
    """The model without tables, and for each field its rows ``[rows, width]``: vectors, and first-order weights."""
    model = workload.model(sparse)
    parts = []
    for name in workload.tables:
        of = model.get_submodule(name)
        parts.append([t.weight.detach() for t in getattr(of, "tables", [of])])
    widths = [part[0].shape[1] for part in parts]
    return Rest(model, workload.tables, widths), [torch.cat(of, dim=1) for of in zip(*parts, strict=True)]

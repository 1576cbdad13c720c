"""Stand-ins: what a model's copy has in the place of a dynamic table, to be captured, planned for and cut as others.

A stand-in is a static table of as many rows as the dynamic one is expected to have. The row of an id is the place of
its key among all keys, so rows side by side are slices of the key space, and a division of rows divides these. Its
numbers are nobody's: a rank's program has the ids where the stand-in has rows, and the table itself where it has the
weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from descompiler.dynamic.embedding import (
    HOOKS,
    DynamicEmbedding,
    DynamicEmbeddingBag,
    DynamicTable,
    check_bags,
    check_ids,
    pooled,
)
from descompiler.dynamic.hashing import mix, shifted
from descompiler.dynamic.owners import Owners
from descompiler.errors import UnsupportedError

ROWS_OF_A_SLICE = 256
"""Rows that a slice is expected to have of a table without a limit."""


@torch.library.custom_op("descompiler::stand_in_rows", mutates_args=())
def stand_in_rows(ids: Tensor, salt: int, slices: int, rows: int, padding_idx: int | None, create: bool) -> Tensor:
    """The rows of a stand-in that ids have; ``padding_idx`` and ``create`` are for the table itself."""
    bits = slices.bit_length() - 1
    keys = mix(ids.to(torch.int64) ^ salt)
    within = (shifted(keys << bits, 33) * (rows // slices)) >> 31
    return shifted(keys, 64 - bits) * (rows // slices) + within


@stand_in_rows.register_fake
def _(ids: Tensor, salt: int, slices: int, rows: int, padding_idx: int | None, create: bool) -> Tensor:
    return torch.empty_like(ids, dtype=torch.int64)


@dataclass(frozen=True)
class DynamicIds:
    """How a program looks ids up in a dynamic table: the arguments of `stand_in_rows`.

    >>> DynamicIds(salt=5, slices=64, rows=640).owners(2).of_slices.bincount().tolist()
    [32, 32]
    """

    salt: int
    slices: int
    rows: int
    padding_idx: int | None = None
    create: bool = False

    @property
    def rows_of_slice(self) -> int:
        """Of the stand-in."""
        return self.rows // self.slices

    def owners(self, ranks: int) -> Owners:
        """Which rank has which slices."""
        return Owners(self.slices, ranks)

    def divided(self, ranks: int) -> list[tuple[int, int]]:
        """The same of the stand-in's rows: how many follow each other, and whose they are."""
        return [(self.rows_of_slice, owner) for owner in self.owners(ranks).of_slices.tolist()]

    def owner(self, ids: Tensor, ranks: int) -> Tensor:
        """The rank of each id."""
        return self.owners(ranks).of(mix(ids ^ self.salt))


class StandIn(nn.Module):
    """A module that stands for a dynamic table (`descompiler.dynamic.embedding.DynamicTable`) in a model's copy.

    Parameters
    ----------
    table : DynamicTable
        Of which it is. Not kept: a copy of the model has no rows.
    device : torch.device
        Of the weight.

    """

    def __init__(self, table: DynamicTable, device: torch.device):
        super().__init__()
        config, slices = table._table.config, table._table.residence.slices
        capacity = config.max_rows if config.evict is None or config.evict.capacity is None else config.evict.capacity
        each = ROWS_OF_A_SLICE if capacity is None else -(-capacity // slices)
        self.rows, self.slices, self.salt = each * slices, slices, config.salt
        self.embedding_dim, self.padding_idx = config.dim, table.padding_idx
        self.named = type(table).__name__ + table._called()
        self.mode: str | None = None
        self.include_last_offset = False
        if isinstance(table, DynamicEmbeddingBag):
            self.mode, self.include_last_offset = table.mode, table.include_last_offset
        weight = torch.empty(self.rows, config.dim, dtype=table.weight.dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        self.training = table.training

    @property
    def dynamic(self) -> DynamicIds:
        """How its ids are looked up."""
        return DynamicIds(self.salt, self.slices, self.rows, self.padding_idx, self.training)

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        check_ids(ids, self.named)
        at = self._rows_of(ids)
        if self.mode is None:
            return self._without_padding(F.embedding(at, self.weight, sparse=True), ids)
        check_bags(ids, offsets, per_sample_weights, self.mode)
        if offsets is None and (self.padding_idx is not None or self.mode == "max"):
            rows = self._without_padding(F.embedding(at, self.weight, sparse=True), ids)
            if self.mode == "max":
                return self._maxima(rows, ids)
            if per_sample_weights is not None:
                rows = rows * per_sample_weights.unsqueeze(-1)
            total = rows.sum(1)
            return total if self.mode == "sum" else total / (ids.ne(self.padding_idx or 0)).sum(1, True).clamp(min=1)
        if offsets is None:
            return F.embedding_bag(at, self.weight, mode=self.mode, sparse=True, per_sample_weights=per_sample_weights)
        # rows first: a maximum over a bag has no sparse gradient, and padding is an id, not a row
        return pooled(
            F.embedding(at, self.weight, sparse=True),
            ids,
            offsets,
            per_sample_weights,
            mode=self.mode,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )

    def _rows_of(self, ids: Tensor) -> Tensor:
        at: Tensor = stand_in_rows(ids, self.salt, self.slices, self.rows, self.padding_idx, self.training)
        return at

    def padding_rows(self) -> frozenset[int]:
        """The row that stands for padding, if there is any."""
        return frozenset(() if self.padding_idx is None else self._rows_of(torch.tensor([self.padding_idx])).tolist())

    def _maxima(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Maxima over bags, of what is no padding; zeros for a bag of nothing else."""
        if self.padding_idx is None:
            return rows.max(1).values
        padding = (ids == self.padding_idx).unsqueeze(-1)
        found = rows.masked_fill(padding, -torch.inf).max(1).values
        return found.masked_fill(padding.all(1), 0.0)

    def _without_padding(self, rows: Tensor, ids: Tensor) -> Tensor:
        return rows if self.padding_idx is None else rows * (ids != self.padding_idx).unsqueeze(-1)


def named_stand_ins(template: nn.Module) -> Iterator[tuple[str, StandIn]]:
    """The stand-ins of a model's copy, by the names of their weights; each once."""
    for name, module in template.named_modules():
        if isinstance(module, StandIn):
            yield f"{name}.weight".lstrip("."), module


def _check_lookups(table: DynamicTable) -> None:
    """Raise where a call of the table does more than a stand-in does."""
    named, calls = type(table).__name__ + table._called(), (DynamicEmbedding.forward, DynamicEmbeddingBag.forward)
    if type(table).forward not in calls or "forward" in vars(table):
        raise UnsupportedError(
            f"{named} has a forward of its own, and what stands for it while the model is captured has not: put the "
            "table into a module that does the rest"
        )
    if any(vars(table).get(hooks) for hooks in HOOKS):
        raise UnsupportedError(f"{named} has hooks, which would not be called: put them on a module around the table")


def stand_ins(model: nn.Module, device: torch.device) -> dict[int, StandIn]:
    """Stand-ins of a model's dynamic tables, by the id of the table's module: what a deep copy takes as its memo."""
    tables = [m for m in model.modules() if isinstance(m, DynamicTable)]
    for table in tables:
        _check_lookups(table)
        table.check_weight()
    return {id(m): StandIn(m, device) for m in tables}

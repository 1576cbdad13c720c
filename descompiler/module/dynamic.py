"""Dynamic tables of a compiled module: this rank's part of each, which is a table of some slices of its key space."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from descompiler.dynamic.embedding import DynamicTable
from descompiler.dynamic.stand_in import StandIn, named_stand_ins
from descompiler.layout.pieces import Pieces
from descompiler.runtime.ranks import Ranks


def dynamic_tables(
    model: nn.Module, template: nn.Module, pieces: Mapping[str, Pieces], ranks: Ranks
) -> dict[str, DynamicTable]:
    """This rank's part of rank 0's dynamic tables, by the names of their weights. Collective."""
    result = {}
    for name, stand_in in named_stand_ins(template):
        table: DynamicTable = model.get_submodule(name.rpartition(".")[0])  # type: ignore[assignment]
        result[name] = table.part_of(owners_of(stand_in, pieces[name]), ranks.rank)
    return result


def owners_of(stand_in: StandIn, pieces: Pieces) -> Tensor | None:
    """The rank of each slice; None: one rank has all."""
    if pieces.is_replicated:
        return None
    sizes, owners = (torch.from_numpy(x) for x in pieces.division.arrays())
    return torch.repeat_interleave(owners, sizes // (stand_in.rows // stand_in.slices))

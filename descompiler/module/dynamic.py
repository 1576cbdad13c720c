"""Dynamic tables of a compiled module: this rank's part of each, which is a table of some slices of its key space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from descompiler.dynamic import saved
from descompiler.dynamic.by_id import ById, put_in, take_out
from descompiler.dynamic.embedding import DynamicTable
from descompiler.dynamic.stand_in import StandIn, named_stand_ins
from descompiler.errors import InputError
from descompiler.layout.pieces import Pieces
from descompiler.runtime.ranks import Ranks


def dynamic_tables(
    model: nn.Module, template: nn.Module, pieces: Mapping[str, Pieces], ranks: Ranks
) -> dict[str, DynamicTable]:
    """This rank's part of rank 0's dynamic tables, by the names of their weights. Collective."""
    result = {}
    for name, stand_in in named_stand_ins(template):
        table: DynamicTable = model.get_submodule(name.rpartition(".")[0])  # type: ignore[assignment]
        part = result[name] = table.part_of(_owners_of(stand_in, pieces[name]), ranks.rank, ranks.count)
        _take(part, ranks.of_first(ranks.by_first(partial(take_out, table._table))))
    return result


def _owners_of(stand_in: StandIn, pieces: Pieces) -> Tensor | None:
    """The rank of each slice; None: one rank has all."""
    if pieces.is_replicated:
        return None
    sizes, owners = (torch.from_numpy(x) for x in pieces.division.arrays())
    return torch.repeat_interleave(owners, sizes // (stand_in.rows // stand_in.slices))


def _take(part: DynamicTable, whole: ById | None) -> None:
    """Have the rows of the own slices of a whole table."""
    assert whole is not None
    put_in(part._table, [whole], slices=part._table.held_slices)


CANNOT_READ = "could not read a dynamic table"


def check_weights(module: nn.Module, ranks: Ranks) -> None:
    """Raise on every rank unless each has the rows of its tables' ids where they are to be. Collective."""
    tables = tables_of(module).values()

    def check() -> None:
        for table in tables:
            table.check_weight()

    if tables:
        ranks.everywhere(check, CANNOT_READ)


def tables_of(module: nn.Module) -> dict[str, DynamicTable]:
    """The dynamic tables of a module, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, DynamicTable)}


def names_of_tables(module: nn.Module) -> dict[str, str]:
    """Every name of each dynamic table, and its first one: a state dict has all."""
    first = {id(table): name for name, table in tables_of(module).items()}
    every = module.named_modules(remove_duplicate=False)
    return {name: first[id(m)] for name, m in every if id(m) in first}


def without_tables(state: Mapping[str, Any], tables: Iterable[str]) -> dict[str, Any]:
    """What a state dict has beside dynamic tables."""
    prefixes = tuple(f"{name}." for name in tables)
    return {n: x for n, x in state.items() if not prefixes or not n.startswith(prefixes)}


def whole_table(part: DynamicTable, ranks: Ranks, *, first_only: bool = False) -> DynamicTable | None:
    """A table with the rows of all ranks' parts of it; ``first_only``: on rank 0, None on the others. Collective."""
    mine = ranks.everywhere(lambda: take_out(part._table, slices=part._table.own_slices), CANNOT_READ)
    every: list[Any] | None
    if ranks.count > 1 and first_only:
        every = [None] * ranks.count if ranks.rank == 0 else None
        dist.gather_object(mine, every, group=ranks.group, group_dst=0)
    else:
        every = ranks.of_every(mine)
    if every is None:
        return None
    whole = part.part_of(None, 0)
    put_in(whole._table, every)
    return whole


def check_whole(part: DynamicTable, name: str, state: Mapping[str, Tensor] | None, ranks: Ranks) -> None:
    """Raise on every rank unless `load_whole` can load this. Collective where only rank 0's state counts.

    Raises
    ------
    InputError
    """

    def check() -> None:
        if not state:
            raise InputError(f"this state_dict has nothing of dynamic table {name!r}")
        saved.check(part.part_of(None, 0)._table, state, f"dynamic table {name!r}")
        if unknown := sorted(state.keys() - saved.KNOWN):
            raise InputError(f"this state_dict has {name}.{unknown[0]}, which no dynamic table has")

    if state is None or ranks.count > 1:
        ranks.by_first(check)
    else:
        check()


def load_whole(part: DynamicTable, state: Mapping[str, Tensor] | None, ranks: Ranks) -> None:
    """Have the rows of the own slices of what the original's state dict has of a table, which is checked.

    Collective; what optimisers keep begins anew. ``state``: of the table, by its own names; None: rank 0's is streamed.

    """

    def loaded() -> ById:
        whole = part.part_of(None, 0)
        whole.load_state_dict(dict(state or {}))
        return take_out(whole._table)

    first = state is None or ranks.count > 1
    _take(part, ranks.of_first(ranks.by_first(loaded)) if first else loaded())


def in_their_places(template: nn.Module, tables: Mapping[str, DynamicTable]) -> dict[int, nn.Module]:
    """Tables by the ids of the modules that stand for them in a blueprint."""
    return {id(template.get_submodule(name)): table for name, table in tables.items()}

"""Dynamic tables in checkpoints: by id in the order of keys, so that slices of the key space are ranges of rows.

Each rank writes the ranges of its slices, which `torch.distributed.checkpoint` knows as pieces of one tensor; how many
rows each slice has is written first, so that any number of ranks reads those of its own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from descompiler.dynamic.by_id import ById, Kept, made_from, put_in, take_out
from descompiler.dynamic.embedding import DynamicTable
from descompiler.dynamic.states import initial_of, name_of
from descompiler.dynamic.table import EVERY_RANK, Table
from descompiler.eager.held import Whose, held
from descompiler.errors import InputError, UnsupportedError
from descompiler.layout.pieces import Pieces
from descompiler.module.dynamic import tables_of
from descompiler.ops.local import plain
from descompiler.runtime.collectives import all_reduce
from descompiler.runtime.ranks import Ranks

TABLES = "app.dynamic."
"""Where a checkpoint has them; then a table's name, and what is kept of it."""

LIVE, STEP, MADE, OPTIMIZER, OPTIONS = "live", "step", "made", "optimizer", "options"
"""What every rank reads: rows of each slice; steps that have ended; what the table was made from; the class of the
optimiser, and its options for the table."""

ROWS, LAST, COUNTS, IDS, SKETCH = "rows", "last", "counts", "ids", "sketch"
OF_ROWS, OF_ALL = "state_of_rows", "state_of_all"
"""What the optimiser keeps: of each row, and once."""


def optimizer_of(table: Table, optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer | None:
    """The optimiser that steps on a table's rows."""
    return next((o for o in optimizers if _group_of(table, o) is not None), None)


def _group_of(table: Table, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    for group in optimizer.param_groups:
        if any(p is table.parameter for p in group["params"]):
            return group
    return None


@contextlib.contextmanager
def aside(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Meanwhile the module and the optimisers are those without dynamic tables."""
    tables = tables_of(module)
    parameters = {id(t.weight) for t in tables.values()}
    places = [
        (m._modules, n, x) for m in module.modules() for n, x in m._modules.items() if isinstance(x, DynamicTable)
    ]
    groups = [(o, i, g["params"]) for o in optimizers for i, g in enumerate(o.param_groups)]
    states = [(o, p, o.state[p]) for o in optimizers for p in list(o.state) if id(p) in parameters]
    for held_by, name, _ in places:
        held_by[name] = nn.Identity()
    for optimizer, i, several in groups:
        optimizer.param_groups[i]["params"] = [p for p in several if id(p) not in parameters]
    for optimizer, p, _ in states:
        del optimizer.state[p]
    try:
        yield
    finally:
        for held_by, name, table in places:
            held_by[name] = table
        for optimizer, i, several in groups:  # loading makes others
            optimizer.param_groups[i]["params"] = several
        for optimizer, p, state in states:
            optimizer.state[p] = state


def has_others(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser steps on anything; asked `aside`, on anything but dynamic tables."""
    return any(g["params"] for g in optimizer.param_groups)


def to_save(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ranks: Ranks) -> dict[str, Any]:
    """What this rank writes of each table. Collective.

    Raises
    ------
    UnsupportedError
        Within a step: ids are sighted, or a gradient waits.
    """
    tables = {name: part._table for name, part in tables_of(module).items()}
    if not tables:
        return {}

    def taken_out() -> dict[str, ById]:
        return {name: _between_steps(name, table, optimizer_of(table, optimizers)) for name, table in tables.items()}

    # what one rank can't take out all ranks hear of, before any of them waits for the others
    states = ranks.everywhere(taken_out, "could not save")
    return {name: _to_save(name, table, states[name], optimizers, ranks) for name, table in tables.items()}


def _between_steps(name: str, table: Table, optimizer: torch.optim.Optimizer | None) -> ById:
    state = take_out(table, optimizer, table.own_slices)
    if len(state.sighted):
        raise UnsupportedError(
            f"dynamic table {name!r} is within a step, which has sighted ids: save after optimizer.step()"
        )
    return state


def _to_save(
    name: str, table: Table, state: ById, optimizers: Sequence[torch.optim.Optimizer], ranks: Ranks
) -> dict[str, Any]:
    optimizer = optimizer_of(table, optimizers)
    live = torch.bincount(state.slices_of(state.ids), minlength=table.residence.slices)
    if ranks.count > 1:
        all_reduce(live, ranks.group, dist.ReduceOp.SUM).wait()
    cut = _cutter(name, table.tellers, live, ranks)
    result: dict[str, Any] = {LIVE: live, STEP: state.step, MADE: json.dumps(dict(state.made))}
    result |= {IDS: cut(state.ids), ROWS: cut(state.rows)}
    result |= {n: cut(x) for n, x in ((LAST, state.last), (COUNTS, state.counts)) if x is not None}
    if state.sketch is not None:
        result[SKETCH] = _cutter(name, table.tellers, torch.ones_like(live), ranks)(state.sketch)
    if optimizer is not None and state.kept is not None:
        result[OPTIMIZER] = state.kept.optimizer
        result[OPTIONS] = json.dumps(_options(_group_of(table, optimizer) or {}))
        result[OF_ROWS] = {n: cut(x) for n, x in state.kept.rows.items()}
        result[OF_ALL] = {n: torch.as_tensor(x) for n, x in state.kept.scalars.items()}
    return result


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that are numbers, flags or text, or several."""
    found = {n: x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for n, x in group.items() if n != "params"}
    return {n: x for n, x in found.items() if isinstance(x, int | float | str | tuple | list | None)}


def _cutter(name: str, owners: Tensor, sizes: Tensor, ranks: Ranks) -> Callable[[Tensor], Tensor]:
    """What makes a tensor of a rank's slices, which have so many rows each, a piece of that of all."""
    ranges = [(n, owner) for n, owner in zip(sizes.tolist(), owners.tolist(), strict=True) if n] or [(0, 0)]

    def cut(x: Tensor) -> Tensor:
        pieces = Pieces.of((int(sizes.sum()), *x.shape[1:]), 0, ranges, ranks.count)
        like = Whose(name, pieces, ranks.rank, None)
        return held(x, _Like(like))

    return cut


def _in_piece(table: Table) -> Tensor:
    """The slices that a rank holds, in the order of its piece: its own, then those that all ranks hold."""
    held = table.held_slices
    every = torch.zeros_like(held, dtype=torch.bool) if table.owners is None else table.owners[held] == EVERY_RANK
    return torch.cat([held[~every], held[every]])


def _no_rows(table: Table, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser that has stepped keeps of no rows."""
    state = optimizer.state.get(table.parameter, {})
    return {name: plain(state.get(name, table.rows.tensor))[:0].cpu() for name in initial_of(optimizer)}


class _Like:
    """What says whose a tensor is."""

    def __init__(self, whose: Whose):
        self.whose = whose


def check_names(module: nn.Module, saved: Collection[str]) -> None:
    """Raise unless a checkpoint that has these names has the dynamic tables of a module, and no others."""
    tables = tables_of(module)
    for name in tables:
        if f"{TABLES}{name}.{LIVE}" in saved:
            continue
        if f"app.module.{name}.weight" in saved:
            raise InputError(
                f"{name!r} is a static table in the checkpoint, and a dynamic one here: load it into the model "
                "with nn.Embedding, and make the dynamic table with des.dynamic.from_embedding"
            )
        raise InputError(f"the checkpoint has no dynamic table {name!r}")
    known = tuple(f"{TABLES}{name}." for name in tables)
    if more := sorted(n for n in saved if n.startswith(TABLES) and not (known and n.startswith(known))):
        raise InputError(f"the checkpoint has dynamic tables that the model has not: {', '.join(more[:3])}")


class SavedTables:
    """What a checkpoint has of a module's dynamic tables, to be read by this rank.

    Parameters
    ----------
    read : callable
        Reads ``{"app": ...}`` from the checkpoint, in place. Collective.

    Raises
    ------
    InputError
        On construction, if it is not of these tables; nothing has changed.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        metadata: Metadata,
        ranks: Ranks,
        read: Callable[[dict[str, Any]], None],
    ):
        self.tables = {name: part._table for name, part in tables_of(module).items()}
        self.optimizers, self.ranks = optimizers, ranks
        self._saved: dict[str, Any] = metadata.state_dict_metadata
        self._small = {name: self._every_ranks(name) for name in self.tables}
        if self._small:
            read({"dynamic": self._small})
            ranks.everywhere(self._check_all, "could not load")
        self.room = {name: self._room(name, table) for name, table in self.tables.items()}

    def take_in(self) -> None:
        """Give the tables, and their optimisers, what has been read into `room`."""
        for name, table in self.tables.items():
            small, room, optimizer = self._small[name], self.room[name], optimizer_of(table, self.optimizers)
            kept = None
            if optimizer is not None:
                of_all = room[OF_ALL]
                rows = room[OF_ROWS] if int(small[LIVE].sum()) or not of_all else _no_rows(table, optimizer)
                kept = Kept(small[OPTIMIZER], initial_of(optimizer), {n: plain(x) for n, x in rows.items()}, of_all)
            found = {n: plain(room[n]) if n in room else None for n in (LAST, COUNTS, SKETCH)}
            if not int(small[LIVE].sum()):  # what has no elements is not in the file
                residence, none = table.residence, torch.empty(0, dtype=torch.int64)
                room |= {IDS: none, ROWS: table.rows.tensor[:0].cpu()}
                there = ((LAST, residence.last), (COUNTS, residence.counts))
                found |= {n: x.tensor[:0] for n, x in there if x is not None}
            state = ById(
                made=json.loads(small[MADE]),
                step=small[STEP],
                slices=_in_piece(table),
                ids=plain(room[IDS]),
                rows=plain(room[ROWS]),
                sighted=torch.empty(0, dtype=torch.int64),
                kept=kept,
                **found,
            )
            put_in(table, [state], optimizer, table.held_slices)
            group = None if optimizer is None else _group_of(table, optimizer)
            if group is not None:
                options = json.loads(small[OPTIONS])
                group.update({n: tuple(x) if isinstance(x, list) else x for n, x in options.items()})

    def _every_ranks(self, name: str) -> dict[str, Any]:
        """Room for what every rank reads of a table."""
        table = self.tables[name]
        room: dict[str, Any] = {LIVE: torch.zeros(table.residence.slices, dtype=torch.int64), STEP: 0, MADE: ""}
        if self._saved[f"{TABLES}{name}.{LIVE}"].size != room[LIVE].shape:
            there = int(self._saved[f"{TABLES}{name}.{LIVE}"].size[0])
            raise InputError(
                f"dynamic table {name!r} has {there} slices there, and {len(room[LIVE])} here: its capacity is another"
            )
        optimizer = optimizer_of(table, self.optimizers)
        if optimizer is not None:
            if f"{TABLES}{name}.{OPTIMIZER}" not in self._saved:
                raise InputError(
                    f"dynamic table {name!r} was saved without an optimiser, and is loaded with "
                    f"{name_of(optimizer)}: give des.load the optimisers that des.save had"
                )
            room |= {OPTIMIZER: "", OPTIONS: ""}
        return room

    def _check_all(self) -> None:
        for name, table in self.tables.items():
            self._check(name, table)

    def _check(self, name: str, table: Table) -> None:
        small = self._small[name]
        there, here = json.loads(small[MADE]), made_from(table)
        if unlike := [n for n in here if there.get(n) != here[n]]:
            which = unlike[0]
            raise InputError(
                f"dynamic table {name!r} has {which}={there.get(which)} in the checkpoint, and {which}={here[which]} "
                "here: make it as the one that was saved"
            )
        rows = int(small[LIVE].sum())
        if (most := table.config.max_rows) is not None and rows > most:
            raise InputError(f"dynamic table {name!r} has {rows} rows in the checkpoint, more than max_rows={most}")
        optimizer = optimizer_of(table, self.optimizers)
        if optimizer is not None and small[OPTIMIZER] != name_of(optimizer):
            raise InputError(
                f"dynamic table {name!r} was saved with {small[OPTIMIZER]}, and is loaded with "
                f"{name_of(optimizer)}: give des.load the optimisers that des.save had"
            )

    def _room(self, name: str, table: Table) -> dict[str, Any]:
        live = self._small[name][LIVE]
        owners = table.tellers if table.owners is None else table.owners
        cut, whole = (_cutter(name, owners, sizes, self.ranks) for sizes in (live, torch.ones_like(live)))
        own = int(live[table.held_slices].sum())
        prefix, with_state = f"{TABLES}{name}.", optimizer_of(table, self.optimizers) is not None
        room: dict[str, Any] = {OF_ROWS: {}, OF_ALL: {}}
        for key, kind in self._saved.items():
            what = key.removeprefix(prefix)
            if not key.startswith(prefix) or what in self._small[name] or not isinstance(kind, TensorStorageMetadata):
                continue
            dtype, shape = kind.properties.dtype, tuple(kind.size)
            where, _, of = what.partition(".")
            if where == SKETCH:
                room[SKETCH] = whole(torch.empty(len(table.held_slices), *shape[1:], dtype=dtype))
            elif where == OF_ALL and with_state:
                room[OF_ALL][of] = torch.empty(shape, dtype=dtype)
            elif where == OF_ROWS and with_state:
                room[OF_ROWS][of] = cut(torch.empty(own, *shape[1:], dtype=dtype))
            elif where not in (OF_ALL, OF_ROWS):
                room[what] = cut(torch.empty(own, *shape[1:], dtype=dtype))
        return room

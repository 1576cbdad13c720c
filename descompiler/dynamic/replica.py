"""A replica of dynamic tables, which reads the deltas that their owners publish, and looks ids up."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from descompiler.dynamic.by_id import ById, ids_of, keys_of
from descompiler.dynamic.chains import Listed, latest, read
from descompiler.dynamic.changes import Update
from descompiler.dynamic.deltas import KIND
from descompiler.dynamic.hashing import slice_of
from descompiler.dynamic.id_map import IdMap
from descompiler.dynamic.parts import unpacked
from descompiler.dynamic.residence import FreeSlots
from descompiler.dynamic.storage import Growing
from descompiler.dynamic.stores import Store, store_of
from descompiler.errors import InputError


@dataclass(frozen=True)
class Refreshed:
    """What a refresh has brought.

    Parameters
    ----------
    parts : int
        Deltas and full states that were read.
    rows, gone : int
        Rows that are new or have other numbers, and that went; of a full state all it has, and all before it.
    gaps : tuple of str
        Where deltas were missing, and a full state was read in their place.
    """

    parts: int
    rows: int
    gone: int
    gaps: tuple[str, ...]


class Replica:
    """Dynamic tables as their owners have published them; an id without a row has zeros, as in evaluation.

    A thread may look up while another refreshes: it finds the rows of before or after a delta. Of several owners each
    is read as far as it has published.

    Parameters
    ----------
    place : str, path or Store
        What `Deltas` was given.

    Attributes
    ----------
    values : dict
        What was published beside the last delta that was read.
    """

    def __init__(self, place: str | os.PathLike[str] | Store):
        self._store = store_of(place)
        self._lock = threading.Lock()
        self._held = _Held(0, {}, {}, {})
        self.values: dict[str, Any] = {}

    def refresh(self) -> Refreshed:
        """Read what was published since the last time; where deltas are missing, from a full state on, and says so.

        Raises
        ------
        InputError
            If a file is missing, cut or another: what was read before it stays.
        """
        known: tuple[Listed, ...] | None = None
        while (point := latest(self._store, KIND)) is not None:
            try:
                return self._follow(point.owners)
            except InputError:
                if point.owners == known:  # it was not removed while it was read
                    raise
            known = point.owners
        return Refreshed(0, 0, 0, ())

    def look_up(self, table: str, ids: Tensor) -> Tensor:
        """The rows of ids of any shape.

        Raises
        ------
        InputError
            If there is no such table, or ids are no int64 or int32 tensor.
        """
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            raise InputError(f"look_up({table!r}) was given ids that are no int64 or int32 tensor")
        with self._lock:
            found = self._table(table).look_up(ids.reshape(-1).to("cpu", torch.int64))
        return found.view(*ids.shape, found.shape[1])

    def resident(self, table: str) -> Tensor:
        """The ids that have rows, sorted."""
        with self._lock:
            return self._table(table).ids().sort().values

    @property
    def steps(self) -> dict[str, int]:
        """The step of each table that all owners have published."""
        with self._lock:
            return {n: min(x[n] for x in self._held.steps.values()) for n in self._held.tables}

    def _table(self, name: str) -> _Served:
        if name not in self._held.tables:
            known = ", ".join(self._held.tables) or "none yet: refresh() after the first publish()"
            raise InputError(f"no table {name!r} in {self._store}; there are: {known}")
        return self._held.tables[name]

    def _follow(self, owners: tuple[Listed, ...]) -> Refreshed:
        """Read what owners have listed. A run of others is read whole before it takes the place of the one before."""
        run, gaps = owners[0].run, list[str]()
        held = self._held if self._held.run == run else _Held(run, {}, {}, {})
        if held is not self._held and self._held.run:
            gaps.append(f"run {run} follows run {self._held.run}: read from its full states")
        parts = rows = gone = 0
        for owner in owners:
            entries, gap = held.missing(owner)
            gaps += [gap] if gap else []
            found = [unpacked(read(self._store, entry), entry.file) for entry in entries]
            parts += len(entries)
            for entry, (tables, values) in zip(entries, found, strict=True):
                with self._lock:
                    for name, part in tables.items():
                        came, went = held.give(name, part)
                        rows, gone = rows + came, gone + went
                    held.steps[owner.rank] = {n: _state_of(part).step for n, part in tables.items()}
                    held.numbers[owner.rank] = entry.number
                    self.values = values
        with self._lock:
            self._held = held
        return Refreshed(parts, rows, gone, tuple(gaps))


@dataclass
class _Held:
    """What was read of a run: tables by name, and of each owner the number of its last part and the steps."""

    run: int
    tables: dict[str, _Served]
    numbers: dict[int, int]
    steps: dict[int, dict[str, int]]

    def missing(self, owner: Listed) -> tuple[list[Any], str | None]:
        """The parts of an owner that are to be read, and which gap is before them, if there is one."""
        last, number = max(owner.numbers()), self.numbers.get(owner.rank)
        if number is None:
            return owner.parts(last), None
        updates = {e.number: e for e in owner.entries if not e.full}
        asked = range(number + 1, last + 1)
        if all(n in updates for n in asked):
            return [updates[n] for n in asked], None
        lacks = next(n for n in asked if n not in updates)
        found = owner.parts(last)
        return found, f"owner {owner.rank}: no delta {lacks} after {number}; read from the full state {found[0].number}"

    def give(self, name: str, part: ById | Update) -> tuple[int, int]:
        """Have a part; how many rows came, and went."""
        state = _state_of(part)
        table = self.tables.setdefault(name, _Served(state.made))
        went = table.remove(part.gone) if isinstance(part, Update) else table.clear(state.slices)
        table.write(state.ids, state.rows)
        return len(state.ids), went


def _state_of(part: ById | Update) -> ById:
    return part.now if isinstance(part, Update) else part


class _Served:
    """Rows by id, without anything that training needs."""

    def __init__(self, made: Mapping[str, str | int]):
        self._made, self._free = made, FreeSlots()
        self._map = IdMap(int(made["slices"]))
        self._rows = Growing((1, int(made["dim"])), getattr(torch, str(made["dtype"])), torch.device("cpu"))

    def look_up(self, ids: Tensor) -> Tensor:
        return self._rows.tensor.index_select(0, self._map.find(keys_of(self._made, ids)))

    def ids(self) -> Tensor:
        keys = self._map.keys.tensor[self._map.in_slices(torch.arange(self._map.slices))]
        return ids_of(self._made, keys)

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Have rows of ids, which differ."""
        keys = keys_of(self._made, ids)
        slots = self._map.find(keys)
        new = slots == 0
        slots[new] = self._free.take(int(new.sum()))
        self._rows.grow(self._free.end)
        self._map.insert(keys[new], slots[new])
        self._rows.tensor[slots] = rows

    def remove(self, ids: Tensor) -> int:
        """Let ids have no rows; how many had one."""
        keys = keys_of(self._made, ids)
        slots, slices = self._map.find(keys), slice_of(keys, self._map.slices).unique()
        held = self._map.in_slices(slices)
        return self._leave(slices, slots[slots != 0], held[torch.isin(held, slots).logical_not_()])

    def clear(self, slices: Tensor) -> int:
        """Let no id of some slices have a row."""
        return self._leave(slices, self._map.in_slices(slices), torch.empty(0, dtype=torch.int64))

    def _leave(self, slices: Tensor, leaving: Tensor, staying: Tensor) -> int:
        if len(leaving):
            self._map.keep(slices, staying)
            self._free.give(leaving)
        return len(leaving)

"""Incremental checkpoints of dynamic tables: full states, and between them what has changed since the save before."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from descompiler.dynamic.by_id import ById, joined, put_in, take_out
from descompiler.dynamic.chains import Listed, latest, read
from descompiler.dynamic.changes import Update
from descompiler.dynamic.owned import Owned, Tables, slices_written
from descompiler.dynamic.parts import unpacked
from descompiler.dynamic.stores import Folder, Store
from descompiler.dynamic.table import Table
from descompiler.errors import InputError, warn

KIND = "incremental checkpoints"


class Increments:
    """Checkpoints of dynamic tables in a directory, of which most have only what has changed since the one before.

    Ids, rows, what the optimiser keeps, counters, sketches and step: a table that loads them goes on exactly as the one
    that was saved. Files take their names when they are whole, and a list of them with checksums is written last: a
    process may die anywhere, and what `load` finds is the last save that every owner has finished. The first save of a
    process is a full state, and so is one when updates together are as large as the full state before them; what is
    before it is removed then.

    Several owners write into one directory without a word to each other, each what it has of the tables, after the same
    steps; all make their `Increments`, and load, before any of them saves. Any number of owners loads what they saved.

    Parameters
    ----------
    path : str or path
        A directory that all owners see.
    tables : mapping of str to DynamicEmbedding or DynamicEmbeddingBag
    optimizers : torch.optim.Optimizer or sequence of them, optional
        Those that hold the tables' weights.
    rank, ranks : int
        Which owner this is, of how many: it has the slices of `owners.Owners`, or those of a compiled module's table.
    compact_at : float
        A save is a full state when updates have so many times the bytes of the one before.

    Raises
    ------
    InputError
        If an optimiser holds none of the tables, or a trained table is in none or in several; if a compiled module's
        table is another rank's.

    Examples
    --------
    >>> import tempfile, descompiler as des
    >>> folder = tempfile.TemporaryDirectory()
    >>> table, other = (des.DynamicEmbedding(2, name="user") for _ in range(2))
    >>> increments = des.dynamic.Increments(folder.name, {"user": table})
    >>> increments.load() is None  # nothing there yet
    True
    >>> for ids in (torch.arange(5), torch.arange(3, 7)):
    ...     rows = table(ids)
    ...     increments.save(seen=int(ids[-1]))
    >>> des.dynamic.Increments(folder.name, {"user": other}).load()
    {'seen': 6}
    >>> bool((other(ids) == rows).all()), len(other)
    (True, 7)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tables: Tables,
        optimizers: Optimizer | Sequence[Optimizer] | None = None,
        *,
        rank: int = 0,
        ranks: int = 1,
        compact_at: float = 1.0,
    ):
        self._store: Store = Folder(path)
        self._owned = Owned(self._store, KIND, tables, rank, ranks, seen=True, keep=0, compact_at=compact_at)
        self._optimizers = _optimizers_of(self._owned.tables, optimizers)
        self._may_begin = self._owned.chain.listed.run == 1
        self._saved_places: list[int] = []

    def save(self, **values: Any) -> None:
        """Save what the tables have now: all of it, or what has changed since the last save.

        Parameters
        ----------
        **values
            Numbers, strings and tensors beside the tables, as the position in a stream; saved anew each time.

        Raises
        ------
        InputError
            If it can't be written, and the save before is the last one still; or if the directory has checkpoints that
            were not loaded.
        UnsupportedError
            If a gradient waits for an optimiser.
        """
        if not self._may_begin:
            raise InputError(f"{self._store} has checkpoints: load() them first, or give another directory")
        owned, held = self._owned, dict[str, ById | Update]()
        with owned.next_part():
            places = self._places()
            full = owned.everything or owned.is_time or places != self._saved_places
            for name, table in owned.tables.items():
                slices, optimizer, changes = owned.slices[name], self._optimizers[name], owned.changes[name]
                held[name] = take_out(table, optimizer, slices) if full else changes.update(slices, optimizer)
            owned.append(held, values, full=full)
            self._saved_places = places

    def load(self) -> dict[str, Any] | None:
        """Give the tables and optimisers what the last save has that all its owners have finished.

        Returns
        -------
        dict or None
            The values that were saved beside; None where no save was ever finished, and nothing changes.

        Raises
        ------
        InputError
            If a file is missing, cut or another, or it is of other tables; nothing has changed.
        """
        point = latest(self._store, KIND)
        self._may_begin = True
        if point is None:
            if self._owned.chain.listed.run > 1:
                warn(f"{self._store} has a first save that not all owners have finished: nothing is loaded")
            return None
        owned, values = self._owned, dict[str, Any]()
        parts: dict[str, list[ById]] = {n: [] for n in owned.tables}
        for owner in self._needed(point.owners):
            found, values = replayed(self._store, owner, point.number, owned.tables)
            for name, state in found.items():
                parts[name].append(state)
        for_each = [(n, t, self._optimizers[n], owned.held[n]) for n, t in owned.tables.items()]
        ready = {n: joined(t, parts[n], o, s) for n, t, o, s in for_each}  # raises before anything changes
        for name, table, optimizer, slices in for_each:
            put_in(table, [ready[name]], optimizer, slices)
        owned.begin_anew()
        return values

    def _places(self) -> list[int]:
        """Where what optimisers keep lies: elsewhere, when a state was loaded into them."""
        held = [(o, self._owned.tables[n].parameter) for n, o in self._optimizers.items() if o is not None]
        return [x.data_ptr() for o, p in held for x in o.state.get(p, {}).values() if isinstance(x, Tensor) and x.dim()]

    def _needed(self, owners: Sequence[Listed]) -> list[Listed]:
        """Owners that have had slices of this one's; one at least, whose step this one has."""
        found = [
            owner
            for owner in owners
            if any(
                bool(torch.isin(slices_written(owner, n, t), self._owned.held[n]).any())
                for n, t in self._owned.tables.items()
            )
        ]
        return found or list(owners[:1])


def replayed(store: Store, owner: Listed, number: int, tables: Iterable[str]) -> tuple[dict[str, ById], dict[str, Any]]:
    """What an owner had of its tables when it wrote a number, and the values beside.

    Raises
    ------
    InputError
        If a file is missing or another, or has other tables than these.
    """
    states: dict[str, ById] = {}
    values: dict[str, Any] = {}
    for entry in owner.parts(number):
        found, values = unpacked(read(store, entry), entry.file)
        if (names := sorted(found)) != sorted(tables):
            raise InputError(f"{store} has the tables {', '.join(names)}, and not {', '.join(sorted(tables))}")
        for name, part in found.items():
            states[name] = part.after(states[name]) if isinstance(part, Update) else part
    return states, values


def _optimizers_of(
    tables: Mapping[str, Table], optimizers: Optimizer | Sequence[Optimizer] | None
) -> dict[str, Optimizer | None]:
    """The optimiser of each table."""
    given = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers or ())
    found: dict[str, Optimizer | None] = {}
    for name, table in tables.items():
        held = [o for o in given if any(p is table.parameter for g in o.param_groups for p in g["params"])]
        if len(held) > 1 or (given and not held and table.parameter.requires_grad):
            raise InputError(
                f"table {name!r} is in {len(held)} of the optimizers: give the one that steps on its weight"
            )
        found[name] = held[0] if held else None
    return found

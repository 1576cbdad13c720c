"""What one owner writes of its tables: their slices that it tells of, what has changed there, its chain of parts.

Of a table in no compiled module an owner has the slices of `owners.Owners`. A compiled module's table says itself which
are this rank's: those that it tells of are written, and all that it holds are loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from descompiler.dynamic.by_id import ById
from descompiler.dynamic.chains import Chain, Listed
from descompiler.dynamic.changes import Changes, Update
from descompiler.dynamic.embedding import DynamicTable
from descompiler.dynamic.owners import Owners, as_ranges, in_ranges
from descompiler.dynamic.parts import packed
from descompiler.dynamic.stores import Store
from descompiler.dynamic.table import Table
from descompiler.errors import InputError

Tables = Mapping[str, DynamicTable | Table]


class Owned:
    """The tables of an owner, and what it has written of them.

    Parameters
    ----------
    store : Store
    kind : str
    tables : mapping of str to DynamicEmbedding, DynamicEmbeddingBag or Table
    rank, ranks : int
        Which owner this is, of how many.
    seen : bool
        Whether rows that were only seen are written.
    keep : int
        Updates that stay beside those that are needed.
    compact_at : float
        When it is time for a full state: updates have so many times the bytes of the one before.

    Attributes
    ----------
    slices, held : dict of str to Tensor
        Of each table, the slices that are written, where each is by one owner; and those that are loaded.
    """

    def __init__(
        self,
        store: Store,
        kind: str,
        tables: Tables,
        rank: int,
        ranks: int,
        *,
        seen: bool,
        keep: int,
        compact_at: float,
    ):
        if not tables:
            raise InputError("no tables were given: give a mapping of names to dynamic tables")
        self.tables = {n: x._table if isinstance(x, DynamicTable) else x for n, x in tables.items()}
        standard = {n: slices_of_owner(t, rank, ranks) for n, t in self.tables.items()}
        self.slices, self.held = dict(standard), dict(standard)
        for name, table in self.tables.items():
            if table.owners is None:
                continue
            if (rank, ranks) != (table.rank, table.ranks):
                raise InputError(
                    f"dynamic table {name!r} is the part that rank {table.rank} of {table.ranks} has in a compiled "
                    f"module, and not of owner {rank} of {ranks}: give rank={table.rank}, ranks={table.ranks}, or call "
                    "des.increments or des.deltas"
                )
            self.slices[name], self.held[name] = table.own_slices, table.held_slices
        others = {n: as_ranges(x) for n, x in self.slices.items() if not torch.equal(x, standard[n])}
        self._begin: Callable[[], Chain] = lambda: Chain(store, kind, rank, ranks, others, keep=keep)
        self.chain, self._compact_at = self._begin(), compact_at
        self.changes = {n: Changes(t, seen=seen) for n, t in self.tables.items()}

    def begin_anew(self) -> None:
        """What is written from now on is of another run: the tables have been given what was saved before."""
        if self.chain.listed.entries:
            self.chain = self._begin()

    @contextlib.contextmanager
    def next_part(self) -> Iterator[None]:
        """A part is made and appended: if it fails, the owners' next ones have the same number all the same."""
        number = self.chain.next
        try:
            yield
        finally:
            self.chain.use_up(number)

    @property
    def everything(self) -> bool:
        """Whether only a full state says what has changed."""
        return self.chain.is_broken or any(changes.everything for changes in self.changes.values())

    @property
    def is_time(self) -> bool:
        """Whether updates since the last full state are as large as it."""
        entries = self.chain.listed.entries
        last = max((i for i, e in enumerate(entries) if e.full), default=None)
        return last is None or sum(e.bytes for e in entries[last + 1 :]) >= self._compact_at * entries[last].bytes

    def append(
        self, held: Mapping[str, ById | Update], values: Mapping[str, Any], *, full: bool, again: bool = False
    ) -> None:
        """Write a part with the next number, or the last one again; what changes from now on is of the one after."""
        self.chain.append(self.chain.next - again, packed(held, values), full=full)
        for changes in self.changes.values():
            changes.forget()
        self.chain.prune()


def slices_of_owner(table: Table, rank: int, ranks: int) -> Tensor:
    """The slices that an owner has of a table that is in no compiled module."""
    return (Owners(table.residence.slices, ranks).of_slices == rank).nonzero()[:, 0]


def slices_written(owner: Listed, name: str, table: Table) -> Tensor:
    """The slices of a table that an owner has written, as its manifest says."""
    if name in owner.slices:
        return in_ranges(owner.slices[name])
    return slices_of_owner(table, owner.rank, owner.ranks)

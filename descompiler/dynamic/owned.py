"""What one owner writes of its tables: their slices that it has, what has changed there, and its chain of parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from descompiler.dynamic.by_id import ById
from descompiler.dynamic.chains import Chain
from descompiler.dynamic.changes import Changes, Update
from descompiler.dynamic.embedding import DynamicTable
from descompiler.dynamic.owners import Owners
from descompiler.dynamic.parts import packed
from descompiler.dynamic.stores import Store
from descompiler.dynamic.table import EVERY_RANK, Table
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
        self._begin: Callable[[], Chain] = lambda: Chain(store, kind, rank, ranks, keep=keep)
        self.chain, self._compact_at = self._begin(), compact_at
        self.slices = {n: slices_of_owner(t, rank, ranks) for n, t in self.tables.items()}
        for name, table in self.tables.items():
            divided = table.owners is None or not bool((table.owners == EVERY_RANK).any())
            if table.owners is not None and not (divided and torch.equal(table.own_slices, self.slices[name])):
                raise InputError(
                    f"dynamic table {name!r} is rank {table.rank}'s part of one that is not divided as owner {rank} of "
                    f"{ranks} has it: give rank= and ranks= of the compiled module (des.increments and des.deltas do), "
                    "and pin it to a form that divides rows evenly"
                )
        self.changes = {n: Changes(t, seen=seen) for n, t in self.tables.items()}

    def begin_anew(self) -> None:
        """What is written from now on is of another run: the tables have been given what was saved before."""
        if self.chain.listed.entries:
            self.chain = self._begin()

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
    """The slices that an owner has of a table."""
    return (Owners(table.residence.slices, ranks).of_slices == rank).nonzero()[:, 0]

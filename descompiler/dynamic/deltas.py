"""A stream of what changes in dynamic tables, for who serves them: ids with their rows, and ids that have none now."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from descompiler.dynamic.by_id import ById, of_slots
from descompiler.dynamic.owned import Owned, Tables
from descompiler.dynamic.stores import Store, store_of

KIND = "deltas"


class Deltas:
    """Publishes what has changed in dynamic tables: rows, and ids whose rows went; nothing that only training needs.

    A delta has a number, and is there whole or not at all (`descompiler.dynamic.chains`). The first of a process is a
    full state, and another is written when deltas together are as large as it; who has lost touch begins there. What is
    published costs what has changed since the one before, so that it can be done every second. `Replica` reads it.

    Parameters
    ----------
    place : str, path or Store
        A directory, or a `RedisStore`.
    tables : mapping of str to DynamicEmbedding or DynamicEmbeddingBag
    rank, ranks : int
        Which owner this is, of how many: each publishes its own slices, without a word to the others. See `Increments`.
    keep : int
        Deltas that stay, for those who read seldom.
    compact_at : float
        A full state is written when deltas have so many times the bytes of the one before.

    Examples
    --------
    >>> import tempfile, descompiler as des
    >>> folder = tempfile.TemporaryDirectory()
    >>> table = des.DynamicEmbedding(2, name="user")
    >>> deltas, replica = des.dynamic.Deltas(folder.name, {"user": table}), des.dynamic.Replica(folder.name)
    >>> rows = table(torch.tensor([7, -7]))
    >>> deltas.publish()
    >>> replica.refresh().rows
    2
    >>> bool((replica.look_up("user", torch.tensor([7, -7])) == rows).all())
    True
    """

    def __init__(
        self,
        place: str | os.PathLike[str] | Store,
        tables: Tables,
        *,
        rank: int = 0,
        ranks: int = 1,
        keep: int = 64,
        compact_at: float = 1.0,
    ):
        owned = Owned(store_of(place), KIND, tables, rank, ranks, seen=False, keep=keep, compact_at=compact_at)
        self._owned = owned

    def publish(self, **values: Any) -> None:
        """Publish what has changed since the last time, after a step.

        Parameters
        ----------
        **values
            Numbers, strings and tensors beside, as the version of the dense part; `Replica.values` has the last ones.

        Raises
        ------
        InputError
            If it can't be written; the next time has its changes too.
        UnsupportedError
            If a gradient waits for an optimiser.
        """
        owned, everything = self._owned, self._owned.everything
        with owned.next_part():
            if not everything:
                updates = {n: owned.changes[n].update(owned.slices[n], None) for n in owned.tables}
                served = {n: replace(x, now=_served(x.now), lines=_NONE, sketch=None) for n, x in updates.items()}
                owned.append(served, values, full=False)
            if everything or owned.is_time:
                owned.append({n: self._all(n) for n in owned.tables}, values, full=True, again=not everything)

    def _all(self, name: str) -> ById:
        table, slices = self._owned.tables[name], self._owned.slices[name]
        return _served(of_slots(table, table.residence.map.in_slices(slices), slices, None, sketch=False))


_NONE = torch.empty(0, dtype=torch.int64)


def _served(state: ById) -> ById:
    """What is served of a state."""
    return replace(state, last=None, counts=None, sighted=_NONE)

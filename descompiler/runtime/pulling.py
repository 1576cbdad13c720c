"""A fetch of dynamic tables under way: which keys a rank asks of which owner, and where their rows go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from descompiler.dynamic.table import EVERY_RANK, Table
from descompiler.layout.fetches import Counts, Fetch
from descompiler.layout.keys import ID_BYTES
from descompiler.ops.unique import unique
from descompiler.runtime.agreement import Message
from descompiler.runtime.collectives import Pending
from descompiler.runtime.communicator import Communicator


@dataclass
class Pulling:
    """A fetch of dynamic tables under way: whom this rank asks for which keys, and where their rows go.

    Attributes
    ----------
    positions : list of Tensor
        For each lookup, the place of each of its ids among the rows of its table: those that were asked for, in order
        of owner, then those that every rank holds, then zeros, for padding.
    asked : list of list of Tensor
        ``[table][owner]``: keys.
    shared : list of Tensor
        By table: keys that every rank holds.
    padded : list of bool
        By table: whether it was looked up for padding.
    told : list of int
        What each rank has told: how many keys it sends.
    """

    fetch: Fetch
    positions: list[Tensor]
    asked: list[list[Tensor]]
    shared: list[Tensor]
    padded: list[bool]
    told: list[int] = field(default_factory=list)
    served: list[list[int]] = field(default_factory=list)  # [table][rank]: rows that ranks ask of this one
    theirs: list[list[int]] = field(default_factory=list)  # the same, of keys that every rank holds
    dtypes: list[torch.dtype] = field(default_factory=list)  # of the rows of each table
    wires: list[torch.dtype] = field(default_factory=list)  # that they cross in
    asking: Pending | None = None  # keys
    answering: Pending | None = None  # rows
    returning: Pending | None = None  # gradients of rows

    gathered_told = 0

    @property
    def asked_told(self) -> list[int]:
        """Of each rank: how many keys it is sent."""
        every = sum(map(len, self.shared))
        return [sum(len(keys[r]) for keys in self.asked) + every for r in range(len(self.asked[0]))]

    def hear(self, told: Sequence[Message]) -> None:
        """Take in how many keys each rank sends."""
        self.told = [m.asked for m in told]

    def start(self, runtime: Communicator) -> None:
        """Send each rank the keys that it is asked for, and those that every rank holds."""
        prefix, n = self.fetch.counts_told, runtime.ranks
        shared = [len(keys) for keys in self.shared]
        chunks: list[Tensor] = []
        for r in range(n):
            if prefix:
                counts = [len(keys[r]) for keys in self.asked]
                counts += shared if self.fetch.shares else []
                chunks.append(torch.tensor(counts, dtype=torch.int64))
            for asked, every in zip(self.asked, self.shared, strict=True):
                chunks += [asked[r], every]
        sent, received = ([prefix + x for x in each] for each in (self.asked_told, self.told))
        self.asking = runtime.exchange(torch.cat(chunks).to(runtime.device), sent, received, Fetch.IDS)

    def heard(self) -> list[Tensor]:
        """By table, the keys that ranks ask of this one, in order of rank, then those that every rank holds."""
        assert self.asking is not None
        prefix, tables = self.fetch.counts_told, len(self.asked)
        sizes = [prefix + n for n in self.told]
        asked: list[list[Tensor]] = [[] for _ in range(tables)]
        shared: list[list[Tensor]] = [[] for _ in range(tables)]
        for n, part in zip(self.told, self.asking.wait().to("cpu").split(sizes), strict=True):
            counts = part[:prefix].tolist() if prefix else [n]
            counts += [0] * (2 * tables - len(counts))
            in_order = [counts[of] for t in range(tables) for of in (t, tables + t)]
            chunks = iter(part[prefix:].split(in_order))
            for t in range(tables):
                asked[t].append(next(chunks))
                shared[t].append(next(chunks))
        self.served, self.theirs = ([list(map(len, keys)) for keys in x] for x in (asked, shared))
        return [torch.cat([*asked[t], *shared[t]]) for t in range(tables)]

    def counts(self, table: int, rank: int) -> Counts:
        """Unique ids of a table, as this rank sees them."""
        asked, served = (sum(x) - x[rank] for x in (list(map(len, self.asked[table])), self.served[table]))
        shared = len(self.shared[table])
        return Counts(asked, served, shared, asked * ID_BYTES, shared * ID_BYTES)


def prepare_pull(tables: Mapping[str, Table], fetch: Fetch, ids: Sequence[Tensor], ranks: int) -> Pulling:
    """Deduplicate the ids of all lookups of a fetch, table by table, and find whom to ask."""
    positions = list(ids)
    asked, shared, padded = [], [], []
    for t, of in enumerate(fetch.tables):
        table, mine = tables[of.name], [i for i, x in enumerate(fetch.lookups) if x == t]
        flat = [ids[i].reshape(-1).to("cpu", torch.int64) for i in mine]
        once = unique(flat[0] if len(flat) == 1 else torch.cat(flat))
        keys = table.keys(once.ids)
        owner = table.owner(keys)
        if fetch.shares:
            owner = torch.where(owner == EVERY_RANK, ranks, owner)
        if table.padding_idx is not None:
            owner[once.ids == table.padding_idx] = ranks + 1  # nobody is asked
        order = owner.argsort(stable=True)
        chunks = keys[order].split(torch.bincount(owner, minlength=ranks + 2).tolist())
        asked.append(list(chunks[:ranks]))
        shared.append(chunks[ranks])
        padded.append(len(chunks[ranks + 1]) > 0)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        for i, found in zip(mine, place[once.inverse].split(list(map(len, flat))), strict=True):
            positions[i] = found.view(ids[i].shape).to(ids[i].device)
    return Pulling(fetch, positions, asked, shared, padded)

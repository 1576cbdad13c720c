"""A fetch under way: which unique rows a rank asks of which owner, and where they go in its lookups.

A class is the tables that are alike in `FetchTable.kind`: dim, dtype, and whether trained. Rows of a class are one
tensor: shared ones first, then those of each owner, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from descompiler.layout.fetches import Counts, Fetch
from descompiler.layout.keys import KeySpace
from descompiler.layout.transfer import crosses_in
from descompiler.ops.local import are_alike, rows_at
from descompiler.ops.together import on_device, one_table
from descompiler.ops.unique import unique
from descompiler.runtime.agreement import Message
from descompiler.runtime.collectives import Pending
from descompiler.runtime.differences import decode, differences, encode, sizes_of
from descompiler.runtime.messages import message_dtype, packed, size_in, unpacked


@dataclass
class Fetching:
    """What `prepare` found, what the other ranks ask, and what is still in flight.

    Attributes
    ----------
    positions : list of Tensor
        For each lookup, the place of each of its ids in the rows of its class.
    padding : list of int
        For each table, the place of its padding row; -1 where the batch has none.
    asked, served : list of list of int
        ``[rank][class]``: rows that this rank asks of a rank; that a rank asks of this one.
    asking_ids, gathered_ids : Ids
        Those that it asks for, in order of rank, class, key; and of shared rows whose gradients are gathered.
    """

    fetch: Fetch
    space: KeySpace
    positions: list[Tensor]
    padding: list[int]
    asking_ids: Ids
    gathered_ids: Ids
    asked: list[list[int]]
    shared_keys: list[Tensor]  # by class
    by_table: list[list[int]]  # [table][owner, shared last]: unique keys
    bytes_by_table: list[list[int]]  # of these, as they cross; of shared ones, if they do
    served_counts: list[int] = field(default_factory=list)
    served_bytes: list[int] = field(default_factory=list)
    gathered_counts: list[int] = field(default_factory=list)
    gathered_bytes: list[int] = field(default_factory=list)
    served: list[list[int]] = field(default_factory=list)
    served_keys: list[Tensor] = field(default_factory=list)  # by class, in order of rank, key
    served_of_table: list[int] = field(default_factory=list)  # rows that the other ranks ask of this one
    dtypes: list[torch.dtype] = field(default_factory=list)  # of the rows of each class
    wires: list[torch.dtype] = field(default_factory=list)  # that they cross in
    asking: Pending | None = None  # keys
    answering: Pending | None = None  # rows
    returning: Pending | None = None  # gradients of rows
    telling: Pending | None = None  # shared keys of the other ranks
    gathering: Gathering | None = None
    reducing: list[tuple[Pending, Tensor]] = field(default_factory=list)  # gradients of shared rows, by dtype

    def hear(self, told: Sequence[Message]) -> None:
        """Take in what each rank will ask of this one, and send to it."""
        self.served_counts, self.served_bytes = _told(m.asked for m in told)
        self.gathered_counts, self.gathered_bytes = _told(m.gathered for m in told)

    @property
    def asked_told(self) -> list[int]:
        """Of each rank: how many rows this one asks for, and the bytes of their ids, as one number."""
        return [sum(of) | n << COUNT_BITS for of, n in zip(self.asked, self.asked_bytes, strict=True)]

    @cached_property
    def asked_bytes(self) -> list[int]:
        """Of the ids that each rank is asked for."""
        return [sum(row[r] for row in self.bytes_by_table) for r in range(len(self.asked))]

    @property
    def gathered_told(self) -> int:
        """Shared rows of which this rank will send a gradient to every other rank, and the bytes of their ids."""
        count = sum(len(self.shared_keys[c]) for c in self.fetch.gathered_classes)
        return count | sum(row[-1] for row in self.bytes_by_table) << COUNT_BITS


COUNT_BITS = 32
"""Of a told number: how many ids; above them, in how many bytes."""


def _told(numbers: Iterable[int]) -> tuple[list[int], list[int]]:
    several = list(numbers)
    return [n & (1 << COUNT_BITS) - 1 for n in several], [n >> COUNT_BITS for n in several]


@dataclass
class Ids:
    """Keys that are to cross, as distances, and the bytes of each."""

    distances: Tensor
    sizes: Tensor

    @staticmethod
    def of(keys: Tensor, owner: Tensor, digits: int) -> Ids:
        """Keys in order of their owner."""
        distances = differences(keys, owner)
        return Ids(distances, sizes_of(distances, digits))

    def encoded(self, total: int) -> Tensor:
        """As so many bytes, which is what ``sizes`` add up to."""
        return encode(self.distances, self.sizes, total)


@dataclass
class Gathering:
    """Gradients of shared rows under way: those of the other ranks, and this rank's own."""

    values: Pending
    counts: list[list[int]]  # [rank][class]; none of this rank
    keys: list[tuple[Tensor, ...]]  # [rank][class]; this rank's too
    own: list[Tensor]  # by class


def prepare(fetch: Fetch, ids: Sequence[Tensor], ranks: int) -> Fetching:
    """Deduplicate the ids of all lookups of a fetch, and find where each row is."""
    device = ids[0].device
    space, of_table = fetch.on(device)
    tables, classes = len(fetch.tables), len(fetch.classes)
    sizes = [x.numel() for x in ids]
    once = unique(_keys(fetch, space, ids, sizes))
    owner, key = space.locate(once.ids)
    owner = torch.where(owner < 0, ranks, owner)
    table = torch.searchsorted(space.offsets, once.ids, right=True) - 1
    by_table = torch.bincount(table * (ranks + 1) + owner, minlength=tables * (ranks + 1)).reshape(tables, -1)
    by_class = by_table.new_zeros((classes, ranks + 1)).index_add_(0, of_table, by_table)
    # shared rows first, then the owners' in order
    turn = of_table[table] * (ranks + 1) + torch.where(owner == ranks, 0, owner + 1)
    order = torch.argsort(turn, stable=True)
    ends = by_class.sum(1).cumsum(0)
    place = torch.empty_like(order)
    firsts = ends - by_class.sum(1)
    place[order] = torch.arange(len(order), device=device) - firsts[of_table[table[order]]]
    positions = torch.split(place[once.inverse], sizes)
    counts = by_class.tolist()
    chunks = torch.split(order, [n for row in counts for n in (row[-1], *row[:-1])])
    asked = torch.cat([chunks[c * (ranks + 1) + 1 + r] for r in range(ranks) for c in range(classes)])
    gathered = torch.cat([order[:0], *(chunks[c * (ranks + 1)] for c in fetch.gathered_classes)])
    asking_ids, gathered_ids = (Ids.of(key[at], owner[at], fetch.digits) for at in (asked, gathered))
    id_bytes = by_table.new_zeros(by_table.numel())
    for at, crossing in ((asked, asking_ids), (gathered, gathered_ids)):
        id_bytes.index_add_(0, (table * (ranks + 1) + owner)[at], crossing.sizes)
    return Fetching(
        fetch,
        space,
        [p.reshape(x.shape) for p, x in zip(positions, ids, strict=True)],
        _padding(fetch, space, once.ids, place),
        asking_ids,
        gathered_ids,
        [[counts[c][r] for c in range(classes)] for r in range(ranks)],
        [key[chunks[c * (ranks + 1)]] for c in range(classes)],
        by_table.tolist(),
        id_bytes.reshape(by_table.shape).tolist(),
    )


def _keys(fetch: Fetch, space: KeySpace, ids: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Ids of all lookups, one after another, as keys that tell tables apart."""
    first = space.offsets[on_device(fetch.lookups, space.offsets.device)]
    if are_alike(ids):
        return (torch.stack(list(ids)).view(len(ids), -1).long() + first[:, None]).view(-1)
    lengths = torch.tensor(sizes, device=first.device)
    return torch.cat([x.reshape(-1).long() for x in ids]) + first.repeat_interleave(lengths, output_size=sum(sizes))


def _padding(fetch: Fetch, space: KeySpace, unique: Tensor, place: Tensor) -> list[int]:
    """The place of each table's padding row among the rows of its class; -1 where it isn't asked for."""
    result = [-1] * len(fetch.tables)
    padded = [t for t, x in enumerate(fetch.tables) if x.padding_idx >= 0]
    if padded and len(unique):
        rows = torch.tensor([fetch.tables[t].padding_idx for t in padded], device=unique.device)
        keys = space.offsets[torch.tensor(padded, device=unique.device)] + rows
        index = torch.searchsorted(unique, keys).clamp(max=len(unique) - 1)
        for t, at in zip(padded, torch.where(unique[index] == keys, place[index], -1).tolist(), strict=True):
            result[t] = at
    return result


def table_of(keys: Tensor, bounds: Tensor) -> Tensor:
    """Of which table of a class each key is; ``bounds`` are the tables' first keys, and the end.

    A table without rows here shares its first key with the next: the search finds the last of them, which has rows.
    """
    return torch.searchsorted(bounds, keys, right=True) - 1


def by_table(keys: Tensor, bounds: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """Keys of a class's tables, taken apart: the rows within each table, and the order that they then have (None: as
    they were). ``bounds`` are the tables' first keys, and the end."""
    if len(bounds) == 2:
        return None, [keys - bounds[0]]
    table = table_of(keys, bounds)
    order = torch.argsort(table, stable=True)
    sizes = torch.bincount(table, minlength=len(bounds) - 1).tolist()
    return order, list(torch.split((keys - bounds[table])[order], sizes))


def _read(weights: Sequence[Tensor], keys: Tensor, bounds: Tensor, moves: Sequence[int]) -> Tensor:
    """Rows of a class's tables, in the order of their keys; ``moves`` are the first rows that they have in pieces."""
    held = [w for w in weights if w.shape[0]]
    if held and (one := one_table(held)) is not None:
        whole, begins = one
        begin = iter(begins)  # a table without rows here has no keys
        starts = [move + (next(begin) if w.shape[0] else 0) for w, move in zip(weights, moves, strict=True)]
        shifts = on_device(tuple(starts), keys.device) - bounds[:-1]
        return rows_at(whole, keys + (shifts if len(weights) == 1 else shifts[table_of(keys, bounds)]))
    order, rows = by_table(keys, bounds)
    found = torch.cat([rows_at(w, r + m) for w, r, m in zip(weights, rows, moves, strict=True)])
    return found if order is None else torch.empty_like(found).index_copy_(0, order, found)


def hear_asked(fetching: Fetching, rank: int) -> None:
    """Wait for what each rank asks of this one; once."""
    fetch, ranks = fetching.fetch, len(fetching.asked)
    if fetching.served:
        return
    own = fetching.space.own[rank]
    asked = own.new_empty(0, dtype=torch.uint8) if fetching.asking is None else fetching.asking.wait()
    received = decode(asked, fetching.served_counts, fetch.digits)  # no keys if not divided
    sender = torch.repeat_interleave(torch.tensor(fetching.served_counts, device=received.device))
    table = torch.searchsorted(own, received, right=True) - 1
    _, of_table = fetch.on(received.device)
    cls = of_table[table]
    size, classes = len(fetch.tables), len(fetch.classes)
    counts = torch.bincount(sender * size + table, minlength=ranks * size).reshape(-1, size)
    fetching.served = counts.new_zeros((ranks, classes)).index_add_(1, of_table, counts).tolist()
    fetching.served_keys = [received[cls == c] for c in range(classes)]
    fetching.served_of_table = (counts.sum(0) - counts[rank]).tolist()


def owned_rows(fetching: Fetching, weights: Sequence[Tensor], rank: int, keys: Sequence[Tensor]) -> list[Tensor]:
    """Rows of this rank's pieces, by class, of keys of its own."""
    own, none = fetching.space.own[rank], [0] * len(weights)
    return [
        _read([weights[t] for t in of], k, own[of.start : of.stop + 1], none[: len(of)])
        for of, k in zip(fetching.fetch.classes, keys, strict=True)
    ]


def shared_rows(fetching: Fetching, weights: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Rows that every rank holds, by class, of those that this rank looks up; they follow its own ones."""
    fetch, result = fetching.fetch, []
    for of, keys in zip(fetch.classes, fetching.shared_keys, strict=True):
        sizes = [int(fetch.tables[t].sizes[rank]) for t in of]
        bounds = fetching.space.shared[of.start : of.stop + 1]
        result.append(_read([weights[t] for t in of], keys, bounds, sizes))
    return result


def cross_as(fetching: Fetching, rows: Sequence[Tensor], narrow: torch.dtype | None) -> None:
    """Keep in what dtypes rows of each class are, and cross."""
    fetching.dtypes = [x.dtype for x in rows]
    fetching.wires = [crosses_in(dtype, narrow) for dtype in fetching.dtypes]


def unique_counts(fetching: Fetching, rank: int) -> Iterator[tuple[str, Counts]]:
    """The step's unique ids, of each table, once it is known what is asked of this rank."""
    every = zip(
        fetching.fetch.tables, fetching.by_table, fetching.bytes_by_table, fetching.served_of_table, strict=True
    )
    for table, row, sizes, answered in every:
        asked, asked_bytes = (sum(x[:-1]) - x[rank] for x in (row, sizes))
        yield table.name, Counts(asked, answered, row[-1], asked_bytes, sizes[-1])


def message_sizes(fetching: Fetching, counts: Sequence[Sequence[int]]) -> list[int]:
    """Elements of each rank's part of a message, of ``[rank][class]`` rows."""
    dims, dtypes = fetching.fetch.dims, fetching.wires
    return [size_in(message_dtype(dtypes), (n * d for n, d in zip(row, dims, strict=True)), dtypes) for row in counts]


def dealt(fetching: Fetching, values: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> Tensor:
    """Rows of each class, in order of rank, as one message in order of rank and class."""
    parts = [
        torch.split(v.to(wire), [row[c] for row in counts])
        for c, (v, wire) in enumerate(zip(values, fetching.wires, strict=True))
    ]
    chunks = [p[r] for r in range(len(counts)) for p in parts]
    return packed(chunks, message_dtype(fetching.wires), values[0].device)


def collected(fetching: Fetching, message: Tensor, counts: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """The inverse of `dealt`: by class, the rows ``[n, dim]`` of each rank."""
    dims = fetching.fetch.dims
    sizes = [n * d for row in counts for n, d in zip(row, dims, strict=True)]
    parts = iter(unpacked(message, sizes, fetching.wires * len(counts)))
    result: list[list[Tensor]] = [[] for _ in dims]
    for row in counts:
        for c, (n, d) in enumerate(zip(row, dims, strict=True)):
            result[c].append(next(parts).reshape(n, d).to(fetching.dtypes[c]))
    return result

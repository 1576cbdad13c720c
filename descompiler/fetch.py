"""Fetching: lookups on a rank's own rows of tables that it holds in part, each unique row once.

    ids of all lookups -> unique keys -> [owners] -> rows -> lookups -> ... -> gradient of each unique row -> [owners]

A rank deduplicates its ids over all tables at once, asks each row's owner for it once (one all-to-all of ids, one of
rows for all tables together), looks the rows up as if they were a small table, and so has one summed gradient for each
row, which it sends back once. Rows that every rank holds are read where they are; their gradients are gathered, each
unique row once, or all-reduced. Three forms are made of this: pull (no shared rows), gather (all rows shared) and hot
(both). The results are ordinary `Local` values, so anything may follow them.

Shapes: U unique keys; a class is the tables that are alike in `FetchTable.kind`: dim, dtype, and whether trained. Rows
of a class are one tensor ``[U_c, dim]``: shared ones first, then those of each owner, in order.

Collectives of a step: counts travel with the header, or in a small exchange of their own where ids are computed from
other lookups (`fetch_late`). Forward: ids (shared ones too, if their gradients will be gathered), rows. Backward: rows'
gradients; those of shared rows, or an all-reduce of them. A rank with nothing to ask for takes part in each, in the
same order.

Gradients are averages over ranks: what ranks send is summed, and divided by their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from descompiler import traffic as wire
from descompiler.errors import InputError
from descompiler.fetch_layout import Counts, Fetch
from descompiler.keys import KeySpace
from descompiler.local_operators import bag, lookup
from descompiler.pieces import ALL
from descompiler.runtime import Runtime

if TYPE_CHECKING:
    from torch.distributed import Work

    from descompiler.collectives import Pending


@dataclass
class Fetching:
    """One fetch under way: what `prepare` found, what the other ranks ask, and what is still in flight.

    Attributes
    ----------
    positions : list of Tensor
        For each lookup, the place of each of its ids in the rows of its class.
    padding : list of int
        For each table, the place of its padding row; -1 where the batch has none.
    asked, served : list of list of int
        ``[rank][class]``: rows that this rank asks of a rank; that a rank asks of this one.
    """

    fetch: Fetch
    space: KeySpace
    positions: list[Tensor]
    padding: list[int]
    keys: Tensor  # asked of other ranks, in order of rank, class, key
    asked: list[list[int]]
    shared_keys: list[Tensor]  # by class
    by_table: list[list[int]]  # [table][owner, shared last]: unique keys
    served_counts: list[int] = field(default_factory=list)
    gathered_counts: list[int] = field(default_factory=list)
    served: list[list[int]] = field(default_factory=list)
    served_keys: list[Tensor] = field(default_factory=list)  # by class, in order of rank, key
    asking: Pending | None = None  # keys
    answering: Pending | None = None  # rows
    returning: Pending | None = None  # gradients of rows
    telling: Pending | None = None  # shared keys of the other ranks
    gathering: Gathering | None = None
    reducing: tuple[Work, Tensor] | None = None  # gradients of shared rows

    def asked_counts(self, ranks: int) -> list[int]:
        return [sum(self.asked[r]) for r in range(ranks)]

    @property
    def gathered_count(self) -> int:
        """Shared rows of which this rank will send a gradient to every other rank."""
        return sum(len(self.shared_keys[c]) for c in self.fetch.gathered_classes)


def prepare(fetch: Fetch, ids: Sequence[Tensor], ranks: int) -> Fetching:
    """Deduplicate the ids of all lookups of a fetch, and find where each row is."""
    device = ids[0].device
    space, of_table = fetch.on(device)
    tables, classes = len(fetch.tables), len(fetch.classes)
    parts = [x.reshape(-1).long() + space.offsets[t] for x, t in zip(ids, fetch.lookups, strict=True)]
    unique, inverse = torch.unique(torch.cat(parts), return_inverse=True)
    owner, key = space.locate(unique)
    owner = torch.where(owner < 0, ranks, owner)
    table = torch.searchsorted(space.offsets, unique, right=True) - 1
    by_table = torch.bincount(table * (ranks + 1) + owner, minlength=tables * (ranks + 1)).reshape(tables, -1)
    by_class = by_table.new_zeros((classes, ranks + 1)).index_add_(0, of_table, by_table)
    # shared rows first, then the owners' in order
    turn = of_table[table] * (ranks + 1) + torch.where(owner == ranks, 0, owner + 1)
    order = torch.argsort(turn, stable=True)
    ends = by_class.sum(1).cumsum(0)
    place = torch.empty_like(order)
    firsts = ends - by_class.sum(1)
    place[order] = torch.arange(len(order), device=device) - firsts[of_table[table[order]]]
    positions = torch.split(place[inverse], [len(p) for p in parts])
    counts = by_class.tolist()
    sizes = [n for row in counts for n in (row[-1], *row[:-1])]
    chunks = torch.split(key[order], sizes)
    keys = [chunks[c * (ranks + 1) + 1 + r] for r in range(ranks) for c in range(classes)]
    return Fetching(
        fetch,
        space,
        [p.reshape(x.shape) for p, x in zip(positions, ids, strict=True)],
        _padding(fetch, space, unique, place),
        torch.cat(keys),
        [[counts[c][r] for c in range(classes)] for r in range(ranks)],
        [chunks[c * (ranks + 1)] for c in range(classes)],
        by_table.tolist(),
    )


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


def begin_fetch(runtime: Runtime, rows: int, ids: Sequence[Tensor], fetch_ids: Sequence[Tensor]) -> list[Any]:
    """`Runtime.begin` for programs that fetch: the header carries the counts. Returns the global rows, and a fetch."""
    problem = runtime.problem(ids)
    fetch = runtime.layout.fetches[0]
    fetching = None if problem else prepare(fetch, fetch_ids, runtime.ranks)
    counts = fetching.asked_counts(runtime.ranks) if fetching else None
    received = runtime.header(rows, problem, counts, fetching.gathered_count if fetching else 0)
    assert fetching is not None
    fetching.served_counts, fetching.gathered_counts = received
    return [sum(runtime.rows), fetching]


def fetch_late(runtime: Runtime, number: int, ids: Sequence[Tensor]) -> Fetching:
    """Begin the ``number``-th fetch of a program, whose ids are known only now. Collective; see `_begin_late`."""
    return _begin_late(runtime, runtime.layout.fetches[number], ids)


def _begin_late(runtime: Runtime, fetch: Fetch, ids: Sequence[Tensor]) -> Fetching:
    """Begin a fetch whose ids are known only now: checks them, and exchanges counts. Collective.

    Raises
    ------
    InputError
        On every rank, if the ids of any rank are wrong.
    """
    problem = next(filter(None, (c.problem(x) for c, x in zip(fetch.checks, ids, strict=True))), None)
    ranks, device = runtime.ranks, runtime.header_device()
    fetching = None if problem else prepare(fetch, ids, ranks)
    asked = fetching.asked_counts(ranks) if fetching else [0] * ranks
    gathered = fetching.gathered_count if fetching else 0
    send = torch.tensor([[int(problem is not None), n, gathered] for n in asked], device=device)
    sizes = [send.shape[1]] * ranks
    received = runtime.exchange(send.reshape(-1), sizes, sizes, wire.FETCH_COUNTS).wait().reshape(send.shape)
    status, served, gathering = received.cpu().T.tolist()
    if any(status):
        runtime.raise_everywhere(problem, InputError)
    assert fetching is not None
    fetching.served_counts, fetching.gathered_counts = served, gathering
    return fetching


def fetch_start(runtime: Runtime, fetching: Fetching) -> Fetching:
    """Ask the owners for rows, and tell the other ranks which shared rows will get a gradient."""
    dtype = torch.int32 if fetching.fetch.id_bytes == 4 else torch.int64
    if fetching.fetch.gathered_classes and torch.is_grad_enabled():
        keys = torch.cat([fetching.shared_keys[c] for c in fetching.fetch.gathered_classes]).to(dtype)
        fetching.telling = _to_all(runtime, keys, fetching.gathered_counts, wire.GATHER_IDS)
    if fetching.fetch.divided:
        asked = fetching.asked_counts(runtime.ranks)
        fetching.asking = runtime.exchange(fetching.keys.to(dtype), asked, fetching.served_counts, wire.FETCH_IDS)
    return fetching


def fetch_rows(runtime: Runtime, fetching: Fetching, *weights: Tensor) -> list[Any]:
    """Answer what was asked, from this rank's pieces of the tables of the fetch; the answers are under way."""
    return [fetching, *_FetchRows.apply(runtime, fetching, *weights)]


def fetch_wait(runtime: Runtime, started: list[Any]) -> list[Tensor]:
    """The rows ``[U_c, dim]`` of each class."""
    fetching, buffer, *shared = started
    return list(_FetchWait.apply(runtime, fetching, buffer, *shared))


def take(fetching: Fetching, rows: list[Tensor], index: int, mode: str | None = None) -> Tensor:
    """The result of the ``index``-th lookup of a fetch: ``[*ids, dim]``, or pooled over dim 1."""
    table = fetching.fetch.lookups[index]
    values, padding = rows[fetching.fetch.class_of[table]], fetching.padding[table]
    if mode is None:
        return lookup(values, fetching.positions[index], padding)
    return bag(values, fetching.positions[index], mode, padding if padding >= 0 else None)


def pull(runtime: Runtime, fetch: Fetch, weight: Tensor, ids: Tensor, mode: str | None = None) -> Tensor:
    """One lookup in a divided table, by itself: `fetch` has one table and one lookup (`Fetch.of_table`).

    Collective: every rank calls it, in the same order, also for no ids at all; and every rank runs its backward.

    Parameters
    ----------
    weight : Tensor
        This rank's piece.
    ids : Tensor
        Of own rows; any shape, ``[b, L]`` for a bag.

    Raises
    ------
    InputError
        On every rank, if the ids of any rank are wrong.
    """
    if runtime.ranks == 1:
        padding = fetch.tables[0].padding_idx
        if mode is None:
            return lookup(weight, ids, padding, fetch.tables[0].sparse)
        return bag(weight, ids, mode, padding if padding >= 0 else None, fetch.tables[0].sparse)
    fetching = fetch_start(runtime, _begin_late(runtime, fetch, [ids]))
    return take(fetching, fetch_wait(runtime, fetch_rows(runtime, fetching, weight)), 0, mode)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and gradients, by class


def _by_table(keys: Tensor, bounds: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """Keys of a class's tables, taken apart: the rows within each table, and the order that they then have (None: as
    they were). ``bounds`` are the tables' first keys, and the end."""
    if len(bounds) == 2:
        return None, [keys - bounds[0]]
    table = torch.searchsorted(bounds, keys, right=True) - 1
    # a table without rows here shares its first key with the next: the search finds the last of them, which has rows
    order = torch.argsort(table, stable=True)
    sizes = torch.bincount(table, minlength=len(bounds) - 1).tolist()
    return order, list(torch.split((keys - bounds[table])[order], sizes))


def _read(weights: Sequence[Tensor], keys: Tensor, bounds: Tensor, moves: Sequence[int]) -> Tensor:
    """Rows of a class's tables, in the order of their keys; ``moves`` are the first rows that they have in pieces."""
    order, rows = _by_table(keys, bounds)
    found = torch.cat([w.index_select(0, r + m) for w, r, m in zip(weights, rows, moves, strict=True)])
    return found if order is None else torch.empty_like(found).index_copy_(0, order, found)


def _dealt(values: Sequence[Tensor], counts: Sequence[Sequence[int]], dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """Rows of each class, in order of rank, as one flat buffer in order of rank and class; and its sizes by rank."""
    parts = [torch.split(v.to(dtype), [row[c] for row in counts]) for c, v in enumerate(values)]
    chunks = [p[r].reshape(-1) for r in range(len(counts)) for p in parts]
    sizes = [sum(p[r].numel() for p in parts) for r in range(len(counts))]
    return torch.cat(chunks), sizes


def _collected(buffer: Tensor, counts: Sequence[Sequence[int]], dims: Sequence[int]) -> list[list[Tensor]]:
    """The inverse of `_dealt`: by class, the rows ``[n, dim]`` of each rank."""
    parts = iter(torch.split(buffer, [n * d for row in counts for n, d in zip(row, dims, strict=True)]))
    result: list[list[Tensor]] = [[] for _ in dims]
    for row in counts:
        for c, (n, d) in enumerate(zip(row, dims, strict=True)):
            result[c].append(next(parts).reshape(n, d))
    return result


def _wire_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


class _FetchRows(torch.autograd.Function):
    """Pieces of tables -> the rows that were asked of this rank, under way to who asked; and the shared rows, by class.

    Backward: what the others send back is this rank's pieces' gradient.
    """

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, fetching: Fetching, *weights: Tensor) -> tuple[Tensor, ...]:
        fetch, space, rank = fetching.fetch, fetching.space, runtime.rank
        own = space.own[rank]
        received = fetching.keys if fetching.asking is None else fetching.asking.wait().long()  # no keys if not divided
        sender = torch.repeat_interleave(torch.tensor(fetching.served_counts, device=received.device))
        table = torch.searchsorted(own, received, right=True) - 1
        _, of_table = fetch.on(received.device)
        cls = of_table[table]
        size, classes = len(fetch.tables), len(fetch.classes)
        by_table = torch.bincount(sender * size + table, minlength=runtime.ranks * size).reshape(-1, size)
        served = by_table.new_zeros((runtime.ranks, classes)).index_add_(1, of_table, by_table)
        fetching.served = served.tolist()
        fetching.served_keys = [received[cls == c] for c in range(classes)]
        _record(runtime, fetching, by_table)
        owned, shared = [], []
        for c, members in enumerate(fetch.classes):
            mine = [weights[t] for t in members]
            bounds = slice(members.start, members.stop + 1)
            owned.append(_read(mine, fetching.served_keys[c], own[bounds], [0] * len(members)))
            sizes = [int(fetch.tables[t].sizes[rank]) for t in members]  # shared rows follow the own ones
            shared.append(_read(mine, fetching.shared_keys[c], space.shared[bounds], sizes))
        ctx.runtime, ctx.fetching = runtime, fetching
        ctx.weights = [w.detach() for w in weights]
        if fetch.divided:
            buffer, sent = _dealt(owned, fetching.served, _wire_dtype(weights))
            sizes = [sum(n * d for n, d in zip(row, fetch.dims, strict=True)) for row in fetching.asked]
            fetching.answering = runtime.exchange(buffer, sent, sizes, wire.FETCH_ROWS)
            return fetching.answering.out, *shared
        return shared[0].new_empty(0), *shared

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime, fetching = ctx.runtime, ctx.fetching
        fetch, space, rank = fetching.fetch, fetching.space, runtime.rank
        owned, shared, reduced = _arrived(fetching), _gathered(runtime, fetching), _reduced(fetching)
        result: list[Tensor | None] = [None] * len(fetch.tables)
        for c, members in enumerate(fetch.classes):
            if not fetch.trained[c]:
                continue
            bounds = slice(members.start, members.stop + 1)
            deposits = []  # rows of each table, what is added to them, and whether they are shared rows
            if fetch.divided:
                deposits.append((*_deposited(fetching.served_keys[c], owned[c], space.own[rank][bounds]), False))
            if c in shared:
                deposits.append((*_deposited(*shared[c], space.shared[bounds]), True))
            for i, t in enumerate(members):
                first = int(fetch.tables[t].sizes[rank])
                parts = [(rows[i] + first if late else rows[i], values[i]) for rows, values, late in deposits]
                if t in reduced:
                    parts.append((reduced[t][0] + first, reduced[t][1]))
                padding = fetch.padding_in_piece(t, rank) if fetch.tables[t].sparse else -1
                result[t] = _gradient(ctx.weights[t], fetch.tables[t].sparse, padding, parts, runtime.ranks)
        return None, None, *result


def _deposited(keys: Tensor, values: Tensor, bounds: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of each table of a class, and what is added to them."""
    order, rows = _by_table(keys, bounds)
    ordered = values if order is None else values[order]
    return rows, list(torch.split(ordered, [len(r) for r in rows]))


def _gradient(like: Tensor, sparse: bool, padding: int, parts: Sequence[tuple[Tensor, Tensor]], ranks: int) -> Tensor:
    """The gradient of a piece from rows and what ranks add to them; a sparse one has the rows that were looked up."""
    rows = torch.cat([r for r, _ in parts])
    values = torch.cat([v for _, v in parts]).to(like.dtype) / ranks
    if not sparse:
        return torch.zeros_like(like).index_add_(0, rows, values)
    if padding >= 0:  # an entry would move it: SparseAdam updates every row that has one
        keep = rows != padding
        rows, values = rows[keep], values[keep]
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, like.shape, check_invariants=False).coalesce()


class _FetchWait(torch.autograd.Function):
    """Rows under way, and shared rows -> the rows of each class. Backward: their gradients are under way."""

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, fetching: Fetching, buffer: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        fetch = fetching.fetch
        result = []
        if fetching.answering is not None:
            arrived = fetching.answering.wait()
            for own, parts in zip(shared, _collected(arrived, fetching.asked, fetch.dims), strict=True):
                result.append(torch.cat([own, *(p.to(own.dtype) for p in parts)]))
        else:
            result = [x.view_as(x) for x in shared]
        ctx.runtime, ctx.fetching, ctx.dtype = runtime, fetching, buffer.dtype
        ctx.like = [x.new_zeros(()) for x in (buffer, *shared)], [x.shape for x in (buffer, *shared)]
        ctx.mark_non_differentiable(*(x for x, t in zip(result, fetch.trained, strict=True) if not t))
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime, fetching, dtype = ctx.runtime, ctx.fetching, ctx.dtype
        fetch = fetching.fetch
        own = [g[: len(k)] for g, k in zip(grads, fetching.shared_keys, strict=True)]
        if fetch.divided:
            asked, served = (_trained(fetch, x) for x in (fetching.asked, fetching.served))
            others = [g[len(k) :] for g, k in zip(grads, fetching.shared_keys, strict=True)]
            others = [g if t else g[:0] for g, t in zip(others, fetch.trained, strict=True)]
            buffer, sent = _dealt(others, asked, dtype)
            sizes = [sum(n * d for n, d in zip(row, fetch.dims, strict=True)) for row in served]
            fetching.returning = runtime.exchange(buffer, sent, sizes, wire.FETCH_BACK)
        if fetch.gathered_classes:
            fetching.gathering = _gather(runtime, fetching, own, dtype)
        if fetch.reduced_tables:
            fetching.reducing = _reduce(runtime, fetching, own, dtype)
        # what the pieces get is in the exchanges: the gradients of the buffers themselves are only for the order
        return None, None, *(z.expand(shape) for z, shape in zip(*ctx.like, strict=True))


def _trained(fetch: Fetch, counts: list[list[int]]) -> list[list[int]]:
    return [[n if t else 0 for n, t in zip(row, fetch.trained, strict=True)] for row in counts]


def _arrived(fetching: Fetching) -> list[Tensor]:
    """Gradients of the rows that this rank owns, by class, in the order of `Fetching.served_keys`."""
    if fetching.returning is None:
        return []
    buffer = fetching.returning.wait()
    served = _trained(fetching.fetch, fetching.served)
    return [torch.cat(parts) for parts in _collected(buffer, served, fetching.fetch.dims)]


def _to_all(runtime: Runtime, mine: Tensor, counts: Sequence[int], name: str) -> Pending:
    """What every other rank sends, ``counts`` elements, in order of rank; ``mine`` goes to them.

    An all-to-all: gloo has no all-gather of uneven sizes, and padding would cost bytes.
    """
    sent = [0 if r == runtime.rank else len(mine) for r in range(runtime.ranks)]
    sizes = [0 if r == runtime.rank else n for r, n in enumerate(counts)]
    return runtime.exchange(mine.repeat(runtime.ranks - 1), sent, sizes, name)


@dataclass
class Gathering:
    """Gradients of shared rows under way: those of the other ranks, and this rank's own."""

    values: Pending
    counts: list[list[int]]  # [rank][class]; none of this rank
    keys: list[tuple[Tensor, ...]]  # [rank][class]; this rank's too
    own: list[Tensor]  # by class


def _gather(runtime: Runtime, fetching: Fetching, own: list[Tensor], dtype: torch.dtype) -> Gathering:
    """Send every rank the gradients of the shared rows that this one looked up."""
    fetch, rank = fetching.fetch, runtime.rank
    assert fetching.telling is not None
    received = fetching.telling.wait().long()
    sizes = [0 if r == rank else n for r, n in enumerate(fetching.gathered_counts)]
    firsts = fetching.space.shared[torch.tensor([m.start for m in fetch.classes], device=received.device)]
    counts, keys = [], []
    for part in torch.split(received, sizes):  # in order of class
        ends = [*torch.searchsorted(part, firsts).tolist(), len(part)]
        counts.append([b - a for a, b in itertools.pairwise(ends)])
        keys.append(torch.split(part, counts[-1]))
    keys[rank] = tuple(fetching.shared_keys)
    values = torch.cat([own[c].to(dtype).reshape(-1) for c in fetch.gathered_classes])
    elements = [sum(n * d for n, d in zip(row, fetch.dims, strict=True)) for row in counts]
    return Gathering(_to_all(runtime, values, elements, wire.GATHER_BACK), counts, keys, own)


def _gathered(runtime: Runtime, fetching: Fetching) -> dict[int, tuple[Tensor, Tensor]]:
    """By class, the shared keys of all ranks and their gradients.

    In order of rank everywhere, so that replicas stay equal bit for bit: sums run in the same order.
    """
    g = fetching.gathering
    if g is None:
        return {}
    buffer = g.values.wait()
    collected = _collected(buffer, g.counts, fetching.fetch.dims)
    result = {}
    for c in fetching.fetch.gathered_classes:
        collected[c][runtime.rank] = g.own[c].to(buffer.dtype)
        result[c] = torch.cat([k[c] for k in g.keys]), torch.cat(collected[c])
    return result


def _reduce(runtime: Runtime, fetching: Fetching, own: Sequence[Tensor], dtype: torch.dtype) -> tuple[Work, Tensor]:
    """Sum dense gradients of shared rows over ranks; a table with sparse gradients adds who looked a row up."""
    fetch, shared = fetching.fetch, fetching.space.shared
    parts = []
    for c, members in enumerate(fetch.classes):
        if any(t in fetch.reduced_tables for t in members):
            keys, values = fetching.shared_keys[c] - shared[members.start], own[c].to(dtype)
            if fetch.tables[members.start].sparse:
                values = torch.cat([values, values.new_ones((len(values), 1))], 1)
            rows = sum(int(fetch.tables[t].sizes[ALL]) for t in members)
            parts.append(values.new_zeros((rows, values.shape[1])).index_add_(0, keys, values).reshape(-1))
    flat = torch.cat(parts)
    size = wire.all_reduce_bytes(flat.numel() * flat.element_size(), runtime.ranks)
    work = runtime.collective(wire.SHARED_ROWS, size, lambda: dist.all_reduce(flat, group=runtime.group, async_op=True))
    return work, flat


def _reduced(fetching: Fetching) -> dict[int, tuple[Tensor, Tensor]]:
    """By table, shared rows and their gradients, summed over ranks."""
    if fetching.reducing is None:
        return {}
    work, flat = fetching.reducing
    work.wait()
    fetch = fetching.fetch
    sizes = [int(fetch.tables[t].sizes[ALL]) for t in fetch.reduced_tables]
    widths = [fetch.tables[t].dim + fetch.tables[t].sparse for t in fetch.reduced_tables]
    parts = torch.split(flat, [n * w for n, w in zip(sizes, widths, strict=True)])
    result = {}
    for t, n, w, part in zip(fetch.reduced_tables, sizes, widths, parts, strict=True):
        values, rows = part.reshape(n, w), torch.arange(n, device=flat.device)
        if fetch.tables[t].sparse:
            rows = rows[values[:, -1] > 0]
            values = values[rows, :-1]
        result[t] = rows, values
    return result


def _record(runtime: Runtime, fetching: Fetching, served: Tensor) -> None:
    """Keep the step's unique ids, by table; ``served`` ``[N, T]``."""
    rank = runtime.rank
    others = (served.sum(0) - served[rank]).tolist()
    for table, row, answered in zip(fetching.fetch.tables, fetching.by_table, others, strict=True):
        counts = Counts(sum(row[:-1]) - row[rank], answered, row[-1])
        runtime.unique[table.name] = runtime.unique.get(table.name, Counts()) + counts

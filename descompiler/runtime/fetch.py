"""Fetching: lookups on a rank's own rows of tables that it holds in part, each unique row once.

    ids of all lookups -> unique keys -> [owners] -> rows -> lookups -> ... -> gradient of each unique row -> [owners]

A rank deduplicates its ids over all tables at once, asks each row's owner for it once (one all-to-all of ids, one of
rows for all tables together), looks the rows up as if they were a small table, and so has one summed gradient for each
row, which it sends back once. Rows that every rank holds are read where they are; their gradients are gathered, each
unique row once, or all-reduced. Three forms are made of this: unique_rows (no
shared rows), sparse_all_gather (all rows shared) and hot_rows (both). The results are ordinary `Local` values, so
anything may follow them.

Shapes: U unique keys; a class is the tables that are alike in `FetchTable.kind`: dim, dtype, and whether trained. Rows
of a class are one tensor ``[U_c, dim]``: shared ones first, then those of each owner, in order.

Collectives of a step: counts travel with the header, or in a small exchange of their own where ids are computed from
other lookups (`fetch_late`). Forward: ids (shared ones too, if their gradients will be gathered), rows. Backward: rows'
gradients; those of shared rows, or an all-reduce of them. A rank with nothing to ask for takes part in each, in the
same order.

Gradients are averages over ranks: what ranks send is summed, and divided by their number.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from descompiler.layout.fetches import Fetch
from descompiler.ops.local import are_alike, bag, lookup, rows_at
from descompiler.ops.operation import Operation
from descompiler.ops.together import Mixed, are_updated, gradients_of
from descompiler.ops.unique import unique
from descompiler.runtime.agreement import Message
from descompiler.runtime.backward import differentiable_once, lookups_of
from descompiler.runtime.carriers import carries
from descompiler.runtime.fetching import (
    Fetching,
    by_table,
    collected,
    cross_as,
    dealt,
    hear_asked,
    message_sizes,
    owned_rows,
    prepare,
    shared_rows,
    table_of,
    unique_counts,
)
from descompiler.runtime.pulling import Pulling, prepare_pull
from descompiler.runtime.runtime import Runtime
from descompiler.runtime.shared_rows import (
    gathered_gradients,
    reduced_gradients,
    start_gathering,
    start_reducing,
    to_all,
)

F = TypeVar("F", bound=Fetching | Pulling)


def begin_fetch(runtime: Runtime, rows: int, ids: Sequence[Tensor], fetch_ids: Sequence[Tensor]) -> list[Any]:
    """`Runtime.begin` for programs that fetch: the header carries the counts. Returns the global rows, and a fetch."""
    if (ahead := runtime.take_ahead()) is not None:
        return [sum(runtime.rows), ahead.fetching]
    problem = runtime.problem(ids)
    fetching = None if problem else prepared(runtime, runtime.layout.fetches[0], fetch_ids)
    counts = fetching.asked_told if fetching else None
    received = runtime.header(rows, problem, counts, fetching.gathered_told if fetching else 0)
    assert fetching is not None
    fetching.hear(received)
    return [sum(runtime.rows), fetching]


def prepared(runtime: Runtime, fetch: Fetch, ids: Sequence[Tensor]) -> Fetching | Pulling:
    """What is asked of whom."""
    return (
        prepare_pull(runtime.tables, fetch, ids, runtime.ranks) if fetch.dynamic else prepare(fetch, ids, runtime.ranks)
    )


def fetch_late(runtime: Runtime, number: int, ids: Sequence[Tensor]) -> Fetching | Pulling:
    """Begin the ``number``-th fetch of a program, whose ids are known only now. Collective; see `_begin_late`."""
    return _begin_late(runtime, runtime.layout.fetches[number], ids)


@carries(Fetch)
def _begin_late(runtime: Runtime, fetch: Fetch, ids: Sequence[Tensor]) -> Fetching | Pulling:
    """Begin a fetch whose ids are known only now: checks them, and exchanges counts. Collective.

    Raises
    ------
    InputError
        On every rank, if the ids of any rank are wrong.
    """
    problem = next(filter(None, (c.problem(x) for c, x in zip(fetch.checks, ids, strict=True))), None)
    fetching = None if problem else prepared(runtime, fetch, ids)
    asked = fetching.asked_told if fetching else [0] * runtime.ranks
    gathered = fetching.gathered_told if fetching else 0
    told = runtime.tell(Fetch.COUNTS, [Message(problem is not None, n, gathered) for n in asked], problem)
    assert fetching is not None
    fetching.hear(told)
    return fetching


@carries(Fetch)
def fetch_start(runtime: Runtime, fetching: F) -> F:
    """Ask the owners for rows, and tell the other ranks which shared rows will get a gradient."""
    if runtime.ahead is not None and runtime.ahead.fetching is fetching:
        return fetching
    if isinstance(fetching, Pulling):
        fetching.start(runtime)
        return fetching
    if fetching.fetch.gathered_classes and torch.is_grad_enabled():
        ids = fetching.gathered_ids.encoded(fetching.gathered_bytes[runtime.rank])
        fetching.telling = to_all(runtime, ids, fetching.gathered_bytes, Fetch.GATHERED_IDS)
    if fetching.fetch.divided:
        asked = fetching.asked_bytes
        ids = fetching.asking_ids.encoded(sum(asked))
        fetching.asking = runtime.exchange(ids, asked, fetching.served_bytes, Fetch.IDS)
    return fetching


def fetch_rows(runtime: Runtime, fetching: Fetching, *weights: Tensor) -> list[Any]:
    """Answer what was asked, from this rank's pieces of the tables of the fetch; the answers are under way."""
    return [fetching, *_FetchRows.apply(runtime, fetching, *weights)]


def fetch_wait(runtime: Runtime, started: list[Any]) -> list[Tensor]:
    """The rows ``[U_c, dim]`` of each class."""
    fetching, *shared = started
    return list(_FetchWait.apply(runtime, fetching, *shared))


def take(fetching: Fetching, rows: list[Tensor], index: int, mode: str | None = None) -> Tensor:
    """The result of the ``index``-th lookup of a fetch: ``[*ids, dim]``, or pooled over dim 1."""
    table = fetching.fetch.lookups[index]
    values, padding = rows[fetching.fetch.class_of[table]], fetching.padding[table]
    if mode is None:
        return lookup(values, fetching.positions[index], padding)
    return bag(values, fetching.positions[index], mode, padding if padding >= 0 else None)


def takes(fetching: Fetching, rows: list[Tensor], indices: list[int]) -> tuple[Tensor, ...]:
    """`take` of several lookups of one class, none of a bag: one operator, and one gradient of the class's rows."""
    found: tuple[Tensor, ...] = _take_several(False, fetching, rows, indices)
    return found


def stacked_takes(fetching: Fetching, rows: list[Tensor], indices: list[int]) -> Tensor:
    """`torch.stack` of `takes` along dim 1, made as such."""
    found: Tensor = _take_several(True, fetching, rows, indices)
    return found


def _take_several(stack: bool, fetching: Fetching, rows: list[Tensor], indices: list[int]) -> Any:
    tables = [fetching.fetch.lookups[i] for i in indices]
    (cls,) = {fetching.fetch.class_of[t] for t in tables}
    paddings = sorted({fetching.padding[t] for t in tables} - {-1})
    return _Takes.apply(stack, paddings, rows[cls], *(fetching.positions[i] for i in indices))


class _Takes(Operation):
    """Rows of a class -> lookups in them.

    Backward: one gradient of all rows, where lookups one by one would have one each, of zeros mostly.
    """

    @staticmethod
    def forward(ctx: Any, stack: bool, paddings: list[int], values: Tensor, *positions: Tensor) -> Any:
        ctx.set_materialize_grads(False)  # of a lookup that no loss uses
        ctx.paddings, ctx.shape, ctx.count = paddings, values.shape, len(positions)
        width, alike = values.shape[1], are_alike(positions)
        if stack and alike and positions[0].dim() == 1:
            at = torch.stack(positions, 1)
            ctx.save_for_backward(at)
            return rows_at(values, at.view(-1)).view(*at.shape, width)
        ctx.save_for_backward(*positions)
        found = rows_at(values, torch.cat([x.reshape(-1) for x in positions]))
        parts = found.split([x.numel() for x in positions])
        each = [x.view(*at.shape, width) for x, at in zip(parts, positions, strict=True)]
        return torch.stack(each, 1) if stack else tuple(each)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        positions = ctx.saved_tensors
        if len(grads) < len(positions):  # they were stacked one by one
            grads = (None,) * len(positions) if grads[0] is None else grads[0].unbind(1)
        width = ctx.shape[1]
        came = [(at.reshape(-1), g.reshape(-1, width)) for at, g in zip(positions, grads, strict=True) if g is not None]
        total = None
        if came:
            at, g = came[0] if len(came) == 1 else map(torch.cat, zip(*came, strict=True))
            total = g.new_zeros(ctx.shape).index_add(0, at, g)
            if ctx.paddings:
                total = total.index_fill(0, torch.tensor(ctx.paddings, device=total.device), 0)
        return (None, None, total, *(None,) * ctx.count)


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
    assert isinstance(fetching, Fetching)  # a static table's
    return take(fetching, fetch_wait(runtime, fetch_rows(runtime, fetching, weight)), 0, mode)


@carries(Fetch)
class _FetchRows(Operation):
    """Pieces of tables -> the rows that were asked of this rank, under way to who asked; and the shared rows, by class.

    Backward: what the others send back is this rank's pieces' gradient.
    """

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, fetching: Fetching, *weights: Tensor) -> tuple[Tensor, ...]:
        fetch = fetching.fetch
        hear_asked(fetching, runtime.rank)
        for name, counts in unique_counts(fetching, runtime.rank):
            runtime.count_unique(name, counts)
        owned = owned_rows(fetching, weights, runtime.rank, fetching.served_keys)
        ctx.runtime, ctx.fetching = runtime, fetching
        ctx.weights, ctx.tables = [w.detach() for w in weights], [weakref.ref(w) for w in weights]
        cross_as(fetching, owned, runtime.layout.wire_dtype)
        if fetch.divided:
            rows, served, asked = owned, fetching.served, fetching.asked
            if (early := runtime.early_of(fetching)) is not None:
                runtime.settle()  # it is heard whose rows are as they were sent
                rows, served, asked = early.rest(owned, runtime.changed)
                runtime.beside.add(Fetch.ROWS, early.bytes_in_vain)
            sent, sizes = (message_sizes(fetching, x) for x in (served, asked))
            fetching.answering = runtime.exchange(dealt(fetching, rows, served), sent, sizes, Fetch.ROWS)
        return tuple(shared_rows(fetching, weights, runtime.rank))

    @staticmethod
    @differentiable_once(lambda ctx: lookups_of(ctx.fetching.fetch.checks))
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime, fetching = ctx.runtime, ctx.fetching
        fetch, space, rank = fetching.fetch, fetching.space, runtime.rank
        owned, shared, reduced = _arrived(fetching), gathered_gradients(runtime, fetching), reduced_gradients(fetching)
        result: list[Tensor | None] = [None] * len(fetch.tables)
        for c, members in enumerate(fetch.classes):
            if not fetch.trained[c]:
                continue
            bounds = slice(members.start, members.stop + 1)
            of_owned_alone = fetch.divided and c not in shared and reduced.keys().isdisjoint(members)
            if of_owned_alone and fetch.tables[members.start].sparse:
                result[members.start : members.stop] = _sparse_gradients(ctx, c, owned[c])
                continue
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


def _sparse_gradients(ctx: Any, c: int, values: Tensor) -> list[Tensor | None]:
    """Gradients of a class's tables, from those of the rows that this rank was asked for; None: an optimiser has them.

    The rows of all tables are sorted together.
    """
    runtime, fetching = ctx.runtime, ctx.fetching
    fetch, rank, members = fetching.fetch, runtime.rank, fetching.fetch.classes[c]
    bounds, keys = fetching.space.own[rank][members.start : members.stop + 1], fetching.served_keys[c]
    weights, tables = (x[members.start : members.stop] for x in (ctx.weights, ctx.tables))
    values = values.to(weights[0].dtype) / runtime.ranks
    which = table_of(keys, bounds)
    rows = keys - bounds[which]
    paddings = [fetch.padding_in_piece(t, rank) for t in members]
    if max(paddings) >= 0:  # an entry would move it: SparseAdam updates every row that has one
        kept = rows != torch.tensor(paddings, device=rows.device)[which]
        keys, which, rows, values = keys[kept], which[kept], rows[kept], values[kept]
    if are_updated(ctx, members, [Mixed([t() for t in tables], which, rows, values)]):
        return [None] * len(members)
    once = unique(keys)
    return [*gradients_of(tables, [w.shape for w in weights], bounds.tolist(), once.ids, once.sums(values))]


def _deposited(keys: Tensor, values: Tensor, bounds: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of each table of a class, and what is added to them."""
    order, rows = by_table(keys, bounds)
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


@carries(Fetch)
class _FetchWait(Operation):
    """Rows under way, and shared rows -> the rows of each class. Backward: their gradients are under way."""

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, fetching: Fetching, *shared: Tensor) -> tuple[Tensor, ...]:
        fetch = fetching.fetch
        if fetching.answering is not None:
            arrived = fetching.answering.wait()
            runtime.rows_have_come()
            early = runtime.early_of(fetching)
            every = collected(fetching, arrived, fetching.asked) if early is None else early.with_rest(arrived)
            result = [torch.cat([own, *parts]) for own, parts in zip(shared, every, strict=True)]
        else:
            result = [x.view_as(x) for x in shared]
        ctx.runtime, ctx.fetching = runtime, fetching
        ctx.like = [x.new_zeros(()) for x in shared], [x.shape for x in shared]
        ctx.mark_non_differentiable(*(x for x, t in zip(result, fetch.trained, strict=True) if not t))
        return tuple(result)

    @staticmethod
    @differentiable_once(lambda ctx: lookups_of(ctx.fetching.fetch.checks))
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime, fetching = ctx.runtime, ctx.fetching
        fetch = fetching.fetch
        own = [g[: len(k)] for g, k in zip(grads, fetching.shared_keys, strict=True)]
        if fetch.divided:
            asked, served = (_counts_of_trained(fetch, x) for x in (fetching.asked, fetching.served))
            others = [g[len(k) :] for g, k in zip(grads, fetching.shared_keys, strict=True)]
            others = [g if t else g[:0] for g, t in zip(others, fetch.trained, strict=True)]
            sent, sizes = (message_sizes(fetching, x) for x in (asked, served))
            fetching.returning = runtime.exchange(dealt(fetching, others, asked), sent, sizes, Fetch.BACK)
        if fetch.gathered_classes:
            fetching.gathering = start_gathering(runtime, fetching, own)
        if fetch.reduced_tables:
            fetching.reducing = start_reducing(runtime, fetching, own)
        # what the pieces get is in the exchanges: the gradients of the shared rows are only for the order
        return None, None, *(z.expand(shape) for z, shape in zip(*ctx.like, strict=True))


def _counts_of_trained(fetch: Fetch, counts: list[list[int]]) -> list[list[int]]:
    return [[n if t else 0 for n, t in zip(row, fetch.trained, strict=True)] for row in counts]


def _arrived(fetching: Fetching) -> list[Tensor]:
    """Gradients of the rows that this rank owns, by class, in the order of `Fetching.served_keys`."""
    if fetching.returning is None:
        return []
    served = _counts_of_trained(fetching.fetch, fetching.served)
    return [torch.cat(parts) for parts in collected(fetching, fetching.returning.wait(), served)]

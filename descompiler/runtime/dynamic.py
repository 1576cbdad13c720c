"""Dynamic tables in a step: what a rank's program looks up in tables whose rows come and go on their owners.

    in the region      ids of the global batch are here: rows of those that this rank owns, zeros for the others'
    on own rows        unique keys -> [owners] -> rows -> lookups -> ... -> gradient of each row -> [owners]

Only owners know who is resident, so keys cross whole: they are the ids, mixed (`descompiler.dynamic.hashing.mix`). All
tables of a fetch share its exchanges, and how many keys are asked for travels with the header, as those of static
tables do (`descompiler.runtime.fetch`).

Slices that every rank holds are the same table on each: all ranks look up what any of them does, and add up the
gradients of all, in the order of the ranks. So a rank tells every other one which keys it looks up there, beside those
that it asks of that one, and sends them its gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from descompiler.layout.fetches import Fetch
from descompiler.layout.transfer import crosses_in
from descompiler.ops.local import lookup, pool
from descompiler.ops.operation import Operation
from descompiler.runtime.backward import differentiable_once, lookups_of
from descompiler.runtime.carriers import carries
from descompiler.runtime.collectives import Pending
from descompiler.runtime.messages import message_dtype, packed, size_in, unpacked
from descompiler.runtime.pulling import Pulling
from descompiler.runtime.runtime import Runtime


def look_up_dynamic(runtime: Runtime, name: str, weight: Tensor, ids: Tensor, create: bool) -> Tensor:
    """Rows of the ids that this rank owns, zeros for the others' and for padding.

    Parameters
    ----------
    name : str
        Of the table's weight.
    weight : Tensor
        The weight as the program has it: gradients go to it.
    ids : Tensor
        Of any shape.
    create : bool
        Whether ids are sighted, and get rows.
    """
    runtime.settle()  # who enters rows knows that all ranks go on
    flat = ids.reshape(-1).to("cpu", torch.int64)
    rows = runtime.tables[name].look_up_owned(flat, create=create, weight=weight)
    return rows.view(*ids.shape, rows.shape[1])


def pull_rows(runtime: Runtime, pulling: Pulling, creates: Sequence[bool], *weights: Tensor) -> list[Any]:
    """Answer what was asked, from this rank's parts of the tables; the answers are under way.

    Parameters
    ----------
    creates : sequence of bool
        Of each table, whether ids are sighted, and get rows.
    """
    runtime.settle()
    keys = pulling.heard()
    for i, t in enumerate(pulling.fetch.tables):
        runtime.count_unique(t.name, pulling.counts(i, runtime.rank))
    every = zip(pulling.fetch.tables, keys, creates, weights, strict=True)
    found = [runtime.tables[t.name].look_up_keys(k, create=create, weight=w) for t, k, create, w in every]
    return [pulling, *_PullRows.apply(runtime, pulling, *found)]


def pull_wait(runtime: Runtime, started: list[Any]) -> list[Tensor]:
    """The rows of each table, in the order of `Pulling.positions`."""
    pulling, *shared = started
    rows = _PullWait.apply(runtime, pulling, *shared)
    return [
        torch.cat([x, x.new_zeros(1, x.shape[1])]) if padded else x
        for x, padded in zip(rows, pulling.padded, strict=True)
    ]


def take_pulled(pulling: Pulling, rows: list[Tensor], index: int, mode: str | None) -> Tensor:
    """The result of the ``index``-th lookup of a fetch: ``[*ids, dim]``, or pooled over dim 1."""
    places = pulling.positions[index]
    found = lookup(rows[pulling.fetch.lookups[index]], places)
    return found if mode is None else pool(found, places, mode, None)


@carries(Fetch)
class _PullRows(Operation):
    """Rows of what `Pulling.heard` tells -> under way to who asked; those of this rank's keys that every rank holds.

    Backward: what the others send back is the gradient of all of them, averaged.
    """

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, pulling: Pulling, *found: Tensor) -> tuple[Tensor, ...]:
        ctx.runtime, ctx.pulling = runtime, pulling
        pulling.dtypes = [x.dtype for x in found]
        pulling.wires = [crosses_in(dtype, runtime.layout.wire_dtype) for dtype in pulling.dtypes]
        parts = [x.split([*a, *s]) for x, a, s in zip(found, pulling.served, pulling.theirs, strict=True)]
        chunks = [[[p[r]] for p in parts] for r in range(runtime.ranks)]
        received = [[[len(keys[r])] for keys in pulling.asked] for r in range(runtime.ranks)]
        pulling.answering = _exchange(runtime, pulling, chunks, received, Fetch.ROWS)
        return tuple(p[runtime.ranks + runtime.rank].clone() for p in parts)

    @staticmethod
    @differentiable_once(lambda ctx: lookups_of(ctx.pulling.fetch.checks))
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime, pulling = ctx.runtime, ctx.pulling
        assert pulling.returning is not None
        of_ranks = _arrived(pulling, pulling.returning, _returned(pulling))
        result: list[Tensor | None] = []
        for t, of in enumerate(pulling.fetch.tables):
            parts = [of_ranks[r][t] for r in range(runtime.ranks)]
            each = [p[0] for p in parts] + [p[1] for p in parts]
            result.append(torch.cat(each) / runtime.ranks if of.trained else None)
        return None, None, *result


@carries(Fetch)
class _PullWait(Operation):
    """Rows under way, and this rank's of those that every rank holds -> the rows of each table.

    Backward: their gradients are under way.
    """

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, pulling: Pulling, *shared: Tensor) -> tuple[Tensor, ...]:
        assert pulling.answering is not None
        received = [[[len(keys[r])] for keys in pulling.asked] for r in range(runtime.ranks)]
        of_ranks = _arrived(pulling, pulling.answering, received)
        result = [torch.cat([*(parts[t][0] for parts in of_ranks), x]) for t, x in enumerate(shared)]
        ctx.runtime, ctx.pulling = runtime, pulling
        ctx.like = [x.new_zeros(()) for x in shared], [x.shape for x in shared]
        trained = [t.trained for t in pulling.fetch.tables]
        ctx.mark_non_differentiable(*(x for x, t in zip(result, trained, strict=True) if not t))
        return tuple(result)

    @staticmethod
    @differentiable_once(lambda ctx: lookups_of(ctx.pulling.fetch.checks))
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime, pulling = ctx.runtime, ctx.pulling
        parts = [g.split([*map(len, a), len(s)]) for g, a, s in zip(grads, pulling.asked, pulling.shared, strict=True)]
        trained = [t.trained for t in pulling.fetch.tables]
        chunks = [
            [[p[r], p[-1]] if x else [p[r][:0], p[-1][:0]] for p, x in zip(parts, trained, strict=True)]
            for r in range(runtime.ranks)
        ]
        pulling.returning = _exchange(runtime, pulling, chunks, _returned(pulling), Fetch.BACK)
        # what the tables get is in the exchange: the gradients here are only for the order
        return None, None, *(z.expand(shape) for z, shape in zip(*ctx.like, strict=True))


def _returned(pulling: Pulling) -> list[list[list[int]]]:
    """``[rank][table]``: rows of which a rank sends gradients, those that it has asked for, and of those that all
    hold."""
    every = list(zip(pulling.fetch.tables, pulling.served, pulling.theirs, strict=True))
    return [[[a[r], s[r]] if of.trained else [0, 0] for of, a, s in every] for r in range(len(pulling.told))]


def _exchange(
    runtime: Runtime,
    pulling: Pulling,
    chunks: Sequence[Sequence[Sequence[Tensor]]],
    received: Sequence[Sequence[Sequence[int]]],
    name: str,
) -> Pending:
    """Send ``chunks[r]``, by table, to rank r, and get so many rows of each table from it."""
    wires = pulling.wires
    dtype = message_dtype(wires)
    sent = [x.to(wire) for parts in chunks for of, wire in zip(parts, wires, strict=True) for x in of]
    counts = [[sum(x.numel() for x in of) for of in parts] for parts in chunks]
    dims = [t.dim for t in pulling.fetch.tables]
    coming = [[sum(n) * d for n, d in zip(parts, dims, strict=True)] for parts in received]
    out, back = ([size_in(dtype, of, wires) for of in each] for each in (counts, coming))
    return runtime.exchange(packed(sent, dtype, runtime.device), out, back, name)


def _arrived(
    pulling: Pulling, under_way: Pending, received: Sequence[Sequence[Sequence[int]]]
) -> list[list[list[Tensor]]]:
    """What has come of `_exchange`: ``[rank][table]``, in as many parts as ``received`` has."""
    dims = [t.dim for t in pulling.fetch.tables]
    each = [(n, d, t) for parts in received for t, (of, d) in enumerate(zip(parts, dims, strict=True)) for n in of]
    flat = unpacked(under_way.wait(), [n * d for n, d, _ in each], [pulling.wires[t] for *_, t in each])
    rows = iter([x.reshape(n, d).to(pulling.dtypes[t]) for x, (n, d, t) in zip(flat, each, strict=True)])
    return [[list(itertools.islice(rows, len(of))) for of in parts] for parts in received]

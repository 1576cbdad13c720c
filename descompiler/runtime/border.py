"""The border of the region in autograd: values out of it, and their gradients back.

The order of collectives in backward has to be the same on every rank: the anchor makes backward come to the exchange
where a rank owns nothing, and the all-reduce of the columns that all ranks share waits for it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from descompiler.layout.border import Exit, SharedColumns, ValuesOut
from descompiler.layout.transfer import crosses_in
from descompiler.ops.operation import Operation
from descompiler.ops.together import Part, are_updated
from descompiler.runtime.agreement import Agreement
from descompiler.runtime.backward import differentiable_once, lookups_of
from descompiler.runtime.carriers import carries
from descompiler.runtime.collectives import Pending
from descompiler.runtime.messages import message_dtype, packed, size_in, unpacked


@dataclass
class Handle:
    """One exchange under way."""

    forward: Pending | None = None
    sizes: tuple[Any, ...] = ()
    backward: Pending | None = None


@carries(ValuesOut)
class ExitStart(Operation):
    """``covers``: the ranks whose rows are in each value, one after another. Wider values are rounded to ``narrow``.

    What it returns has no numbers: it is for the order, and `ExitWait` has what arrives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        runtime: Agreement,
        out: ValuesOut,
        handle: Handle,
        covers: Sequence[Sequence[int]],
        narrow: torch.dtype | None,
        anchor: Tensor,
        *values: Tensor,
    ) -> Tensor:
        ctx.runtime, ctx.handle, ctx.rows, ctx.covers = runtime, handle, list(runtime.rows), covers
        ctx.like = [(v.shape[1:], v.dtype, crosses_in(v.dtype, narrow)) for v in values]
        ctx.anchor = anchor
        dtypes = [crosses_in(runtime.dtype_of(e.wire_dtype), narrow) for e in out.exits]
        dtype = message_dtype(dtypes) if dtypes else runtime.wire_dtype
        chunks: list[list[Tensor]] = [[] for _ in ctx.rows]
        for v, ranks, (_, _, wire) in zip(values, covers, ctx.like, strict=True):
            for r, part in zip(ranks, torch.split(v.to(wire), [ctx.rows[r] for r in ranks]), strict=True):
                chunks[r].append(part.reshape(-1))
        send = packed([c for of_rank in chunks for c in of_rank], dtype, runtime.device)
        mine = ctx.rows[runtime.rank]
        received = [mine * size_in(dtype, (e.width(r) for e in out.exits), dtypes) for r in range(runtime.ranks)]
        sent = [size_in(dtype, (c.numel() for c in of_rank), (c.dtype for c in of_rank)) for of_rank in chunks]
        handle.forward = runtime.exchange(send, sent, received, out.SEND)
        handle.sizes = received, sent
        return anchor.new_zeros(())

    @staticmethod
    @differentiable_once(lambda ctx: lookups_of(ctx.runtime.checks))
    def backward(ctx: Any, *grads: Any) -> Any:
        buffer = ctx.handle.backward.wait()
        like, pieces = ctx.like, [list[Tensor]() for _ in ctx.like]
        here = [(i, r) for r in range(len(ctx.rows)) for i, ranks in enumerate(ctx.covers) if r in ranks]
        counts = [ctx.rows[r] * like[i][0].numel() for i, r in here]
        parts = unpacked(buffer, counts, [like[i][2] for i, _ in here])
        for (i, r), part in zip(here, parts, strict=True):
            pieces[i].append(part.reshape(ctx.rows[r], *like[i][0]))
        # Gradients are averaged over ranks; what the region's owner receives is the sum.
        result = [torch.cat(p).to(dtype).div_(ctx.runtime.ranks) for p, (_, dtype, _) in zip(pieces, like, strict=True)]
        return None, None, None, None, None, torch.zeros_like(ctx.anchor), *result


@carries(ValuesOut)
class ExitWait(Operation):
    """What arrives, ``counts`` elements of some ``dtypes``: those of each dtype, one after another, by dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        runtime: Agreement,
        handle: Handle,
        counts: Sequence[int],
        dtypes: Sequence[torch.dtype],
        started: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.runtime, ctx.handle, ctx.counts, ctx.dtypes = runtime, handle, counts, dtypes
        ctx.started = started.new_zeros(())
        assert handle.forward is not None
        arrived = handle.forward.wait()
        if len(kinds := list(dict.fromkeys(dtypes))) < 2:
            return (arrived.detach(),)  # another tensor: what ctx holds must not have ctx in its history
        parts = unpacked(arrived, counts, dtypes)
        return tuple(torch.cat([p for p in parts if p.dtype == kind]) for kind in kinds)

    @staticmethod
    @differentiable_once(lambda ctx: lookups_of(ctx.runtime.checks))
    def backward(ctx: Any, *grads: Any) -> Any:
        flat = grads[0].contiguous()
        if len(grads) > 1:
            flat = packed(apart(grads, ctx.counts, ctx.dtypes), message_dtype(ctx.dtypes), flat.device)
        received, sent = ctx.handle.sizes
        # the transposed exchange: what was received is sent back
        ctx.handle.backward = ctx.runtime.exchange(flat, received, sent, ValuesOut.BACK)
        return None, None, None, None, ctx.started


def apart(buffers: Sequence[Tensor], counts: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Flat values of ``counts`` elements, in order, from those of each of their dtypes, one after another."""
    every = list(zip(counts, dtypes, strict=True))
    queues = {b.dtype: iter(b.split([n for n, dtype in every if dtype == b.dtype])) for b in buffers} if every else {}
    return [next(queues[dtype]) for dtype in dtypes]


def put_together(e: Exit, parts: dict[int, Tensor]) -> Tensor:
    if e.division is None:
        ordered = [parts[r] for r in sorted(parts)]
        if ordered[0].element_size() == 2:  # a sum of so few bits is rounded once, as in one process
            return torch.stack(ordered).sum(0)
        return functools.reduce(torch.add, ordered)
    ranges = e.division.pairs
    if len(parts) == 1 and all(owner in parts for _, owner in ranges):
        return next(iter(parts.values()))
    sizes = {r: [x.size for x in e.division.of_owner(r)] for r in parts}
    queues = {r: iter(torch.split(p, sizes[r], e.dim)) for r, p in parts.items()}
    return torch.cat([next(queues[owner]) for _, owner in ranges if owner in queues], e.dim)


class Anchor(Operation):
    """Identity; weights get zeros in a layout, or nothing (None)."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kinds: Sequence[torch.layout | None], *weights: Tensor) -> Tensor:
        ctx.like = [(w.shape, w.dtype, w.device, k) for k, w in zip(kinds, weights, strict=True)]
        ctx.sparse = [(i, weakref.ref(w)) for i, w in enumerate(weights) if kinds[i] is torch.sparse_coo]
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        result = [None if like[3] in (None, torch.sparse_coo) else _zeros(*like) for like in ctx.like]
        nothing: dict[Any, Any] = {}
        found = []
        for i, table in ctx.sparse:
            shape, dtype, device, _ = ctx.like[i]
            if (key := (shape[1:], dtype, device)) not in nothing:
                nothing[key] = _no_rows(shape, dtype, device)
            found.append((1 + i, Part.of(table(), *nothing[key])))  # behind the anchor
        if found and not are_updated(ctx, [i for i, _ in found], [part for _, part in found]):
            for i, _ in ctx.sparse:
                result[i] = _zeros(*ctx.like[i])
        return grads[0], None, *result


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device, kind: torch.layout | None) -> Tensor | None:
    """No gradient's values: zeros; of a sparse one no rows, each a tensor as those of other gradients of its kind."""
    if kind is None or kind is torch.strided:
        return None if kind is None else torch.zeros(shape, dtype=dtype, device=device)
    rows, values = _no_rows(shape, dtype, device)
    return torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=False)


def _no_rows(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and gradients of none of a table's rows."""
    return torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, *shape[1:], dtype=dtype, device=device)


@carries(SharedColumns)
class ReduceShared(Operation):
    """Identity; in backward an all-reduce of all slices' gradients of each dtype.

    The anchor that it returns feeds the exchange, so that on every rank the exchange's backward comes first: the order
    of collectives has to be the same everywhere.
    """

    @staticmethod
    def forward(ctx: Any, runtime: Agreement, anchor: Tensor, *slices: Tensor) -> tuple[Tensor, ...]:
        ctx.runtime = runtime
        return tuple(x.view_as(x) for x in (anchor, *slices))

    @staticmethod
    @differentiable_once("columns of weights that every rank holds")
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime = ctx.runtime
        anchor, *rest = grads
        sums = []
        for dtype in dict.fromkeys(g.dtype for g in rest):
            flat = torch.cat([g.reshape(-1) for g in rest if g.dtype == dtype])
            runtime.all_reduce(SharedColumns.AVERAGE, flat)
            sums.append(flat.div_(runtime.ranks))
        parts = apart(sums, [g.numel() for g in rest], [g.dtype for g in rest])
        return None, anchor, *(p.reshape(g.shape) for p, g in zip(parts, rest, strict=True))

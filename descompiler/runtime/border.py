"""The border of the region in autograd: values out of it, and their gradients back.

The order of collectives in backward has to be the same on every rank: the anchor makes backward come to the exchange
where a rank owns nothing, and the all-reduce of the columns that all ranks share waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from descompiler.layout.border import Exit, SharedColumns, ValuesOut
from descompiler.runtime.agreement import Agreement
from descompiler.runtime.carriers import carries
from descompiler.runtime.collectives import Pending


@dataclass
class Handle:
    """One exchange under way."""

    forward: Pending | None = None
    sizes: tuple[Any, ...] = ()
    backward: Pending | None = None


@carries(ValuesOut)
class ExitStart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, runtime: Agreement, out: ValuesOut, handle: Handle, anchor: Tensor, *values: Tensor
    ) -> Tensor:
        ctx.runtime, ctx.handle, ctx.rows = runtime, handle, list(runtime.rows)
        ctx.shapes = [(v.shape[1:], v.dtype) for v in values]
        ctx.anchor = anchor
        dtype, width = runtime.wire_dtype, sum(v.shape[1:].numel() for v in values)
        parts = [torch.split(v.to(dtype), ctx.rows) for v in values]
        chunks = [p[r].reshape(-1) for r in range(runtime.ranks) for p in parts]
        send = torch.cat(chunks) if chunks else torch.empty(0, dtype=dtype, device=runtime.device)
        mine = ctx.rows[runtime.rank]
        received = [mine * sum(e.width(r) for e in out.exits) for r in range(runtime.ranks)]
        ctx.received, ctx.sent = received, [b * width for b in ctx.rows]
        handle.forward = runtime.exchange(send, ctx.sent, received, out.SEND)
        handle.sizes = (ctx.received, ctx.sent)
        return handle.forward.out.detach()  # another tensor: what ctx holds must not have ctx in its history

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        buffer = ctx.handle.backward.wait()
        widths = [shape.numel() for shape, _ in ctx.shapes]
        parts = torch.split(buffer, [b * w for b in ctx.rows for w in widths])
        result = []
        for i, (shape, dtype) in enumerate(ctx.shapes):
            pieces = [p.reshape(b, *shape) for b, p in zip(ctx.rows, parts[i :: len(widths)], strict=True)]
            # Gradients are averaged over ranks; what the region's owner receives is the sum.
            result.append(torch.cat(pieces).div_(ctx.runtime.ranks).to(dtype))
        return None, None, None, torch.zeros_like(ctx.anchor), *result


@carries(ValuesOut)
class ExitWait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, runtime: Agreement, handle: Handle, rows: list[int], buffer: Tensor) -> Tensor:
        ctx.runtime, ctx.handle = runtime, handle
        assert handle.forward is not None
        handle.forward.wait()
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        received, sent = ctx.handle.sizes
        # the transposed exchange: what was received is sent back
        ctx.handle.backward = ctx.runtime.exchange(grad.contiguous(), received, sent, ValuesOut.BACK)
        return None, None, None, grad


def put_together(e: Exit, parts: dict[int, Tensor]) -> Tensor:
    if e.division is None:
        ordered = [parts[r] for r in sorted(parts)]
        return functools.reduce(torch.add, ordered)
    ranges = e.division.pairs
    if len(parts) == 1 and all(owner in parts for _, owner in ranges):
        return next(iter(parts.values()))
    sizes = {r: [x.size for x in e.division.of_owner(r)] for r in parts}
    queues = {r: iter(torch.split(p, sizes[r], e.dim)) for r, p in parts.items()}
    return torch.cat([next(queues[owner]) for _, owner in ranges if owner in queues], e.dim)


class Anchor(torch.autograd.Function):
    """Identity; weights get zeros in a layout, or nothing (None)."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kinds: Sequence[torch.layout | None], *weights: Tensor) -> Tensor:
        ctx.like = [(w.shape, w.dtype, w.device, k) for k, w in zip(kinds, weights, strict=True)]
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        zeros = [k if k is None else torch.zeros(s, dtype=t, device=d, layout=k) for s, t, d, k in ctx.like]
        return grads[0], None, *zeros


@carries(SharedColumns)
class ReduceShared(torch.autograd.Function):
    """Identity; in backward one all-reduce of all slices' gradients.

    The anchor that it returns feeds the exchange, so that on every rank the exchange's backward comes first: the order
    of collectives has to be the same everywhere.
    """

    @staticmethod
    def forward(ctx: Any, runtime: Agreement, anchor: Tensor, *slices: Tensor) -> tuple[Tensor, ...]:
        ctx.runtime = runtime
        return tuple(x.view_as(x) for x in (anchor, *slices))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime = ctx.runtime
        anchor, *rest = grads
        flat = torch.cat([g.reshape(-1) for g in rest])
        runtime.all_reduce(SharedColumns.AVERAGE, flat)
        flat /= runtime.ranks
        parts = torch.split(flat, [g.numel() for g in rest])
        return None, anchor, *(p.reshape(g.shape) for p, g in zip(parts, rest, strict=True))

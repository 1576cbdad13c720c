"""Values that every rank has, in autograd: gathered, summed over ranks, cut to own rows; tables that are used whole.

What is computed from gathered and summed values has equal gradients on every rank, so only the borders of that
computation send anything in backward: see `descompiler.classify.coupling`.

Gradients of gradients (a penalty on the gradient of an input) are exact: the backward of each function here is made of
these functions, of which gather and slice, and reduce and spread, are each other's. What pieces of tables get is not
differentiated again (`descompiler.runtime.backward.differentiable_once`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from descompiler.layout.global_values import (
    SUMS_DTYPE,
    GatherRows,
    NormOutside,
    SliceRows,
    SpreadValue,
    SumTerms,
    TableTotal,
    WholeTables,
)
from descompiler.layout.rows import Rows
from descompiler.ops.local import differentiable, widest
from descompiler.ops.operation import Operation
from descompiler.runtime.agreement import Agreement
from descompiler.runtime.backward import differentiable_once
from descompiler.runtime.carriers import carries
from descompiler.runtime.messages import message_dtype, packed, size_in, unpacked


@carries(GatherRows)
class Gather(Operation):
    @staticmethod
    def forward(
        ctx: Any, runtime: Agreement, name: str, rows: Sequence[int], layouts: list[Rows], *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.runtime, ctx.rows, ctx.layouts = runtime, rows, layouts
        ctx.set_materialize_grads(False)  # no rank's loss uses what is made of one that has none
        leading = [r.lead(x) for r, x in zip(layouts, values, strict=True)]
        wholes = _gather_rows(runtime, rows, leading, name)
        result = tuple(r.restore(x) for r, x in zip(layouts, wholes, strict=True))
        ctx.mark_non_differentiable(*(x for x in result if not differentiable(x)))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pairs = zip(ctx.layouts, grads, strict=True)
        own = (None if g is None else Slice.apply(ctx.runtime, ctx.rows, r, g) for r, g in pairs)
        return None, None, None, None, *own


@carries(SumTerms)
class ReduceTerms(Operation):
    @staticmethod
    def forward(ctx: Any, runtime: Agreement, name: str, *terms: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([x.reshape(-1) for x in terms])
        runtime.all_reduce(name, flat)
        parts = torch.split(flat, [x.numel() for x in terms])
        result = tuple(p.reshape(x.shape) for p, x in zip(parts, terms, strict=True))
        ctx.runtime = runtime
        ctx.mark_non_differentiable(*(x for x in result if not differentiable(x)))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, *(Spread.apply(ctx.runtime, g) for g in grads)


@carries(SliceRows)
class Slice(Operation):
    @staticmethod
    def forward(ctx: Any, runtime: Agreement, rows: Sequence[int], layout: Rows, x: Tensor) -> Tensor:
        ctx.runtime, ctx.rows, ctx.layout = runtime, rows, layout
        ctx.set_materialize_grads(False)  # no rank's loss uses an output that has none
        return layout.narrow(x, sum(rows[: runtime.rank]), rows[runtime.rank]).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None, None, None
        (whole,) = Gather.apply(ctx.runtime, SliceRows.BACK, ctx.rows, [ctx.layout], *grads)
        return None, None, None, whole


@carries(SpreadValue)
class Spread(Operation):
    @staticmethod
    def forward(ctx: Any, runtime: Agreement, x: Tensor) -> Tensor:
        ctx.runtime = runtime
        ctx.set_materialize_grads(False)  # as above
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None
        (whole,) = ReduceTerms.apply(ctx.runtime, SpreadValue.BACK, *grads)
        return None, whole


def _sum_of_all(runtime: Agreement, name: str, x: Tensor) -> Tensor:
    """The sum of the ranks' values, for own rows; its gradient is the sum of theirs."""
    (whole,) = ReduceTerms.apply(runtime, name, x)
    return Spread.apply(runtime, whole)


def _gather_rows(runtime: Agreement, rows: Sequence[int], values: Sequence[Tensor], name: str) -> list[Tensor]:
    """The global batch of values ``[rows, ...]`` of one dtype, in one collective."""
    flat = torch.cat([x.reshape(-1) for x in values]) if len(values) > 1 else values[0].reshape(-1).contiguous()
    width = sum(x.shape[1:].numel() for x in values)
    every = runtime.gather_uneven(name, flat, [b * width for b in rows])
    parts = torch.split(every, [b * x.shape[1:].numel() for b in rows for x in values])
    return [
        torch.cat([p.reshape(b, *x.shape[1:]) for b, p in zip(rows, parts[i :: len(values)], strict=True)])
        for i, x in enumerate(values)
    ]


@carries(TableTotal)
class SumOverRanks(Operation):
    """Backward: the ranks' gradients are averaged, as those of every parameter."""

    @staticmethod
    def forward(ctx: Any, runtime: Agreement, own: Tensor, shared: Tensor | None) -> Tensor:
        ctx.runtime, ctx.shared = runtime, shared is not None
        result = own.clone()
        runtime.all_reduce(TableTotal.SUM, result)
        return result if shared is None else result + shared

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = _sum_of_all(ctx.runtime, TableTotal.BACK, grads[0]) / ctx.runtime.ranks
        return None, grad, grad if ctx.shared else None


class Together(Operation):
    @staticmethod
    def forward(
        ctx: Any, runtime: Agreement, failures: list[tuple[str, Exception]] | None, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.runtime, ctx.failures = runtime, failures
        return tuple(x.view_as(x) for x in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.failures is not None:
            ctx.runtime.agree_after_backward(ctx.failures)
        return None, None, *grads


@carries(WholeTables)
class GatherTables(Operation):
    """Whole tables, in one collective; gradients of pieces are averages over ranks."""

    @staticmethod
    def forward(ctx: Any, runtime: Agreement, whole: WholeTables, *pieces: Tensor) -> tuple[Tensor, ...]:
        ranks, wholes = runtime.ranks, whole.tables
        ctx.runtime, ctx.whole, ctx.dtypes = runtime, whole, [p.dtype for p in pieces]
        dtype, counts = message_dtype(ctx.dtypes), [[t.pieces.numel(r) for t in wholes] for r in range(ranks)]
        flat = packed(pieces, dtype, runtime.device)
        every = runtime.gather_uneven(whole.GATHER, flat, [size_in(dtype, c, ctx.dtypes) for c in counts])
        parts = unpacked(every, [n for c in counts for n in c], ctx.dtypes * ranks)
        result = []
        for i, t in enumerate(wholes):
            shapes = [t.pieces.piece_shape(r) for r in range(ranks)]
            mine = [x.reshape(s) for x, s in zip(parts[i :: len(wholes)], shapes, strict=True)]
            result.append(t.pieces.join(mine))
        return tuple(result)

    @staticmethod
    @differentiable_once("a table that ranks hold in part and use whole")
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime, wholes, dtypes, dtype = ctx.runtime, ctx.whole.tables, ctx.dtypes, message_dtype(ctx.dtypes)
        ranks, rank = runtime.ranks, runtime.rank
        counts = [[t.pieces.numel(r) for t in wholes] for r in range(ranks)]
        sizes = [size_in(dtype, c, dtypes) for c in counts]
        chunks = [t.pieces.cut(g, r).reshape(-1) for r in range(ranks) for t, g in zip(wholes, grads, strict=True)]
        send = packed(chunks, dtype, runtime.device)
        received = runtime.exchange(send, sizes, [sizes[rank]] * ranks, ctx.whole.BACK).wait()
        parts = unpacked(received, counts[rank] * ranks, dtypes * ranks)
        totals = (torch.stack(parts[i :: len(wholes)]).sum(0) / ranks for i in range(len(wholes)))
        shapes = [t.pieces.piece_shape(rank) for t in wholes]
        every = zip(totals, shapes, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(p.reshape(s) if wanted else None for p, s, wanted in every)


@carries(NormOutside)
class SyncBatchNorm(Operation):
    """Statistics by the pairwise formula of Chan et al. (1979) over the ranks' (count, mean, M2)."""

    @staticmethod
    def forward(
        ctx: Any,
        runtime: Agreement,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        # one of few bits may have weights and statistics of more, which it is normalised with: `BatchNormCall.dtype`.
        # Sums are of 32 bits at least, as torch's: float16 ends at 65,504, and bfloat16 counts to 256
        given, operands = x, (x, weight, bias, running_mean, running_var)
        x = x.to(torch.promote_types(widest(a for a in operands if a is not None), SUMS_DTYPE))
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        channels = x.shape[1]
        count = x.numel() // max(channels, 1)
        mean = x.mean(dims) if count else x.new_zeros(channels)
        m2 = ((x - mean.reshape(shape)) ** 2).sum(dims)
        mine = torch.cat([x.new_tensor([count]), mean, m2])
        every = runtime.gather(NormOutside.GATHER, mine)
        counts, means, m2s = every.reshape(runtime.ranks, -1).split([1, channels, channels], 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        m2 = m2s.sum(0) + (counts * (means - mean) ** 2).sum(0)
        scale = torch.rsqrt(m2 / total + eps)
        if running_mean is not None and running_var is not None:
            for running, now in ((running_mean, mean), (running_var, m2 / (total - 1))):  # of no rows there are none
                before = running.to(now.dtype)
                running.copy_(torch.where(total > 0, before * (1 - momentum) + momentum * now, before))
        ctx.runtime, ctx.dims, ctx.shape, ctx.eps = runtime, dims, shape, eps
        ctx.save_for_backward(given, mean, scale, weight, total)
        normal = (x - mean.reshape(shape)) * scale.reshape(shape)
        out = normal if weight is None else normal * weight.reshape(shape)
        return (out if bias is None else out + bias.reshape(shape)).to(given.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), runtime, shape = grads, ctx.runtime, ctx.shape
        given, mean, scale, weight, total = ctx.saved_tensors
        x, grad = given.to(mean.dtype), grad.to(mean.dtype)
        if torch.is_grad_enabled():  # it will be differentiated: the statistics are made of x
            mean = _sum_of_all(runtime, NormOutside.GATHER, x.sum(ctx.dims)) / total
            m2 = ((x - mean.reshape(shape)) ** 2).sum(ctx.dims)
            scale = torch.rsqrt(_sum_of_all(runtime, NormOutside.GATHER, m2) / total + ctx.eps)
        normal = (x - mean.reshape(shape)) * scale.reshape(shape)
        grad_bias, grad_weight = grad.sum(ctx.dims), (grad * normal).sum(ctx.dims)
        inner = _sum_of_all(runtime, NormOutside.BACK, torch.cat([grad_bias, grad_weight]))
        sum_grad, sum_product = inner.split(grad_bias.numel())
        grad_x = grad - (sum_grad.reshape(shape) + normal * sum_product.reshape(shape)) / total
        grad_x = grad_x * scale.reshape(shape)
        if weight is None:
            return None, grad_x.to(given.dtype), None, None, None, None, None, None
        grad_x = grad_x * weight.reshape(shape)
        return None, grad_x.to(given.dtype), grad_weight, grad_bias, None, None, None, None

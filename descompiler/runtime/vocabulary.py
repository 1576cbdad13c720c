"""Products with a table divided over the vocabulary: what is asked of the logits, computed where the rows are.

``vocabulary(x, weight, bias, first, size, requests)`` stands for ``logits = x @ weight[first : first + size].T + bias``
and all that the graph wants of them. Each request is a homomorphism from the vocabulary into a commutative monoid, so
that it needs a few numbers from each owner of a range of rows, not the logits:

    request               result (for x [..., k])              partial result of an owner      merged by
    ("log_sum_exp",)      [...]                                 log-sum-exp of its range        log-sum-exp
    ("total",)            [...] sum over the vocabulary         the sum of its range            sum
    ("select", ids, -100) [..., c] logits at ids [..., c]       logits of the ids it owns       sum
    ("max",)              [...] and [...], the first maximum    the same                        maximum, first
    ("top", count)        [..., count] and [..., count]         its `count` best                the `count` best
    ("logits",)           [..., size]                           logits of its range             concatenation

Softmax probabilities, cross-entropy (ignored targets and label smoothing too) and log-softmax at given ids are sums of
these. On N ranks: every owner gets all rows of x (and the ids), computes its range on the global batch, and sends each
rank the partial results of its rows; in backward it gets their gradients, has the complete gradient of its rows of the
table, and sends each rank its terms of the gradient of x.

Vocabulary-parallel cross-entropy of one output layer is known from Megatron-LM (Shoeybi et al., arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from descompiler.layout.vocabulary import Vocabulary
from descompiler.ops.operation import Operation
from descompiler.ops.vocabulary import partial_of, shaped
from descompiler.runtime.backward import differentiable_once
from descompiler.runtime.carriers import carries
from descompiler.runtime.messages import bytes_of

KEPT_ELEMENTS = 1 << 24
"""Logits (of the global batch, on one rank) that are kept for backward; more are computed again, in chunks of this."""


def vocabulary_on_ranks(
    runtime: Any,
    spec: Vocabulary,
    counts: list[int],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Sequence[Tensor],
) -> list[Tensor]:
    """`vocabulary` where each rank has a piece of the table, and its own rows of x.

    Parameters
    ----------
    runtime : Runtime
    counts : list of int
        Rows of x that each rank has: several for a row of the batch where x has them for each position.
    x : Tensor [..., k]
        This rank's rows.
    weight : Tensor
        This rank's piece; `spec.parts` says which rows of the vocabulary it is.
    bias : Tensor or None
        The same piece of the bias.
    ids : sequence of Tensor
        By "select" request.
    """
    rows = x.reshape(-1, spec.dim)
    dtype = torch.int32 if spec.id_bytes == 4 else torch.int64
    flat_ids = torch.cat([i.reshape(len(rows), i.shape[-1]) for i in ids], 1).to(dtype) if ids else None
    values, best = _Exchange.apply(runtime, spec, counts, flat_ids, rows, weight, bias)
    parts = _by_owner(values, len(rows), spec.owners, spec.width)
    best_of = _by_owner(best.long(), len(rows), spec.owners, spec.ids_width)
    return shaped(_merge(spec, parts, best_of), x.shape[:-1], spec.requests)


def _by_owner(flat: Tensor, rows: int, owners: Sequence[int], width: Callable[[int], int]) -> list[Tensor]:
    parts = flat.split([rows * width(r) for r in owners])
    return [p.reshape(rows, width(r)) for p, r in zip(parts, owners, strict=True)]


def _merge(spec: Vocabulary, values: Sequence[Tensor], ids: Sequence[Tensor]) -> list[Tensor]:
    """The owners' partial results, put together; owners are in the order of their ranges."""
    columns = [v.split(spec.widths(r), 1) for v, r in zip(values, spec.owners, strict=True)]
    best = [iter(i.split(spec.ids_widths(r), 1)) for i, r in zip(ids, spec.owners, strict=True)]
    result: list[Tensor] = []
    for number, (kind, count) in enumerate(spec.requests):
        parts = [c[number] for c in columns]
        if kind == "log_sum_exp":
            result.append(torch.cat(parts, 1).logsumexp(1, keepdim=True))
        elif kind == "logits":
            result.append(torch.cat(parts, 1))
        elif kind in ("max", "top"):
            candidates, where = torch.cat(parts, 1), torch.cat([next(b) for b in best], 1)
            # equal ones: in the order of the vocabulary
            order = torch.sort(candidates, stable=True, dim=1, descending=True).indices[:, :count]
            result += [candidates.gather(1, order), where.gather(1, order)]
        else:
            result.append(torch.stack(parts).sum(0))
    return result


@carries(Vocabulary)
class _Exchange(Operation):
    """Rows of x to the owners, their partial results back; in backward the same with gradients.

    With J the mean over ranks of each rank's loss, a rank's gradients are N dJ/dx. Its rows of x get that; an owner's
    rows of the table get the sum over all rows of the batch, divided by N.
    """

    @staticmethod
    def forward(
        ctx: Any,
        runtime: Any,
        spec: Vocabulary,
        counts: list[int],
        ids: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rank = runtime.rank
        owns, mine = rank in spec.owners, counts[rank]
        sent = [x] + ([] if ids is None else [ids])
        outgoing: list[Sequence[Tensor]] = [sent if r in spec.owners else () for r in range(runtime.ranks)]
        like = [(x.new_empty(0), spec.dim)] + ([] if ids is None else [(ids, ids.shape[1])])
        incoming = [[(t, (n, w)) for t, w in like] if owns else [] for n in counts]
        arrived = _exchange(runtime, outgoing, incoming, spec.ROWS)
        id_dtype = torch.int32 if spec.id_bytes == 4 else torch.int64
        back: list[Sequence[Tensor]] = [()] * runtime.ranks
        if owns:
            whole_x = torch.cat([a[0] for a in arrived])
            whole_ids = [] if ids is None else [i.long() for i in _split_ids(spec, torch.cat([a[1] for a in arrived]))]
            ctx.slice = _Slice(spec, rank, whole_x, weight, bias, whole_ids)
            values, best = ctx.slice.forward(any(ctx.needs_input_grad))
            pieces = zip(values.to(x.dtype).split(counts), best.to(id_dtype).split(counts), strict=True)
            back = [list(p) for p in pieces]
        empty_ids = torch.empty(0, dtype=id_dtype, device=x.device)
        incoming = [
            [(like[0][0], (mine, spec.width(r))), (empty_ids, (mine, spec.ids_width(r)))] if r in spec.owners else []
            for r in range(runtime.ranks)
        ]
        parts = _exchange(runtime, back, incoming, spec.PARTIAL)
        values = torch.cat([parts[r][0].reshape(-1) for r in spec.owners])
        best = torch.cat([parts[r][1].reshape(-1) for r in spec.owners])
        ctx.runtime, ctx.spec, ctx.counts, ctx.owns = runtime, spec, counts, owns
        ctx.like = (weight, bias)
        ctx.mark_non_differentiable(best)
        return values, best

    @staticmethod
    @differentiable_once("a product with a table that ranks hold in part")
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime, spec, counts, rank = ctx.runtime, ctx.spec, ctx.counts, ctx.runtime.rank
        (weight, bias), mine = ctx.like, counts[rank]
        empty = grads[0].new_empty(0)
        parts = grads[0].split([mine * spec.width(r) for r in spec.owners])
        outgoing: list[Sequence[Tensor]] = [()] * runtime.ranks
        for r, p in zip(spec.owners, parts, strict=True):
            outgoing[r] = [p]
        incoming = [[(empty, (n, spec.width(rank)))] if ctx.owns else [] for n in counts]
        arrived = _exchange(runtime, outgoing, incoming, spec.GRADIENTS)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[5] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[6] else None
        back: list[Sequence[Tensor]] = [()] * runtime.ranks
        if ctx.owns:
            wanted = ctx.needs_input_grad[4:7]
            gradient = torch.cat([a[0] for a in arrived])
            terms, found_weight, found_bias = ctx.slice.backward(gradient, wanted)
            if found_weight is not None:
                grad_weight = found_weight.div_(runtime.ranks)
            if found_bias is not None:
                grad_bias = found_bias.div_(runtime.ranks)
            if terms is not None:
                back = [[t] for t in terms.split(counts)]
        grad_x = None
        if ctx.needs_input_grad[4]:
            incoming = [[(empty, (mine, spec.dim))] if r in spec.owners else [] for r in range(runtime.ranks)]
            terms_of = _exchange(runtime, back, incoming, spec.TERMS)
            grad_x = torch.stack([terms_of[r][0] for r in spec.owners]).sum(0)
        return None, None, None, None, grad_x, grad_weight, grad_bias


class _Slice:
    """One owner's range of the vocabulary on the global batch; logits are kept for backward, or computed again."""

    def __init__(
        self, spec: Vocabulary, rank: int, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Sequence[Tensor]
    ):
        self.spec, self.rank, self.ids = spec, rank, ids
        self.start, self.size, self.first = spec.parts[rank]
        self.inputs = [x.detach(), weight.detach(), None if bias is None else bias.detach()]
        self.chunk = max(1, KEPT_ELEMENTS // max(self.size, 1))
        self.kept: tuple[list[Tensor | None], tuple[Tensor, ...]] | None = None

    def forward(self, grad: bool) -> tuple[Tensor, Tensor]:
        """Values ``[rows, width]`` and ids ``[rows, ids_width]`` of the partial results."""
        rows = len(self.inputs[0])  # type: ignore[arg-type]
        if rows <= self.chunk and grad:
            self.kept = self._compute(slice(None), (True, True, True))
            results = [tuple(r.detach() for r in self.kept[1])]
        else:
            steps = range(0, max(rows, 1), self.chunk)
            with torch.no_grad():
                results = [self._compute(slice(i, i + self.chunk), (False,) * 3)[1] for i in steps]
        whole = [torch.cat(column) for column in zip(*results, strict=True)]
        values = [w for w in whole if w.is_floating_point()]
        best = [w for w in whole if not w.is_floating_point()]
        none = torch.empty((rows, 0), dtype=torch.int64, device=whole[0].device)
        return torch.cat(values, 1), torch.cat(best, 1) if best else none

    def backward(self, gradient: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, the piece and the bias from those of the values."""
        total: list[Any] = [[], None, None]
        rows = len(gradient)
        for i in range(0, max(rows, 1), self.chunk):
            span = slice(i, i + self.chunk)
            inputs, outputs = self.kept or self._compute(span, wanted)
            differentiable = [o for o in outputs if o.is_floating_point()]
            grads = gradient[span].split([o.shape[1] for o in differentiable], 1)
            chosen = [n for n, (w, x) in enumerate(zip(wanted, inputs, strict=True)) if w and x is not None]
            targets: list[Any] = [inputs[n] for n in chosen]
            found = torch.autograd.grad(differentiable, targets, grads)
            for n, g in zip(chosen, found, strict=True):
                if n == 0:
                    total[0].append(g)
                else:
                    total[n] = g if total[n] is None else total[n].add_(g)
        self.kept = None
        return torch.cat(total[0]) if wanted[0] else None, total[1], total[2]

    def _compute(self, rows: slice, wanted: Sequence[bool]) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
        x, weight, bias = self.inputs
        assert x is not None and weight is not None
        inputs = [
            None if t is None else t.detach().requires_grad_(w)
            for t, w in zip((x[rows], weight, bias), wanted, strict=True)
        ]
        with torch.set_grad_enabled(any(wanted)):
            narrow = inputs[1].narrow(0, self.first, self.size)  # type: ignore[union-attr]
            ids = [i[rows] for i in self.ids]
            assert inputs[0] is not None
            return inputs, partial_of(inputs[0], narrow, inputs[2], ids, self.spec.requests, self.start)


def _split_ids(spec: Vocabulary, ids: Tensor) -> tuple[Tensor, ...]:
    return ids.split([count for kind, count in spec.requests if kind == "select"], 1)


def _exchange(
    runtime: Any,
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[tuple[Tensor, tuple[int, int]]]],
    name: str,
) -> list[list[Tensor]]:
    """Send rank r the tensors ``outgoing[r]``, of any types, in one all-to-all of bytes.

    ``incoming[r]`` are the types (by example) and shapes of what rank r sends.
    """
    chunks = [bytes_of(t) for tensors in outgoing for t in tensors]
    sent = [sum(t.numel() * t.element_size() for t in tensors) for tensors in outgoing]
    sizes = [[shape[0] * shape[1] * like.element_size() for like, shape in parts] for parts in incoming]
    send = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8, device=runtime.device)
    received = runtime.exchange(send, sent, [sum(s) for s in sizes], name).wait()
    pieces = iter(received.split([n for s in sizes for n in s]))
    return [[next(pieces).clone().view(like.dtype).reshape(shape) for like, shape in parts] for parts in incoming]

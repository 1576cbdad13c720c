"""The runtime: what an emitted program calls that crosses between ranks, and the exchange behind it.

A program's forward makes at most four collectives: a header (row counts, agreement, errors), the ids into the region,
the region's values out of it; its backward sends the gradients of those values back. Everything that crosses in one
direction at one stage shares one all-to-all. Starts and waits are separate calls, so that work which does not depend on
an exchange runs beside it, in backward too: `torch.autograd` runs the newest ready node first, and the local operators
are newer than the start of the exchange.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from descompiler import traffic as wire
from descompiler.clock import Clock
from descompiler.collectives import Pending, all_gather, all_to_all
from descompiler.draws import Draws
from descompiler.errors import InputError, RankError
from descompiler.layout import Check, Counts, Exit, Layout
from descompiler.local_operators import scale_grad
from descompiler.rows import Rows
from descompiler.traffic import Traffic
from descompiler.vocabulary import vocabulary_on_ranks


@dataclass
class Handle:
    """One exchange under way."""

    forward: Pending | None = None
    sizes: tuple[Any, ...] = ()
    backward: Pending | None = None


@dataclass
class Runtime:
    """What emitted operators know at run time. One per compiled module; programs set their layout before they run."""

    group: Any
    rank: int
    ranks: int
    loss: str
    traffic: Traffic = field(default_factory=Traffic)
    unique: dict[str, Counts] = field(default_factory=dict)
    layout: Layout = field(default_factory=lambda: Layout(1))
    checks: tuple[Check, ...] = ()
    mode: int = 0
    mode_name: str = ""
    modes: list[int] = field(default_factory=list)  # of all ranks, at the latest header
    rows: list[int] = field(default_factory=list)
    started: bool = False
    wire_dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    forwards: int = 0
    clock: Clock | None = None  # set while `descompiler.audit` runs
    failures: list[tuple[str, Exception]] = field(default_factory=list)  # of backwards of the latest forward's leaves

    def __post_init__(self) -> None:
        self.draws = Draws(self.group, self.ranks)

    def collective(self, name: str, sent_bytes: int | Fraction, call: Callable[[], Any]) -> Any:
        """Make a collective, ``call()``: count it, and time it under a clock."""
        self.traffic.add(name, sent_bytes)
        return call() if self.clock is None else self.clock.time(name, self.group, call)

    def gather(self, name: str, mine: Tensor) -> Tensor:
        """All ranks' tensors of one size, flat, one after another."""
        size = (self.ranks - 1) * mine.numel() * mine.element_size()
        return self.collective(name, size, lambda: all_gather(mine, self.group))

    def all_reduce(self, name: str, x: Tensor) -> None:
        """Sum over ranks, in place."""
        size = wire.all_reduce_bytes(x.numel() * x.element_size(), self.ranks)
        self.collective(name, size, lambda: dist.all_reduce(x, group=self.group))

    def header_device(self) -> torch.device:
        """Where small control tensors live: NCCL needs them on the GPU."""
        return self.device if self.ranks > 1 and dist.get_backend(self.group) == "nccl" else torch.device("cpu")

    def begin(self, rows: int, ids: Sequence[Tensor]) -> int:
        """Check ids, exchange row counts, agree with the other ranks; returns the rows of the global batch."""
        self.header(rows, self.problem(ids))
        return sum(self.rows)

    def problem(self, ids: Sequence[Tensor]) -> str | None:
        """Why ids are wrong, or None."""
        return next(filter(None, (c.problem(i) for c, i in zip(self.checks, ids, strict=True))), None)

    def header(
        self,
        rows: int,
        problem: str | None,
        asked: Sequence[int] | None = None,
        gathered: int = 0,
        *,
        same_mode: bool = True,
    ) -> tuple[list[int], list[int]]:
        """Every rank calls this once a step, also when it has failed: then all ranks raise.

        Parameters
        ----------
        asked : sequence of int, optional
            How many rows this rank will ask of each rank (`descompiler.fetch`).
        gathered : int
            Of how many shared rows it will send a gradient to every rank.
        same_mode : bool
            Whether ranks in different modes raise; ``modes`` has those of all.

        Returns
        -------
        list of int, list of int
            What each rank asks of this one, and how many shared rows' gradients it will send.
        """
        self.started = True
        asked = [0] * self.ranks if asked is None else asked
        if self.ranks == 1:
            self.rows, self.modes = [rows], [self.mode]
            if problem is not None:
                raise InputError(problem)
            return [0], [0]
        device = self.header_device()
        mine = [[rows, int(problem is not None), self.mode, n, gathered] for n in asked]
        send = torch.tensor(mine, dtype=torch.int64, device=device)
        sizes = [send.shape[1]] * self.ranks
        table = self.exchange(send.reshape(-1), sizes, sizes, wire.HEADER).wait().reshape(send.shape)
        self.rows, failed, self.modes, served, gathering = table.cpu().T.tolist()
        if any(failed):
            self.raise_everywhere(problem, InputError)
        if same_mode and len(set(self.modes)) > 1:
            self.raise_different()
        return served, gathering

    def agree(self, problem: str | None) -> None:
        """Every rank calls this after code of the user's has run, also when that has failed: then all ranks raise.

        Before the header of a step nothing is sent: it will tell.
        """
        if self.ranks == 1 or not self.started:
            if problem is not None:
                raise InputError(problem)
            return
        self._agree(wire.LEAVES, problem)

    def _agree(self, name: str, problem: str | None) -> None:
        mine = torch.tensor([problem is not None], dtype=torch.uint8, device=self.header_device())
        if bool(self.gather(name, mine).any()):
            self.raise_everywhere(problem, InputError)

    def agree_after_backward(self, failures: list[tuple[str, Exception]]) -> None:
        """At the end of the backward that is under way, ranks tell whether a leaf's failed: then all ranks raise.

        The last of all that is done then: the reducer, and the exchange of gradients, have to end as in any backward.
        """
        queue = torch.autograd.Variable._execution_engine.queue_callback

        def tell() -> None:
            problem, cause = failures[0] if failures else (None, None)
            failures.clear()
            try:
                self._agree(wire.LEAVES_BACK, problem)
            except InputError as error:
                raise error from cause

        failures.clear()  # of another backward through a graph that was kept
        queue(lambda: queue(tell))

    def raise_different(self) -> None:
        """Raise on every rank, with the modes of all."""
        self.raise_everywhere(f"runs in mode {self.mode_name}", RankError, "ranks call forward in different modes")

    def raise_everywhere(self, problem: str | None, kind: type[Exception], title: str = "") -> None:
        """Raise on every rank what any of them has to say. Collective."""
        texts: list[Any] = [None] * self.ranks
        dist.all_gather_object(texts, problem, group=self.group)
        lines = [f"rank {r}: {t}" for r, t in enumerate(texts) if t is not None]
        raise kind("\n".join([title, *lines] if title else lines))

    # ---- tables that are used whole

    def gather_tables(self, *pieces: Tensor) -> list[Tensor]:
        """The tables of ``layout.wholes`` from all ranks' pieces; backward sends each owner its rows' gradients."""
        return list(_GatherTables.apply(self, *pieces))

    # ---- ids into the region

    def enter_start(self, ids: Sequence[Tensor]) -> Handle:
        """Send each rank the ids that its tables need; ``ids`` follow ``layout.entries``."""
        entries, mine = self.layout.entries, self.rows[self.rank]
        dtype = torch.int32 if self.layout.id_bytes == 4 else torch.int64
        chunks, sent = [], []
        for r in range(self.ranks):
            size = 0
            for e, x in zip(entries, ids, strict=True):
                if e.width(r):
                    columns = e.columns[r]
                    part = x if columns is None else x[:, list(columns)]
                    chunks.append(part.to(dtype).reshape(-1))
                    size += mine * e.width(r)
            sent.append(size)
        width = sum(e.width(self.rank) for e in entries)
        send = torch.cat(chunks) if chunks else torch.empty(0, dtype=dtype, device=self.device)
        return Handle(self.exchange(send, sent, [b * width for b in self.rows], wire.ENTER))

    def enter_wait(self, handle: Handle) -> list[Tensor | None]:
        """Ids of the global batch ``[rows, ...]`` for this rank's tables, by entry; None where it needs none."""
        assert handle.forward is not None
        arrived = handle.forward.wait()
        entries = self.layout.entries
        widths = [e.width(self.rank) for e in entries]
        parts = torch.split(arrived, [b * w for b in self.rows for w in widths])
        result: list[Tensor | None] = []
        for i, e in enumerate(entries):
            if not widths[i]:
                result.append(None)
                continue
            tail = e.tail_on(self.rank)
            pieces = [p.reshape(b, *tail) for b, p in zip(self.rows, parts[i :: len(entries)], strict=True)]
            result.append(torch.cat(pieces).long())
        return result

    def exchange(self, send: Tensor, sent: list[int], received: list[int], name: str) -> Pending:
        """Start an all-to-all of flat tensors; ``sent`` and ``received`` are elements by rank."""
        size = (sum(sent) - sent[self.rank]) * send.element_size()
        return self.collective(name, size, lambda: all_to_all(send, sent, received, self.group))

    # ---- values out of the region, their gradients back

    def exit_start(self, anchor: Tensor, values: Sequence[Tensor | None]) -> list[Any]:
        """Send each rank its rows of every value; ``values`` follow ``layout.exits`` (None: this rank has no part)."""
        handle = Handle()
        present = [v for v in values if v is not None]
        return [handle, _ExitStart.apply(self, handle, anchor, *present)]

    def exit_wait(self, started: list[Any]) -> list[Tensor]:
        """The values for this rank's own rows: summed, or put together (LOCAL segments left out)."""
        handle, buffer = started
        buffer = _ExitWait.apply(self, handle, list(self.rows), buffer)
        mine, exits = self.rows[self.rank], self.layout.exits
        senders = [(i, r) for r in range(self.ranks) for i, e in enumerate(exits) if e.width(r)]
        parts = torch.split(buffer, [mine * exits[i].width(r) for i, r in senders])
        by_exit: list[dict[int, Tensor]] = [{} for _ in exits]
        for (i, r), p in zip(senders, parts, strict=True):
            by_exit[i][r] = p.reshape(mine, *(exits[i].tails[r] or ()))
        return [_put_together(e, by_exit[i]) for i, e in enumerate(exits)]

    # ---- weights that several ranks hold in part

    def reduce_shared(self, anchor: Tensor, *slices: Tensor) -> list[Tensor]:
        """The slices, and a token; in backward the slices' gradients are averaged over ranks, after the exchange."""
        return list(_ReduceShared.apply(self, anchor, *slices))

    def anchor(self, *weights: Tensor) -> Tensor:
        """A scalar that requires a gradient, so that backward runs on ranks that own nothing.

        ``weights`` are replicated weights that only other ranks use: they get zero gradients here, for the reducer.
        """
        return _Anchor.apply(torch.zeros((), dtype=self.wire_dtype, device=self.device, requires_grad=True), *weights)

    def vocabulary(
        self, number: int, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Sequence[Tensor]
    ) -> list[Tensor]:
        """What is asked of a product with a table whose rows are divided: ``layout.vocabularies[number]``."""
        return vocabulary_on_ranks(self, self.layout.vocabularies[number], x, weight, bias, ids)

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Batch norm in training over the global batch; x ``[b, C, ...]``."""
        return _SyncBatchNorm.apply(self, x, weight, bias, running_mean, running_var, momentum, eps)

    def norm_inside(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        mine: list[int],
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Batch norm in training of some channels ``mine``, of which this rank has the global batch."""
        if running_mean is None or running_var is None:
            return torch.batch_norm(x, weight, bias, None, None, True, momentum, eps, True)
        kept = [running_mean[mine], running_var[mine]]
        result = torch.batch_norm(x, weight, bias, kept[0], kept[1], True, momentum, eps, True)
        running_mean[mine], running_var[mine] = kept
        return result

    def share_statistics(
        self, buffers: Sequence[Sequence[Tensor]], channels: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        """Send each running statistic from the rank that has moved it to all; ``channels`` of each norm, by rank."""
        n = self.ranks
        own = torch.cat([b[c[self.rank]] for pair, c in zip(buffers, channels, strict=True) for b in pair])
        sizes = [2 * sum(len(c[r]) for c in channels) for r in range(n)]
        every = self.exchange(own.repeat(n), [own.numel()] * n, sizes, wire.NORM_INSIDE).wait()
        places = [(b, c[r]) for r in range(n) for pair, c in zip(buffers, channels, strict=True) for b in pair]
        for (b, mine), values in zip(places, torch.split(every, [len(m) for _, m in places]), strict=True):
            b[mine] = values

    # ---- values that mix the rows of the batch: every rank computes them, from the global batch

    def gather_rows(self, values: Sequence[Tensor], layouts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The global batch of each value, on every rank; ``layouts`` are the fields of each value's `Rows`.

        What is computed from the results has the same gradients on every rank, so backward sends nothing.
        """
        return list(_Gather.apply(self, [Rows(*x) for x in layouts], *values))

    def sum_terms(self, terms: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks of each term, on every rank. Backward sends nothing, as in `gather_rows`."""
        return list(_Reduce.apply(self, *terms))

    def slice_rows(self, x: Tensor, dim: int, outer: int, inner: int) -> Tensor:
        """Own rows of a value that every rank has; backward gathers the gradients of all ranks' rows."""
        return _Slice.apply(self, Rows(dim, outer, inner), x)

    def spread(self, x: Tensor) -> Tensor:
        """A value that every rank has, for its own rows; backward sums the gradients of all ranks."""
        return _Spread.apply(self, x)

    def draw(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A random draw that is the same on every rank: the next of this forward's."""
        with self.draws.next_of_forward(self.forwards, self.device):
            return function(*args, **kwargs)

    def total(self, own: Tensor, shared: Tensor | None = None) -> Tensor:
        """A number made from a whole table: terms of this rank's own piece, and of rows that all ranks hold."""
        return _Total.apply(self, own, shared)

    def own_rows(self) -> int:
        """Rows of this rank, once the header has told."""
        return self.rows[self.rank]

    def together(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs; in backward all of them get a gradient, so that every rank runs the same collectives.

        That it begins is known here, on every rank: if it goes through opaque leaves, ranks agree when it ends.
        """
        return list(_Together.apply(self, *outputs))

    def reach(self, x: Tensor, fetched: Sequence[Sequence[Tensor]]) -> Tensor:
        """``x``, from which backward also comes to rows that nobody reads, with gradients of zero."""
        return x + sum(r[:0].sum().to(x) for rows in fetched for r in rows)

    def output(self, x: Tensor) -> Tensor:
        """Scale the gradient that the user's loss sends in to the convention of averaging over ranks."""
        if self.ranks == 1 or not x.requires_grad or self.loss == "rank_mean":
            return x
        if self.loss == "sum":
            return scale_grad(x, self.ranks)
        return scale_grad(x, self.ranks * self.rows[self.rank] / max(sum(self.rows), 1))


def _put_together(e: Exit, parts: dict[int, Tensor]) -> Tensor:
    if e.segments is None:
        ordered = [parts[r] for r in sorted(parts)]
        return functools.reduce(torch.add, ordered)
    if len(parts) == 1 and all(owner in parts for _, owner in e.segments):
        return next(iter(parts.values()))
    sizes = {r: [size for size, owner in e.segments if owner == r] for r in parts}
    queues = {r: iter(torch.split(p, sizes[r], e.dim)) for r, p in parts.items()}
    return torch.cat([next(queues[owner]) for _, owner in e.segments if owner in queues], e.dim)


class _GatherTables(torch.autograd.Function):
    """Whole tables, in one collective; gradients of pieces are averages over ranks."""

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, *pieces: Tensor) -> tuple[Tensor, ...]:
        wholes, ranks, dtype = runtime.layout.wholes, runtime.ranks, runtime.wire_dtype
        ctx.runtime, ctx.wholes, ctx.dtypes = runtime, wholes, [p.dtype for p in pieces]
        ctx.sizes = sizes = runtime.layout.whole_elements
        flat = torch.cat([p.reshape(-1).to(dtype) for p in pieces])

        def call() -> Tensor:
            if len(set(sizes)) == 1:
                return all_gather(flat, runtime.group)
            return all_to_all(flat.repeat(ranks), [len(flat)] * ranks, sizes, runtime.group).wait()

        every = runtime.collective(wire.WHOLE, (ranks - 1) * flat.numel() * flat.element_size(), call)
        parts = torch.split(every, [t.pieces.numel(r) for r in range(ranks) for t in wholes])
        result = []
        for i, (t, p) in enumerate(zip(wholes, pieces, strict=True)):
            shapes = [t.pieces.piece_shape(r) for r in range(ranks)]
            mine = [x.reshape(s) for x, s in zip(parts[i :: len(wholes)], shapes, strict=True)]
            result.append(t.pieces.join(mine).to(p.dtype))
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime, wholes, sizes = ctx.runtime, ctx.wholes, ctx.sizes
        ranks, mine = runtime.ranks, sizes[runtime.rank]
        chunks = [t.pieces.cut(g, r).reshape(-1) for r in range(ranks) for t, g in zip(wholes, grads, strict=True)]
        send = torch.cat([c.to(runtime.wire_dtype) for c in chunks])
        received = runtime.exchange(send, sizes, [mine] * ranks, wire.WHOLE_BACK).wait()
        total = received.reshape(ranks, mine).sum(0) / ranks
        parts = total.split([t.pieces.numel(runtime.rank) for t in wholes])
        shapes = [t.pieces.piece_shape(runtime.rank) for t in wholes]
        every = zip(parts, shapes, ctx.dtypes, ctx.needs_input_grad[1:], strict=True)
        return None, *(p.reshape(s).to(d) if wanted else None for p, s, d, wanted in every)


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *weights: Tensor) -> Tensor:
        ctx.like = [(w.shape, w.dtype, w.device) for w in weights]
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], *(torch.zeros(s, dtype=t, device=d) for s, t, d in ctx.like)


class _ExitStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, runtime: Runtime, handle: Handle, anchor: Tensor, *values: Tensor) -> Tensor:
        ctx.runtime, ctx.handle, ctx.rows = runtime, handle, list(runtime.rows)
        ctx.shapes = [(v.shape[1:], v.dtype) for v in values]
        ctx.anchor = anchor
        dtype, width = runtime.wire_dtype, sum(v.shape[1:].numel() for v in values)
        parts = [torch.split(v.to(dtype), ctx.rows) for v in values]
        chunks = [p[r].reshape(-1) for r in range(runtime.ranks) for p in parts]
        send = torch.cat(chunks) if chunks else torch.empty(0, dtype=dtype, device=runtime.device)
        mine = ctx.rows[runtime.rank]
        received = [mine * sum(e.width(r) for e in runtime.layout.exits) for r in range(runtime.ranks)]
        ctx.received, ctx.sent = received, [b * width for b in ctx.rows]
        handle.forward = runtime.exchange(send, ctx.sent, received, wire.EXIT)
        handle.sizes = (ctx.received, ctx.sent)
        return handle.forward.out

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
        return None, None, torch.zeros_like(ctx.anchor), *result


class _ExitWait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, runtime: Runtime, handle: Handle, rows: list[int], buffer: Tensor) -> Tensor:
        ctx.runtime, ctx.handle = runtime, handle
        assert handle.forward is not None
        handle.forward.wait()
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        received, sent = ctx.handle.sizes
        # the transposed exchange: what was received is sent back
        ctx.handle.backward = ctx.runtime.exchange(grad.contiguous(), received, sent, wire.RETURN)
        return None, None, None, grad


class _ReduceShared(torch.autograd.Function):
    """Identity; in backward one all-reduce of all slices' gradients.

    The anchor that it returns feeds the exchange, so that on every rank the exchange's backward comes first: the order
    of collectives has to be the same everywhere.
    """

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, anchor: Tensor, *slices: Tensor) -> tuple[Tensor, ...]:
        ctx.runtime = runtime
        return tuple(x.view_as(x) for x in (anchor, *slices))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime = ctx.runtime
        anchor, *rest = grads
        flat = torch.cat([g.reshape(-1) for g in rest])
        runtime.all_reduce(wire.SHARED_COLUMNS, flat)
        flat /= runtime.ranks
        parts = torch.split(flat, [g.numel() for g in rest])
        return None, anchor, *(p.reshape(g.shape) for p, g in zip(parts, rest, strict=True))


class _SyncBatchNorm(torch.autograd.Function):
    """Statistics by the pairwise formula of Chan et al. (1979) over the ranks' (count, mean, M2)."""

    @staticmethod
    def forward(
        ctx: Any,
        runtime: Runtime,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        channels = x.shape[1]
        count = x.numel() // max(channels, 1)
        mean = x.mean(dims) if count else x.new_zeros(channels)
        m2 = ((x - mean.reshape(shape)) ** 2).sum(dims)
        mine = torch.cat([x.new_tensor([count]), mean, m2])
        if runtime.ranks > 1:
            every = runtime.gather(wire.NORM_FORWARD, mine)
        else:
            every = mine
        counts, means, m2s = every.reshape(runtime.ranks, -1).split([1, channels, channels], 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        m2 = m2s.sum(0) + (counts * (means - mean) ** 2).sum(0)
        scale = torch.rsqrt(m2 / total + eps)
        if running_mean is not None and running_var is not None:
            running_mean.mul_(1 - momentum).add_(momentum * mean)
            running_var.mul_(1 - momentum).add_(momentum * m2 / (total - 1))
        normal = (x - mean.reshape(shape)) * scale.reshape(shape)
        ctx.runtime, ctx.dims, ctx.shape = runtime, dims, shape
        ctx.save_for_backward(normal, scale, weight, total)
        out = normal if weight is None else normal * weight.reshape(shape)
        return out if bias is None else out + bias.reshape(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), runtime, shape = grads, ctx.runtime, ctx.shape
        normal, scale, weight, total = ctx.saved_tensors
        grad_bias, grad_weight = grad.sum(ctx.dims), (grad * normal).sum(ctx.dims)
        inner = torch.cat([grad_bias, grad_weight])
        if runtime.ranks > 1:
            runtime.all_reduce(wire.NORM_BACKWARD, inner)
        sum_grad, sum_product = inner.split(grad_bias.numel())
        grad_x = grad - (sum_grad.reshape(shape) + normal * sum_product.reshape(shape)) / total
        grad_x = grad_x * scale.reshape(shape)
        if weight is None:
            return None, grad_x, None, None, None, None, None, None
        return None, grad_x * weight.reshape(shape), grad_weight, grad_bias, None, None, None, None


def _gather_rows(runtime: Runtime, rows: Sequence[int], values: Sequence[Tensor], name: str) -> list[Tensor]:
    """The global batch of values ``[rows, ...]`` of one dtype, in one collective."""
    mine, n = rows[runtime.rank], runtime.ranks
    flat = torch.cat([x.reshape(-1) for x in values]) if len(values) > 1 else values[0].reshape(-1).contiguous()
    width = sum(x.shape[1:].numel() for x in values)

    def call() -> Tensor:
        if len(set(rows)) == 1:
            return all_gather(flat, runtime.group)
        return all_to_all(flat.repeat(n), [mine * width] * n, [b * width for b in rows], runtime.group).wait()

    every = runtime.collective(name, (n - 1) * flat.numel() * flat.element_size(), call)
    parts = torch.split(every, [b * x.shape[1:].numel() for b in rows for x in values])
    return [
        torch.cat([p.reshape(b, *x.shape[1:]) for b, p in zip(rows, parts[i :: len(values)], strict=True)])
        for i, x in enumerate(values)
    ]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, runtime: Runtime, layouts: list[Rows], *values: Tensor) -> tuple[Tensor, ...]:
        rows = list(runtime.rows)
        ctx.layouts, ctx.first, ctx.mine = layouts, sum(rows[: runtime.rank]), rows[runtime.rank]
        leading = [r.lead(x) for r, x in zip(layouts, values, strict=True)]
        wholes = _gather_rows(runtime, rows, leading, wire.COUPLING["gather"])
        result = tuple(r.restore(x) for r, x in zip(layouts, wholes, strict=True))
        ctx.mark_non_differentiable(*(x for x in result if not x.is_floating_point()))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, *(r.narrow(g, ctx.first, ctx.mine) for r, g in zip(ctx.layouts, grads, strict=True))


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, runtime: Runtime, *terms: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([x.reshape(-1) for x in terms])
        runtime.all_reduce(wire.COUPLING["reduce"], flat)
        parts = torch.split(flat, [x.numel() for x in terms])
        result = tuple(p.reshape(x.shape) for p, x in zip(parts, terms, strict=True))
        ctx.mark_non_differentiable(*(x for x in result if not x.is_floating_point()))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *grads


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, runtime: Runtime, rows: Rows, x: Tensor) -> Tensor:
        ctx.runtime, ctx.layout, ctx.rows = runtime, rows, list(runtime.rows)
        return rows.narrow(x, sum(ctx.rows[: runtime.rank]), ctx.rows[runtime.rank]).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        own = ctx.layout.lead(grads[0])
        (whole,) = _gather_rows(ctx.runtime, ctx.rows, [own], wire.COUPLING["slice"])
        return None, None, ctx.layout.restore(whole)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, runtime: Runtime, x: Tensor) -> Tensor:
        ctx.runtime = runtime
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        ctx.runtime.all_reduce(wire.COUPLING["spread"], grad)
        return None, grad


class _Total(torch.autograd.Function):
    """Backward: the ranks' gradients are averaged, as those of every parameter."""

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, own: Tensor, shared: Tensor | None) -> Tensor:
        ctx.runtime, ctx.shared = runtime, shared is not None
        result = own.clone()
        runtime.all_reduce(wire.COUPLING["total"], result)
        return result if shared is None else result + shared

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0].clone()
        ctx.runtime.all_reduce(wire.COUPLING["total back"], grad)
        grad /= ctx.runtime.ranks
        return None, grad, grad if ctx.shared else None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, runtime: Runtime, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.runtime, ctx.failures = runtime, runtime.failures if runtime.layout.leaves_backward else None
        return tuple(x.view_as(x) for x in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.failures is not None:
            ctx.runtime.agree_after_backward(ctx.failures)
        return None, *grads

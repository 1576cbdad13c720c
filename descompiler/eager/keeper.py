"""The keeper: the exchanges behind the pieces of a module, and the averages of its replicated parameters' gradients.

Gradients are exchanged at the end of backward, all at once (`Keeper.finish`): ranks may use a value or not. Every
exchange begins with an agreement (`Keeper.agree`): ranks whose Python looks up more or less than the others' serve each
other, any other difference is an error that says where.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from descompiler.eager.pieces import Piece, plain
from descompiler.errors import DescompilerError, InputError, UnsupportedError, raised_at, warn
from descompiler.layout.pieces import Pieces, locate
from descompiler.layout.step import DenseGradients
from descompiler.layout.traffic import all_reduce_bytes
from descompiler.runtime.collectives import all_to_all
from descompiler.runtime.gradients import Caught, add_gradient, sum_of
from descompiler.runtime.guard import Guard
from descompiler.runtime.room import give_back
from descompiler.runtime.runtime import Runtime

FETCH_IDS = "all_to_all (ids of fetched rows)"


FETCH_ROWS = "all_to_all (fetched rows)"


FETCH_GRADIENTS = "all_to_all (gradients of fetched rows)"


GATHER = "all_gather (whole parameters)"


SCATTER = "all_to_all (gradients of whole parameters)"


FLAGS = "all_reduce (which gradients there are)"


KINDS = ("other", "end", "norm", "fetch", "whole")


SERVED = ("fetch", "whole")
"""Calls that a rank which does not make them can take part in, if it waits at one of `WAITING`."""


WAITING = ("end", "norm", *SERVED)


NO_BACKWARD = -1
"""What torch calls the backward that is under way where there is none."""


KEPT_FORWARDS = 8
"""Forwards whose backward may still come; older ones are forgotten."""


@dataclass(eq=False)
class Record:
    """One use of a piece in a forward; its gradient is exchanged when backward ends."""

    piece: Piece
    forward: int
    sent: list[int]  # rows asked of each rank, in the order of ``fetch``'s result
    asked: list[int]  # rows that each rank asked for
    positions: Tensor | None  # which rows of this rank's piece they were; None: the whole parameter was gathered
    sparse: bool = False
    gradient: Tensor | None = None


@dataclass
class Keeper:
    """The exchanges behind the pieces of one module, and the averages of its replicated parameters' gradients."""

    runtime: Runtime
    pieces: list[Piece] = field(default_factory=list)
    records: deque[Record] = field(default_factory=deque)
    scheduled: bool = False
    failed: bool = False
    failure: Exception | None = None  # of the user's code in the backward that is under way
    noted: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.watch([])

    # ---- agreement

    def _forget(self) -> None:
        """Forget what the latest backward held."""
        self.scheduled, self.failure = False, None
        self.caught.take()
        for record in self.records:
            record.gradient = None

    def begin(self) -> None:
        """A forward begins."""
        self.failed = False
        self.runtime.forwards += 1
        if self.runtime.ranks > 1:
            give_back(self.runtime.forwards)
        if torch._C._current_graph_task_id() == NO_BACKWARD:  # what a backward that was broken off has left
            self._forget()
        self.caught.hook()
        while self.records and self.records[0].forward <= self.runtime.forwards - KEPT_FORWARDS:
            self.records.popleft()

    def agree(
        self,
        what: str,
        kind: str = "other",
        piece: Piece | None = None,
        *,
        rows: int = 0,
        problem: str | None = None,
        tell: Sequence[int] | None = None,
    ) -> list[int]:
        """Come to a common call: none has failed, and every rank calls the same operator, or serves those that do.

        A rank that has reached a batch norm or the end of forward, or wants another parameter's rows, takes part in the
        lookups of the others with no ids of its own; the lowest rank's call comes first. Any other difference raises on
        every rank.
        ``tell[r]`` is a number for rank r; returns what each rank told this one.
        """
        runtime = self.runtime
        position = 0 if piece is None else piece.position
        code = KINDS.index(kind) if kind in SERVED else zlib.crc32(what.encode()) << 3 | KINDS.index(kind)
        runtime.mode = mine = -1 - (position << 3 | code if kind in SERVED else code)
        try:
            while True:
                runtime.mode, runtime.mode_name = mine, what
                told, _ = runtime.header(rows, problem, tell, same_mode=False)
                modes = runtime.modes
                if len(set(modes)) == 1:
                    return told
                kinds = [KINDS[(-1 - m) & 7] if m < 0 else "another program" for m in modes]
                calls = [m for m, k in zip(modes, kinds, strict=True) if k in SERVED]
                if not calls or not all(k in WAITING for k in kinds):
                    runtime.raise_different()
                told = [n if m == calls[0] else 0 for n, m in zip(told, modes, strict=True)]
                if calls[0] == mine:
                    return told
                self._serve(KINDS[(-1 - calls[0]) & 7], self.pieces[(-1 - calls[0]) >> 3], told)
        except DescompilerError:
            self.failed = True
            raise

    def _serve(self, kind: str, piece: Piece, asked: list[int]) -> None:
        """Take part in other ranks' use of a piece."""
        if kind == "whole":
            self._gathered(piece)
        else:
            none = torch.zeros(0, dtype=torch.int64, device=piece.device)
            self._fetched(piece, none, [0] * self.runtime.ranks, asked, False)

    # ---- rows

    def fetch(self, piece: Piece, ids: Tensor, sparse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Unique rows of the original parameter.

        Returns
        -------
        rows : Tensor [U, ...]
        inverse : Tensor
            ``rows[inverse]`` are the rows at ``ids``.
        unique : Tensor [U]
            The ids of ``rows``.
        """
        pieces, name = piece.pieces, piece.original
        total = pieces.shape[0]
        problem = None
        if ids.is_floating_point() or ids.dtype == torch.bool:
            problem = f"table {name!r}: ids must be integers, and are {ids.dtype}"
        elif ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= total):
            bad = ids[(ids < 0) | (ids >= total)][0]
            problem = f"table {name!r}: id {int(bad)} is not in 0 to {total - 1}; check the vocabulary size"
        what = f"lookup in {name!r}"
        if problem is not None:
            if not ids.numel():  # of a batch without rows: forward is run again on a spare row
                raise InputError(problem)
            self.agree(what, "fetch", piece, problem=problem)
        unique, inverse = torch.unique(ids.reshape(-1), return_inverse=True)
        owners, positions = locate(pieces, unique, self.runtime.rank)
        order = torch.argsort(owners, stable=True)
        sent = torch.bincount(owners, minlength=self.runtime.ranks).tolist()
        asked = self.agree(what, "fetch", piece, tell=sent) if self.runtime.ranks > 1 else sent
        rows = self._fetched(piece, positions[order], sent, asked, sparse)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return rows, back[inverse].reshape(ids.shape), unique[order]

    def _fetched(self, piece: Piece, wanted: Tensor, sent: list[int], asked: list[int], sparse: bool) -> Tensor:
        record = Record(
            piece, self.runtime.forwards, sent, asked, self.exchange(wanted, sent, asked, FETCH_IDS), sparse
        )
        rows = _Fetch.apply(self, record, _anchor(piece))
        self._keep(record)
        return rows

    def _gathered(self, piece: Piece) -> Tensor:
        record = Record(piece, self.runtime.forwards, [], [], None)
        full = _Whole.apply(self, record, _anchor(piece))
        self._keep(record)
        return full

    def _keep(self, record: Record) -> None:
        if torch.is_grad_enabled() and record.piece.requires_grad:
            self.records.append(record)

    def whole(self, piece: Piece, what: str) -> Tensor:
        """The original parameter, gathered from all ranks."""
        size = torch.Size(piece.pieces.shape).numel() * piece.element_size()
        if (piece.original, what) not in self.noted:
            self.noted.add((piece.original, what))
            warn(
                f"{what} needs the whole of {piece.original!r}: its {size:,} bytes are gathered in every call, and "
                "their gradients sent back"
            )
        self.agree(f"{what} on {piece.original!r}", "whole", piece)
        return self._gathered(piece)

    def spread(self, x: Tensor, what: str) -> Tensor:
        """``[ranks]``: a scalar of every rank. Each rank computes the same with them, so its own part's gradient is
        that of the original."""
        return _Spread.apply(self, x, what)

    def total(self, x: Tensor, what: str) -> Tensor:
        """The sum of a scalar over ranks, as part of every rank's loss: its gradient here is that of averaging."""
        return _Total.apply(self, x, what)

    def exchange(self, send: Tensor, sent: Sequence[int], received: Sequence[int], name: str) -> Tensor:
        """All-to-all of rows: ``sent[r]`` rows of ``send`` to rank r, ``received[r]`` from it."""
        if self.runtime.ranks == 1:
            return send
        width = send.shape[1:].numel()
        size = (len(send) - sent[self.runtime.rank]) * width * send.element_size()
        counts = ([n * width for n in sent], [n * width for n in received])
        flat = send.contiguous().reshape(-1)
        out = self.runtime.collective(name, size, lambda: all_to_all(flat, *counts, self.runtime.group).wait())
        return out.reshape(sum(received), *send.shape[1:])

    def gather(self, piece: Tensor, pieces: Pieces) -> Tensor:
        """The full tensor of all ranks' pieces."""
        ranks = self.runtime.ranks
        if ranks == 1:
            return piece.detach().clone()
        most = max(pieces.numel(r) for r in range(ranks))
        mine = piece.new_zeros(most)
        mine[: piece.numel()] = piece.detach().reshape(-1)
        every = self.runtime.gather(GATHER, mine)
        parts = [every[r * most : r * most + pieces.numel(r)].reshape(pieces.piece_shape(r)) for r in range(ranks)]
        return pieces.join(parts)

    # ---- backward

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average these parameters' gradients over ranks when backward ends, while they require gradients."""
        self.caught = Caught(parameters if self.runtime.ranks > 1 else [], self._hold)
        self.caught.hook()

    def _hold(self, position: int, gradient: Tensor) -> None:
        before = self.caught.local.get(position)
        self.caught.local[position] = gradient if before is None else before + gradient
        self.schedule()

    def guard(self) -> Guard:
        """For the user's code in a forward: what its backward raises on this rank is told when backward ends."""

        def failed(error: Exception) -> None:
            if self.failed:  # ranks have told each other already
                raise error
            self.failure = self.failure or error

        return Guard(failed)

    def schedule(self) -> None:
        """Run `finish` when the backward that is under way ends."""
        if not self.scheduled:
            self.scheduled = True
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)

    def finish(self) -> None:
        """Exchange the gradients of this backward."""
        self.scheduled = False
        runtime, cause, problem = self.runtime, self.failure, None
        if cause is not None:
            place = raised_at(cause) or "an operator of torch"
            problem = f"backward of forward ({place}): {type(cause).__name__}: {cause}"
        try:
            self.agree(f"the end of backward, {len(self.records)} uses of split parameters", problem=problem)
        except DescompilerError as error:
            self._forget()
            raise error from cause
        held = self.caught.take()
        flags = torch.tensor(
            [r.gradient is not None for r in self.records] + [i in held for i in range(len(self.caught.parameters))],
            dtype=torch.uint8,
        )
        if runtime.ranks > 1 and len(flags):
            flags = flags.to(runtime.header_device())
            size = all_reduce_bytes(len(flags), runtime.ranks)
            largest = dist.ReduceOp.MAX
            runtime.collective(FLAGS, size, lambda: dist.all_reduce(flags, op=largest, group=runtime.group))
        some = flags.tolist()
        with torch.no_grad():
            totals: dict[Piece, Tensor] = {}
            for record, present in zip(self.records, some[: len(self.records)], strict=True):
                if present:
                    gradient = self._return_gradient(record)
                    record.gradient = None  # its graph may be kept for another backward
                    before = totals.get(record.piece)
                    totals[record.piece] = gradient if before is None else sum_of(before, gradient)
            for piece, gradient in totals.items():
                for hook in (piece._backward_hooks or {}).values():  # users', which autograd would call
                    changed = hook(gradient)
                    gradient = gradient if changed is None else changed
                add_gradient(piece, gradient)
            self._average(held, some[len(self.records) :])

    def _return_gradient(self, record: Record) -> Tensor:
        """Of the piece, from every rank's use of it; the convention's share of a sum over ranks."""
        piece, ranks = record.piece, self.runtime.ranks
        if record.positions is None:
            return self._scatter(record) / ranks
        tail = piece.shape[1:]
        gradient = record.gradient
        if gradient is None:
            gradient = piece.detach().new_zeros((sum(record.sent), *tail))
        received = self.exchange(gradient, record.sent, record.asked, FETCH_GRADIENTS) / ranks
        if record.sparse:
            return torch.sparse_coo_tensor(record.positions[None], received, piece.shape).coalesce()
        return torch.zeros(piece.shape, dtype=piece.dtype).index_add_(0, record.positions, received)

    def _scatter(self, record: Record) -> Tensor:
        """The sum over ranks of this rank's piece of a whole parameter's gradient."""
        piece, pieces, runtime = record.piece, record.piece.pieces, self.runtime
        full = record.gradient
        if full is None:
            full = torch.zeros(pieces.shape, dtype=piece.dtype)
        if runtime.ranks == 1:
            return full
        parts = [pieces.cut(full, r) for r in range(runtime.ranks)]
        mine = parts[runtime.rank]
        sizes = [p.numel() for p in parts]
        flat = torch.cat([p.reshape(-1) for p in parts])
        out = self.exchange(flat, sizes, [mine.numel()] * runtime.ranks, SCATTER)
        return out.reshape(runtime.ranks, *mine.shape).sum(0)

    def _average(self, held: Mapping[int, Tensor], present: Sequence[int]) -> None:
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, p in enumerate(self.caught.parameters):
            if present[i]:
                by_dtype.setdefault(p.dtype, []).append(i)
        for positions in by_dtype.values():
            flat = self.caught.flat(positions, held, self.runtime.ranks)
            self.runtime.all_reduce(DenseGradients.AVERAGE, flat)
            self.caught.accumulate(positions, flat)


def _anchor(piece: Piece) -> Tensor:
    """What makes autograd reach a use of a piece; the piece itself would have its hooks called without a gradient."""
    return torch.zeros((), device=piece.device, requires_grad=piece.requires_grad)


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keeper: Keeper, record: Record, anchor: Tensor) -> Tensor:
        ctx.keeper, ctx.record = keeper, record
        own = plain(record.piece).detach()
        return keeper.exchange(own[record.positions], record.asked, record.sent, FETCH_ROWS)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _hold(ctx, grads[0])


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keeper: Keeper, record: Record, anchor: Tensor) -> Tensor:
        ctx.keeper, ctx.record = keeper, record
        return keeper.gather(plain(record.piece), record.piece.pieces)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _hold(ctx, grads[0])


def _hold(ctx: Any, gradient: Tensor) -> Any:
    record, keeper = ctx.record, ctx.keeper
    if not any(r is record for r in keeper.records):
        raise UnsupportedError(f"backward through a forward that ended more than {KEPT_FORWARDS} forwards ago")
    record.gradient = gradient
    keeper.schedule()
    return None, None, None


def _scalars(keeper: Keeper, x: Tensor, what: str) -> Tensor:
    """A scalar of every rank, bit for bit, in the agreement itself."""
    bits = int(x.detach().double().cpu().reshape(1).view(torch.int64))
    told = keeper.agree(what, tell=[bits] * keeper.runtime.ranks)
    return torch.tensor(told, dtype=torch.int64).view(torch.float64).to(x)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keeper: Keeper, x: Tensor, what: str) -> Tensor:
        ctx.rank, ctx.shape = keeper.runtime.rank, x.shape
        return x.reshape(1).clone() if keeper.runtime.ranks == 1 else _scalars(keeper, x, what)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0][ctx.rank].reshape(ctx.shape), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keeper: Keeper, x: Tensor, what: str) -> Tensor:
        ctx.ranks = keeper.runtime.ranks
        return _scalars(keeper, x, what).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0] * ctx.ranks, None  # averaged over ranks below


class Finish(torch.autograd.Function):
    """Identity on a forward's outputs; in backward it makes sure that the gradients' exchange takes place."""

    @staticmethod
    def forward(ctx: Any, keeper: Keeper, anchor: Tensor, *tensors: Tensor) -> Any:
        ctx.keeper = keeper
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.keeper.schedule()
        return None, None, *grads

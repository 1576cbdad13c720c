"""Substituted parameters: what happens when Python code uses a parameter of which this rank holds a piece.

A `Piece` is an ordinary parameter (this rank's part, for optimisers) whose uses are intercepted:

    lookup      F.embedding, F.embedding_bag, W[ids], index_select     each unique row is fetched once from its owner
    reduction   W.sum(), W.mean(), norms, also of f(W) elementwise     local terms, then every rank's
    the rest    W @ x, cat([W, V]), ...                                the whole parameter is gathered, with a note

so each means what it means in the original model. Gradients are exchanged at the end of backward, all at once
(`Keeper.finish`): ranks may use a value or not. Every exchange begins with an agreement (`Keeper.agree`): ranks whose
Python looks up more or less than the others' serve each other, any other difference is an error that says where.
"""

from __future__ import annotations

import warnings
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode, resolve_name

from descompiler import traffic as wire
from descompiler.collectives import all_to_all
from descompiler.errors import DescompilerError, InputError, UnsupportedError
from descompiler.guard import Guard, raised_at
from descompiler.pieces import ALL, Pieces
from descompiler.runtime import Runtime

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
    replicated: list[nn.Parameter] = field(default_factory=list)
    accumulators: list[Any] = field(default_factory=list)  # the hooked node of each of ``replicated``, if any
    pieces: list[Piece] = field(default_factory=list)
    records: deque[Record] = field(default_factory=deque)
    local: dict[int, Tensor] = field(default_factory=dict)  # this backward's gradients, by position in ``replicated``
    scheduled: bool = False
    failed: bool = False
    failure: Exception | None = None  # of the user's code in the backward that is under way
    noted: set[tuple[str, str]] = field(default_factory=set)

    # ---- agreement

    def _forget(self) -> None:
        """Forget what the latest backward held."""
        self.scheduled, self.failure, self.local = False, None, {}
        for record in self.records:
            record.gradient = None

    def begin(self) -> None:
        """A forward begins."""
        self.failed = False
        self.runtime.forwards += 1
        if torch._C._current_graph_task_id() == NO_BACKWARD:  # what a backward that was broken off has left
            self._forget()
        self._hook()
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
        owners, positions = _locate(pieces, unique, self.runtime.rank)
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
            warnings.warn(
                f"descompiler: {what} needs the whole of {piece.original!r}: its {size:,} bytes are gathered in every "
                "call, and their gradients sent back",
                stacklevel=2,
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
        self.replicated.extend(parameters)
        self.accumulators.extend([None] * len(parameters))
        self._hook()

    def _hook(self) -> None:
        """Hold what reaches the node that accumulates a parameter's gradient, behind hooks that users registered.

        A parameter has none while it is frozen, and another one once its dtype or device has changed.
        """
        if self.runtime.ranks == 1 or not torch.is_grad_enabled():
            return
        for i, p in enumerate(self.replicated):
            if p.requires_grad and (node := get_gradient_edge(p).node) is not self.accumulators[i]:
                self.accumulators[i] = node
                node.register_prehook(lambda gradients, i=i: self._hold(i, gradients))

    def _hold(self, position: int, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...] | None:
        (gradient,) = gradients
        if gradient is None:
            return None
        self.local[position] = gradient.to_dense() if gradient.is_sparse else gradient
        self.schedule()
        return (torch.zeros_like(self.local[position]),)

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
        held, self.local = self.local, {}
        flags = torch.tensor(
            [r.gradient is not None for r in self.records] + [i in held for i in range(len(self.replicated))],
            dtype=torch.uint8,
        )
        if runtime.ranks > 1 and len(flags):
            flags = flags.to(runtime.header_device())
            size = wire.all_reduce_bytes(len(flags), runtime.ranks)
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
                    totals[record.piece] = gradient if before is None else _sum(before, gradient)
            for piece, gradient in totals.items():
                for hook in (piece._backward_hooks or {}).values():  # users', which autograd would call
                    changed = hook(gradient)
                    gradient = gradient if changed is None else changed
                _add(piece, gradient)
            self._average(held, some[len(some) - len(self.replicated) :])

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
        ranks = self.runtime.ranks
        if ranks == 1:
            return
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, p in enumerate(self.replicated):
            if present[i]:
                by_dtype.setdefault(p.dtype, []).append(i)
        for positions in by_dtype.values():
            parts = [held[i] if i in held else torch.zeros_like(self.replicated[i]) for i in positions]
            flat = torch.cat([g.reshape(-1) for g in parts])
            self.runtime.all_reduce(wire.DENSE_GRADIENTS, flat)
            flat /= ranks
            for i, g in zip(positions, flat.split([g.numel() for g in parts]), strict=True):
                _add(self.replicated[i], g.reshape(self.replicated[i].shape))


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Of gradients that may be sparse; torch adds a sparse one to a dense one only."""
    return b + a if a.is_sparse else a + b


def _add(p: Tensor, gradient: Tensor) -> None:
    """Accumulate a gradient that autograd does not bring."""
    if p.grad is None:
        p.grad = gradient.clone()
    elif p.grad.is_sparse or gradient.is_sparse:
        p.grad = _sum(p.grad, gradient)
    else:
        p.grad.add_(gradient)


def _locate(pieces: Pieces, ids: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Owner of each row, and its position in the owner's piece; rows that all ranks hold are taken from this one."""
    held = [r for r in pieces.ranges if r.size]
    offset = dict.fromkeys(range(pieces.ranks), 0)
    owners, bases = [], []
    for r in held:
        if r.owner == ALL:
            position = pieces.own_size(rank) + sum(s.size for s in pieces.shared() if s.stop <= r.start)
            owners.append(rank)
        else:
            position = offset[r.owner]
            offset[r.owner] += r.size
            owners.append(r.owner)
        bases.append(position - r.start)
    starts = torch.tensor([r.start for r in held], dtype=torch.int64, device=ids.device)
    index = torch.bucketize(ids.long(), starts, right=True) - 1
    return torch.tensor(owners, device=ids.device)[index], ids.long() + torch.tensor(bases, device=ids.device)[index]


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


# ---------------------------------------------------------------------------------------------------------------------
# Interception


def plain(x: Tensor) -> Tensor:
    """The same tensor, for code whose results are ordinary tensors."""
    return _local(Tensor.as_subclass, (x, Tensor), {})


class Tracked(Tensor):
    """An elementwise function of pieces, for reductions; it is cut as they are."""

    pieces: Pieces
    original: str
    keeper: Keeper

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _intercept(func, args, kwargs or {})


class Piece(nn.Parameter):
    """This rank's part of a parameter; see the module's text."""

    pieces: Pieces
    original: str
    keeper: Keeper
    position: int  # among the keeper's pieces

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _intercept(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        result = nn.Parameter(plain(self).detach().clone(), self.requires_grad)
        return memo.setdefault(id(self), result)  # a copy is a plain tensor: it belongs to no module

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(plain(self).detach(), self.requires_grad).__reduce_ex__(protocol)


def substitute(p: nn.Parameter, name: str, pieces: Pieces, keeper: Keeper) -> Piece:
    """Make a parameter that holds this rank's part a `Piece`, in place: optimisers keep their reference."""
    p.__class__ = Piece
    p.pieces, p.original, p.keeper = pieces, name, keeper  # type: ignore[attr-defined]
    p.position = len(keeper.pieces)  # type: ignore[attr-defined]
    keeper.pieces.append(p)  # type: ignore[arg-type]
    return p  # type: ignore[return-value]


_ELEMENTWISE_NAMES = """
    square pow abs mul multiply add sub subtract div divide true_divide neg negative sqrt rsqrt exp log log1p sigmoid
    tanh relu clamp clamp_min clamp_max sign __mul__ __rmul__ __add__ __radd__ __sub__ __rsub__ __neg__ __truediv__
    __pow__ softplus logsigmoid gelu silu clone float double
"""
ELEMENTWISE = {
    getattr(home, name) for home in (torch, Tensor, F) for name in _ELEMENTWISE_NAMES.split() if hasattr(home, name)
}
SUMS = {torch.sum: "sum", Tensor.sum: "sum", torch.mean: "mean", Tensor.mean: "mean"}
NORMS = {torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm}
LOOKUPS = {F.embedding, F.embedding_bag, torch.embedding, Tensor.__getitem__, torch.index_select, Tensor.index_select}
DROPOUTS = {F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d}
PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, torch.bmm}


def _intercept(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in LOOKUPS:
        result = _lookup(func, args, kwargs)
        if result is not NotImplemented:
            return result
        return _on_whole(func, args, kwargs)
    if func in PRODUCTS:
        return _on_whole(func, args, kwargs)
    if not torch.is_grad_enabled():  # optimisers, initialisers, copies: this rank's part
        return _local(func, args, kwargs)
    first = args[0] if args else None
    if func in SUMS or func in NORMS:
        result = _reduce(func, first, args[1:], kwargs)
        if result is not NotImplemented:
            return result
        return _on_whole(func, args, kwargs)
    if func in ELEMENTWISE and (kind := _common(args, kwargs)) is not None:
        result = _local(func, args, kwargs)
        if isinstance(result, Tensor) and result.shape == kind.shape:
            tracked = result.as_subclass(Tracked)
            tracked.pieces, tracked.original, tracked.keeper = kind.pieces, kind.original, kind.keeper
            return tracked
    result = _local(func, args, kwargs)
    tensors = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)]
    if not any(x.grad_fn is not None for x in tensors):
        return result  # sizes, dtypes, detached values: this rank's part
    return _on_whole(func, args, kwargs)


def _local(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    torch.utils._pytree.tree_map_only(Tensor, found.append, (args, kwargs))
    return found


def _common(args: Any, kwargs: Any) -> Any:
    """The piece that all tensors among the arguments are cut as; None if they are not (numbers may join)."""
    cut = [x for x in _tensors(args, kwargs) if x.numel() != 1 or isinstance(x, Piece | Tracked)]
    if all(isinstance(x, Piece | Tracked) and x.pieces == cut[0].pieces and x.shape == cut[0].shape for x in cut):  # type: ignore[attr-defined]
        return cut[0]
    return None


def _own_and_shared(x: Any) -> tuple[Tensor, Tensor]:
    """The part that this rank alone holds, and the part that every rank holds."""
    held, own = plain(x), x.pieces.own_size(x.keeper.runtime.rank)
    return held.narrow(x.pieces.dim, 0, own), held.narrow(x.pieces.dim, own, held.shape[x.pieces.dim] - own)


def _reduce(func: Any, x: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A sum, mean or norm over all elements; NotImplemented for one over a dimension."""
    if not isinstance(x, Piece | Tracked):
        return NotImplemented
    what = f"{function_name(func)} of {x.original!r}"
    own, shared = _own_and_shared(x)
    if func in SUMS:
        if rest or kwargs:
            return NotImplemented
        total = x.keeper.spread(own.sum(), what).sum() + shared.sum()
        return total / torch.Size(x.pieces.shape).numel() if SUMS[func] == "mean" else total
    order = kwargs.get("p", kwargs.get("ord", rest[0] if rest else 2))
    order = 2 if order in (None, "fro") else order
    if len(rest) > 1 or set(kwargs) - {"p", "ord"} or not isinstance(order, int | float) or order <= 0:
        return NotImplemented
    if func is torch.linalg.norm and order != 2:
        return NotImplemented  # a matrix norm
    norms = [torch.linalg.vector_norm(part, order) if part.numel() else part.sum() for part in (own, shared)]
    return torch.linalg.vector_norm(torch.cat([x.keeper.spread(norms[0], what), norms[1].reshape(1)]), order)


def _on_whole(func: Any, args: Any, kwargs: Any) -> Any:
    def gathered(x: Any) -> Any:
        if isinstance(x, Piece):
            return x.keeper.whole(x, function_name(func))
        if isinstance(x, Tracked):
            raise UnsupportedError(
                f"{function_name(func)} takes an elementwise function of {x.original!r}, of which each rank holds a "
                "part; only sums, means and norms over all its elements are computed from parts. Pin it: "
                f"plan={{{x.original!r}: 'replicate'}}"
            )
        return x

    return func(*torch.utils._pytree.tree_map(gathered, args), **torch.utils._pytree.tree_map(gathered, kwargs))


def _lookup(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A lookup through fetched rows; NotImplemented if the call is none (a slice, ids that are no piece's)."""
    names: tuple[str, ...]
    if func is F.embedding:
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    elif func is F.embedding_bag:
        names = (
            "input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
            "per_sample_weights", "include_last_offset", "padding_idx",
        )  # fmt: skip
    elif func is torch.embedding:
        names = ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse")
    else:
        return _index(func, args, kwargs)
    call = dict(zip(names, args, strict=False)) | kwargs
    weight, ids = call["weight"], call["input"]
    if not isinstance(weight, Piece) or isinstance(ids, Piece | Tracked) or weight.pieces.dim != 0:
        return NotImplemented
    for option in ("max_norm", "scale_grad_by_freq"):
        if call.get(option):
            raise UnsupportedError(
                f"table {weight.original!r} is looked up with {option}: it depends on what one rank sees; leave it out"
            )
    rows, inverse, unique = weight.keeper.fetch(weight, ids, bool(call.get("sparse")))
    padding = call.get("padding_idx")
    if (padding is not None and padding != -1) or (padding == -1 and func is not torch.embedding):
        padding = padding + weight.pieces.shape[0] if padding < 0 else padding
        place = (unique == padding).nonzero()
        padding = int(place) if len(place) else None
    elif func is torch.embedding:
        padding = -1
    if func is torch.embedding:
        return torch.embedding(rows, inverse, -1 if padding is None else padding)
    call |= {"weight": rows, "input": inverse, "padding_idx": padding, "sparse": False}
    return func(**call)


def _index(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is Tensor.__getitem__:
        weight, ids = args
    else:
        weight, dim, ids = (dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs).values()
        if dim != 0:
            return NotImplemented
    if isinstance(ids, int):
        ids = torch.tensor(ids)
    integers = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dtype not in (torch.bool, torch.uint8)
    if not isinstance(weight, Piece) or not integers or weight.pieces.dim != 0:
        return NotImplemented
    if func is Tensor.__getitem__:
        ids = torch.where(ids < 0, ids + weight.pieces.shape[0], ids)
    rows, inverse, _ = weight.keeper.fetch(weight, ids, False)
    return rows[inverse]


def function_name(func: Callable[..., Any]) -> str:
    return resolve_name(func) or getattr(func, "__name__", str(func))


class SynchroniseNorms(TorchFunctionMode):
    """Batch norm in training takes its statistics over the global batch."""

    def __init__(self, keeper: Keeper, *, spare: bool = False):
        super().__init__()
        self.keeper = keeper
        self.spare = spare  # the rows are none of the batch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        call: dict[str, Any] = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
        call |= dict(zip(names, args, strict=False)) | (kwargs or {})
        if not call["training"]:
            return func(*args, **(kwargs or {}))
        keeper = self.keeper
        keeper.agree("batch norm", "norm")
        x = call["input"][:0] if self.spare else call["input"]
        arguments = (call[n] for n in ("weight", "bias", "running_mean", "running_var", "momentum", "eps"))
        out = keeper.runtime.batch_norm(x, *arguments)
        if out.requires_grad:
            out.register_hook(self._before_backward)
        return call["input"] + out.sum() if self.spare else out  # a sum over no rows: 0

    def _before_backward(self, gradient: Tensor) -> None:
        self.keeper.agree("backward of batch norm")

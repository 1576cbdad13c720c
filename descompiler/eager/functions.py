"""Autograd functions of the eager rung: what crosses in forward, and what happens when backward comes back to it.

A use of a sharded parameter is reached through an anchor, a scalar made of it, so that a backward which asks for the
parameter comes to the use. What autograd brings the parameter through it is nothing: `GradientSync` has the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from descompiler.eager.dynamic import DynamicParameter
from descompiler.eager.gradients import GradientSync, UseOfPiece
from descompiler.eager.piece import Divided
from descompiler.layout.fetches import Fetch
from descompiler.layout.global_values import WholeTables
from descompiler.ops.local import plain
from descompiler.ops.operation import Operation
from descompiler.runtime.backward import Used, differentiable_once
from descompiler.runtime.carriers import carries
from descompiler.runtime.runtime import Runtime

TRACE = "write forward so that it can be traced, or compile a part of the model"


def fetched(sync: GradientSync, use: UseOfPiece) -> Tensor:
    """The rows that this rank has asked for; it sends those that it was asked for."""
    return _Fetched.apply(sync, use, _anchor(sync, use.parameter))


def gathered(sync: GradientSync, use: UseOfPiece) -> Tensor:
    """The whole parameter, of all ranks' parts."""
    return _Gathered.apply(sync, use, _anchor(sync, use.parameter))


def scalars(runtime: Runtime, x: Tensor, what: str) -> Tensor:
    """``[ranks]``: a scalar of every rank.

    Each rank computes the same with them, so its own part's gradient is that of the original.
    """
    return _Scalars.apply(runtime, x, what)


def total(runtime: Runtime, x: Tensor, what: str) -> Tensor:
    """The sum of a scalar over ranks; each rank's has the gradient that comes to the sum."""
    return _Total.apply(runtime, x, what)


def _anchor(sync: GradientSync, parameter: Divided) -> Tensor:
    # autograd would call users' hooks without a gradient; and rows of dynamic tables are not asked for by themselves
    if not sync.in_part or isinstance(parameter, DynamicParameter):
        return torch.zeros((), device=parameter.device, requires_grad=parameter.requires_grad)
    with torch._C.DisableTorchFunctionSubclass():
        return _Anchor.apply(parameter)


class _Anchor(Operation):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return torch.zeros((), device=parameter.device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None


@carries(Fetch)
class _Fetched(Operation):
    @staticmethod
    def forward(ctx: Any, sync: GradientSync, use: UseOfPiece, anchor: Tensor) -> Tensor:
        ctx.sync, ctx.use = sync, use
        own = plain(use.parameter).detach()
        return sync.runtime.exchange_rows(own[use.positions], use.asked, use.sent, Fetch.ROWS)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.sync.hold(ctx.use, grads[0])
        return None, None, None


@carries(WholeTables)
class _Gathered(Operation):
    @staticmethod
    def forward(ctx: Any, sync: GradientSync, use: UseOfPiece, anchor: Tensor) -> Tensor:
        ctx.sync, ctx.use = sync, use
        own, pieces, runtime = plain(use.parameter).detach(), use.parameter.pieces, sync.runtime
        if runtime.ranks == 1:
            return own.clone()
        most = max(pieces.numel(r) for r in range(runtime.ranks))
        mine = own.new_zeros(most)
        mine[: own.numel()] = own.reshape(-1)
        every = runtime.gather(WholeTables.GATHER, mine)
        parts = [every[r * most :][: pieces.numel(r)].reshape(pieces.piece_shape(r)) for r in range(runtime.ranks)]
        return pieces.join(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.sync.hold(ctx.use, grads[0])
        return None, None, None


def _of_every_rank(runtime: Runtime, x: Tensor, what: str) -> Tensor:
    """A scalar of every rank, bit for bit, in the agreement itself."""
    bits = int(x.detach().double().cpu().reshape(1).view(torch.int64))
    told = runtime.meet(what, tell=[bits] * runtime.ranks)
    return torch.tensor(told, dtype=torch.int64).view(torch.float64).to(x)


class _Scalars(Operation):
    @staticmethod
    def forward(ctx: Any, runtime: Runtime, x: Tensor, what: str) -> Tensor:
        ctx.rank, ctx.shape = runtime.rank, x.shape
        return x.reshape(1).clone() if runtime.ranks == 1 else _of_every_rank(runtime, x, what)

    @staticmethod
    @differentiable_once("a value of every rank in a forward that is not traced", TRACE)
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0][ctx.rank].reshape(ctx.shape), None


class _Total(Operation):
    @staticmethod
    def forward(ctx: Any, runtime: Runtime, x: Tensor, what: str) -> Tensor:
        ctx.set_materialize_grads(False)
        return _of_every_rank(runtime, x, what).sum()

    @staticmethod
    @differentiable_once("a value of every rank in a forward that is not traced", TRACE)
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0], None


class Finish(Operation):
    """Identity on a forward's outputs; in backward it makes sure that the gradients' exchange takes place.

    Outputs that any rank's loss uses have a gradient on every rank, so that all make the same collectives; the others
    have none. ``positions``: of the tensors, among the outputs.

    Sharded parameters are among its inputs, so that one whose gradient is to be returned has one, to be filled in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sync: GradientSync,
        used: Used,
        positions: Sequence[int],
        anchor: Tensor,
        sharded: int,
        *tensors: Tensor,
    ) -> Any:
        ctx.sync, ctx.sharded, ctx.used, ctx.positions = sync, sharded, used, positions
        ctx.like = [(t.shape, t.dtype, t.device) for t in tensors[sharded:]]
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors[sharded:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        every = [
            torch.zeros(s, dtype=t, device=d) if g is None and ctx.used.has(i) else g
            for i, g, (s, t, d) in zip(ctx.positions, grads, ctx.like, strict=True)
        ]
        return *(None,) * 5, *ctx.sync.enter_backward(ctx.sharded, ctx.used), *every

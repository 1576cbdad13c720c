"""Rows: the parameter of a dynamic table, which widens when rows come, and the lookup whose gradient knows who went."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from descompiler.dynamic.storage import Growing
from descompiler.errors import UnsupportedError
from descompiler.ops.local import put_rows, rows_at

P = ParamSpec("P")
R = TypeVar("R")

FEWEST_ROWS = 256
WIDER = 4
"""The parameter has a quarter more rows than it needs, or room for the step with most new rows twice over."""


def as_plain(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function see tensors as plain ones: the parameter may be of a class that ranks' parts of a table have."""

    @functools.wraps(function)
    def seen(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    return seen


def lasting(function: Callable[P, R]) -> Callable[P, R]:
    """Let what a function makes be trained and written to later, also where it is called in `torch.inference_mode`."""

    @functools.wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return made


def among(slots: Tensor, some: Tensor) -> Tensor:
    """Of each slot whether it is one of some: `torch.isin`, which takes three times as long for those of a step."""
    if not len(some):
        return torch.zeros_like(slots, dtype=torch.bool)
    if slots.device.type != "cpu":
        return torch.isin(slots, some.to(slots.device))
    ordered, looked_for = np.sort(some.cpu().numpy()), slots.numpy()
    return torch.from_numpy(ordered[ordered.searchsorted(looked_for) % len(ordered)] == looked_for)


class Ticket:
    """What the gradient of one lookup has to know: slots whose rows have gone since."""

    __slots__ = ("__weakref__", "gone")

    def __init__(self) -> None:
        self.gone: list[Tensor] = []

    def stay(self, slots: Tensor) -> Tensor:
        """Of each slot, whether it has a row, which has not gone since."""
        result = slots != 0
        for gone in self.gone:
            result.logical_and_(among(slots, gone).logical_not_())
        return result


class Rows:
    """The rows of a table in one parameter, by slot. Row 0 is the default row; rows of free slots are zeros.

    The parameter gets wider between steps, if that is enough for the next one. If it isn't, lookups of before and after
    have gradients of different shapes, which autograd takes to the parameter by different ways: they are brought to one
    shape as they come.
    """

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device, most: int | None):
        self.most = None if most is None else most + 1
        self._held = Growing((1, dim), dtype, device, self.most)
        self._coming = self._largest = 0
        self._waiting: Tensor | None = None
        self.marked: Callable[[Tensor], Tensor] = lambda x: x
        """What an optimiser's state of these rows is, beside a tensor: of a rank's part of a table, a piece."""
        self.untaken = False
        """Whether a gradient has come since an optimiser took the last one."""
        self.writes = 0
        """How often something else than optimisers and the table has written rows, as far as `notice` saw it."""
        self.tickets: weakref.WeakSet[Ticket] = weakref.WeakSet()
        self.parameter = nn.Parameter(self._held.tensor)
        self._version = self._written()
        self._watch()
        self._widen(FEWEST_ROWS if self.most is None else min(FEWEST_ROWS, self.most))

    def notice(self) -> None:
        """Look whether somebody has written to the parameter since an optimiser did."""
        known, self._version = self._version, self._written()
        self.writes += self._version != known

    @as_plain
    def follow(self) -> None:
        """Go on with what has been put in the place of the rows: ``parameter.data = ...``; memory of several processes.

        Raises
        ------
        UnsupportedError
            If these are more or fewer.
        """
        if self.parameter.data_ptr() == self.tensor.data_ptr() and not self._held.is_elsewhere:
            return
        if self.parameter.shape != self.tensor.shape:
            raise UnsupportedError(
                f"`weight.data = ...` has put {tuple(self.parameter.shape)} in the place of the rows of a dynamic "
                f"table, {tuple(self.tensor.shape)}, which come and go: write into them (`weight.data.copy_(...)`), or "
                "load a state dict"
            )
        self.adopt(self.parameter)

    def taken(self) -> None:
        """An optimiser has taken the gradient, and written to the parameter."""
        self.untaken, self._version = False, self._written()

    @as_plain
    def _written(self) -> int:
        return 0 if self.parameter.is_inference() else self.parameter._version

    @property
    def tensor(self) -> Tensor:
        """The rows, without history."""
        return self._held.tensor

    def adopt(self, parameter: nn.Parameter) -> None:
        """Go on with another parameter, or with what a cast or a move has put into this one."""
        with torch.no_grad():
            self._held = Growing.holding(parameter.detach(), self.most)
        known, self.parameter = self.parameter, parameter
        self.writes, self._version = self.writes + 1, self._written()
        self._assign(self._held.tensor)
        if known is not parameter:
            self._watch()

    def write(self, slots: Tensor, values: Tensor) -> None:
        """Set rows of slots, for which there is room then."""
        self._coming += len(slots)
        if len(slots):
            self.need(int(slots.max()) + 1)
            put_rows(self.tensor, slots.to(self.tensor.device), values.to(self.tensor))

    def need(self, size: int) -> None:
        """Let the parameter have at least so many rows."""
        if size > len(self.tensor):
            wider = max(size, len(self.tensor) * (WIDER + 1) // WIDER)
            self._widen(wider if self.most is None else max(size, min(wider, self.most)))

    @as_plain
    def clear(self, slots: Tensor) -> None:
        """Rows have gone: what comes of their gradients is nobody's."""
        if not len(slots):
            return
        for ticket in self.tickets:
            ticket.gone.append(slots)
        self.tensor.index_fill_(0, slots.to(self.tensor.device), 0)
        if (grad := self.gradient()) is not None:
            left = among(grad._indices()[0], slots).logical_not_()
            if not left.all():
                self.parameter.grad = _part(grad, left)

    def end_step(self, end: int) -> None:
        """Widen the parameter for what the next step may bring, of which slots up to an end are taken now."""
        self._largest, self._coming = max(self._largest, self._coming), 0
        if end + self._largest > len(self.tensor):
            self.need(end + 2 * self._largest)

    @as_plain
    def pending(self) -> Tensor:
        """Slots whose gradient waits for an optimiser."""
        grad = self.gradient()
        return torch.empty(0, dtype=torch.int64) if grad is None else grad._indices()[0].cpu()

    @as_plain
    def gradient(self) -> Tensor | None:
        """The parameter's gradient.

        Raises
        ------
        UnsupportedError
            If it is dense.
        """
        grad = self.parameter.grad
        if grad is not None and not grad.is_sparse:
            raise UnsupportedError(
                "the weight of a dynamic table has a dense gradient: it was used otherwise than by lookups, as in a "
                "penalty on table.weight. Penalise the rows that lookups return"
            )
        return grad

    @as_plain
    def settle(self) -> None:
        """Let the gradient have the parameter's shape."""
        grad = self.parameter.grad
        if grad is not None and grad.is_sparse and grad.shape != self.parameter.shape:
            self.parameter.grad = _shaped(grad, self.parameter.shape)

    def look_up(self, slots: Tensor, weight: Tensor | None = None) -> Tensor:
        """Rows of slots, with a history if gradients are asked for: of the parameter, or what has been made of it."""
        slots = slots.to(self.tensor.device)
        if not (torch.is_grad_enabled() and self._is_trained()):
            return rows_at(self.tensor, slots)
        weight = self.parameter if weight is None else weight
        found: Tensor = _LookUp.apply(weight, self.tensor, slots, self.ticket())
        return found

    def ticket(self) -> Ticket:
        """What knows which rows have gone since now."""
        ticket = Ticket()
        self.tickets.add(ticket)
        return ticket

    @as_plain
    def _is_trained(self) -> bool:
        return self.parameter.requires_grad

    @as_plain
    def _widen(self, size: int) -> None:
        self._held.grow(size)
        self._assign(self._held.tensor)
        self.settle()

    @as_plain
    def _assign(self, data: Tensor) -> None:
        # what accumulates the gradient knows the parameter's shape, and lives as long as graphs that lead to it; it is
        # given up only when the dtype changes
        other = torch.float16 if data.dtype != torch.float16 else torch.float32
        self.parameter.data = torch.empty(0, dtype=other, device=data.device)
        self.parameter.data = data

    def _watch(self) -> None:
        rows = weakref.ref(self)

        @unserializable_hook  # a copy has its own
        @as_plain
        def comes(grad: Tensor) -> None:
            held = rows()
            if held is not None and (before := held.parameter.grad) is not None and before.shape != grad.shape:
                held._waiting, held.parameter.grad = before, None  # a sum of two shapes would fail

        @unserializable_hook
        @as_plain
        def came(parameter: nn.Parameter) -> None:
            if (held := rows()) is None or parameter is not held.parameter:
                return
            held.untaken = True
            held.settle()
            if held._waiting is not None and parameter.grad is not None:
                parameter.grad = _shaped(held._waiting, parameter.shape) + parameter.grad
                held._waiting = None

        trained = self.parameter.requires_grad  # a frozen one may be thawed, and takes no hooks until then
        self.parameter.requires_grad_(True)
        self.parameter.register_hook(comes)
        self.parameter.register_post_accumulate_grad_hook(came)
        self.parameter.requires_grad_(trained)


def _shaped(grad: Tensor, shape: torch.Size) -> Tensor:
    """A sparse gradient in another number of rows."""
    return torch.sparse_coo_tensor(
        grad._indices(), grad._values(), shape, check_invariants=False, is_coalesced=grad.is_coalesced()
    )


def _part(grad: Tensor, rows: Tensor) -> Tensor:
    """Some entries of a sparse gradient."""
    return torch.sparse_coo_tensor(
        grad._indices()[:, rows],
        grad._values()[rows],
        grad.shape,
        check_invariants=False,
        is_coalesced=grad.is_coalesced(),
    )


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor, slots: Tensor, ticket: Ticket) -> Tensor:
        # a view of the weight may have been made before the rows that have come since
        ctx.save_for_backward(slots)
        ctx.shape, ctx.ticket = weight.shape, ticket
        return rows_at(rows, slots)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slots,) = ctx.saved_tensors
        kept = ctx.ticket.stay(slots)
        if not kept.all():
            rows = kept.nonzero()[:, 0]
            slots, grad = slots.index_select(0, rows), grad.index_select(0, rows)
        if not len(slots):  # a sum with a gradient of no rows resizes what it has, and NumPy's memory can't be
            slots, grad = torch.empty_like(slots), torch.empty_like(grad, memory_format=torch.contiguous_format)
        return torch.sparse_coo_tensor(slots[None], grad, ctx.shape, check_invariants=False), None, None, None

"""Rows of tables, updated together: what optimisers do with the rows that have gradients, and where these rows lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from descompiler.ops.local import plain, put_rows, rows_at
from descompiler.optim import ftrl


def rows_of(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that have a gradient, some of them in several parts, and these."""
    if gradient.is_sparse:
        return gradient._indices()[0], gradient._values()
    gradient = plain(gradient)  # of a table that every rank holds; where it is zero nothing moves
    rows = gradient.flatten(1).any(1).nonzero()[:, 0]
    return rows, gradient[rows]


def as_one(tensors: list[Tensor]) -> Tensor:
    """Tensors of one width, one behind the other in one storage, as one; they are moved there if they are not yet.

    A state that was loaded, or a module that was moved, has storages of its own again. Called where a piece is an
    ordinary tensor (``torch._C.DisableTorchFunctionSubclass``).
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first.detach()
    rows = sum(x.shape[0] for x in tensors)
    size, at = first.element_size() * first[:1].numel(), first.data_ptr()
    storage = first.untyped_storage()
    for x in tensors:
        if x.data_ptr() != at or not x.is_contiguous() or x.untyped_storage().data_ptr() != storage.data_ptr():
            break
        at += size * x.shape[0]
    else:
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    whole = first.new_empty(rows, *first.shape[1:])
    start = 0
    for x in tensors:  # one after the other: what was moved is free
        part = whole[start : start + x.shape[0]]
        part.copy_(x)
        x.data = part
        start += x.shape[0]
    return whole


@dataclass
class Step:
    """One step of one table: the rows that have gradients, each once unless the update is linear.

    Attributes
    ----------
    states : list of Tensor
        Of the optimiser, by `Update.states`.
    number : float
        Of the table's steps, from 1.
    """

    table: Tensor
    rows: Tensor
    gradient: Tensor
    states: list[Tensor]
    number: float
    options: dict[str, Any]


@dataclass(frozen=True)
class Update:
    """How rows of a table are updated.

    Attributes
    ----------
    states : tuple of str
        Tensors of the optimiser, of the table's shape, or of one number a row.
    options : mapping of str
        With torch's defaults.
    kept_as : str
        Whose state it is, in checkpoints of dynamic tables: what else keeps the same goes on with it.
    linear : bool
        In gradients: parts of a row's may be applied one by one, and are not sorted and summed first.
    check : callable, optional
        Raises for options out of their range.
    """

    of: Callable[[Step], None]
    states: tuple[str, ...]
    options: Mapping[str, Any]
    kept_as: str
    linear: bool = False
    check: Callable[[Mapping[str, Any]], None] | None = None


def _sgd(s: Step) -> None:
    s.table.index_add_(0, s.rows, s.gradient * -s.options["lr"])  # rows may be there several times


def _adagrad(s: Step) -> None:
    """Adagrad (Duchi et al., 2011), as `torch.optim.Adagrad` updates rows of sparse gradients."""
    (total,), square = s.states, s.gradient.square()
    if total.shape[1:] != square.shape[1:]:  # row-wise: the mean of a row's
        square = square.mean(1, keepdim=True)
    now = rows_at(total, s.rows).add_(square)
    put_rows(total, s.rows, now)
    _move(s, (s.gradient / now.sqrt_().add_(s.options["eps"])).mul_(-adagrad_rate(s)))


def adagrad_rate(s: Step) -> Any:
    """What Adagrad multiplies in this step: ``lr``, less by ``lr_decay``."""
    return s.options["lr"] / (1 + (s.number - 1) * s.options["lr_decay"])


def _adam(s: Step) -> None:
    """Adam (Kingma and Ba, 2014) of the rows that have gradients, as `torch.optim.SparseAdam`."""
    (beta1, beta2), g = s.options["betas"], s.gradient
    first, second = (rows_at(x, s.rows) for x in s.states)
    first.lerp_(g, 1 - beta1)
    second.lerp_(g.square(), 1 - beta2)
    for state, x in zip(s.states, (first, second), strict=True):
        put_rows(state, s.rows, x)
    rate = s.options["lr"] * (1 - beta2**s.number) ** 0.5 / (1 - beta1**s.number)
    _move(s, (first / second.sqrt_().add_(s.options["eps"])).mul_(-rate))


def _move(s: Step, by: Tensor) -> None:
    """Add to the table's rows, each of which is there once: to add to rows that may repeat takes twice as long."""
    put_rows(s.table, s.rows, rows_at(s.table, s.rows).add_(by))


def _ftrl(s: Step) -> None:
    """FTRL-Proximal (McMahan et al., 2013), as `descompiler.optim.FTRL`."""
    ftrl.update_rows(s.table, s.states, s.rows, s.gradient, s.options)


_ADAM = Update(_adam, ("exp_avg", "exp_avg_sq"), {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}, "SparseAdam")


_ADAGRAD = {"lr": 1e-2, "eps": 1e-10, "lr_decay": 0.0, "initial_accumulator_value": 0.0}


KINDS: dict[type[torch.optim.Optimizer], Update] = {
    torch.optim.SGD: Update(_sgd, (), {"lr": 1e-3}, "SGD", linear=True),
    torch.optim.Adagrad: Update(_adagrad, ("sum",), _ADAGRAD, "Adagrad"),
    torch.optim.Adam: _ADAM,
    torch.optim.SparseAdam: _ADAM,
    ftrl.FTRL: Update(_ftrl, ftrl.STATES, ftrl.OPTIONS, "FTRL", check=ftrl.check),
}
"""What tables may be updated by."""

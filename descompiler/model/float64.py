"""Running float32 models in float64, where errors can be told from rounding.

A model that casts (``x.float()``) or creates tensors (``torch.zeros(n, 1)``) in forward is in float32 there, whatever
its parameters are. Within `InDouble` every float32 that is asked for is float64, in eager code and in calls of ATen
operators. A tracer's own code must not run within it; `double_meant` says that the model's code shall, wherever it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from descompiler.model.attributes import held_values

_MEANT = ContextVar("_MEANT", default=False)


class InDouble(TorchFunctionMode):
    """Context in which float32 means float64.

    >>> with InDouble():
    ...     torch.arange(2).float().dtype, torch.zeros(2).dtype, torch.ones(2, dtype=torch.float32).dtype
    (torch.float64, torch.float64, torch.float64)
    >>> with InDouble():
    ...     torch.FloatTensor([1]).dtype, torch.ones(2).type(torch.FloatTensor).dtype, torch.ones(2).cfloat().dtype
    (torch.float64, torch.float64, torch.complex128)
    """

    def __enter__(self) -> InDouble:
        self._before = torch.get_default_dtype(), torch.FloatTensor
        torch.set_default_dtype(torch.float64)
        torch.FloatTensor = torch.DoubleTensor  # type: ignore[misc, assignment] # a constructor, which no mode sees
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        dtype, torch.FloatTensor = self._before  # type: ignore[misc]
        torch.set_default_dtype(dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = _WIDER_METHODS.get(func, func)
        return func(*map(_double, args), **{k: _double(v) for k, v in (kwargs or {}).items()})


_WIDER_METHODS = {
    torch.Tensor.float: torch.Tensor.double,
    torch.Tensor.cfloat: torch.Tensor.cdouble,  # type: ignore[attr-defined]
}


_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128, "torch.FloatTensor": torch.float64}


def _double(x: Any) -> Any:
    return _WIDER.get(x, x) if isinstance(x, torch.dtype | str) else x


def _is_narrow(x: Tensor) -> bool:
    return x.dtype in _WIDER or (x.is_floating_point() and x.dtype != torch.float64)


def widen(x: Tensor) -> Tensor:
    """A tensor of less precision in float64 or complex128, others as they are; leaves stay leaves."""
    wider = x.detach().to(_WIDER.get(x.dtype, torch.float64) if _is_narrow(x) else x.dtype)
    return wider.requires_grad_(x.requires_grad)


def widen_attributes(model: nn.Module) -> None:
    """Tensors that modules hold as plain attributes (adjacency matrices, features), in float64: ``double`` skips them.

    >>> module = nn.Linear(1, 1).double()
    >>> module.features = [torch.ones(2), {"item": torch.eye(2).to_sparse()}]
    >>> widen_attributes(module)
    >>> module.features[0].dtype, module.features[1]["item"].dtype
    (torch.float64, torch.float64)
    """
    registered = {id(p) for p in model.parameters()}

    def is_narrow(x: Any) -> bool:
        return isinstance(x, Tensor) and _is_narrow(x) and id(x) not in registered

    for module, name, nested in held_values(model):
        if any(map(is_narrow, pytree.tree_leaves(nested))):
            vars(module)[name] = pytree.tree_map(lambda x: widen(x) if is_narrow(x) else x, nested)


@contextmanager
def double_meant() -> Iterator[None]:
    """Context in which models are traced, and run, as if written for float64."""
    default, token = torch.get_default_dtype(), _MEANT.set(True)
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        _MEANT.reset(token)
        torch.set_default_dtype(default)


def is_double_meant() -> bool:
    """Whether a model's own code has to run within `InDouble`."""
    return _MEANT.get()

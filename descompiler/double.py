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
from torch.overrides import TorchFunctionMode

_MEANT = ContextVar("_MEANT", default=False)


class InDouble(TorchFunctionMode):
    """Context in which float32 means float64.

    >>> with InDouble():
    ...     torch.arange(2).float().dtype, torch.zeros(2).dtype, torch.ones(2, dtype=torch.float32).dtype
    (torch.float64, torch.float64, torch.float64)
    """

    def __enter__(self) -> InDouble:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_double, args), **{k: _double(v) for k, v in (kwargs or {}).items()})


def _double(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x


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

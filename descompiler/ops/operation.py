"""What the autograd functions of this package are."""

from __future__ import annotations

from typing import Any

import torch


class Operation(torch.autograd.Function):
    """An autograd function that takes its operands as they are.

    PyTorch's own looks in Python at each of them, whether it was left behind by a transform of ``torch.func``: of an
    operator of a hundred tables that takes longer than the operator. Within such a transform that goes on, and PyTorch
    says what is wrong with it.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

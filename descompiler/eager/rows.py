"""Which tensors in the user's code, outside of the compiled method, have this rank's rows of the batch.

What a parameter does to rows weighs as the method's outputs do, and what it does to a constant counts once, so that a
constant of as many rows must not be taken for the batch's. What has a history comes from the method's outputs. Of the
rest the number of rows decides, and whether the global batch would fit in the same place: the user's code is that of
one process, where it has to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descompiler.errors import UnsupportedError, running_at
from descompiler.ops.functions import TERMS, function_name
from descompiler.runtime.agreement import Agreement


def of_batch(x: Tensor, runtime: Agreement, holds: Callable[[Tensor], bool]) -> bool:
    """Whether a tensor that no parameter is has rows of this rank: the method's outputs, or inputs and labels.

    ``holds`` says whether a tensor is a buffer of the model's, which has none.
    """
    rows = runtime.known_rows()
    if x.grad_fn is not None or not x.dim() or isinstance(x, nn.Parameter) or holds(x):
        return x.grad_fn is not None
    several = rows > 1 and not x.is_floating_point()  # ids of several columns, one after another
    return x.shape[0] == rows or (several and x.shape[0] % rows == 0)


def are_constants(
    func: Any, args: Any, kwargs: Any, own: Sequence[Tensor], batch: Sequence[Tensor], runtime: Agreement
) -> bool:
    """Whether tensors that have as many rows as this rank can't be the batch's: the global one would not fit there.

    A zero that terms of a loss are added to, in turn, has one.

    Raises
    ------
    UnsupportedError
        If that is not known: on a rank with one row, a constant of one row looks as that row's labels do.
    """
    if any(x.grad_fn is not None for x in batch):
        return False
    if func in TERMS and all(x.numel() == 1 for x in (*own, *batch)):
        return not any(x.any() for x in batch)
    rows, every, chosen = runtime.known_rows(), sum(runtime.rows), {id(x) for x in batch}

    def fits(rows_of_batch: int) -> bool:
        def meta(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            more = (x.shape[0] // rows * rows_of_batch, *x.shape[1:]) if id(x) in chosen else x.shape
            return torch.empty(more, dtype=x.dtype, device="meta")

        try:
            positional, named = pytree.tree_map(meta, (args, kwargs))
            with torch._C.DisableTorchFunctionSubclass():
                func(*positional, **named)
        except (RuntimeError, TypeError, ValueError, IndexError):  # of shapes, or of what has no numbers
            return False
        return True

    if rows == 1 and runtime.ranks > 1 and fits(every):
        at = running_at()
        raise UnsupportedError(
            f"{function_name(func)}{f' at {at}' if at else ''}: what counts once for the whole batch meets a tensor of "
            f"shape {tuple(batch[0].shape)} on a rank that has one row: is that a constant, or this row's? Write a "
            "constant as a Python number or a tensor without dimensions; compute what is of rows in the compiled method"
        )
    return bool(rows) and every != rows and not fits(every) and fits(rows)

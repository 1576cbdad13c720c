"""Operators that don't do on a batch without rows what they do on others: a rank without any has a spare one.

Fourier transforms don't run there; torch's attention gives its mask no gradient there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from descompiler.layout.rows import Rows


class OnSpareRow:
    """An operator; of tensors without rows, its result for one row of the example, of which none are kept.

    Parameters
    ----------
    target : callable
    spare : sequence
        By leaf of its arguments: where the batch lies and one row of it, a number for one row, or None for what has
        no rows.
    results : sequence of Rows
        Of the tensors that it returns.
    """

    def __init__(self, target: Callable[..., Any], spare: Sequence[Any], results: Sequence[Rows]):
        self.target, self.spare, self.results = target, tuple(spare), tuple(results)
        self.__name__ = self.__qualname__ = f"{getattr(target, '__name__', str(target)).replace('.', '_')}_on_spare_row"
        self.__module__ = __name__

    def __repr__(self) -> str:
        return self.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if not any(isinstance(s, tuple) and not x.shape[s[0].dim] for x, s in zip(leaves, self.spare, strict=True)):
            return self.target(*args, **kwargs)
        args, kwargs = pytree.tree_unflatten(list(map(_with_row, leaves, self.spare)), spec)
        out = self.target(*args, **kwargs)
        if isinstance(out, Tensor):
            return self.results[0].narrow(out, 0, 0)
        return type(out)(r.narrow(x, 0, 0) for x, r in zip(out, self.results, strict=True))


def _with_row(x: Any, spare: Any) -> Any:
    if not isinstance(spare, tuple):
        return x if spare is None else spare
    rows, row = spare
    # a row beside none, so that backward still comes to what has none
    return torch.cat([x, row.to(x)], rows.dim)


def reached_without_rows(
    call: Callable[..., Any], args: Any, kwargs: Any, results: Sequence[tuple[int, ...]]
) -> list[bool] | None:
    """To which operands the gradient comes on arguments without rows; None if it does not run, or returns other shapes.

    Of those that can have one. Where ranks with rows have one and a rank without rows has none, what is sent of it
    behind this operator would find no partner there.
    """

    def leaf(x: Any) -> Any:
        differentiable = isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
        return x.detach().requires_grad_() if differentiable else x

    args, kwargs = pytree.tree_map(leaf, (args, kwargs))
    taken = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    try:
        with torch.enable_grad():
            out = call(*args, **kwargs)
            tensors = [out] if isinstance(out, Tensor) else list(out)
            if [tuple(x.shape) for x in tensors] != list(results):
                return None
            ends = [x for x in tensors if x.requires_grad]
            if not ends:
                return []
            found = torch.autograd.grad(ends, taken, [torch.ones_like(x) for x in ends], allow_unused=True)
            return [g is not None for g in found]
    except (RuntimeError, IndexError, ValueError):
        return None

"""What a program is captured for: the dtypes and sizes of a call's tensors, apart from their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from descompiler.errors import InputError
from descompiler.model.calls import OtherCall

MOST_KEPT = 128
"""Programs of one model, for inputs of other sizes, or as it was changed: the oldest go first."""


def shapes_text(sizes: Sequence[Sequence[int]]) -> str:
    """Shapes of inputs, of their sizes beyond the rows.

    >>> shapes_text([(3,), ()])
    '(rows, 3), (rows)'
    """
    return ", ".join(f"({', '.join(['rows', *map(str, x)])})" for x in sizes)


@dataclass(frozen=True)
class Kinds:
    """What a program is captured for: the tensors of a call, apart from their values.

    Attributes
    ----------
    dtypes : tuple of torch.dtype
    sizes : tuple of tuple of int
        Of each tensor, beyond dim 0.
    rows : int, optional
        Of the global batch, where forward branches on it.
    called : OtherCall, optional
        If otherwise than the example.
    trained : tuple of int
        Positions of the tensors that require a gradient.
    """

    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[tuple[int, ...], ...]
    rows: int | None = None
    called: OtherCall | None = None
    trained: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensors: Sequence[Tensor], called: OtherCall | None = None) -> Kinds:
        trained = tuple(i for i, x in enumerate(tensors) if x.requires_grad) if torch.is_grad_enabled() else ()
        return cls(tuple(x.dtype for x in tensors), tuple(tuple(x.shape[1:]) for x in tensors), None, called, trained)

    @property
    def told(self) -> tuple[str, ...]:
        """What ranks have alike in a step."""
        names = [str(d).removeprefix("torch.") for d in self.dtypes if d.is_floating_point or d.is_complex]
        return (
            *([f"{', '.join(names)} inputs"] if names else ()),
            *([f"gradients of inputs {', '.join(map(str, self.trained))}"] if self.trained else ()),
            *([] if self.called is None else [f"called otherwise than the example ({self.called.told})"]),
        )

    def of_example(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of an example in these kinds: repeated or cut along each dimension that has another size."""
        result = []
        for x, dtype, sizes in zip(tensors, self.dtypes, self.sizes, strict=True):
            if len(sizes) != x.dim() - 1 or (0 in x.shape[1:] and x.shape[1:].numel() != torch.Size(sizes).numel()):
                raise InputError(
                    f"an input has the sizes {list(sizes)} for each row, and in example_inputs "
                    f"{list(x.shape[1:])}: compile again"
                )
            for dim, size in enumerate((self.rows or x.shape[0], *sizes)):
                if size != x.shape[dim]:
                    x = x.index_select(dim, torch.arange(size, device=x.device) % x.shape[dim])
            result.append(x.to(dtype))
        return result

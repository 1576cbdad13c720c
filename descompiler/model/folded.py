"""Values for the parameters of a probe: of any size, in little memory.

Small ones are random. A larger one is a view of few numbers in which every row is another: W[i, j] = base[i + j]. One
that is too large for that is `Folded`: a lookup of row i reads row i modulo a prime, all else sees equal rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WHOLE_ELEMENTS = 1 << 22
"""Of all parameters of a probe together that have values of their own, and gradients: 32 MiB in float64."""


BASE_ELEMENTS = 1 << 21
"""Of all bases of overlapping parameters together."""


FOLDED_ROWS = 127
"""A prime, so that ids which are made from others (offsets of fields, remainders) seldom fall on one row."""


aten = torch.ops.aten


_EMBEDDING = ("weight", "indices", "padding_idx")


_BAG = ("weight", "indices", "offsets", *("_" * n for n in range(1, 6)), "padding_idx")


ARGUMENTS = {
    F.embedding: ("indices", "weight", "padding_idx"),
    F.embedding_bag: ("indices", "weight", "offsets", *("_" * n for n in range(1, 8)), "padding_idx"),
    torch.embedding: _EMBEDDING,
    aten.embedding.default: _EMBEDDING,
    torch.embedding_bag: _BAG,
    aten.embedding_bag.default: _BAG,
    aten.embedding_bag.padding_idx: _BAG,
    Tensor.__getitem__: ("weight", "indices"),
    aten.index.Tensor: ("weight", "indices"),
    torch.index_select: ("weight", "dim", "indices"),
    Tensor.index_select: ("weight", "dim", "indices"),
    aten.index_select.default: ("weight", "dim", "indices"),
}
"""Lookups, and what their arguments are by position; keywords have these names, or those of `KEYWORDS`."""


KEYWORDS = {F.embedding: {"input": "indices"}, F.embedding_bag: {"input": "indices"}}


KEYWORDS |= {
    f: {"input": "weight", "self": "weight", "index": "indices"} for f in (torch.index_select, Tensor.index_select)
}


class Folded(nn.Parameter):
    """A table of a probe, whose lookups read the few rows that it has.

    Attributes
    ----------
    rows : Tensor [FOLDED_ROWS + 1, ...]
        A leaf of its own, which stands for the parameter where gradients are concerned. The last row is that of
        padding in bags.
    """

    rows: Tensor

    @classmethod
    def of(cls, shape: torch.Size, rows: Tensor, requires_grad: bool) -> Folded:
        """A parameter of a shape ``[V, ...]``, with ``rows`` ``[FOLDED_ROWS + 1, ...]``."""
        result = torch.Tensor._make_subclass(cls, rows[:1].expand(shape), requires_grad)
        result.rows = rows.detach().requires_grad_(requires_grad)
        return result

    def unfolded(self) -> nn.Parameter:
        """An ordinary parameter with equal rows, in the memory of one."""
        return nn.Parameter(self.rows.detach()[:1].expand(self.shape), requires_grad=self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Folded:
        return memo.setdefault(id(self), Folded.of(self.shape, self.rows.detach().clone(), self.requires_grad))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.detach:
                return cls.of(args[0].shape, args[0].rows.detach(), False)
            if func is Tensor.requires_grad_:
                args[0].rows.requires_grad_(*args[1:], **kwargs)
            if func in ARGUMENTS:
                args, kwargs = _folded(func, args, kwargs)
            return func(*args, **kwargs)


def _folded(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A lookup's arguments with the rows in place of the table; as they are if it is none (a slice, a mask)."""
    names, keywords = ARGUMENTS[func], KEYWORDS.get(func, {})
    call = dict(zip(names, args, strict=False)) | {keywords.get(k, k): x for k, x in kwargs.items()}
    table, ids, padding = call["weight"], call["indices"], call.get("padding_idx")
    several = isinstance(ids, list | tuple)
    first = ids[0] if several and ids else ids
    integers = isinstance(first, Tensor) and not first.is_floating_point() and first.dtype not in MASKS
    if not isinstance(table, Folded) or not integers or call.get("dim", 0) != 0:
        return args, kwargs
    assert isinstance(first, Tensor)
    rows = torch.where(first < 0, first + len(table), first) if func in COUNTS_FROM_END else first
    # an id that is none of the table's is an error here too
    found = torch.where((rows >= 0) & (rows < len(table)), rows % FOLDED_ROWS, first)
    if padding is not None and (padding >= 0 or func in PADS_FROM_END):
        found = torch.where(rows == padding % len(table), FOLDED_ROWS, found)
        call["padding_idx"] = FOLDED_ROWS
    call |= {"weight": table.rows, "indices": [found, *ids[1:]] if several else found}
    back = {new: old for old, new in keywords.items() if old in kwargs}
    positional = names[: len(args)]
    return tuple(call[n] for n in positional), {back.get(n, n): x for n, x in call.items() if n not in positional}


MASKS = (torch.bool, torch.uint8)


COUNTS_FROM_END = (Tensor.__getitem__, aten.index.Tensor)


PADS_FROM_END = (F.embedding, F.embedding_bag)
"""Of others, a padding of -1 is none."""


def probe_parameters(
    parameters: Iterable[nn.Parameter], device: torch.device, generator: torch.Generator, *, double: bool
) -> dict[int, nn.Parameter]:
    """Random parameters of the shapes of others, by the identity of these."""
    result: dict[int, nn.Parameter] = {}
    whole = based = 0
    for p in sorted(parameters, key=Tensor.numel):
        dtype = torch.float64 if double and p.is_floating_point() else p.dtype

        def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return (0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

        whole += p.numel()
        base = sum(p.shape) - p.dim() + 1
        if whole <= WHOLE_ELEMENTS or p.dim() == 0:
            values = nn.Parameter(drawn(*p.shape), requires_grad=p.requires_grad)
        elif p.dim() > 1 and based + base <= BASE_ELEMENTS:
            based += base
            values = nn.Parameter(drawn(base).as_strided(p.shape, (1,) * p.dim()), requires_grad=p.requires_grad)
        else:
            values = Folded.of(p.shape, drawn(FOLDED_ROWS + 1, *p.shape[1:]), p.requires_grad)
        result[id(p)] = values
    return result


def has_own_values(p: Tensor) -> bool:
    """Whether a parameter of a probe has a number in memory for each of its elements.

    >>> has_own_values(torch.zeros(2, 3)), has_own_values(torch.zeros(3).as_strided((2, 2), (1, 1)))
    (True, False)
    """
    return p.numel() * p.element_size() <= p.untyped_storage().nbytes() and not isinstance(p, Folded)

"""Parameters that are kept as buffers are: of numbers that no gradient comes to, or frozen sparse matrices.

They have their names in `state_dict`, and are the same on every rank. A model's copy (`blueprint`) has them as buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.errors import UnsupportedError


def is_kept(p: Tensor) -> bool:
    """Whether a parameter is kept as a buffer is.

    >>> [is_kept(torch.zeros(2, dtype=d)) for d in (torch.bool, torch.int64, torch.float32)]
    [True, True, False]
    """
    return not p.requires_grad and (p.layout is not torch.strided or not (p.is_floating_point() or p.is_complex()))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, those that are kept as buffers left out."""
    return {n: p for n, p in model.named_parameters() if not is_kept(p)}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Buffers by all their names, with the parameters that are kept as such."""
    kept = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False) if is_kept(p)}
    return dict(model.named_buffers(remove_duplicate=False)) | kept


def keep_as_buffers(model: nn.Module) -> None:
    """Make buffers of a copy's parameters that are kept as such."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and is_kept(p):
                del module._parameters[name]
                module.register_buffer(name, p.detach() if isinstance(p, nn.Parameter) else p)


def with_attributes(p: nn.Parameter, like: Tensor) -> nn.Parameter:
    """A parameter with what the model, or its author, has set on another (``weight.no_decay = True``)."""
    for name, x in vars(like).items():
        if name not in vars(p):
            setattr(p, name, x)
    return p


def copies_of(buffers: Mapping[str, Tensor], made_of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Copies of buffers: what is one tensor under two names, or shares memory with another, does in the copies too.

    >>> x = torch.zeros(3)
    >>> a, b, c = copies_of({"a": x, "b": x, "c": x[1:]}, torch.clone).values()
    >>> a is b, a.add_(1) is a, c
    (True, True, tensor([1., 1.]))
    """
    copies: dict[int, Tensor] = {}
    for group in _sharing(buffers.values()):
        if len(group) == 1:
            copies[id(group[0])] = made_of(group[0])
            continue
        size = group[0].untyped_storage().nbytes() // group[0].element_size()
        memory = made_of(group[0].detach().as_strided((size,), (1,), 0))
        for x in group:
            copies[id(x)] = memory.as_strided(x.shape, x.stride(), x.storage_offset())
    return {n: copies[id(x)] for n, x in buffers.items()}


def _sharing(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors, each once, together with those of the same memory and dtype."""
    groups: dict[Any, list[Tensor]] = {}
    for x in {id(x): x for x in tensors}.values():
        has_memory = x.layout is torch.strided and not x.is_meta and x.untyped_storage().data_ptr()
        groups.setdefault((x.untyped_storage().data_ptr(), x.dtype) if has_memory else id(x), []).append(x)
    return list(groups.values())


def check_memory(model: nn.Module) -> None:
    """Raise if a parameter that is trained shares memory with a parameter or buffer that is another object.

    Raises
    ------
    UnsupportedError
        With both names: training one moves the other, which no rank's pieces would.
    """
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    names = {id(x): n for n, x in held.items()}
    for group in _sharing(held.values()):
        for p in (x for x in group if isinstance(x, nn.Parameter) and x.requires_grad):
            for other in group:
                if other is not p and _overlap(p, other):
                    raise UnsupportedError(
                        f"parameter {names[id(p)]!r} shares its memory with {names[id(other)]!r}, which is another "
                        "tensor: training one moves the other, and of pieces on ranks it would not. Tie parameters by "
                        "assigning the module or the parameter itself (b.weight = a.weight), or clone the values"
                    )


def _overlap(a: Tensor, b: Tensor) -> bool:
    def span(x: Tensor) -> tuple[int, int]:
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        return int(x.storage_offset()), int(x.storage_offset() + last)

    (first, last), (other_first, other_last) = span(a), span(b)
    return bool(a.numel() and b.numel()) and first <= other_last and other_first <= last

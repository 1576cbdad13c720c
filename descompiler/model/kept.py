"""Parameters that are kept as buffers are: of numbers that no gradient comes to, or frozen sparse matrices.

They have their names in `state_dict`, and are the same on every rank. A model's copy (`blueprint`) has them as buffers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

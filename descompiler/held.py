"""What modules hold as plain attributes, neither parameters nor buffers: matrices, lists of parameters, leftovers.

`torch.nn.Module` knows nothing of it: ``double``, ``parameters`` and ``copy.deepcopy`` pass it over, or fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descompiler.inputs import adapt

COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def held_values(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Plain attributes of all modules, known classes inside as pytree nodes: module, name, value."""
    for module in model.modules():
        for name, x in list(vars(module).items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                yield module, name, pytree.tree_map(adapt, x)


def unregistered(model: nn.Module) -> list[str]:
    """Tensors that are trained by nobody who asks for ``parameters()``: those of lists, and other plain attributes.

    >>> module = nn.Linear(1, 1)
    >>> module.gates, module.all = [nn.Parameter(torch.zeros(1))], [module.weight]
    >>> unregistered(module)
    ['gates']
    """
    registered = {id(p) for p in model.parameters()}
    prefixes = {id(m): f"{n}." if n else "" for n, m in model.named_modules()}
    return [
        f"{prefixes[id(module)]}{name}"
        for module, name, nested in held_values(model)
        if any(
            isinstance(x, Tensor) and x.requires_grad and x.is_leaf and id(x) not in registered
            for x in pytree.tree_leaves(nested)
        )
    ]


def left_behind(model: nn.Module) -> list[str]:
    """Plain attributes in which forward left values with a history, as a loss to be added later is.

    >>> module = nn.Linear(1, 1)
    >>> module.auxiliary = module.weight.sum()
    >>> left_behind(module)
    ['auxiliary']
    """
    prefixes = {id(m): f"{n}." if n else "" for n, m in model.named_modules()}
    return [
        f"{prefixes[id(module)]}{name}"
        for module, name, nested in held_values(model)
        if any(isinstance(x, Tensor) and not x.is_leaf for x in pytree.tree_leaves(nested))
        # weight_norm and spectral_norm compute ``weight`` from parameters of such names in front of each forward
        and not any(p.startswith(f"{name}_") for p in module._parameters)
    ]


def held_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Tensors that are plain attributes themselves: module, name, tensor."""
    for module in model.modules():
        for name, x in vars(module).items():
            if isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
                yield module, name, x


def copied(model: nn.Module) -> dict[int, Tensor]:
    """A memo for `copy.deepcopy`: copies of what it can't copy by itself.

    These are compressed matrices, and values that a forward computed and left behind (attention weights to look at, a
    weight under ``weight_norm``); their copies have no history.

    >>> import copy
    >>> module = nn.Linear(1, 1)
    >>> module.seen = [module.weight * 2]
    >>> copy.deepcopy(module, copied(module)).seen[0].requires_grad
    False
    """
    held = [x for _, _, nested in held_values(model) for x in pytree.tree_leaves(nested) if isinstance(x, Tensor)]
    return {id(x): x.detach().clone() for x in (*model.buffers(), *held) if x.layout in COMPRESSED or not x.is_leaf}

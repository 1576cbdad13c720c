"""The leaves of an autograd graph, and which parameters are among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

K = TypeVar("K")


def leaves_of(ends: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that would accumulate gradients of some, found without computing any.

    >>> import torch
    >>> a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    >>> [x is a or x is b for x in leaves_of([a * 2, (a + b).detach(), b.exp()])]
    [True, True]
    """
    nodes: list[Any] = [get_gradient_edge(x).node for x in ends if x.requires_grad]
    seen = {None, *nodes}
    found: dict[int, Tensor] = {}
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        for other, _ in node.next_functions:
            if other not in seen:
                seen.add(other)
                nodes.append(other)
    return list(found.values())


def reached(ends: Sequence[Tensor], parameters: Mapping[K, Tensor]) -> set[K]:
    """Which parameters, folded ones (`descompiler.model.folded`) among them, would get a gradient of some tensors."""
    leaves = {id(x) for x in leaves_of(ends)}
    return {name for name, p in parameters.items() if {id(p), id(getattr(p, "rows", p))} & leaves}

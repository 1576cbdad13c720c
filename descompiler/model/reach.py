"""The leaves of an autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge


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

"""owner: ``f(x@r, y@r)  -->  f(x, y)@r``

Any operator whose tensors all have one owner is computed there, on the global batch. It pays where the result is
narrower than what it was made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from descompiler.placement import Owned
from descompiler.program import aten, is_tensor, rowwise
from descompiler.rule import Declined, Part, Placed, Situation

ON_OWNER = frozenset(
    {
        aten.maximum.default,
        aten.minimum.default,
        aten.flip.default,
        aten.cosine_similarity.default,
    }
)


@dataclass(frozen=True)
class OnOwner:
    """Operators without a rule of their own, on values of one owner."""

    name: str = "owner"
    targets: frozenset[Any] = ON_OWNER

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        tensors = [n for n in node.all_input_nodes if is_tensor(n)]
        places = {at.at(n) for n in tensors}
        first = next(iter(places))
        if len(places) == 1 and isinstance(first, Owned) and rowwise(at.program, node):
            return Placed(first)
        return Declined(f"no rule for values that are {', '.join(sorted(map(str, places)))}")

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), part.operand)
        return part.call(node.target, *args, **kwargs)

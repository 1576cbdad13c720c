"""owner: ``f(x@r, y@r, W)  -->  f(x, y, W@r)@r``

Any operator whose values all have one owner is computed there, on the global batch: sequence encoders, norms,
attention, gates. Parameters that nobody else uses move to the owner and need no all-reduce. It pays where the result is
narrower than what it was made from: a sequence's encoding against its items.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from descompiler.graph.nodes import is_pure
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import Owned
from descompiler.region.rule import NO_RULE, Declined, Part, Placed, Situation


@dataclass(frozen=True)
class OnOwner:
    """Operators on values of one owner."""

    name: str = "owner"
    targets: None = None

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        values = {at.at(n) for n in node.all_input_nodes if n in at.placements}
        owner = next(iter(values))
        if len(values) > 1 or not isinstance(owner, Owned):
            return Declined(NO_RULE)
        if not is_pure(node):
            return Declined("every rank runs it, for what it keeps: running statistics, a user's own state")
        pieces: dict[str, Pieces] = {}
        replicated: list[str] = []
        for n in node.all_input_nodes:
            if n in at.placements or n in at.givens.sized:
                continue
            if not at.given(n, owner):
                return Declined("an operand that each rank has for its own rows only")
            if (moved := at.to_owner(n, owner)) is not None:
                pieces.update(moved)
            else:
                replicated += at.givens.parameters(n)
        return Placed(owner, pieces, tuple(dict.fromkeys(replicated)))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        return part.copy(node)

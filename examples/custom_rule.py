"""A placement rule of your own: `torch.flip` stays where the embeddings are.

    python examples/custom_rule.py

No built-in rule knows the operator, so what it is made of would be sent to each row's own rank first. The rule says
where a flipped value is, by where its operand is, and what a rank does for its part. `des.plan` shows what that is
worth, and `des.verify` proves it on two local ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

import descompiler as des
from descompiler.graph.nodes import aten, shape_of, signature
from descompiler.layout.placement import Disjoint, Partial
from descompiler.region.rule import Declined, Part, Placed, Situation


@dataclass(frozen=True)
class Flip:
    """flip: ``flip(sum_r(x_r), [1])  -->  sum_r(flip(x_r, [1]))``"""

    name: str = "flip"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.flip.default})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, rank = at.at(node.args[0]), len(shape_of(node.args[0]))  # type: ignore[arg-type]
        dims = {d % rank for d in signature(node)["dims"]}
        if 0 in dims:
            return Declined("it turns the batch round")
        if isinstance(x, Partial):  # flip(a + b) = flip(a) + flip(b)
            return Placed(x)
        if isinstance(x, Disjoint):  # whose rows lie elsewhere then, unless it is the columns that are turned
            return Placed(x if min(dims, default=x.lead) >= x.lead else Partial(x.ranks))
        if x.dim in dims:  # type: ignore[union-attr]
            return Declined("it turns round what different ranks have")
        return Placed(x)  # type: ignore[arg-type]

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        return part.copy(node)


RULES = (Flip(),)
"""What an entry point of the group `descompiler.passes` may name."""


class Palindrome(nn.Module):
    """Scores how much a history of items is the same backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(20_000, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, history: Tensor) -> Tensor:
        x = self.items(history)
        return self.head((x * x.flip([1])).sum(1)).squeeze(1)


def main() -> None:
    inputs = (torch.randint(20_000, (64, 30), generator=torch.Generator().manual_seed(0)),)
    for name, rules in (("without the rule", ()), ("with it", (Flip(),))):
        plan = des.plan(Palindrome(), inputs, ranks=4, batch=1024, pins={"items": "column_wise"}, rules=rules)
        print(f"{name}: rank 0 sends {plan.traffic(0).total:,} B a step")
    print(des.verify(Palindrome(), inputs, plans=[{"items": "row_wise"}, {"items": "column_wise"}], rules=[Flip()]))


if __name__ == "__main__":
    main()

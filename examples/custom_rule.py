"""A placement rule of your own: windows over a history (`Tensor.unfold`) stay where the embeddings are.

    python examples/custom_rule.py

No built-in rule knows the operator, so what it is made of would be sent to each row's own rank first. The rule says
where windows are, by where their operand is, and what a rank does for its part. `des.plan` shows what that is
worth, and `des.verify` proves it on two local ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

import descompiler as des
from descompiler.graph.arguments import operand
from descompiler.graph.nodes import aten, shape_of, signature
from descompiler.layout.placement import Disjoint, Partial, Shard
from descompiler.region.rule import Declined, Part, Placed, Situation


@dataclass(frozen=True)
class Windows:
    """windows: ``unfold(sum_r(x_r), 1, 3, 1)  -->  sum_r(unfold(x_r, 1, 3, 1))``"""

    name: str = "windows"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.unfold.default})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, rank = at.at(node.args[0]), len(shape_of(operand(node, 0)))
        dim = signature(node)["dimension"] % rank
        if dim == 0:
            return Declined("windows of rows of the batch")
        if isinstance(x, Partial):  # the windows of a sum are sums of windows
            return Placed(x)
        if isinstance(x, Disjoint):  # which rank has a row of a window is not told by the row's place any more
            return Placed(x if dim >= x.lead else Partial(x.ranks))
        if isinstance(x, Shard) and x.dim != dim:  # the window's own dimension comes last
            return Placed(x)
        return Declined("windows over what different ranks have")

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        return part.copy(node)


RULES = (Windows(),)
"""What an entry point of the group `descompiler.passes` may name."""


class Phrases(nn.Module):
    """Scores a history of items by what follows each other: products over three items in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(20_000, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, history: Tensor) -> Tensor:
        windows = self.items(history).unfold(1, 3, 1)  # [rows, windows, 16, 3]
        return self.head((windows[..., 0] * windows[..., 1] * windows[..., 2]).sum(1)).squeeze(1)


def main() -> None:
    inputs = (torch.randint(20_000, (64, 30), generator=torch.Generator().manual_seed(0)),)
    for name, rules in (("without the rule", ()), ("with it", (Windows(),))):
        plan = des.plan(Phrases(), inputs, ranks=4, batch=1024, pins={"items": "column_wise"}, rules=rules)
        print(f"{name}: rank 0 sends {plan.traffic(0).total:,} B a step")
    print(des.verify(Phrases(), inputs, plans=[{"items": "row_wise"}, {"items": "column_wise"}], rules=[Windows()]))


if __name__ == "__main__":
    main()

"""A form of your own: a table lies whole on the last rank, whatever its size.

    python examples/custom_form.py

So may you keep one table on the machine that has the memory for it. A form says which tables can take it, what each
rank holds, where a lookup's result is, and what a rank's program does for a lookup; what it sends is a formula, so the
planner weighs it against the others. `des.verify` proves it on two local ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

import descompiler as des
from descompiler.examples import MODELS, make_inputs
from descompiler.graph.program import Program
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import Owned, Region
from descompiler.ops.local import bag, lookup
from descompiler.tables.blocks import InRegion, not_in_region
from descompiler.tables.form import Choice, LookupPart, Split
from descompiler.tables.tables import Lookup, Operator


@dataclass(frozen=True)
class LastRank(InRegion):
    """last_rank: ``E[R,D]  -->  E[R,D]@(ranks - 1)``"""

    name: str = "last_rank"

    def refuses(self, program: Program, operator: Operator) -> str | None:
        return not_in_region(program, operator)

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        return Split(self.name, Pieces.whole(operator.shape, ranks - 1, ranks))

    def placement(self, split: Split, operator: Operator, lookup: Lookup) -> Region | None:
        return Owned(split.pieces.owners[0])

    def emit(self, part: LookupPart) -> fx.Node:
        o, x = part.operator, part.lookup
        if x.mode is None:
            return part.call(lookup, part.weight, part.ids, x.padding_idx, o.sparse)
        return part.call(bag, part.weight, part.ids, x.mode, x.padding, o.sparse)


FORMS = (LastRank(),)
"""What an entry point of the group `descompiler.passes` may name."""


def main() -> None:
    inputs = make_inputs("fm")
    plan = des.plan(MODELS["fm"](), inputs, ranks=4, pins={"embeddings.tables.1": "last_rank"}, forms=[LastRank()])
    for name, split in plan.splits.items():
        print(f"{name}: {split}")
    print(des.verify(MODELS["fm"](), inputs, plans=[{"*": "last_rank"}], forms=[LastRank()]))


if __name__ == "__main__":
    main()

"""row_wise: ``E[R,D]  -->  cat_0(E[R_r,D]@r)``

Contiguous ranges of rows to ranks. Each rank looks up all ids of the global batch, zeros for those that it doesn't own,
so a result is non-zero on one rank (`Disjoint`), a bag a sum of terms (`Partial`). Products with the table are computed
by the owners of its rows (`descompiler.tables.products`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from descompiler.graph.nodes import tail
from descompiler.graph.program import Program
from descompiler.layout.placement import Disjoint, Owned, Partial, Region
from descompiler.ops.local import bag_rows, lookup_rows
from descompiler.tables.blocks import ByRows, InRegion, by_rows, not_in_region
from descompiler.tables.form import Choice, LookupPart, Split
from descompiler.tables.tables import Lookup, Operator


@dataclass(frozen=True)
class RowWise(ByRows, InRegion):
    name: str = "row_wise"
    in_part: ClassVar[str] = "unique_rows"

    def refuses(self, program: Program, operator: Operator) -> str | None:
        if reason := not_in_region(program, operator):
            return reason
        if any(x.mode == "max" for x in operator.lookups):
            return "the maximum over a bag is not a sum of ranks' terms"
        return None

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        return Split(self.name, by_rows(operator, ranks, choice))

    def placement(self, split: Split, operator: Operator, lookup: Lookup) -> Region | None:
        owners = split.pieces.owners
        if len(owners) == 1:
            return Owned(owners[0])
        if lookup.mode is not None:
            return Partial(owners)
        return Disjoint(owners, (lookup.ids.name, split.pieces.division.runs), 1 + len(tail(lookup.ids)))

    def emit(self, part: LookupPart) -> fx.Node:
        o, x, pieces = part.operator, part.lookup, part.split.pieces
        start = pieces.own(part.rank)[0].start
        near = o.padding_idx - start  # the padding row in this rank's piece
        near = near if o.padding_idx >= 0 and 0 <= near < pieces.own_size(part.rank) else -1
        if x.mode is None:
            return part.call(lookup_rows, part.weight, part.ids, start, near, o.sparse)
        return part.call(bag_rows, part.weight, part.ids, start, x.mode, o.padding, near, o.sparse)

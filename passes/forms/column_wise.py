"""column_wise: ``E[R,D]  -->  cat_1(E[R,D_r]@r)``

Contiguous ranges of columns to ranks: every rank looks up all ids, and has its columns of every result. Of what is
computed of whole tables column by column (graph propagation) a rank computes its columns, and nothing crosses for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from descompiler.graph.nodes import tail
from descompiler.graph.program import Program
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import Region, shard
from descompiler.ops.local import bag, lookup
from descompiler.tables.blocks import InRegion, not_in_region, whole_rows
from descompiler.tables.form import Choice, LookupPart, Split
from descompiler.tables.tables import Lookup, Operator


@dataclass(frozen=True)
class ColumnWise(InRegion):
    name: str = "column_wise"
    by_columns: ClassVar[bool] = True

    def refuses(self, program: Program, operator: Operator) -> str | None:
        return not_in_region(program, operator, by_columns=True) or whole_rows(operator)

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        return Split(self.name, Pieces.even(operator.shape, 1, ranks))

    def placement(self, split: Split, operator: Operator, lookup: Lookup) -> Region | None:
        return shard(len(tail(lookup.node)), split.pieces.division.pairs)

    def emit(self, part: LookupPart) -> fx.Node:
        o, x = part.operator, part.lookup
        if x.mode is None:
            return part.call(lookup, part.weight, part.ids, x.padding_idx, o.sparse)
        return part.call(bag, part.weight, part.ids, x.mode, x.padding, o.sparse)

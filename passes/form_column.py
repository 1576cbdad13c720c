"""column: ``E[R,D]  -->  cat_1(E[R,D_r]@r)``

Contiguous ranges of columns to ranks: every rank looks up all ids, and has its columns of every result. Of what is
computed of whole tables column by column (graph propagation) a rank computes its columns, and nothing crosses for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from torch import Tensor, fx

from descompiler.cost_models.exchange import IDS_IN, VALUES_OUT_AND_BACK
from descompiler.form import Choice, LookupPart, Split, all_columns, any_row, not_in_region, whole_rows
from descompiler.layout import Check
from descompiler.operators import Lookup, Operator
from descompiler.pieces import Pieces, even_sizes
from descompiler.placement import Region, Segment, shard
from descompiler.program import Program, tail
from descompiler.runtime import bag, lookup
from descompiler.statistics import Statistics


@dataclass(frozen=True)
class Column:
    name: str = "column"

    def refuses(self, program: Program, operator: Operator) -> str | None:
        return not_in_region(program, operator, by_columns=True) or whole_rows(operator)

    def choose(
        self, operator: Operator, ranks: int, statistics: Statistics, batch_rows: int, max_rows: int | None = None
    ) -> Choice:
        return Choice()

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        return Split(self.name, Pieces.by_sizes(operator.shape, 1, even_sizes(operator.dim, ranks), ranks))

    def placement(self, split: Split, operator: Operator, lookup: Lookup) -> Region | None:
        return shard(len(tail(lookup.node)), [Segment(r.size, r.owner) for r in split.pieces.ranges])

    def columns(self, split: Split, operator: Operator, lookup: Lookup, rank: int) -> tuple[int, ...] | None:
        return all_columns(split, rank)

    def fetches(self, split: Split) -> bool:
        return False

    def check(self, split: Split, operator: Operator) -> Check:
        return any_row(operator)

    def constants(self, split: Split, rank: int) -> Mapping[str, Tensor]:
        return {}

    def emit(self, part: LookupPart) -> fx.Node:
        o, x = part.operator, part.lookup
        if x.mode is None:
            return part.call(lookup, part.weight, part.ids, x.padding_idx, o.sparse)
        return part.call(bag, part.weight, part.ids, x.mode, x.padding, o.sparse)

    def costs(self, sparse: bool) -> Mapping[str, sympy.Expr]:
        return {"ids in": IDS_IN, "values out and back": VALUES_OUT_AND_BACK}

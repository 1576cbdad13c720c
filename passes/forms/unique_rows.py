"""unique_rows: ``E[R,D]  -->  cat_0(E[R_r,D]@r)``, lookups on own rows

Contiguous ranges of rows to ranks, as in form row_wise, but each rank looks up its own rows of the batch: it asks each
owner for its unique ids once, and returns each row's summed gradient once (a synchronous parameter server that
deduplicates). The result is local, so any operator may follow, also one that no rule keeps in a region, and ids may be
computed from other lookups. Products with the table are computed by the owners of its rows
(`descompiler.tables.products`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import sympy

from descompiler.cost_models.forms import UNIQUE_ROWS
from descompiler.cost_models.table import Table
from descompiler.graph.program import Program
from descompiler.tables.blocks import ByRows, OwnRows, by_rows, not_fetched
from descompiler.tables.form import Choice, Split
from descompiler.tables.tables import Operator


@dataclass(frozen=True)
class UniqueRows(ByRows, OwnRows):
    name: str = "unique_rows"
    in_part: ClassVar[str] = "unique_rows"
    curve: ClassVar[sympy.Expr] = UNIQUE_ROWS

    def refuses(self, program: Program, operator: Operator) -> str | None:
        return not_fetched(operator)

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        return Split(self.name, by_rows(operator, ranks, choice))

    def costs(self, table: Table) -> Mapping[str, sympy.Expr]:
        return {"unique ids out, rows back, gradients out": UNIQUE_ROWS}

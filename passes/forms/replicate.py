"""replicate: ``E[R,D]  -->  E[R,D] on every rank``

Lookups stay outside the region, on each rank's own rows. Dense gradients are all-reduced by the reducer; those of a
table with ``sparse=True`` are gathered, as in form sparse_all_gather. It pays for small tables: nothing is sent in
forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import sympy

from descompiler.cost_models.forms import REPLICATE, SPARSE_ALL_GATHER
from descompiler.cost_models.table import Table
from descompiler.graph.program import Program
from descompiler.layout.pieces import Pieces
from descompiler.tables.blocks import OwnRows, not_fetched
from descompiler.tables.form import Choice, Split
from descompiler.tables.tables import Operator


@dataclass(frozen=True)
class Replicate(OwnRows):
    name: str = "replicate"
    fallback: ClassVar[bool] = True
    in_part: ClassVar[str] = "replicate"
    curve: ClassVar[sympy.Expr] = REPLICATE

    def refuses(self, program: Program, operator: Operator) -> str | None:
        return None

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        gathered = operator.sparse and operator.trained and not_fetched(operator) is None
        return Split(self.name, Pieces.replicate(operator.shape, ranks), gathered)

    def fetches(self, split: Split) -> bool:
        return split.gathered

    def costs(self, table: Table) -> Mapping[str, sympy.Expr]:
        return {"sparse gradients": SPARSE_ALL_GATHER} if table.sparse else {"dense gradients": REPLICATE}

"""sparse_all_gather: ``E[R,D]  -->  E[R,D] on every rank; gradients: (unique ids, summed rows) gathered``

A replicated table of which only the rows of a step's batch change: each rank sends every other one the unique ids that
it looked up and a summed gradient for each, instead of an all-reduce of the whole table's gradient. ``.grad`` is dense
or sparse, as the module's ``sparse`` says. It pays for large tables at few ranks: nothing is sent in forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import sympy

from descompiler.cost_models.forms import SPARSE_ALL_GATHER
from descompiler.cost_models.table import Table
from descompiler.graph.program import Program
from descompiler.layout.pieces import Pieces
from descompiler.tables.blocks import OwnRows, not_fetched
from descompiler.tables.form import Choice, Split
from descompiler.tables.tables import Operator


@dataclass(frozen=True)
class SparseAllGather(OwnRows):
    name: str = "sparse_all_gather"
    curve: ClassVar[sympy.Expr] = SPARSE_ALL_GATHER

    def refuses(self, program: Program, operator: Operator) -> str | None:
        if operator.outputs:
            return "products with it have gradients of every row"
        return not_fetched(operator) if operator.trained else "it is not trained: no gradient is exchanged"

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        return Split(self.name, Pieces.replicate(operator.shape, ranks), gathered=True)

    def costs(self, table: Table) -> Mapping[str, sympy.Expr]:
        return {"gradients of unique ids": SPARSE_ALL_GATHER}

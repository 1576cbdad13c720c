"""fsdp: ``E[R,D]  -->  cat_0(E[R_r,D]@r)``, gathered whole before it is used

Contiguous ranges of rows to ranks, as FullyShardedDataParallel and ZeRO-3 (Rajbhandari et al., arXiv 1910.02054) hold
parameters: every rank gathers the table in forward, uses it as if it were replicated, and sends each owner its rows of
the gradient in backward. That moves what an all-reduce of the gradient moves, and keeps an N-th of the weights, their
gradients and the optimiser's state; the gathered table and its gradient are there during a step. It pays in memory
alone, for tables that the model uses whole: those that are only looked up are better fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from descompiler.cost_models.forms import FSDP
from descompiler.cost_models.table import Table
from descompiler.graph.program import Program
from descompiler.tables.blocks import OwnRows, by_rows, not_fetched
from descompiler.tables.form import Choice, Split
from descompiler.tables.tables import Operator


@dataclass(frozen=True)
class FullySharded(OwnRows):
    name: str = "fsdp"

    def refuses(self, program: Program, operator: Operator) -> str | None:
        if not operator.outputs and not_fetched(operator) is None:
            return "it is only looked up: its rows are enough (unique_rows)"
        if any(x.sparse for x in operator.lookups):
            return "its gradients are sparse, and a gathered table's is dense"
        if operator.whole_in_region:
            return "pieces of other tables are computed with all of it"
        return None

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        return Split(self.name, by_rows(operator, ranks, choice), whole=True)

    def fetches(self, split: Split) -> bool:
        return False

    def costs(self, table: Table) -> Mapping[str, sympy.Expr]:
        return {"the table gathered, its gradients back": FSDP}

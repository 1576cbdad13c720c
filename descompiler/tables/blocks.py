"""What forms are made of: reasons why lookups can't be where a form has them, and what most forms have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import sympy
from torch import Tensor, fx

from descompiler.cost_models.exchange import IDS_IN, VALUES_OUT_AND_BACK
from descompiler.cost_models.table import Table
from descompiler.graph.arguments import LookupCall
from descompiler.graph.nodes import where
from descompiler.graph.program import Program, rowwise
from descompiler.layout.border import Columns
from descompiler.layout.id_checks import Check
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import Region
from descompiler.layout.spans import Spans, alike
from descompiler.layout.statistics import Statistics
from descompiler.ops.local import bag, lookup
from descompiler.tables.form import Choice, LookupPart, Split
from descompiler.tables.tables import Lookup, Operator


def not_in_region(program: Program, operator: Operator, *, by_columns: bool = False) -> str | None:
    """Why no lookup of an operator can be in the substituted region; None if all can.

    ``by_columns``: ranks have columns of the table, and of what is computed of it column by column.
    """
    if reason := (_used_otherwise(operator) if by_columns and operator.group is not None else not_fetched(operator)):
        return reason
    if any(not rowwise(program, x.ids) or not rowwise(program, x.node) for x in operator.lookups):
        return "its ids are not one row per row of the batch"
    if operator.coupled_ids:
        return "its ids are computed from the whole batch"
    if operator.computed_ids:
        return "its ids are computed from another lookup"
    return None


def whole_rows(operator: Operator) -> str | None:
    """Why an operator's rows can't be cut, or dealt out in several ranges; None if they can."""
    if operator.outputs:
        return f"products with it ({where(operator.outputs[0].node)}) need one range of whole rows on each rank"
    return None


def _used_otherwise(operator: Operator) -> str | None:
    """Why an operator's lookups are not all that is done with it; None if they are."""
    if operator.other_uses:
        return f"the table is also used by {where(operator.other_uses[0])}"
    return "every rank looks it up for the whole batch" if operator.coupled else None


def not_fetched(operator: Operator) -> str | None:
    """Why the lookups of an operator can't go through `descompiler.runtime.fetch`; None if they can."""
    if reason := _used_otherwise(operator):
        return reason
    if operator.group is not None:
        return f"what is looked up is computed of all its rows ({where(operator.group.nodes[0])})"
    return None if operator.uniform else "its lookups differ in padding_idx or sparse"


class ByRows:
    """What forms have in common of which each rank owns consecutive rows."""

    takes_dynamic: ClassVar[bool] = True

    def choose(
        self,
        operator: Operator,
        ranks: int,
        statistics: Statistics,
        batch_rows: int,
        by_memory: bool = False,
        itemsize: int | None = None,
    ) -> Choice:
        if by_memory or operator.name not in statistics.measured or operator.dynamic is not None:
            return Choice()  # keys are hashes: equal shares of them are asked for equally often
        return Choice(sizes=tuple(statistics.balanced_rows(operator.name, ranks, batch_rows)))


class Plain:
    """What most forms have in common: nothing to choose, any row may be looked up, no tensors beside the table."""

    fallback: ClassVar[bool] = False
    has_owners: ClassVar[bool] = False
    takes_dynamic: ClassVar[bool] = False
    by_columns: ClassVar[bool] = False
    needs_statistics: ClassVar[bool] = False
    in_part: ClassVar[str | None] = None
    curve: ClassVar[sympy.Expr | None] = None

    def choose(
        self,
        operator: Operator,
        ranks: int,
        statistics: Statistics,
        batch_rows: int,
        by_memory: bool = False,
        itemsize: int | None = None,
    ) -> Choice:
        return Choice()

    def check(self, split: Split, operator: Operator) -> Check:
        rows = None if operator.dynamic is not None else operator.rows
        return Check(operator.name, rows, None, operator.line)

    def constants(self, split: Split, rank: int) -> Mapping[str, Tensor]:
        return {}

    def least_bytes(
        self, operator: Operator, ranks: int, statistics: Statistics, batch_rows: int, itemsize: int
    ) -> float | None:
        return None


class InRegion(Plain):
    """What forms have in common whose lookups are in the region: owners get all ids of the global batch."""

    def columns(self, split: Split, operator: Operator, lookup: Lookup) -> Spans[Columns]:
        return alike(split.pieces.owners, None)

    def fetches(self, split: Split) -> bool:
        return False

    def costs(self, table: Table) -> Mapping[str, sympy.Expr]:
        return {"ids in": IDS_IN, "values out and back": VALUES_OUT_AND_BACK}


class OwnRows(Plain):
    """What forms have in common whose lookups stay outside the region, on each rank's own rows."""

    def placement(self, split: Split, operator: Operator, lookup: Lookup) -> Region | None:
        return None

    def columns(self, split: Split, operator: Operator, lookup: Lookup) -> Spans[Columns]:
        return ()

    def fetches(self, split: Split) -> bool:
        return True

    def emit(self, part: LookupPart) -> fx.Node:
        x = part.lookup
        if x.sparse and part.ranks > 1:  # other uses have dense gradients, and so has the sum, which is all-reduced
            if x.mode is None:
                return part.call(lookup, part.weight, part.ids, x.padding_idx)
            return part.call(bag, part.weight, part.ids, x.mode, x.padding_idx if x.padding_idx >= 0 else None)
        operands = {LookupCall(x.node).weight: part.weight, x.ids: part.ids}
        return part.graph.node_copy(x.node, lambda n: operands[n])


def by_rows(operator: Operator, ranks: int, choice: Choice) -> Pieces:
    """Contiguous ranges of rows to ranks; of a dynamic table's slices as their owners are (`DynamicIds`)."""
    if operator.dynamic is not None:
        return Pieces.of(operator.shape, 0, operator.dynamic.divided(ranks), ranks)
    if choice.sizes is None:
        return Pieces.even(operator.shape, 0, ranks)
    return Pieces.by_sizes(operator.shape, 0, choice.sizes, ranks)

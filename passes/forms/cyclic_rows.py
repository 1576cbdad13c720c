"""cyclic_rows: ``E[R,D]  -->  E[rows of r,D]@r``, rows dealt out in rounds, lookups on own rows

As form unique_rows, but a rank owns many short ranges: each round deals every rank one block of rows, of one size, and
begins with the next rank. Blocks are single rows at first and grow with what has been dealt. It pays where rows are
sorted by frequency, as vocabularies are: of equal ranges the first rank sends most of the rows, and ranges of equal
load, which form unique_rows takes if ids were measured, are not of equal memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import sympy

from descompiler.cost_models.forms import UNIQUE_ROWS
from descompiler.graph.program import Program
from descompiler.layout.pieces import Pieces, even_sizes
from descompiler.tables.blocks import OwnRows, not_fetched, whole_rows
from descompiler.tables.form import Choice, Split
from descompiler.tables.tables import Operator


@dataclass(frozen=True)
class CyclicRows(OwnRows):
    """``growth``: for so many rows that a rank has, its next block is one row longer."""

    name: str = "cyclic_rows"
    growth: int = 4
    in_part: ClassVar[str] = "unique_rows"

    def refuses(self, program: Program, operator: Operator) -> str | None:
        return whole_rows(operator) or not_fetched(operator)

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        held = list(self._dealt(operator.rows, ranks)) or [(0, 0)]
        return Split(self.name, Pieces.of(operator.shape, 0, held, ranks))

    def costs(self, sparse: bool) -> Mapping[str, sympy.Expr]:
        return {"unique ids out, rows back, gradients out": UNIQUE_ROWS}

    def _dealt(self, rows: int, ranks: int) -> Iterator[tuple[int, int]]:
        """(size, rank) of each block, in order of rows; the last round deals what is left evenly."""
        each, first = 0, 0  # what every rank has so far, and who is next
        while rows > each * ranks:
            left = rows - each * ranks
            block = 1 + each // self.growth
            sizes = [block] * ranks if block * ranks <= left else even_sizes(left, ranks)
            yield from ((size, (first + i) % ranks) for i, size in enumerate(sizes) if size)
            each, first = each + block, first + 1

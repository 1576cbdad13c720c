"""table_wise: ``E[R,D]  -->  E[R,D]@r``, and ``E[fields' rows,D]  -->  cat_0(E[rows of f,D]@r_f)`` for an offsets table

Whole tables, or whole fields of one table whose ids are ``x + offsets``, have one owner each. A lookup's result is the
owner's, so whatever mixes columns or fields of one owner can follow it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from descompiler.graph.nodes import aten
from descompiler.graph.program import Program
from descompiler.layout.border import Columns
from descompiler.layout.id_checks import Check
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import Owned, Region, shard
from descompiler.layout.spans import Spans, spans_of
from descompiler.ops.local import bag, lookup
from descompiler.tables.blocks import InRegion, not_in_region, whole_rows
from descompiler.tables.form import Choice, LookupPart, Split
from descompiler.tables.tables import Lookup, Operator


@dataclass(frozen=True)
class TableWise(InRegion):
    name: str = "table_wise"
    has_owners: ClassVar[bool] = True
    takes_dynamic: ClassVar[bool] = True

    def refuses(self, program: Program, operator: Operator) -> str | None:
        return not_in_region(program, operator) or whole_rows(operator)

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        if operator.starts is None or choice.field_owners is None:
            return Split(self.name, Pieces.whole(operator.shape, choice.owner, ranks))
        stops = (*operator.starts[1:], operator.rows)
        sizes = (b - a for a, b in zip(operator.starts, stops, strict=True))
        return Split(self.name, Pieces.of(operator.shape, 0, zip(sizes, choice.field_owners, strict=True), ranks))

    def placement(self, split: Split, operator: Operator, lookup: Lookup) -> Region | None:
        owners = split.pieces.owners
        if len(owners) == 1:
            return Owned(owners[0])
        return shard(1, [(1, r.owner) for r in split.pieces.division])

    def columns(self, split: Split, operator: Operator, lookup: Lookup) -> Spans[Columns]:
        if not _several(split):
            return super().columns(split, operator, lookup)
        fields: dict[int, list[int]] = {}
        for i, r in enumerate(split.pieces.division):
            fields.setdefault(r.owner, []).append(i)
        return spans_of((owner, tuple(fields[owner])) for owner in sorted(fields))

    def check(self, split: Split, operator: Operator) -> Check:
        if _several(split):
            return Check(operator.name, operator.rows, operator.starts, operator.line)
        return super().check(split, operator)

    def constants(self, split: Split, rank: int) -> Mapping[str, Tensor]:
        """Where a rank's fields of an offsets table lie side by side, ids move by a constant per field."""
        if not _several(split):
            return {}
        position, moves = 0, []
        for r in split.pieces.own(rank):
            moves.append(position - r.start)
            position += r.size
        return {"shift": torch.tensor(moves, dtype=torch.int64)}

    def emit(self, part: LookupPart) -> fx.Node:
        o, x, ids, padding = part.operator, part.lookup, part.ids, part.operator.padding_idx
        if _several(part.split):
            ids = part.call(aten.add.Tensor, ids, part.constants["shift"])
            padding = _padding_in_piece(o, part.split.pieces, part.rank)
        if x.mode is None:
            return part.call(lookup, part.weight, ids, padding, o.sparse)
        return part.call(bag, part.weight, ids, x.mode, padding if padding >= 0 else None, o.sparse)


def _several(split: Split) -> bool:
    """Whether fields of one table have different owners."""
    return len(split.pieces.owners) > 1


def _padding_in_piece(o: Operator, pieces: Pieces, rank: int) -> int:
    """The row of this rank's piece that is the table's padding row; -1 if it is elsewhere or there is none."""
    position = 0
    for r in pieces.own(rank):
        if r.start <= o.padding_idx < r.stop:
            return position + o.padding_idx - r.start
        position += r.size
    return -1

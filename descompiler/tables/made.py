"""Whether a split is one that its form makes: what a form's programs do is right for those alone."""

from __future__ import annotations

from collections.abc import Iterator

from descompiler.errors import PlanError
from descompiler.layout.division import Range
from descompiler.layout.pieces import ALL, Pieces
from descompiler.tables.form import Choice, Split, split_as
from descompiler.tables.tables import Operator


def made_by_its_form(operator: Operator, split: Split) -> bool:
    """Whether a form makes that split of an operator, by any choice: nobody else's pieces are what it works with.

    >>> from descompiler.cost_models.table import Table
    >>> import descompiler.passes
    >>> users = Operator(Table("users", 5, 2), ())
    >>> cut = Split("unique_rows", Pieces.by_sizes((5, 2), 0, [1, 4], 2))
    >>> turned = Split("unique_rows", Pieces.of((5, 2), 0, [(1, 1), (4, 0)], 2))
    >>> made_by_its_form(users, cut), made_by_its_form(users, turned)
    (True, False)
    """
    for choice in _choices(operator, split.pieces):
        try:
            if split_as(operator, split.form, split.pieces.ranks, choice) == split:
                return True
        except (PlanError, ValueError):  # the form can't make that choice
            continue
    return False


def _choices(operator: Operator, pieces: Pieces) -> Iterator[Choice]:
    """The choices that pieces may come from."""
    yield Choice()
    ranges = [r for r in pieces.division if r.size]
    if pieces.owners:
        yield Choice(owner=pieces.owners[0])
    if pieces.dim or not pieces.shape:
        return
    if operator.starts is not None and len(pieces.division.pairs) == len(operator.starts):
        yield Choice(field_owners=tuple(owner for _, owner in pieces.division.pairs))
    hot = tuple(_joined([r for r in ranges if r.owner == ALL]))
    yield Choice(sizes=_sizes(ranges, pieces.ranks), hot=hot)


def _joined(ranges: list[Range]) -> list[tuple[int, int]]:
    """Ranges without the borders between those side by side."""
    result: list[tuple[int, int]] = []
    for r in ranges:
        if result and result[-1][1] == r.start:
            result[-1] = (result[-1][0], r.stop)
        else:
            result.append((r.start, r.stop))
    return result


def _sizes(ranges: list[Range], ranks: int) -> tuple[int, ...]:
    """Consecutive rows of each rank, those that all hold included: they end where another rank's begin.

    Where rows that all hold are in between, the border is where two ranges of these meet, or at their edge.
    """
    ends, last = [0] * ranks, 0
    for before, r in zip([None, *ranges], ranges, strict=False):
        if r.owner != ALL:
            last = max(last, r.owner)
        elif before is not None and before.owner == ALL:
            ends[last] = r.start
            last = min(last + 1, ranks - 1)
        ends[last] = r.stop
    for rank in range(1, ranks):
        ends[rank] = max(ends[rank], ends[rank - 1])
    ends[-1] = ranges[-1].stop if ranges else 0
    return tuple(b - a for a, b in zip([0, *ends], ends, strict=False))

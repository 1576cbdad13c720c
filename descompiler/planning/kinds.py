"""Kinds of tables: those of a plan that are alike (width, ids, form, prices), under one pattern of their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from descompiler.planning.chosen import Chosen, PlannedTable
from descompiler.units import format_count


@dataclass(frozen=True)
class TableKind:
    """Tables that are alike, and the form that they take.

    Attributes
    ----------
    pattern : str
        Their names, with ``*`` where they differ.
    price : int
        Bytes that the busiest rank sends in a step.
    others : list of (int, str)
        The same if these tables took another form, and that form; the cheapest first.
    missing : mapping of str to int
        By form: bytes above the limit of memory.
    """

    pattern: str
    tables: tuple[PlannedTable, ...]
    form: str
    price: int
    others: Sequence[tuple[int, str]]
    missing: Mapping[str, int]

    @property
    def title(self) -> str:
        return self.pattern + (f"  ({len(self.tables)} tables)" if len(self.tables) > 1 else "")

    @property
    def rows(self) -> str:
        """Rows of one table, or from the smallest to the largest."""
        sizes = sorted(t.rows for t in self.tables)
        few, most = format_count(sizes[0]), format_count(sizes[-1])
        return few if sizes[0] == sizes[-1] else f"{few} to {most}"


def pattern_of(names: Sequence[str]) -> str:
    """A pattern of names that differ in numbers or in dotted parts.

    >>> pattern_of(["a.tables.0.weight", "a.tables.12.weight"]), pattern_of(["user.weight", "item.weight"])
    ('a.tables.*.weight', '*.weight')
    """
    parts = [n.split(".") for n in names]
    if len({len(p) for p in parts}) > 1:
        return "*"
    return ".".join(x[0] if len(set(x)) == 1 else "*" for x in zip(*parts, strict=True))


def without_index(name: str) -> str:
    """A table's name with ``*`` for numbers.

    >>> without_index("a.tables.12.weight")
    'a.tables.*.weight'
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def kinds(plan: Chosen, only: str | None = None) -> list[TableKind]:
    """The plan's tables, those that are alike together, in the order of the model; or one table by itself."""
    groups: dict[Any, list[PlannedTable]] = {}
    for t in plan.tables:
        if only is not None and t.name != only:
            continue
        of = (without_index(t.name), t.dim, t.ids, t.itemsize, t.sparse, t.uses, plan.splits[t.name].form)
        said = (t.refusals, plan.prices.get(t.name, {}), plan.missing.get(t.name, {}))
        groups.setdefault((*of, *(tuple(sorted(x.items())) for x in said)), []).append(t)
    return [_table_kind(plan, tuple(group)) for group in groups.values()]


def _table_kind(plan: Chosen, tables: tuple[PlannedTable, ...]) -> TableKind:
    name = tables[0].name
    form, prices = plan.splits[name].form, plan.prices.get(name, {})
    seconds = plan.seconds.get(name, {})
    cheapest = sorted((seconds.get(other, 0.0), price, other) for other, price in prices.items() if other != form)
    others = [(price, other) for _, price, other in cheapest]
    price = prices.get(form, plan.price_bytes)
    return TableKind(pattern_of([t.name for t in tables]), tables, form, price, others, plan.missing.get(name, {}))

"""A table of values with units, for people and programs, and its plain text.

A cell is a plain value; its column says what it means (`UNITS`), and each rendering how that is written. None is a cell
that does not apply, "" one like that above. `descompiler.report.render` has the other renderings.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, replace
from typing import Any

from descompiler.units import format_bytes, format_count, format_seconds

UNITS = ("text", "count", "bytes", "seconds", "percent", "ratio", "formula")
"""What a column holds; "bytes" and "seconds" are in SI, "percent" counts hundredths, "formula" is sympy's."""


NONE = "–"


@dataclass(frozen=True)
class Column:
    """A column: what its head says, and one of `UNITS`."""

    title: str
    unit: str = "text"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"column {self.title!r}: no unit {self.unit!r}; the units are {', '.join(UNITS)}")

    @property
    def is_number(self) -> bool:
        return self.unit not in ("text", "formula")


@dataclass(frozen=True)
class Sheet:
    """A table for people and programs.

    Attributes
    ----------
    rows : tuple of tuple
        As long as `columns`.
    notes : tuple of str
        Sentences below the table: what the numbers mean.
    strong : frozenset of int
        Rows to emphasise: what was chosen.

    Examples
    --------
    >>> sheet = Sheet("bytes", (Column("strategy"), Column("sent", "bytes")), (("pull", 24_685_069), ("whole", None)))
    >>> print(to_text(sheet))
    bytes
      strategy          sent
      pull      24,685,069 B
      whole                –
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...] = ()
    strong: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", printable(self.title))
        object.__setattr__(self, "notes", tuple(map(printable, self.notes)))
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"sheet {self.title!r}: {len(self.columns)} columns, and a row {row}")

    def without_empty(self, title: str) -> Sheet:
        """The sheet without a column, if that holds nothing in any row."""
        at = [c.title for c in self.columns].index(title)
        if any(row[at] not in (None, "") for row in self.rows):
            return self
        rows = tuple((*row[:at], *row[at + 1 :]) for row in self.rows)
        return replace(self, columns=(*self.columns[:at], *self.columns[at + 1 :]), rows=rows)


def printable(text: str) -> str:
    r"""Text of which no character commands a terminal: those that do are written as Python's escapes.

    Names are the user's, or a file's.

    >>> print(printable("a\x1b[31mb\u202ec\nd"))
    a\x1b[31mb\u202ec
    d
    """
    commands = (c for c in set(text) if unicodedata.category(c) in ("Cc", "Cf") and c != "\n")
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in commands})


def text_of(value: Any, unit: str) -> str:
    """A cell for people.

    >>> text_of(99.7712, "percent"), text_of(None, "bytes"), text_of(1e6, "count")
    ('99.77 %', '–', '1.00M')
    """
    if value is None:
        return NONE
    if value == "":
        return ""
    if unit == "bytes":
        return format_bytes(float(value))
    if unit == "seconds":
        return format_seconds(float(value))
    if unit == "count":
        return format_count(float(value))
    if unit == "ratio":
        return f"{float(value):.2f}" if value < 10 else f"{float(value):,.1f}"
    if unit == "percent":
        return f"{float(value):.2f} %"
    return printable(str(value))


def exactly(value: Any, unit: str) -> str:
    """A cell for logs: bytes and counts with all their digits, the rest as `text_of` writes it.

    >>> exactly(24_685_069, "bytes"), exactly(99.7712, "percent")
    ('24,685,069 B', '99.77 %')
    """
    if unit in ("bytes", "count") and isinstance(value, int | float):
        text = f"{value:,.0f}" if value == round(value) or unit == "bytes" else f"{value:,.1f}"
        return f"{text} B" if unit == "bytes" else text
    return text_of(value, unit)


def to_text(sheet: Sheet) -> str:
    """Aligned columns for a log or a notebook, with all digits and however long, notes below."""
    cells = [[c.title for c in sheet.columns]]
    cells += [[exactly(x, c.unit) for x, c in zip(row, sheet.columns, strict=True)] for row in sheet.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [sheet.title]
    if sheet.rows:
        for row in cells:
            aligned = (
                text.rjust(n) if c.is_number else text.ljust(n)
                for text, n, c in zip(row, widths, sheet.columns, strict=True)
            )
            lines.append(f"  {'  '.join(aligned)}".rstrip())
    return "\n".join([*lines, *(f"  {note}" for note in sheet.notes)])

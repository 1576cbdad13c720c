"""Other names of forms, understood where people write one: in pins, on the command line, in plan files.

Inside, a form has one name: `current_name` is called at the boundary, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from descompiler.errors import warn

ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("row", "rows"), "row_wise"),
    **dict.fromkeys(("column", "columns"), "column_wise"),
    **dict.fromkeys(("field", "fields", "table", "tables"), "table_wise"),
    "pull": "unique_rows",
    "gather": "sparse_all_gather",
    "hot": "hot_rows",
}
"""Names that forms had, or that people give them, to those that they have."""


def current_name(name: str) -> str:
    """The name of the form that is meant by ``name``; a note, once in a process, if it is another one."""
    if name not in ALIASES:
        return name
    _note(name)
    return ALIASES[name]


@cache
def _note(name: str) -> None:
    warn(f"the form {name!r} is named {ALIASES[name]!r} now; the other name is still understood")

"""Seconds of what a rank does itself in a step: lookups, their gradients and updates, and what is computed of them.

    n ids looked up in a table of k columns       c + n (a + k e)     `lookup_seconds`: forward, backward and the update
                                                                      of rows; c is of a call, whatever the ids
    n ids, each of which is asked for once        n u                 sorted, and put back in their places
    a dense gradient of V rows of k               V k w               made, swept by the optimiser and dropped
    A values on n rows that are no view           n A v               forward and backward
    products                                      flops / rate        `descompiler.cost_models.operators`

Bytes say what a link does; this is what decides where links are fast: in a form whose lookups are in the region each
rank looks up the ids of all ranks, of its tables, rows or columns. `descompiler.calibrate` measures the rates.
Functions take numbers, arrays or symbols.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf
from typing import Any

from descompiler.errors import PlanError


@dataclass(frozen=True)
class Rates:
    """Seconds of one rank's work.

    Attributes
    ----------
    call_s : float
        Of a table's lookup, gradient and update, whatever the ids.
    id_s : float
        Of an id.
    element_s : float
        Of each element of its row.
    unique_s : float
        Of an id among those that are made unique.
    swept_s : float
        Of an element of a dense gradient.
    value_s : float
        Of an element that is computed.
    source : str
        Where the numbers are from.

    >>> Rates(1e-4, 1e-7, 1e-8, 1e-7, 1e-9, 1e-9).id_s
    1e-07
    """

    call_s: float
    id_s: float
    element_s: float
    unique_s: float
    swept_s: float
    value_s: float
    source: str = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name != "source" and not 0 <= getattr(self, f.name) < inf:
                raise PlanError(f"rates: {f.name} must be seconds, 0 or more, not {getattr(self, f.name)}")


def lookup_seconds(rates: Rates, ids: Any, columns: Any, calls: Any = 1) -> Any:
    """Of a table's lookups, forward, backward and update.

    >>> round(lookup_seconds(Rates(1e-4, 1e-7, 1e-8, 0, 0, 0), 1000, 16), 9)
    0.00036
    """
    return calls * rates.call_s + ids * (rates.id_s + columns * rates.element_s)

"""Statistics of ids: what the price of a form depends on.

Unique ids. A row's batch draws n ids of a table, independently; id v is drawn with probability p_v. The expected
number of different ones is

    U(n) = sum over v of 1 - (1 - p_v)^n

Without samples, p_v is assumed to fall as v^-1.05 (Zipf; `Statistics.assumed`), and popular ids to be spread evenly
over the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

ZIPF = 1.05
"""Exponent of the assumed frequencies of ids."""


class Used(Protocol):
    """A table: its name, rows, and how many ids each row of a batch draws of it."""

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def ids(self) -> int: ...


@dataclass(frozen=True)
class Statistics:
    """Statistics of the ids of some tables.

    Attributes
    ----------
    tables : dict of str to (int, int)
        Rows and ids per row of the batch, by table.
    source : str
        Where the numbers are from, for people.
    """

    tables: Mapping[str, tuple[int, int]]
    zipf: float = ZIPF
    source: str = "assumed"

    @staticmethod
    def assumed(tables: Sequence[Used], zipf: float = ZIPF) -> Statistics:
        """Ids that nobody measured: frequencies fall as rank^-zipf."""
        return Statistics({t.name: (t.rows, t.ids) for t in tables}, zipf, f"assumed: Zipf({zipf}) ids")

    def unique(self, table: str, batch_rows: int) -> float:
        """Expected unique ids of one rank's batch of ``batch_rows`` rows, over all lookups of the table."""
        rows, ids = self.tables[table]
        return zipf_unique(rows, ids * batch_rows, self.zipf)


@lru_cache(maxsize=1 << 14)
def zipf_unique(rows: int, draws: int, exponent: float = ZIPF) -> float:
    """Expected different ids among ``draws`` of ``rows`` whose frequencies fall as rank^-exponent.

    The most frequent thousand are summed one by one, the others in groups within which frequencies differ by 1 %.

    >>> round(zipf_unique(1000, 1), 6), round(zipf_unique(10, 10_000), 3)
    (1.0, 10.0)
    """
    if not rows or not draws:
        return 0.0
    exact = min(rows, 1000)
    ends = [exact]
    while ends[-1] < rows:
        ends.append(min(rows, int(ends[-1] * 1.01) + 1))
    first = np.concatenate([np.arange(1, exact + 1), np.array(ends[:-1]) + 1])
    count = np.concatenate([np.ones(exact), np.diff(ends)])
    middle = first + (count - 1) / 2
    weight = middle**-exponent
    p = weight / (weight * count).sum()
    return float((count * -np.expm1(draws * np.log1p(-np.minimum(p, 1 - 1e-15)))).sum())

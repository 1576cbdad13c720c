"""What other strategies send, per rank and step, in bytes.

all-reduce of S bytes (ring)              2 (N-1)/N S           `ALL_REDUCE`
a table's sparse gradients, gathered      (N-1) b L (k s + 8)   `SPARSE`, duplicates included
a table's rows by all-to-all, and back    (N-1)/N b L (i + 2 k s)   `ALL_TO_ALL`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from descompiler.cost_models.symbols import L, N, P, V, b, i, k, s

ALL_REDUCE = 2 * (N - 1) / N * V * k * s
SPARSE = (N - 1) * b * L * (k * s + 8)
ALL_TO_ALL = (N - 1) / N * b * L * (i + 2 * k * s)
DENSE = 2 * (N - 1) / N * P * s


@dataclass(frozen=True)
class TableUse:
    """A table: rows, dim, and the ids per row of the batch over all its lookups."""

    rows: int
    dim: int
    ids: int


BASELINES = {
    "data parallel, dense gradients": ALL_REDUCE,
    "data parallel, sparse gradients": SPARSE,
    "field split, all-to-all of embeddings": ALL_TO_ALL,
}


def baselines(
    tables: Sequence[TableUse], dense_elements: int, *, ranks: int, rows: int, itemsize: int, id_bytes: int = 8
) -> dict[str, int]:
    """Bytes per rank and step of each baseline, dense parameters' all-reduce included.

    >>> baselines([TableUse(1000, 4, 1)], 10, ranks=2, rows=8, itemsize=4)["data parallel, dense gradients"]
    16040
    """
    dense = DENSE.subs({N: ranks, P: dense_elements, s: itemsize})
    result = {}
    for name, formula in BASELINES.items():
        total = sympy.Integer(0)
        for t in tables:
            total += formula.subs({N: ranks, b: rows, L: t.ids, V: t.rows, k: t.dim, s: itemsize, i: id_bytes})
        result[name] = int(sympy.floor(total + dense + sympy.Rational(1, 2)))
    return result

"""Where one cost overtakes another, in closed form wherever sympy finds the roots of a rational cost.

The threshold t of symbol x solves a(x) = b(x); on which side a is cheaper is seen from a - b beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy

from descompiler.cost_models.symbols import N

BESIDE = 1e-3
"""Where to look which cost is lower: so much beside a threshold, relative to it."""


@dataclass(frozen=True)
class Crossover:
    """A threshold.

    Attributes
    ----------
    symbol : sympy.Symbol
    threshold : sympy.Expr
        Closed form, in the other symbols.
    value : float
        With the numbers that were given.
    first, second : str
        With these numbers, ``first`` is cheaper beyond the threshold, ``second`` below it.
    """

    symbol: sympy.Symbol
    threshold: sympy.Expr
    value: float
    first: str
    second: str

    @property
    def start(self) -> int:
        """The first whole number from which on ``first`` is cheaper."""
        return math.floor(self.value) + 1

    def __str__(self) -> str:
        what = WORDS.get(self.symbol.name, str(self.symbol))
        return f"{self.first} beats {self.second} from {self.start:,} {what} ({self.symbol} > {self.threshold})"


WORDS = {
    "N": "ranks",
    "b": "rows a rank",
    "V": "rows of the table",
    "k": "dimensions",
    "L": "ids a row",
    "U": "unique ids",
    "w": "elements of the partial result",
}


def crossovers(
    a: tuple[str, Any], b: tuple[str, Any], symbol: sympy.Symbol, values: Mapping[sympy.Symbol, Any]
) -> list[Crossover]:
    """Every positive threshold at which one of two costs overtakes the other.

    Parameters
    ----------
    a, b : (str, sympy.Expr)
        Name and cost.
    values : mapping
        Numbers of the other symbols: they say which thresholds are real, and which side is cheaper.

    Returns
    -------
    list of Crossover
        Ascending. Empty: one is cheaper throughout, or there is no closed form.

    Raises
    ------
    ValueError
        If a symbol has no number, or the one to solve for has.

    Examples
    --------
    >>> from descompiler.cost_models.forms import ALL_TO_ALL, PARTIAL_SUMS, REPLICATE, UNIQUE_ROWS
    >>> from descompiler.cost_models.symbols import L, N, U, V, b, d, i, k, s, w
    >>> fields = {L: 24, k: 1, w: 1, b: 1024, s: 4, i: 4}
    >>> print(crossovers(("all-to-all", ALL_TO_ALL), ("partial sums", PARTIAL_SUMS), N, fields)[0])
    all-to-all beats partial sums from 25 ranks (N > L*k/w)
    >>> known = {U: 8000, k: 16, s: 4, d: 1, N: 8}
    >>> print(crossovers(("unique rows", UNIQUE_ROWS), ("replicate", REPLICATE), V, known)[0])
    unique rows beats replicate from 8,063 rows of the table (V > U*(d + 2*k*s)/(2*k*s))
    """
    if symbol in values:
        raise ValueError(f"{symbol} is what to solve for: give no number of it")
    difference, roots = _solved(a[1], b[1], symbol)
    if missing := difference.free_symbols - set(values) - {symbol}:
        raise ValueError(f"give numbers of {', '.join(sorted(map(str, missing)))}")
    at = sympy.lambdify(symbol, difference.subs(values), "math")
    found = []
    for root in roots:
        number = root.subs(values)
        if not number.is_real or number <= (1 if symbol is N else 0):
            continue  # no real number, or one rank, which sends nothing
        value = float(number)
        below, beyond = at(value * (1 - BESIDE)), at(value * (1 + BESIDE))
        if below * beyond < 0:  # else they touch
            first, second = (a[0], b[0]) if beyond < 0 else (b[0], a[0])
            found.append(Crossover(symbol, root, value, first, second))
    return sorted(found, key=lambda x: x.value)


@cache
def _solved(a: sympy.Expr, b: sympy.Expr, symbol: sympy.Symbol) -> tuple[sympy.Expr, tuple[sympy.Expr, ...]]:
    """a - b, and where it may be 0: kept, since numbers change from table to table, formulas don't."""
    difference = sympy.cancel(a - b)
    free = sympy.Dummy(symbol.name, positive=True)  # roots need not be whole
    numerator, _ = sympy.fraction(difference.subs(symbol, free))
    try:
        roots = sympy.roots(sympy.Poly(numerator, free)) if numerator.has(free) else ()
    except sympy.PolynomialError:  # no closed form
        roots = ()
    return difference, tuple(map(sympy.factor, roots))

"""Where one cost overtakes another, in closed form wherever sympy's ``solve`` finds one.

The threshold t of symbol x solves a(x) = b(x); on which side a is cheaper is seen from a - b beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from descompiler.cost_models.symbols import N


@dataclass(frozen=True)
class Crossover:
    """A threshold.

    Attributes
    ----------
    symbol : sympy.Symbol
    threshold : sympy.Expr
        Closed form, in the other symbols.
    value : float or None
        With the numbers that were given; None if symbols are left.
    first, second : str
        ``first`` is cheaper beyond the threshold, ``second`` below it.
    """

    symbol: sympy.Symbol
    threshold: sympy.Expr
    value: float | None
    first: str
    second: str

    @property
    def start(self) -> int | None:
        """The first whole number from which on ``first`` is cheaper."""
        return None if self.value is None else int(sympy.floor(self.value)) + 1

    def __str__(self) -> str:
        what = WORDS.get(self.symbol.name, str(self.symbol))
        number = f" {self.start:,}" if self.start is not None else ""
        return f"{self.first} beats {self.second} from{number} {what} ({self.symbol} > {self.threshold})"


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
    a: tuple[str, Any], b: tuple[str, Any], symbol: sympy.Symbol, values: Mapping[sympy.Symbol, Any] | None = None
) -> list[Crossover]:
    """Every positive threshold at which one of two costs overtakes the other.

    Parameters
    ----------
    a, b : (str, sympy.Expr)
        Name and cost.
    values : mapping, optional
        Numbers of the other symbols. Without them, only closed forms that are positive for all values are returned.

    Returns
    -------
    list of Crossover
        Ascending, if numbers were given. Empty: one is cheaper throughout, or there is no closed form.

    Examples
    --------
    >>> from descompiler.cost_models.forms import ALL_TO_ALL, PARTIAL, PULL, REPLICATE
    >>> from descompiler.cost_models.symbols import L, N, U, V, b, i, k, s, w
    >>> fields = {L: 24, k: 1, w: 1, b: 1024, s: 4, i: 4}
    >>> print(crossovers(("all-to-all", ALL_TO_ALL), ("partial sums", PARTIAL), N, fields)[0])
    all-to-all beats partial sums from 25 ranks (N > L*k/w)
    >>> print(crossovers(("pull", PULL), ("replicate", REPLICATE), V, {U: 8000, k: 16, s: 4, i: 4})[0])
    pull beats replicate from 8,251 rows of the table (V > U*(i + 2*k*s)/(2*k*s))
    """
    values = dict(values or {})
    if symbol in values:
        raise ValueError(f"{symbol} is what to solve for: give no value of it")
    difference = sympy.factor(sympy.together(a[1] - b[1]))
    free = sympy.Dummy(symbol.name, positive=True)  # roots need not be whole
    numerator, _ = sympy.fraction(difference.subs(symbol, free))
    try:
        roots = sympy.solve(numerator, free)
    except NotImplementedError:  # no closed form
        roots = []
    found: dict[sympy.Expr, Crossover] = {}
    for root in roots:
        threshold = sympy.factor(root)
        number = threshold.subs(values)
        value = float(number) if number.is_number and number.is_real else None
        if number.is_number and (value is None or value <= (1 if symbol is N else 0)):
            continue  # no real number, or one rank, which sends nothing
        beyond = _sign(difference, symbol, values, threshold, above=True)
        below = _sign(difference, symbol, values, threshold, above=False)
        if beyond == 0 or beyond == below:
            continue  # they touch, or nothing is known
        first, second = (a[0], b[0]) if beyond < 0 else (b[0], a[0])
        found[threshold] = Crossover(symbol, threshold, value, first, second)
    return sorted(found.values(), key=lambda x: (x.value is None, x.value or 0.0, str(x.threshold)))


def _sign(
    difference: sympy.Expr, symbol: sympy.Symbol, values: Mapping[sympy.Symbol, Any], root: sympy.Expr, *, above: bool
) -> int:
    """The sign of ``difference`` beside a root; 0 if it is not known."""
    step = sympy.Rational(1, 1000)
    beside = difference.subs(symbol, root * (1 + step if above else 1 - step)).subs(values)
    beside = sympy.simplify(beside)
    if beside.is_number:
        return int(sympy.sign(beside))
    # all symbols are positive: one sign of all terms decides; try numbers where that is not seen
    samples = [{x: n for n, x in enumerate(sorted(beside.free_symbols, key=str), start)} for start in (2, 5, 11)]
    signs = {int(sympy.sign(beside.subs(v))) for v in samples}
    return signs.pop() if len(signs) == 1 else 0

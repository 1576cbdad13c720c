"""The symbols of every cost formula: this is the only place where they are made."""

from functools import cache

import sympy

N = sympy.Symbol("N", integer=True, positive=True)
"""Ranks."""
g = sympy.Symbol("g", integer=True, positive=True)
"""Ranks per node."""
b = sympy.Symbol("b", integer=True, nonnegative=True)
"""Rows per rank."""
F = sympy.Symbol("F", integer=True, positive=True)
"""Fields: tables that are alike."""
L = sympy.Symbol("L", integer=True, positive=True)
"""Ids per row of one table."""
V = sympy.Symbol("V", integer=True, positive=True)
"""Rows of a table."""
U = sympy.Symbol("U", nonnegative=True)
"""Expected unique ids of one table in one rank's batch."""
UG = sympy.Symbol("U_G", nonnegative=True)
"""Expected unique ids of one table in the global batch."""
H = sympy.Symbol("H", integer=True, nonnegative=True)
"""Rows of a table that every rank holds because they are frequent."""
UH = sympy.Symbol("U_H", nonnegative=True)
"""Expected unique ids of them in one rank's batch."""
p = sympy.Symbol("p", positive=True)
"""Vectors per row that a table's lookups return: 1 for a bag, L without pooling."""
c = sympy.Symbol("c", integer=True, positive=True)
"""Column shards of a table."""
k = sympy.Symbol("k", integer=True, positive=True)
"""Dimension of a table."""
s = sympy.Symbol("s", integer=True, positive=True)
"""Bytes of an element."""
i = sympy.Symbol("i", integer=True, positive=True)
"""Bytes of an id."""
d = sympy.Symbol("d", positive=True)
"""Bytes of a unique id, as its distance to the one before it."""
l = sympy.Symbol("l", integer=True, nonnegative=True)  # noqa: E741
"""Bytes of a bag's length, where lengths are sent beside ids."""
P = sympy.Symbol("P", integer=True, nonnegative=True)
"""Elements of the dense parameters."""
w = sympy.Symbol("w", integer=True, positive=True)
"""Elements per row of the batch that leave the region, over all ranks that send them."""
S = sympy.Symbol("S", nonnegative=True)
"""Bytes of a collective's whole tensor."""
A = sympy.Symbol("A", nonnegative=True)
"""Elements of activations per row that are kept for backward."""


@cache
def alpha(collective: str, link: str) -> sympy.Symbol:
    """Seconds of one message of a collective on a class of links ("intra" or "inter" a node).

    >>> alpha("all_reduce", "inter")
    alpha_all_reduce_inter
    """
    return sympy.Symbol(f"alpha_{collective}_{link}", nonnegative=True)


@cache
def beta(collective: str, link: str) -> sympy.Symbol:
    """Seconds per byte of a collective on a class of links."""
    return sympy.Symbol(f"beta_{collective}_{link}", nonnegative=True)


@cache
def start(collective: str, link: str) -> sympy.Symbol:
    """Seconds to start a collective, whatever the ranks."""
    return sympy.Symbol(f"start_{collective}_{link}", nonnegative=True)


gamma = sympy.Symbol("gamma", nonnegative=True)
"""Seconds per floating point operation."""

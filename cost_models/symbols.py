"""The symbols of every cost formula: this is the only place where they are made."""

import sympy

N = sympy.Symbol("N", integer=True, positive=True)
"""Ranks."""
b = sympy.Symbol("b", integer=True, nonnegative=True)
"""Rows per rank."""
L = sympy.Symbol("L", integer=True, positive=True)
"""Ids per row of one table."""
V = sympy.Symbol("V", integer=True, positive=True)
"""Rows of a table."""
k = sympy.Symbol("k", integer=True, positive=True)
"""Dimension of a table."""
s = sympy.Symbol("s", integer=True, positive=True)
"""Bytes of an element."""
i = sympy.Symbol("i", integer=True, positive=True)
"""Bytes of an id."""
P = sympy.Symbol("P", integer=True, nonnegative=True)
"""Elements of the dense parameters."""
w = sympy.Symbol("w", integer=True, positive=True)
"""Elements per row of the batch that leave the region, over all ranks that send them."""

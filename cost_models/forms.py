"""What the forms of a weights-rich operator send, per rank and step, the mean over ranks: the shapes of their curves.

    replicate, dense gradients          2 (N-1)/N V k s                           `REPLICATE`
    replicate, unique rows' gradients   (N-1) U (k s + d)                         `SPARSE_ALL_GATHER`
    pull unique rows                    (N-1)/N U (d + 2 k s)                     `UNIQUE_ROWS`
    hot rows replicated, others pulled  (N-1)/N ((U - u) (d + 2 k s) + 2 H k s)   `HOT_ROWS`: u of H hot rows in a batch
    hot slices gathered, others pulled  (N-1)/N (U-u) (d + 2 k s) + (N-1) u (k s + d)  `HOT_SLICES`, of a dynamic table
    fully sharded, gathered whole       2 (N-1)/N V k s                           `FSDP`: forward and backward together
    split, values by all-to-all         (N-1)/N b L (i + 2 k s)                   `ALL_TO_ALL`
    table- or column-wise, a partial    (N-1)/N b L i + 2 (N-1) b w s             `PARTIAL_SUMS`: w elements a row

A row that a rank's batch has with probability q is hot if 2 k s < q (d + 2 k s): `hot_threshold`.

What a plan prices is its own layout, exactly (`descompiler.layout.layout`); these are for crossovers and curves.
"""

import sympy

from descompiler.cost_models.baselines import ALL_REDUCE
from descompiler.cost_models.exchange import IDS_IN, VALUES_OUT_AND_BACK
from descompiler.cost_models.symbols import UH, H, L, N, U, d, k, s, w

REPLICATE = ALL_REDUCE
SPARSE_ALL_GATHER = (N - 1) * U * (k * s + d)
UNIQUE_ROWS = (N - 1) / N * U * (d + 2 * k * s)
HOT_ROWS = (N - 1) / N * ((U - UH) * (d + 2 * k * s) + 2 * H * k * s)
HOT_SLICES = UNIQUE_ROWS.subs(U, U - UH) + SPARSE_ALL_GATHER.subs(U, UH)
FSDP = ALL_REDUCE
ALL_TO_ALL = IDS_IN + VALUES_OUT_AND_BACK.subs(w, L * k)
PARTIAL_SUMS = IDS_IN + VALUES_OUT_AND_BACK.subs(w, N * w)  # each of N ranks sends a term


def rounded(formula: sympy.Expr, itemsize: int) -> sympy.Expr:
    """What a form sends where rows and values cross in elements of ``itemsize`` bytes; sums by all-reduce don't.

    >>> rounded(UNIQUE_ROWS, 2), rounded(REPLICATE, 2) == REPLICATE
    (U*(N - 1)*(d + 4*k)/N, True)
    """
    if formula == HOT_ROWS:
        return (N - 1) / N * ((U - UH) * (d + 2 * k * itemsize) + 2 * H * k * s)
    return formula if formula in (REPLICATE, FSDP) else formula.subs(s, itemsize)


def hot_threshold(
    dim: int, itemsize: int, id_bytes: float, sparse: bool = False, rounded_to: int | None = None
) -> float:
    """The probability that a batch has a row, above which replicating the row sends less than pulling it.

    Where `HOT_ROWS` with the row among the hot ones, H + 1 and u + q for H and u, equals `HOT_ROWS` without. With
    sparse gradients, one more element a row is all-reduced: whether it was looked up. Elements of pulled rows that are
    ``rounded_to`` fewer bytes make it dearer to replicate.

    >>> hot_threshold(1, 4, 4), round(hot_threshold(16, 4, 4), 3), hot_threshold(1, 4, 4, sparse=True)
    (0.6666666666666666, 0.97, 1.3333333333333333)
    >>> hot_threshold(1, 8, 4, rounded_to=2)
    2.0
    """
    return 2 * (dim + sparse) * itemsize / (id_bytes + 2 * dim * (rounded_to or itemsize))

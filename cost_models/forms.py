"""What the forms of a weights-rich operator send, per rank and step, the mean over ranks: the shapes of their curves.

    replicate, dense gradients          2 (N-1)/N V k s                           `REPLICATE`
    replicate, unique rows' gradients   (N-1) U (k s + i)                         `GATHER`
    pull unique rows                    (N-1)/N U (i + 2 k s)                     `PULL`
    split, values by all-to-all         (N-1)/N b L (i + 2 k s)                   `ALL_TO_ALL`
    field or column split, a partial    (N-1)/N b L i + 2 (N-1) b w s             `PARTIAL`: w elements a row, per rank

What a plan prices is its own layout, exactly (`descompiler.layout`); these are for crossovers and curves.
"""

from descompiler.cost_models.baselines import ALL_REDUCE
from descompiler.cost_models.exchange import IDS_IN, VALUES_OUT_AND_BACK
from descompiler.cost_models.symbols import L, N, U, i, k, s, w

REPLICATE = ALL_REDUCE
GATHER = (N - 1) * U * (k * s + i)
PULL = (N - 1) / N * U * (i + 2 * k * s)
ALL_TO_ALL = IDS_IN + VALUES_OUT_AND_BACK.subs(w, L * k)
PARTIAL = IDS_IN + VALUES_OUT_AND_BACK.subs(w, N * w)  # each of N ranks sends a term

FORMS = {
    "replicate": REPLICATE,
    "gather": GATHER,
    "pull": PULL,
    "all-to-all": ALL_TO_ALL,
    "partial": PARTIAL,
}

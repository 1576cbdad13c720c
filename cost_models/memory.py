"""Bytes that a rank keeps for a weight, its gradient, its optimiser's state, and activations.

With V rows of k elements of s bytes, U of the rows in a step's gradient:

    weight                          V k s             `weight_bytes`
    gradient, dense                 V k s             `gradient_bytes`
    gradient, sparse                U (k s + 8)       `gradient_bytes`: values, and indices of 8 bytes
    SGD                             0                 `state_bytes`
    momentum, Adagrad               V k s
    row-wise Adagrad                V s               one sum of squares a row (FBGEMM's EXACT_ROWWISE_ADAGRAD)
    Adam, SparseAdam, FTRL          2 V k s
    activations of A elements       n A s             `activation_bytes`; n rows: of the global batch, inside the region

(Adagrad: Duchi, Hazan, Singer, 2011; Adam: Kingma and Ba, 2015; what PyTorch's optimisers keep, steps left out.)
Functions take numbers or symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

STATE: dict[str, Callable[[Any, Any], Any]] = {
    "sgd": lambda V, k: 0 * V,
    "momentum": lambda V, k: V * k,
    "adagrad": lambda V, k: V * k,
    "rowwise_adagrad": lambda V, k: V,
    "adam": lambda V, k: 2 * V * k,
    "sparse_adam": lambda V, k: 2 * V * k,
    "ftrl": lambda V, k: 2 * V * k,
}
"""Elements of state for a weight ``[V, k]``, by optimiser."""


OF_WHOLE_ROWS = frozenset({"rowwise_adagrad"})
"""Optimisers that look at a row as a whole: columns of it on several ranks have no step."""


def weight_bytes(rows: Any, dim: Any, itemsize: Any) -> Any:
    """Of a weight, or of the rows of it that a rank holds."""
    return rows * dim * itemsize


def gradient_bytes(rows: Any, dim: Any, itemsize: Any, *, unique: Any = None) -> Any:
    """Of a gradient; ``unique`` rows of it if it is sparse."""
    return rows * dim * itemsize if unique is None else unique * (dim * itemsize + 8)


def state_bytes(optimizer: str, rows: Any, dim: Any, itemsize: Any) -> Any:
    """Of an optimiser's state.

    >>> state_bytes("adam", 10, 4, 4), state_bytes("rowwise_adagrad", 10, 4, 4)
    (320, 40)
    """
    return STATE[optimizer](rows, dim) * itemsize


def activation_bytes(rows: Any, elements: Any, itemsize: Any) -> Any:
    """Of the values that backward needs, ``elements`` per row of the batch."""
    return rows * elements * itemsize


def table_bytes(rows: Any, dim: Any, itemsize: Any, optimizer: str = "adagrad", *, unique: Any = None) -> Any:
    """Weight, gradient and optimiser state of ``rows`` rows.

    >>> table_bytes(1000, 16, 4)
    192000
    """
    return (
        weight_bytes(rows, dim, itemsize)
        + gradient_bytes(rows, dim, itemsize, unique=unique)
        + state_bytes(optimizer, rows, dim, itemsize)
    )

"""Floating point operations, forward and backward, and what computing on the global batch adds.

    linear m -> n on b rows            6 b m n       `linear_flops`: forward 2 b m n, and as much for each gradient
    sum of L vectors of k on b rows    2 b L k       `pooling_flops`: forward (adds), backward (the rows' gradients)
    of an operator inside the region   f (N a + o - 1)    `extra_flops`

Outside the region every rank computes f operations on its own rows. Inside, on N times the rows, the rank with the
largest share a of the divided dimension computes N a f; what it has of its own rows adds a share o. In balance N a = 1.
Functions take numbers or symbols.
"""

from __future__ import annotations

from typing import Any


def linear_flops(rows: Any, inputs: Any, outputs: Any) -> Any:
    """Of a matrix product ``[rows, inputs] x [inputs, outputs]`` and both its gradients.

    >>> linear_flops(2, 3, 4)
    144
    """
    return 6 * rows * inputs * outputs


def pooling_flops(rows: Any, ids: Any, dim: Any) -> Any:
    """Of summing ``ids`` vectors for each row, and of adding their gradients to the table's."""
    return 2 * rows * ids * dim


def extra_flops(flops: Any, ranks: Any, share: Any, own: Any = 0) -> Any:
    """What the slowest rank computes inside the region beyond its ``flops`` outside.

    Parameters
    ----------
    share : number or symbol
        Its part of the divided dimension, 1 if the dimension is not divided.
    own : number or symbol
        The part that every rank computes for its own rows.

    >>> extra_flops(100, 4, 0.25), extra_flops(100, 4, 1)
    (0.0, 300)
    """
    return flops * (ranks * share + own - 1)

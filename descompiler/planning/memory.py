"""Memory of each rank under a plan: weights, gradients, optimiser state, activations.

    weights, state     of the pieces that the rank holds      `descompiler.cost_models.memory`
    gradients          as the weights; of a table with sparse gradients, of the unique rows of a step
    activations        n A s: every value that is no view, A elements a row, in bytes of s; n is the rank's rows
                       outside the region, the global batch's inside it; of tables computed of whole tables, all rows

Activations are counted as if all were kept until backward ends, so they are an upper estimate; buffers of collectives
are not counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from descompiler.cost_models.memory import STATE, activation_bytes, gradient_bytes, state_bytes, weight_bytes
from descompiler.errors import PlanError
from descompiler.graph.nodes import is_view, shape_of
from descompiler.layout.pieces import ALL, Pieces
from descompiler.layout.placement import LOCAL, Placement, Shard, ranks_of
from descompiler.layout.spans import Spans
from descompiler.region.cut import Weights
from descompiler.region.partition import Partition
from descompiler.tables.computed import groups_of


@dataclass(frozen=True)
class Memory:
    """What one rank keeps, in bytes."""

    weights_bytes: int
    gradients_bytes: int
    state_bytes: int
    activations_bytes: int

    @property
    def total(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.state_bytes + self.activations_bytes

    def __str__(self) -> str:
        return (
            f"{self.total:,} B: weights {self.weights_bytes:,}, gradients {self.gradients_bytes:,}, optimiser state "
            f"{self.state_bytes:,}, activations {self.activations_bytes:,}"
        )


def check_optimizer(name: str) -> str:
    """The name; `PlanError` if nothing is known of that optimiser's state."""
    if name not in STATE:
        raise PlanError(f"optimizer={name!r}: its memory is not known; one of {', '.join(STATE)} is as large")
    return name


def memory_of(partition: Partition, w: Weights, optimizer: str, unique: Mapping[str, float]) -> Spans[Memory]:
    """Memory of every rank.

    Parameters
    ----------
    unique : mapping of str to float
        Expected unique ids of one rank's batch, for tables with sparse gradients.
    """
    program, operators, pieces = partition.program, partition.operators, partition.pieces
    sparse = {o.name for o in operators if o.sparse}
    tables = {o.name for o in operators}
    weights, gradients, state = (np.zeros(w.ranks, dtype=np.int64) for _ in range(3))
    for name, p in program.parameters.items():
        rows, width = held_elements(pieces[name])
        itemsize = p.dtype.itemsize
        weights += weight_bytes(rows, width, itemsize)
        if not p.requires_grad:
            continue
        if name in sparse:
            touched = np.minimum(rows, int(unique.get(name, 0) * w.ranks))
            gradients += gradient_bytes(rows, width, itemsize, unique=touched)
        else:
            gradients += gradient_bytes(rows, width, itemsize)
        if name in tables:
            state += state_bytes(optimizer, rows, width, itemsize)
        else:  # row-wise optimisers are for tables
            state += state_bytes("adagrad" if optimizer == "rowwise_adagrad" else optimizer, rows, width, itemsize)
    inside, outside = activation_elements(partition, w.ranks)
    activations = activation_bytes(w.rows, outside + inside * w.ranks, w.itemsize)
    gathered = [program.parameters[name] for name in partition.wholes]  # there, with their gradients, during a step
    held = sum(p.numel() * (2 if p.requires_grad else 1) for p in gathered)
    activations = activations + activation_bytes(1, held, w.itemsize)
    for group in groups_of(operators):  # all rows of each computed table, in this rank's columns
        first = pieces[group.tables[0]]
        share = held_elements(first)[0] / first.shape[first.dim]
        elements = sum(prod(shape_of(n)) for n in group.nodes if not is_view(n))
        activations = activations + activation_bytes(1, np.ceil(elements * share).astype(np.int64), w.itemsize)
    every = np.stack([weights, gradients, state, activations])
    changes = np.flatnonzero((np.diff(every) != 0).any(0)) + 1
    borders = itertools.pairwise([0, *changes.tolist(), w.ranks])
    return tuple((first, stop, Memory(*every[:, first].tolist())) for first, stop in borders)


def activation_elements(partition: Partition, ranks: int) -> tuple[np.ndarray, int]:
    """Elements a row of all values that are no view: of each rank's share of the region, and outside of it."""
    inside, outside = np.zeros(ranks, dtype=np.int64), 0
    for node, elements, rows in partition.known.activations:
        if node in partition.inside:
            _add_share(inside, elements, partition.placements[node])
        elif rows:
            outside += elements
    return inside, outside


def held_elements(pieces: Pieces) -> tuple[np.ndarray, int]:
    """Elements of the divided dimension that each rank holds, and how large the others are together."""
    whole = pieces.shape[pieces.dim] if pieces.shape else 1
    return pieces.sizes[:ALL] + pieces.sizes[ALL], prod(pieces.shape) // max(whole, 1)


def _add_share(total: np.ndarray, elements: int, placement: Placement) -> None:
    if isinstance(placement, Shard):
        size = sum(placement.widths.values())
        for r, width in placement.widths.items():
            if r != LOCAL:
                total[r] += elements * width // size
    else:
        total[list(ranks_of(placement))] += elements  # type: ignore[arg-type]

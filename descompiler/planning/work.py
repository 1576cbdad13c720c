"""Seconds of what each rank does itself in a step of a partition, by the rates of a cluster.

    lookups in the region     every rank that has a part of the table looks up the ids of all ranks, in its columns
    lookups that are fetched  a rank makes its own ids unique; owners look up what all ranks ask them for
    other lookups             own ids; where ranks exchange rows' gradients, an update of all ranks' rows
    dense gradients           of all rows that a rank holds
    values, products          inside the region on the global batch, of a rank's share; outside on own rows

The formulas are those of `descompiler.cost_models.work`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np

from descompiler.cost_models.work import Rates, lookup_seconds
from descompiler.graph.nodes import elements_per_row, tail
from descompiler.layout.spans import Spans
from descompiler.planning.memory import activation_elements, held_elements
from descompiler.region.cut import Weights, work_bytes
from descompiler.region.known import Known
from descompiler.region.partition import Partition
from descompiler.tables.form import Split, form_named
from descompiler.tables.tables import Lookup, Operator

CALL_OF_FETCHED = 0.5
"""Of a call, what a table takes where its rows are fetched, beside the owner's: with a whole one predictions of LR, FM
and DeepFM on 2 ranks were a fifth too high, with none a quarter too low."""


@dataclass(frozen=True, eq=False)
class Work:
    """Own work of the ranks in partitions of one program; what an operator takes in a split is found once.

    Attributes
    ----------
    unique : mapping of str to float
        Expected unique ids of one rank's batch, by table.
    flops_per_s : float, optional
        Of products; without, they take no time.
    """

    w: Weights
    unique: Mapping[str, float]
    rates: Rates
    flops_per_s: float | None
    _found: dict[tuple[str, int], tuple[Split, np.ndarray]] = field(default_factory=dict)

    def seconds(self, partition: Partition) -> np.ndarray:
        """Of each rank."""
        w, seconds = self.w, np.zeros(self.w.ranks)
        for o in partition.operators:
            seconds += self.of_operator(o, partition.splits[o.name])
        inside, outside = activation_elements(partition, w.ranks)
        seconds += w.rows * (inside * w.ranks + outside) * self.rates.value_s
        if self.flops_per_s is not None:
            seconds += _flops(partition, w) / self.flops_per_s
        return seconds

    def of_operator(self, o: Operator, split: Split) -> np.ndarray:
        """Of each rank: the lookups of a table, and its dense gradient; not to be changed."""
        key = o.name, id(split)  # which is that of no other split as long as this one is kept
        if key not in self._found:
            self._found[key] = split, self._of_operator(o, split)
        return self._found[key][1]

    def _of_operator(self, o: Operator, split: Split) -> np.ndarray:
        held, _ = held_elements(split.pieces)
        seconds = np.zeros(self.w.ranks)
        for x in o.lookups:
            seconds += _of_lookup(o, x, split, held, self.w, self.unique[o.name], self.rates)
        if o.trained and not o.sparse:
            seconds += held * (o.dim if split.pieces.dim == 0 else o.rows) * self.rates.swept_s
        return seconds

    def least(self, known: Known) -> float:
        """Seconds of a rank's matrix products in any plan, forward and backward: those of its own rows."""
        return 0.0 if self.flops_per_s is None else sum(known.flops(self.w.rows).values()) / self.flops_per_s


def _of_lookup(
    o: Operator, x: Lookup, split: Split, held: np.ndarray, w: Weights, unique: float, rates: Rates
) -> np.ndarray:
    """Of one lookup of a table, by rank."""
    width, by_columns = elements_per_row(x.ids), split.pieces.dim == 1
    if split.placement(o, x) is not None:
        ids = w.ranks * w.rows * _widths(split.columns(o, x), x, w.ranks)
        columns = held if by_columns else np.where(held > 0, o.dim, 0)
        looked_up: np.ndarray = np.where((held > 0) & (ids > 0), lookup_seconds(rates, ids, columns), 0.0)
        return looked_up
    own: float = lookup_seconds(rates, w.rows * width, o.dim)
    if w.ranks == 1:
        return np.full(1, own)
    if form_named(split.form).fetches(split):
        asked = w.ranks * unique * held / max(held.sum(), 1)
        served: np.ndarray = np.where(held > 0, lookup_seconds(rates, asked, o.dim), 0.0)
        # rows that have come are looked up together, and updated by their owners
        taken: float = lookup_seconds(rates, w.rows * width, o.dim, calls=CALL_OF_FETCHED)
        return taken + w.rows * width * rates.unique_s + served
    if split.gathered:
        own += lookup_seconds(rates, (w.ranks - 1) * unique, o.dim, calls=0)
    return np.full(w.ranks, own)


def _widths(columns: Spans[tuple[int, ...] | None], x: Lookup, ranks: int) -> np.ndarray:
    """How many ids of a row each rank looks up."""
    whole = tail(x.ids)
    result = np.zeros(ranks)
    for first, stop, chosen in columns:
        result[first:stop] = prod(whole) if chosen is None else len(chosen) * prod(whole[1:])
    return result


def _flops(partition: Partition, w: Weights) -> float:
    """Of the slowest rank's matrix products, forward and backward."""
    flops = partition.known.flops(w.rows)
    total = float(sum(flops.values()))
    for n in partition.inside & flops.keys():
        at = partition.candidates.placed[n].placement
        total += work_bytes(n, at, partition.placements, w) * w.flops_per_byte / w.ranks
    return total

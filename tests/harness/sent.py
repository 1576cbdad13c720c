"""What all ranks send in a training step, counted from what each rank holds: an oracle of costs, for small graphs.

It takes a layout's shapes and the pieces of weights. No cost of the cut, no prediction of the layout is called here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import prod

import torch
from torch import fx

from descompiler.layout.global_values import NormOutside, NormsInside
from descompiler.layout.layout import Layout
from descompiler.layout.pieces import Pieces
from descompiler.layout.step import StepHeader
from descompiler.region.cut import Candidates


def legal_sets(candidates: Candidates) -> Iterator[frozenset[fx.Node]]:
    """Every set of inside nodes that a region can be: closed under operands, and what can't leave has all its users."""
    found = [frozenset(candidates.lookups)]
    for node in candidates.placed:  # in the order of the graph: operands come before their users
        if node not in candidates.lookups:
            operands = {p for p in node.all_input_nodes if p in candidates.placed}
            found += [inside | {node} for inside in found if operands <= inside]
    for inside in found:
        if all(u in inside for n in inside & candidates.confined for u in n.users):
            yield inside


def values_out(layout: Layout, rows: int, itemsize: int) -> int:
    """Bytes of what leaves the region, and of its gradients: each rank's terms go to N - 1 ranks, which answer."""
    elements = sum((stop - first) * prod(tail) for x in layout.exits for first, stop, tail in x.tails)
    return 2 * (layout.ranks - 1) * rows * elements * itemsize


def ids_in(layout: Layout, rows: int) -> int:
    """Bytes of ids: N - 1 ranks send theirs to each rank that looks them up."""
    each = 0
    for x in layout.entries:
        for first, stop, columns in x.columns:
            each += (stop - first) * prod(x.tail if columns is None else (len(columns), *x.tail[1:]))
    return (layout.ranks - 1) * rows * each * layout.id_bytes


def gradients_reduced(pieces: Mapping[str, Pieces], trained: Collection[str], itemsize: int) -> int:
    """Bytes of all-reduces: 2 (N - 1) over all ranks for each element that every rank has a copy of."""
    copies = 0  # beside the first
    for name in trained:
        whole = torch.empty(pieces[name].shape, device="meta")
        copies += sum(pieces[name].cut(whole, r).numel() for r in range(pieces[name].ranks)) - whole.numel()
    return 2 * copies * itemsize


def norms(layout: Layout, itemsize: int) -> int:
    """Bytes of batch norms: outside, mean and variance of all ranks, the rows, two sums back; inside, what moved."""
    others = layout.ranks - 1
    outside = sum(layout.ranks * (2 * c + 1) + 2 * 2 * c for c in (t.channels for t in layout.of(NormOutside)))
    inside = sum(2 * c for t in layout.of(NormsInside) for channels in t.channels for c in channels)
    return others * (outside + inside) * itemsize


def headers(layout: Layout) -> int:
    """Bytes that each rank tells each other one before the step."""
    return layout.ranks * (layout.ranks - 1) * StepHeader.BYTES

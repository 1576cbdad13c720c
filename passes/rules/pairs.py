"""pairs: ``gather_1(z_r)[:, i, j]  -->  gather_1(z_r[:, own of i, own of j])``

Positions in several dimensions at once, made of no batch: the triangle of a DLRM's dot products. What is picked stays
with its owner; of terms, all ranks pick the same. It pays since what makes the triangle then stays inside, and of F F
products F (F - 1) / 2 leave at most.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from descompiler.graph.arguments import operand
from descompiler.graph.nodes import aten, shape_of
from descompiler.graph.program import Program
from descompiler.graph.slicing import indexed
from descompiler.layout.placement import LOCAL, Disjoint, Partial, Shard, shard
from descompiler.region.rule import Declined, Part, Placed, Situation
from descompiler.region.sliced import emit_slices, place_slices


@dataclass(frozen=True)
class Pairs:
    """``x[:, i, j]``, and ``x[:, i]`` of positions that no `IndexSelect` has."""

    name: str = "pairs"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.index.Tensor})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, dims = at.at(node.args[0]), indexed(node)
        if dims is None or dims.start == 0:
            return Declined("picks rows of the batch, by a mask, or in dimensions that are not side by side")
        if not all(n in at.givens.constants for n in _indices(node)):
            return Declined("selects by computed positions")
        if isinstance(x, Partial) or (isinstance(x, Disjoint) and dims.start >= x.lead):
            return Placed(x)
        if isinstance(x, Shard) and x.dim not in dims:
            return place_slices(node, at)
        picked = _picked(at.program, node)
        if picked is None:
            return Declined("moves what ranks divide to positions that are no constants, or to several dimensions")
        if isinstance(x, Disjoint):
            lead = 1 + dims.start + max(0, x.lead - dims.stop)
            return Placed(Disjoint(x.ranks, ("pairs", x.key, dims.start, tuple(map(tuple, picked))), lead))
        assert isinstance(x, Shard)
        owners = _owners(x, dims, picked)
        if all(owner == LOCAL for owner in owners):
            return Declined("selects what every rank has for its own rows")
        return Placed(shard(dims.start, [(1, owner) for owner in owners]))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        x, dims = part.at(node.args[0]), indexed(node)
        assert dims is not None
        if isinstance(x, Shard) and x.dim not in dims:
            return emit_slices(node, part)
        if not isinstance(x, Shard):
            return part.copy(node)
        picked = _picked(part.program, node)
        assert picked is not None
        mine = [owner == part.owner for owner in _owners(x, dims, picked)]
        near = {position: i for i, position in enumerate(x.positions(part.owner))}
        lists = [[p for p, own in zip(positions, mine, strict=True) if own] for positions in picked]
        divided = x.dim - dims.start
        lists[divided] = [near[p] for p in lists[divided]]
        return part.call(operator.getitem, part.operand(operand(node)), (*[slice(None)] * dims.start, *lists))


def _indices(node: fx.Node) -> list[fx.Node]:
    indices: Any = node.args[1]
    return [i for i in indices if i is not None]


def _picked(program: Program, node: fx.Node) -> list[list[int]] | None:
    """The constant positions in each indexed dimension, in one row; None if they are not known, or in several rows."""
    sources = [program.source(i) for i in _indices(node)]
    values = [program.constants[s.name] for s in sources if s is not None and s.name in program.constants]
    if len(values) < len(sources):
        return None
    dims, sizes = indexed(node), shape_of(operand(node))
    alike = torch.broadcast_tensors(*values)
    if dims is None or alike[0].dim() != 1:
        return None
    return [[int(p) % int(sizes[d]) for p in v.tolist()] for d, v in zip(dims, alike, strict=True)]


def _owners(x: Shard, dims: range, picked: list[list[int]]) -> list[int]:
    """The owner of each element that is picked along the divided dimension."""
    owners = x.division.owner_of_each
    return [owners[p] for p in picked[x.dim - dims.start]]

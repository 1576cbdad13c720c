"""index: ``index_select(gather_1(x_r), 1, [2, 0])  -->  gather_1(index_select(x_r, 1, own positions))``

A selection by a constant reorders and repeats elements of a divided dimension; each stays with its owner. It pays since
pairs of fields are selected so, and a selection of one field is narrower than all.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.arguments import operand
from descompiler.graph.nodes import aten, dim_of
from descompiler.graph.program import Program
from descompiler.layout.placement import LOCAL, Disjoint, Partial, Shard, shard
from descompiler.region.rule import Declined, Part, Placed, Situation
from descompiler.region.sliced import place_slices


@dataclass(frozen=True)
class IndexSelect:
    name: str = "index"
    targets: ClassVar[frozenset[Any]] = frozenset({aten.index_select.default})

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        x, dim, chosen = at.at(node.args[0]), dim_of(node), _chosen(at.program, node)
        if dim == 0:
            return Declined("selects rows of the batch")
        if chosen is None:
            return Declined("selects by computed positions")
        if isinstance(x, Partial):
            return Placed(x)
        if isinstance(x, Disjoint):
            return Placed(x if dim >= x.lead else Disjoint(x.ranks, ("index", x.key, dim, tuple(chosen)), x.lead))
        assert isinstance(x, Shard)
        if x.dim != dim:
            return place_slices(node, at)
        owners = x.division.owner_of_each
        if all(owners[i] == LOCAL for i in chosen):
            return Declined("selects what every rank has for its own rows")
        return Placed(shard(dim, [(1, owners[i]) for i in chosen]))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        x, dim = part.at(node.args[0]), dim_of(node)
        if not isinstance(x, Shard) or x.dim != dim:
            return part.call(aten.index_select.default, part.operand(operand(node)), dim, part.given(operand(node, 2)))
        chosen, mine = _chosen(part.program, node), x.positions(part.owner)
        assert chosen is not None
        positions = [mine.index(i) for i in chosen if i in mine]
        return part.call(operator.getitem, part.operand(operand(node)), (*[slice(None)] * dim, positions))


def _chosen(program: Program, node: fx.Node) -> list[int] | None:
    source = program.source(node.args[2])
    if source is None or source.name not in program.constants:
        return None
    return [int(i) for i in program.constants[source.name].tolist()]

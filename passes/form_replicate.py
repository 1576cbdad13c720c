"""replicate: ``E[R,D]  -->  E[R,D] on every rank``

Lookups stay outside the region, on each rank's own rows. Dense gradients are all-reduced by the reducer; those of a
table with ``sparse=True`` are gathered, row by row. It pays for small tables: nothing is sent in forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from torch import Tensor, fx

from descompiler.cost_models.baselines import ALL_REDUCE, SPARSE
from descompiler.form import Choice, LookupPart, Split, any_row
from descompiler.layout import Check
from descompiler.operators import Lookup, Operator
from descompiler.pieces import Pieces
from descompiler.placement import Region
from descompiler.program import Program


@dataclass(frozen=True)
class Replicate:
    name: str = "replicate"

    def refuses(self, program: Program, operator: Operator) -> str | None:
        return None

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        return Split(self.name, Pieces.replicate(operator.shape, ranks))

    def placement(self, split: Split, operator: Operator, lookup: Lookup) -> Region | None:
        return None

    def columns(self, split: Split, operator: Operator, lookup: Lookup, rank: int) -> tuple[int, ...] | None:
        return ()

    def check(self, split: Split, operator: Operator) -> Check:
        return any_row(operator)

    def constants(self, split: Split, rank: int) -> Mapping[str, Tensor]:
        return {}

    def emit(self, part: LookupPart) -> fx.Node:
        o, x = part.operator, part.lookup
        if not (o.sparse and o.trained) or part.ranks == 1:
            operands = {x.node.args[0]: part.weight, x.ids: part.ids}
            return part.graph.node_copy(x.node, lambda n: operands[n])
        if x.mode is None:
            return part.runtime_call("sparse_lookup", part.weight, part.ids, o.padding_idx)
        return part.runtime_call("sparse_bag", part.weight, part.ids, x.mode, o.padding)

    def costs(self, operator: Operator) -> Mapping[str, sympy.Expr]:
        return {"sparse gradients": SPARSE} if operator.sparse else {"dense gradients": ALL_REDUCE}

"""explicit_shapes: ``view(x, [b, -1])  -->  reshape(x, [b, 12])``

A size that is known stands where -1 left it open: with no rows it could be anything, and torch refuses. A view becomes
a reshape, because later passes remove the copies that made the view possible; ``expand_as(x, y)`` an expand.
"""

from __future__ import annotations

from dataclasses import dataclass

from descompiler.graph.nodes import aten, is_tensor, shape_of
from descompiler.graph.program import Program

VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


@dataclass(frozen=True)
class ExplicitShapes:
    name: str = "explicit_shapes"

    def __call__(self, program: Program) -> Program:
        for node in program.graph.nodes:
            if node.target is aten.expand_as.default and len(shape_of(node)) == len(shape_of(node.args[0])):
                kept = zip(shape_of(node.args[0]), shape_of(node), strict=True)
                sizes = [-1 if a == b else b for a, b in kept]
                if all(isinstance(s, int) for s in sizes):
                    node.target, node.args = aten.expand.default, (node.args[0], sizes)
            if node.target not in VIEWS or not is_tensor(node):
                continue
            node.target = aten.reshape.default
            known = shape_of(node)
            sizes = list(node.args[1])
            for i, size in enumerate(sizes):
                if isinstance(size, int) and size == -1 and isinstance(known[i], int):
                    sizes[i] = known[i]
            node.args = (node.args[0], sizes)
        return program

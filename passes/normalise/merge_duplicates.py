"""merge_duplicates: ``a = select(x, 1, 0); b = select(x, 1, 0)  -->  a = select(x, 1, 0)``

Common subexpressions of pure operators. It pays because ids that two tables read then cross the wire once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import fx

from descompiler.graph.nodes import PURE_PYTHON, aten, is_random
from descompiler.graph.program import Program
from descompiler.graph.rewrite import eliminate_dead_code


@dataclass(frozen=True)
class MergeDuplicates:
    name: str = "merge_duplicates"

    def __call__(self, program: Program) -> Program:
        seen: dict[Hashable, fx.Node] = {}
        merged = 0
        writes = False
        for node in list(program.graph.nodes):
            if node.op == "placeholder":
                # tied parameters and constants that are one thing under two names are one node
                key: Hashable = ("placeholder", program.sources[node.name])
            elif node.op == "call_function":
                schema = getattr(node.target, "_schema", None)
                if schema is None and node.target not in PURE_PYTHON:
                    continue
                if schema is not None and (schema.is_mutable or is_random(node)):
                    writes = writes or schema.is_mutable
                    continue
                if node.target is aten.batch_norm.default:
                    continue
                key = (node.target, _freeze(node.args), _freeze(node.kwargs))
            else:
                continue
            if key in seen:
                node.replace_all_uses_with(seen[key])
                program.graph.erase_node(node)
                merged += 1
            else:
                seen[key] = node
        program.note(f"{self.name}: {merged} nodes")
        eliminate_dead_code(program.graph)
        return program


def _freeze(x: Any) -> Hashable:
    if isinstance(x, list | tuple):
        return tuple(_freeze(y) for y in x)
    if isinstance(x, dict):
        return tuple((k, _freeze(v)) for k, v in x.items())
    return (type(x).__name__, x)

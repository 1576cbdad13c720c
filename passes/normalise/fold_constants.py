"""fold_constants: ``unsqueeze(lift_fresh_copy(c), 0)  -->  c'``

An expression of constants alone becomes a constant. It pays because later passes recognise `x + offsets` only where the
offsets are a constant; and because a small constant is cheaper than its computation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from descompiler.graph.nodes import Source, is_random, is_tensor
from descompiler.graph.program import Program


@dataclass(frozen=True)
class FoldConstants:
    name: str = "fold_constants"
    limit_elements: int = 1 << 16

    def __call__(self, program: Program) -> Program:
        values: dict[fx.Node, Tensor] = {}
        for node in list(program.graph.nodes):
            source = program.source(node)
            if source is not None:
                if source.kind == "constant":
                    values[node] = program.constants[source.name]
                continue
            inputs = node.all_input_nodes
            if node.op != "call_function" or not inputs or not all(n in values for n in inputs):
                continue
            schema = getattr(node.target, "_schema", None)
            if schema is None or schema.is_mutable or is_random(node) or not is_tensor(node):
                continue
            recipe = _recipe(program, node)
            result = recipe()
            if result.numel() > self.limit_elements:
                continue
            name = f"folded_{node.name}"
            first = next(iter(program.graph.nodes))
            with program.graph.inserting_before(first):
                constant = program.graph.placeholder(name)
            constant.meta["val"] = node.meta["val"]
            program.sources[constant.name] = Source("constant", name)
            program.constants[name], program.recipes[name] = result, recipe
            values[constant] = result
            node.replace_all_uses_with(constant)
            program.graph.erase_node(node)
            program.note(f"{self.name}: {node.name}")
        return program


def _recipe(program: Program, node: fx.Node) -> Callable[[], Tensor]:
    """Computes a node from constants."""
    names = {n: program.sources[n.name].name for n in node.all_input_nodes}
    target: Any = node.target
    arguments = (node.args, dict(node.kwargs))

    def compute() -> Tensor:
        args, kwargs = fx.map_arg(arguments, lambda n: program.constant(names[n]))
        result: Tensor = target(*args, **kwargs)
        return result

    return compute

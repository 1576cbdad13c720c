"""recognise_lookups: ``index(T, [ids])  -->  embedding(T, where(ids < 0, ids + V, ids))``

Rows at ids of the batch, of a parameter or of a table that is computed of parameters (graph propagation), written as
indexing. It pays because a table that is only looked up can be divided. Ids that an embedding also looks up can't be
negative, so they stay as they are, and cross the wire once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from descompiler.graph.nodes import aten, is_tensor, shape_of, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import insert_call
from descompiler.ops.local import bag


@dataclass(frozen=True)
class RecogniseLookups:
    name: str = "recognise_lookups"

    def __call__(self, program: Program) -> Program:
        kinds: dict[fx.Node, set[str]] = {}
        looked_up: set[fx.Node] = set()
        for n in program.graph.nodes:
            source = program.source(n)
            kinds[n] = {source.kind} if source is not None else set().union(*(kinds[a] for a in n.all_input_nodes))
            if n.target in (aten.embedding.default, bag):
                looked_up.add(n.args[1])
        for node in list(program.graph.nodes):
            table, ids = _rows_at(node)
            if table is None or "input" in kinds[table] or "parameter" not in kinds[table] or "input" not in kinds[ids]:
                continue
            if node.target is aten.index.Tensor and ids not in looked_up:
                ids = _from_the_end(node, ids, int(shape_of(table)[0]))
            with program.graph.inserting_before(node):
                new = program.graph.call_function(aten.embedding.default, (table, ids))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            program.graph.erase_node(node)
            program.note(f"{self.name}: {node.name}")
        return program


def _rows_at(node: fx.Node) -> Any:
    """(table, ids) of a node that takes rows of a matrix by integers; (None, None) for others."""
    if node.target is aten.index.Tensor:
        arguments: Any = node.args
        table, indices = arguments
        ids = indices[0] if len(indices) == 1 else None
    elif node.target is aten.index_select.default:
        table, dim, ids = node.args
        ids = ids if dim == 0 else None
    else:
        return None, None
    integers = isinstance(ids, fx.Node) and is_tensor(ids) and value(ids).dtype in (torch.int32, torch.int64)
    matrix = isinstance(table, fx.Node) and is_tensor(table) and len(shape_of(table)) == 2
    if not integers or not matrix:
        return None, None
    assert isinstance(table, fx.Node)
    return (table, ids) if isinstance(shape_of(table)[0], int) else (None, None)


def _from_the_end(node: fx.Node, ids: fx.Node, rows: int) -> fx.Node:
    """Ids, where negative ones count from the end."""

    negative = insert_call(node, aten.lt.Scalar, ids, 0)
    return insert_call(node, aten.where.self, negative, insert_call(node, aten.add.Tensor, ids, rows), ids)

"""simplify_indexing: ``getitem(split(x, s, d), i)  -->  slice(x, d, i * s, (i + 1) * s)``

Splits, chunks and unbinds become slices and selections, and an index by a constant, ``x[:, c]``, an ``index_select``.
It pays because a rule then needs to know one operator in place of five, and because a tuple has no placement.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from descompiler.graph.nodes import aten, is_tensor, shape_of, signature, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import eliminate_dead_code

SPLIT_OPERATORS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.chunk.default,
    aten.unbind.int,
}


@dataclass(frozen=True)
class SimplifyIndexing:
    name: str = "simplify_indexing"

    def __call__(self, program: Program) -> Program:
        for node in list(program.graph.nodes):
            if node.target is operator.getitem and getattr(node.args[0], "target", None) in SPLIT_OPERATORS:
                self._unpack(program, node)
            elif node.target is aten.index.Tensor:
                self._select(program, node)
        eliminate_dead_code(program.graph)
        return program

    def _unpack(self, program: Program, node: fx.Node) -> None:
        pieces, index = node.args
        assert isinstance(pieces, fx.Node) and isinstance(index, int)
        x = pieces.args[0]
        assert isinstance(x, fx.Node)
        dim = signature(pieces)["dim"] % len(shape_of(x))
        if not isinstance(shape_of(x)[dim], int):  # of the batch: the sizes are not known
            return
        if pieces.target is aten.unbind.int:
            self._replace(program, node, aten.select.int, (x, dim, index))
            return
        sizes = [int(t.shape[dim]) for t in value(pieces)]
        start = sum(sizes[:index])
        self._replace(program, node, aten.slice.Tensor, (x, dim, start, start + sizes[index]))

    def _select(self, program: Program, node: fx.Node) -> None:
        x, indices = node.args
        assert isinstance(x, fx.Node) and isinstance(indices, list | tuple)
        given = [(d, i) for d, i in enumerate(indices) if i is not None]
        if len(given) != 1 or not is_tensor(x):
            return
        dim, index = given[0]
        source = program.source(index)
        if dim == 0 or source is None or source.kind == "parameter" or source.name not in program.constants:
            return
        values = program.constants[source.name]
        positions = values.dtype in (torch.int32, torch.int64)  # of a mask, there are as many as are true
        if positions and values.dim() == 1 and values.numel() and bool((values >= 0).all()):
            self._replace(program, node, aten.index_select.default, (x, dim, index))

    def _replace(self, program: Program, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
        with program.graph.inserting_before(node):
            new = program.graph.call_function(target, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)

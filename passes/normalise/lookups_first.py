"""lookups_first: ``embedding(normalize(W), ids)  -->  normalize(embedding(W, ids))``

Where what is looked up is computed of a table row by row, the rows are looked up first, and computed then. It pays
because the table is then only looked up, and can be divided in any form. Rows of a value that is itself computed of
whole tables (graph propagation) are moved so only over operators that need all columns, such as norms: what is left
then works on each column by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from descompiler.graph.arguments import LookupCall
from descompiler.graph.contractions import CONTRACTIONS
from descompiler.graph.nodes import aten, is_tensor, shape_of, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import eliminate_dead_code, insert_call
from descompiler.graph.slicing import follow

MAX_ROWS_COMPUTED_ONCE = 1024
"""Products with a table of fewer rows than this are left in front of its lookups: they are computed once, not by id."""


@dataclass(frozen=True)
class LookupsFirst:
    name: str = "lookups_first"

    def __call__(self, program: Program) -> Program:
        varies: set[fx.Node] = set()  # what depends on the inputs
        for n in program.graph.nodes:
            source = program.source(n)
            if (source is not None and source.kind == "input") or any(a in varies for a in n.all_input_nodes):
                varies.add(n)
        for node in list(program.graph.nodes):
            if node.target is not aten.embedding.default:
                continue
            table, ids = LookupCall(node).weight, LookupCall(node).ids
            if table.op != "call_function" or table in varies or ids not in varies or not is_tensor(table):
                continue
            move = _Move(program, node)
            if move.pays():
                node.replace_all_uses_with(move.emit(table))
                program.note(f"{self.name}: {node.name} before {', '.join(str(n.name) for n in move.steps)}")
        eliminate_dead_code(program.graph)
        return program


class _Move:
    """The row-by-row operators in front of a lookup, from the last back to what has to be looked up."""

    def __init__(self, program: Program, lookup: fx.Node):
        self.program, self.lookup = program, lookup
        call = LookupCall(lookup)
        self.leads = len(shape_of(call.ids))
        self.rows = shape_of(call.weight)[0]
        self.steps: dict[fx.Node, None] = {}
        self.leaves: dict[fx.Node, None] = {}
        self.made: dict[fx.Node, fx.Node] = {}
        self._visit(call.weight)

    def _visit(self, n: Any) -> None:
        if n in self.steps or n in self.leaves:
            return
        along = [a for a in n.all_input_nodes if self._has_rows(a)]
        step = follow(n, dict.fromkeys(along, 0)) if along else None
        if step is None or step.dim != 0 or step.narrowed or self._arguments(n, dict.fromkeys(along, 0)) is None:
            self.leaves[n] = None
            return
        for a in along:
            self._visit(a)
        self.steps[n] = None

    def _has_rows(self, n: fx.Node) -> bool:
        """Whether a value may be one of the table's rows: of as many rows, computed of a parameter, or one."""
        shape = shape_of(n) if is_tensor(n) else []
        made = n.op == "call_function" or self.program.parameter(n) is not None
        return made and bool(shape) and shape[0] == self.rows

    def pays(self) -> bool:
        """Whether the lookups are then of parameters, or of values without what mixes columns."""
        if not self.steps or any(len(shape_of(n)) != 2 or not value(n).is_floating_point() for n in self.leaves):
            return False
        others = {a for n in self.steps for a in n.all_input_nodes if a not in self.steps and a not in self.leaves}
        if self._padded() and any(self.program.source(a) is None or self.program.parameter(a) for a in others):
            return False  # they get no gradient of the padding row now
        multiplies = any(n.target in CONTRACTIONS for n in self.steps)
        if multiplies and self.rows < MAX_ROWS_COMPUTED_ONCE:
            return False
        if all(self.program.parameter(n) is not None for n in self.leaves):
            return True
        columns = dict.fromkeys(self.leaves, 1)
        for n in self.steps:
            step = follow(n, columns)
            if step is None:
                return True
            columns[n] = step.dim
        return False

    def _padded(self) -> bool:
        return LookupCall(self.lookup).padding_idx >= 0

    def emit(self, n: fx.Node) -> fx.Node:
        """The value of a step, or of a leaf, at the ids."""
        if n not in self.made:
            if n in self.leaves:
                self.made[n] = insert_call(self.lookup, aten.embedding.default, n, *self.lookup.args[1:])
            else:
                dims = {a: 0 for a in n.all_input_nodes if a in self.steps or a in self.leaves}
                arguments = self._arguments(n, dims)
                assert arguments is not None  # it is a step
                target, args, kwargs = arguments
                args, kwargs = fx.map_arg((args, kwargs), lambda a: self.emit(a) if a in dims else a)
                self.made[n] = insert_call(self.lookup, target, *args, **kwargs)
        return self.made[n]

    def _arguments(self, n: fx.Node, dims: Mapping[fx.Node, int]) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
        """A step's target and arguments for values with the ids' dimensions in place of one of rows; None: unknown.

        Dimensions count from the end, which stays what it is.
        """
        target: Any = n.target
        args: list[Any] = list(n.args)
        kwargs = dict(n.kwargs)
        if target in (aten.mm.default, aten.matmul.default):
            return aten.matmul.default, tuple(args), kwargs
        if target is aten.expand.default:
            sizes: Any = args[1]
            if len(sizes) != len(shape_of(args[0])):
                return None
            args[1] = [-1] * self.leads + list(sizes[1:])
            return target, tuple(args), kwargs
        if not isinstance(target, torch._ops.OpOverload) or target in UNKNOWN:
            return None
        if target is aten.linear.default and args[0] not in dims:
            return None  # a weight's rows are not the result's first dimension, once there are more in front
        grows = target in (aten.unsqueeze.default, aten.stack.default)
        rank = len(shape_of(n)) if grows else len(shape_of(next(iter(dims))))
        for i, a in enumerate(target._schema.arguments):
            if a.name not in ("dim", "dims"):
                continue
            found: Any = kwargs.get(a.name, args[i] if i < len(args) else a.default_value)
            if found is None:
                return None
            several = isinstance(found, list | tuple)
            ends = [d if d < 0 else d - rank for d in (found if several else [found])]
            if any(d == -rank for d in ends):
                return None
            kwargs[a.name] = ends if several else ends[0]
            if i < len(args):
                args[i] = kwargs.pop(a.name)
        return target, tuple(args), kwargs


UNKNOWN = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.t.default,
        aten.numpy_T.default,
        aten.transpose.int,
        aten.permute.default,
        aten.index.Tensor,
        aten.embedding.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.einsum.default,
        aten.tensordot.default,
        aten.repeat.default,
        aten.prelu.default,
        aten.conv1d.default,
        aten._sparse_mm.default,
        aten._sparse_addmm.default,
        aten.index_add.default,
        aten.scatter_add.default,
        aten.scatter_reduce.two,
        aten.gather.default,
    }
)
"""Operators whose arguments say something of the rows' dimension."""

"""recognise_bags: ``embedding_bag(W, reshape(ids, [-1]), arange(0, L*b, L), ...)[0]  -->  bag(W, ids, ...)``

`nn.EmbeddingBag` on 2-D ids flattens them and builds offsets; the recognised form keeps the ids row by row, so that
they can be exchanged as any other ids.

    embedding_bag(W, ..., per_sample_weights=w)[0]  -->  sum(embedding(W, ids) * reshape(w, [b, L, 1]), 1)

A bag whose ids have weights is what it stands for: a lookup, whose rows may be fetched or divided as any other's, and a
sum. Padding has the weight 0.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from descompiler.graph.nodes import aten, is_tensor, shape_of, signature, value
from descompiler.graph.program import Program, rowwise
from descompiler.graph.rewrite import eliminate_dead_code, insert_call
from descompiler.ops.local import bag

MODES = {0: "sum", 1: "mean", 2: "max"}


@dataclass(frozen=True)
class RecogniseBags:
    name: str = "recognise_bags"

    def __call__(self, program: Program) -> Program:
        for node in list(program.graph.nodes):
            if node.target not in (aten.embedding_bag.padding_idx, aten.embedding_bag.default):
                continue
            ids = self._ids(program, node)
            outputs = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
            if ids is None or not outputs:
                continue
            args = signature(node)
            padding = args.get("padding_idx")
            if padding is not None and padding < 0:  # from the end, as torch's bags count; a lookup's -1 is none
                padding += int(shape_of(args["weight"])[0])
            if args["per_sample_weights"] is not None:
                new = _weighted(outputs[0], args, ids, padding)
            else:
                with program.graph.inserting_before(outputs[0]):
                    new = program.graph.call_function(
                        bag,
                        (args["weight"], ids, MODES[args["mode"]], padding, args["sparse"]),
                        {"scale_grad_by_freq": args["scale_grad_by_freq"]} if args["scale_grad_by_freq"] else {},
                    )
            new.meta = dict(outputs[0].meta)
            for o in outputs:
                o.replace_all_uses_with(new)
                program.graph.erase_node(o)
            program.note(f"{self.name}: {node.name}")
        eliminate_dead_code(program.graph)
        return program

    def _ids(self, program: Program, node: fx.Node) -> fx.Node | None:
        """The 2-D ids [b, L] that the node's flat ids and offsets were made from."""
        args = signature(node)
        flat, offsets = args["indices"], args["offsets"]
        if not is_tensor(flat) or args.get("include_last_offset"):
            return None
        ids = flat.args[0] if flat.target in (aten.reshape.default, aten.view.default) else None
        if not isinstance(ids, fx.Node) or not rowwise(program, ids) or len(shape_of(ids)) != 2:
            return None
        if shape_of(flat) != [sympy.sympify(shape_of(ids)[1]) * program.batch] and shape_of(ids)[1] != 1:
            return None
        length = shape_of(ids)[1]
        if offsets.target is aten.arange.start_step:
            start, _, step = ((*offsets.args, 1))[:3]
        elif offsets.target is aten.arange.start:
            start, step = offsets.args[0], 1
        elif offsets.target is aten.arange.default:
            start, step = 0, 1
        else:
            return None
        if value(offsets).dim() != 1 or shape_of(offsets) != [program.batch]:
            return None
        return ids if start == 0 and step == length else None


def _weighted(before: fx.Node, args: dict[str, Any], ids: fx.Node, padding: int | None) -> fx.Node:
    """The sum of the rows at ``ids``, each times its weight."""
    table, by_frequency = args["weight"], args["scale_grad_by_freq"]
    rows = insert_call(
        before, aten.embedding.default, table, ids, -1 if padding is None else padding, by_frequency, args["sparse"]
    )
    weights = args["per_sample_weights"]
    flattened = weights.target in (aten.reshape.default, aten.view.default)
    if flattened and shape_of(weights.args[0]) == shape_of(ids):
        weights = weights.args[0]
    else:
        weights = insert_call(before, aten.reshape.default, weights, [-1, shape_of(ids)[1]])
    if padding is not None:
        left_out = insert_call(before, aten.eq.Scalar, ids, padding)
        weights = insert_call(before, aten.masked_fill.Scalar, weights, left_out, 0)
    weighted = insert_call(before, aten.mul.Tensor, rows, insert_call(before, aten.unsqueeze.default, weights, -1))
    return insert_call(before, aten.sum.dim_IntList, weighted, [1])

"""recognise_masked_sums: ``sum(embedding(W, ids) * (ids != p), 1)  -->  bag(W, ids, "sum", p)``

A sum of looked-up rows that leaves out the padding id, by a mask made from the ids, is a bag; so is its form as a
product, ``bmm(mask, rows)``. It pays because the mask is not known where the rows are: all rows of a sequence would
cross the wire, and their sum is as wide as one of them. (A row that is left out must not be infinite: 0 times infinity
is no number, and a bag does not look.)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from descompiler.graph.arguments import LookupCall
from descompiler.graph.nodes import aten, shape_of, signature, value
from descompiler.graph.program import Program, rowwise
from descompiler.graph.rewrite import eliminate_dead_code
from descompiler.ops.local import bag

SHAPING = {aten.to.dtype, aten._to_copy.default, aten.unsqueeze.default, aten.reshape.default}


@dataclass(frozen=True)
class RecogniseMaskedSums:
    name: str = "recognise_masked_sums"

    def __call__(self, program: Program) -> Program:
        for node in list(program.graph.nodes):
            if node.target is aten.embedding.default and program.parameter(LookupCall(node).weight) is not None:
                self._replace(program, node)
        eliminate_dead_code(program.graph)
        return program

    def _replace(self, program: Program, rows: fx.Node) -> None:
        call = LookupCall(rows)
        ids = call.ids
        if not rowwise(program, ids) or len(shape_of(ids)) != 2 or len(rows.users) != 1:
            return
        user = next(iter(rows.users))
        batch, length = shape_of(rows)[:2]
        total, keep, mask = user, True, None
        if user.target is aten.bmm.default and user.args[1] is rows:
            mask, shape = user.args[0], [batch, 1, length]
        elif user.target is aten.mul.Tensor and len(user.users) == 1 and len(user.all_input_nodes) == 2:
            total = next(iter(user.users))
            if total.target is not aten.sum.dim_IntList or list(signature(total)["dim"] or ()) not in ([1], [-2]):
                return
            mask, shape = next(n for n in user.all_input_nodes if n is not rows), [batch, length, 1]
            keep = bool(signature(total)["keepdim"])
        if not isinstance(mask, fx.Node) or shape_of(mask) != shape:
            return
        left_out = _left_out(mask, ids)
        # another padding than the table's other lookups have would rule out forms that fetch rows once for all
        if left_out is None or call.padding_idx != left_out or value(total).dtype != value(rows).dtype:
            return
        with program.graph.inserting_before(total):
            new = program.graph.call_function(bag, (call.weight, ids, "sum", left_out, call.sparse))
            new.meta = dict(rows.meta)
            with value(rows).fake_mode:
                new.meta["val"] = value(rows)[:, 0]
            result = program.graph.call_function(aten.unsqueeze.default, (new, 1)) if keep else new
        if keep:
            result.meta = dict(total.meta)
        total.replace_all_uses_with(result)
        program.graph.erase_node(total)
        program.note(f"{self.name}: {rows.name}")


def _left_out(mask: fx.Node, ids: fx.Node) -> int | None:
    """The id where a mask made of ``ids`` is 0, if it is 1 at all others."""
    while mask.target in SHAPING and isinstance(mask.args[0], fx.Node):
        mask = mask.args[0]
    if not mask.args or mask.args[0] is not ids or not isinstance(mask.args[1], int):
        return None
    if mask.target is aten.ne.Scalar and mask.args[1] >= 0:
        return mask.args[1]
    return 0 if mask.target is aten.gt.Scalar and mask.args[1] == 0 else None  # ids are never negative

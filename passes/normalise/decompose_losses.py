"""decompose_losses: ``mse_loss(x, y, mean)  -->  mean(mse_loss(x, y, none))``

A loss that reduces over the batch becomes its terms and their mean or sum. It pays because terms are local to rows, and
of a mean over the batch only one number crosses; the whole would need every rank's rows on every rank.

``cross_entropy`` and ``nll_loss`` divide by the number of targets that are not ``ignore_index``; those with class
weights stay whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from descompiler.graph.nodes import aten, signature, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import insert_call

MEANS = frozenset(
    {
        aten.mse_loss.default,
        aten.l1_loss.default,
        aten.smooth_l1_loss.default,
        aten.huber_loss.default,
        aten.binary_cross_entropy.default,
        aten.binary_cross_entropy_with_logits.default,
        aten.soft_margin_loss.default,
        aten.kl_div.default,
        aten.poisson_nll_loss.default,
        aten.hinge_embedding_loss.default,
        aten.margin_ranking_loss.default,
        aten.cosine_embedding_loss.default,
        aten.triplet_margin_loss.default,
    }
)
"""Losses whose mean is that of their terms."""


BY_CLASS = frozenset({aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default})


REDUCTION_MEAN, REDUCTION_SUM = 1, 2


@dataclass(frozen=True)
class DecomposeLosses:
    name: str = "decompose_losses"

    def __call__(self, program: Program) -> Program:
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target not in MEANS | BY_CLASS:
                continue
            args = signature(node)
            reduction = args["reduction"]
            weighs_classes = node.target in BY_CLASS and args["weight"] is not None
            if reduction not in (REDUCTION_MEAN, REDUCTION_SUM) or weighs_classes:
                continue
            terms = _terms(node)
            if reduction == REDUCTION_SUM:
                new = insert_call(node, aten.sum.default, terms)
            elif node.target in MEANS or value(args["target"]).is_floating_point():
                new = insert_call(node, aten.mean.default, terms)
            else:
                counted = insert_call(node, aten.ne.Scalar, args["target"], args["ignore_index"])
                count = insert_call(node, aten.sum.default, counted)
                new = insert_call(node, aten.div.Tensor, insert_call(node, aten.sum.default, terms), count)
            node.replace_all_uses_with(new)
            program.graph.erase_node(node)
            program.note(f"{self.name}: {node.name}")
        return program


def _terms(node: fx.Node) -> fx.Node:
    """The loss without a reduction."""
    target: Any = node.target
    position = [a.name for a in target._schema.arguments].index("reduction")
    if position < len(node.args):
        return insert_call(node, target, *node.args[:position], 0, *node.args[position + 1 :], **node.kwargs)
    return insert_call(node, target, *node.args, **{**node.kwargs, "reduction": 0})

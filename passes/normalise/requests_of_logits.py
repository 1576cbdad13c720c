"""What is asked of logits, for `descompiler.passes.normalise.recognise_outputs`: as requests, of whose results each
user's value is made."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from descompiler.graph.nodes import aten, is_tensor, shape_of, signature, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import insert_call
from descompiler.ops.vocabulary import Request
from descompiler.passes.normalise.products_with_tables import Product, independent, only_data

Build = Callable[[list[fx.Node]], dict[fx.Node, fx.Node]]
"""Makes a consumer's value from the results of its requests."""


@dataclass
class Consumer:
    """What one user of the logits wants: ``build`` makes its value from the results of its requests."""

    node: fx.Node
    requests: list[Request]
    build: Build


def consumer_of(program: Program, p: Product, node: fx.Node) -> Consumer | None:
    """What a user of the logits asks for; None: the logits themselves."""
    if node.op != "call_function":
        return None
    target, args, dims = node.target, dict[str, Any](), value(p.node).dim()
    if isinstance(target, torch._ops.OpOverload):
        args = signature(node)
    over = args.get("dim")
    over = over if isinstance(over, list | tuple) else [over]
    last = over != [None] and [d % dims for d in over] == [dims - 1]

    def kept(result: fx.Node) -> fx.Node:
        return insert_call(node, aten.unsqueeze.default, result, -1) if args["keepdim"] else result

    if target is aten.cross_entropy_loss.default:
        return _cross_entropy(program, p, node)
    if dims == 3 and _swaps_last(node):
        return _classes_in_front(program, p, node)
    if target in (aten.log_softmax.int, aten.softmax.int) and last and args["dtype"] is None:
        return _softmax(program, p, node)
    if target is aten.logsumexp.default and last:
        return Consumer(node, [("log_sum_exp",)], lambda r: {node: kept(r[0])})
    if target is aten.argmax.default and last:
        return Consumer(node, [("max",)], lambda r: {node: kept(r[1])})
    if target in (aten.topk.default, aten.max.dim) and last and args.get("largest", True):
        items: dict[fx.Node, Any] = {u: u.args[1] for u in node.users if u.target is operator.getitem}
        if target is aten.max.dim:
            return Consumer(node, [("max",)], lambda r: {u: kept(r[i]) for u, i in items.items()})
        return Consumer(node, [("top", args["k"])], lambda r: {u: r[i] for u, i in items.items()})
    selected = _selected(program, p, node)
    if selected is None:
        return None
    request, finish = selected
    return Consumer(node, [request], lambda r: {node: finish(r[0])})


def _selected(program: Program, p: Product, node: fx.Node) -> tuple[Request, Callable[[fx.Node], fx.Node]] | None:
    """``gather(logits, -1, ids)`` and ``logits[arange(b), ids]``: the request, and its result's last step."""
    shape, arguments = shape_of(p.node), list[Any](node.args)
    if node.target is aten.gather.default and arguments[1] % len(shape) == len(shape) - 1:
        ids = arguments[2]
        if shape_of(ids)[:-1] == shape[:-1] and isinstance(shape_of(ids)[-1], int) and only_data(program, ids):
            return ("select", ids, None), lambda r: r
    if node.target is aten.index.Tensor and len(shape) == 2 and len(arguments[1]) == 2:
        rows, ids = arguments[1]
        if _counts(rows, shape[0]) and is_tensor(ids) and shape_of(ids) == shape[:1] and only_data(program, ids):
            if value(ids).dtype == torch.bool:
                return None
            wide = insert_call(node, aten.unsqueeze.default, ids, -1)
            return ("select", wide, None), lambda r: insert_call(node, aten.squeeze.dim, r, -1)
    return None


def _counts(node: Any, size: Any) -> bool:
    """Whether a value is ``arange(size)``."""
    if not isinstance(node, fx.Node) or not is_tensor(node) or shape_of(node) != [size]:
        return False
    if node.target is aten.arange.default:
        return True
    return node.target in (aten.arange.start, aten.arange.start_step) and [*node.args, 1][:3:2] == [0, 1]


def _swaps_last(node: Any) -> bool:
    """Whether a node of three dimensions is ``transpose(x, 1, 2)``."""
    if node.target is aten.transpose.int:
        return {int(d) % 3 for d in node.args[1:3]} == {1, 2}
    return node.target is aten.permute.default and [int(d) % 3 for d in node.args[1]] == [0, 2, 1]


def _softmax(program: Program, p: Product, node: fx.Node) -> Consumer | None:
    """(log-)softmax of which only some ids are used, or the negative log-likelihood."""
    log = node.target is aten.log_softmax.int
    requests: list[Request] = [("log_sum_exp",)]
    steps: list[Callable[[list[fx.Node]], dict[fx.Node, fx.Node]]] = []
    for user in node.users:
        if log and user.target is aten.nll_loss_nd.default:
            loss = _cross_entropy(program, p, user)
            if loss is None:
                return None
            requests += loss.requests[1:]

            def losses(
                r: list[fx.Node], i: int = len(requests) - 1, build: Build = loss.build
            ) -> dict[fx.Node, fx.Node]:
                return build([r[0], r[i]])

            steps.append(losses)
            continue
        selected = _selected(program, p, user) if user.args[0] is node else None
        if selected is None:
            return None
        request, finish = selected
        requests.append(request)

        def step(
            r: list[fx.Node], i: int = len(requests) - 1, u: fx.Node = user, f: Any = finish
        ) -> dict[fx.Node, fx.Node]:
            result = insert_call(u, aten.sub.Tensor, r[i], insert_call(u, aten.unsqueeze.default, r[0], -1))
            return {u: f(result if log else insert_call(u, aten.exp.default, result))}

        steps.append(step)

    def build(results: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        return {old: new for step in steps for old, new in step(results).items()}

    return Consumer(node, requests, build) if steps else None


def _classes_in_front(program: Program, p: Product, node: fx.Node) -> Consumer | None:
    """Cross-entropy of ``[b, L, V]`` logits, whose classes it wants in dimension 1."""
    requests: list[Request] = []
    builds: list[tuple[int, int, Build]] = []
    for user in node.users:
        if user.target is not aten.cross_entropy_loss.default:
            return None
        loss = _cross_entropy(program, p, user)
        if loss is None:
            return None
        builds.append((len(requests), len(requests) + len(loss.requests), loss.build))
        requests += loss.requests
    return Consumer(node, requests, lambda r: {u: x for i, j, build in builds for u, x in build(r[i:j]).items()})


def _cross_entropy(program: Program, p: Product, node: fx.Node) -> Consumer | None:
    """Cross-entropy with class ids, or `nll_loss_nd` of log-softmax; classes are in dimension 1, or in front of it."""
    args = signature(node)
    target, ignore, smoothing = args["target"], int(str(args["ignore_index"])), float(args.get("label_smoothing", 0))
    weights = args["weight"]
    if value(target).is_floating_point() or value(p.node).dim() not in (2, 3):
        return None
    if weights is not None and (smoothing or not independent(program, weights)):
        return None
    if value(p.node).dim() == 3 and not _swaps_last(node.args[0]):
        return None
    if shape_of(target) != shape_of(p.node)[:-1] or not only_data(program, target):
        return None
    wide = insert_call(node, aten.unsqueeze.default, target, -1)
    requests: list[Request] = [("log_sum_exp",), ("select", wide, ignore)]
    if smoothing:
        requests.append(("total",))

    def build(r: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        chosen = insert_call(node, aten.squeeze.dim, r[1], -1)
        losses = insert_call(node, aten.sub.Tensor, r[0], chosen)
        if smoothing:  # (1 - e) (lse - chosen) + e (lse - mean of the logits)
            uniform = insert_call(node, aten.sub.Tensor, r[0], insert_call(node, aten.div.Tensor, r[2], p.size))
            losses = insert_call(
                node,
                aten.add.Tensor,
                insert_call(node, aten.mul.Tensor, losses, 1 - smoothing),
                insert_call(node, aten.mul.Tensor, uniform, smoothing),
            )
        valid = insert_call(node, aten.ne.Scalar, target, ignore)
        counted = valid
        if weights is not None:
            theirs = insert_call(
                node, aten.index.Tensor, weights, [insert_call(node, aten.where.ScalarOther, valid, target, 0)]
            )
            losses = insert_call(node, aten.mul.Tensor, losses, theirs)
            counted = insert_call(node, aten.where.ScalarOther, valid, theirs, 0.0)
        losses = insert_call(node, aten.where.ScalarOther, valid, losses, 0.0)
        if args["reduction"] == 0:
            return {node: losses}
        total = insert_call(node, aten.sum.default, losses)
        if args["reduction"] == 2:
            return {node: total}
        return {node: insert_call(node, aten.div.Tensor, total, insert_call(node, aten.sum.default, counted))}

    return Consumer(node, requests, build)

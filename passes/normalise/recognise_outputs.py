"""recognise_outputs: ``cross_entropy(x @ W.T, y)  -->  v = vocabulary(x, W, log_sum_exp, select y); v[0] - v[1]``

A product with a weights-rich parameter (a table that is looked up too, or one of many rows), and what is asked of the
logits: cross-entropy, log-softmax or softmax at given ids, log-sum-exp, candidates' scores, maxima, top-k. It pays
because each of these needs only a few numbers of each owner of the table's rows (see `descompiler.runtime.vocabulary`),
so that the logits never cross the wire. Scales, reshapes, biases and slices between the product and these are moved in
front of the product. Where something else is asked of the logits, they are computed by the owners and sent to their
rows' ranks (request "logits"), or the table is replicated, whichever is cheaper.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import sympy
import torch
from torch import fx

from descompiler.graph.arguments import LookupCall, operand
from descompiler.graph.nodes import aten, is_tensor, shape_of, signature, target_name, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import ancestors, eliminate_dead_code, insert_call
from descompiler.ops.vocabulary import Request, outputs_of, vocabulary
from descompiler.tables.computed import computed_by_rows

OUTPUT_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


Build = Callable[[list[fx.Node]], dict[fx.Node, fx.Node]]
"""Makes a consumer's value from the results of its requests."""


@dataclass
class Product:
    """``node = x @ table[first : first + size].T + bias``."""

    node: fx.Node
    x: fx.Node
    table: fx.Node
    first: int
    size: int
    bias: fx.Node | None = None


@dataclass
class Consumer:
    """What one user of the logits wants: ``build`` makes its value from the results of its requests."""

    node: fx.Node
    requests: list[Request]
    build: Build
    through: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True)
class RecogniseOutputs:
    """The pass.

    Attributes
    ----------
    minimum_rows : int
        Rows from which a parameter that is never looked up counts as weights-rich.
    """

    name: str = "recognise_outputs"
    minimum_rows: int = 1024

    def __call__(self, program: Program) -> Program:
        lookups = [x for n in program.graph.nodes if (x := LookupCall.of(n)) is not None]
        looked_up = {program.parameter(x.weight) for x in lookups}
        for node in list(program.graph.nodes):
            if node.op != "call_function" or not node.users:
                continue
            product = _product(program, node)
            if product is None or (
                _base(program, product.table) not in looked_up and shape_of(product.table)[0] < self.minimum_rows
            ):
                continue
            self._rewrite(program, product)
        eliminate_dead_code(program.graph)
        return program

    def _rewrite(self, program: Program, product: Product) -> None:
        table, first = _base(program, product.table), product.node
        while _absorb(program, product):
            pass
        consumers = [_consumer(program, product, u) for u in product.node.users]
        wanted = [c for c in consumers if c is not None]
        edit = _Editor(program, product.node)
        if len(wanted) < len(consumers):
            others = {target_name(u) for u, c in zip(product.node.users, consumers, strict=True) if c is None}
            outputs = edit.vocabulary(product, [("logits",)], before=product.node)
            product.node.replace_all_uses_with(outputs[0])
            program.note(f"{self.name}: {first.name} with {table}: logits, for {', '.join(sorted(others))}")
            return
        requests: list[Request] = []
        places: list[list[int]] = []
        for c in wanted:
            for r in c.requests:
                if r not in requests:
                    requests.append(r)
            places.append([requests.index(r) for r in c.requests])
        order = {n: i for i, n in enumerate(program.graph.nodes)}
        start = min((c.node for c in wanted), key=lambda n: order[n])
        edit.hoist([r[1] for r in requests if r[0] == "select"], start)
        outputs = edit.vocabulary(product, requests, before=start)
        positions = [sum(outputs_of(r[0]) for r in requests[:i]) for i in range(len(requests) + 1)]
        for c, indices in zip(wanted, places, strict=True):
            mine = [outputs[j] for i in indices for j in range(positions[i], positions[i + 1])]
            edit.at(c.node)
            for old, new in c.build(mine).items():
                old.replace_all_uses_with(new)
        program.note(f"{self.name}: {first.name} with {table}: {', '.join(r[0] for r in requests)}")


class _Editor:
    def __init__(self, program: Program, like: fx.Node):
        self.program, self.graph, self.like = program, program.graph, like
        self.point = like

    def at(self, node: fx.Node) -> None:
        """Insert before this node from now on."""
        self.point = node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(self.point, target, *args, **kwargs)

    def vocabulary(self, product: Product, requests: Sequence[Request], before: fx.Node) -> list[fx.Node]:
        self.at(before)
        p = product
        node = self.call(vocabulary, p.x, p.table, p.bias, p.first, p.size, list(requests))
        node.meta["stack_trace"] = p.node.meta.get("stack_trace")
        return [self.call(operator.getitem, node, i) for i in range(len(value(node)))]

    def hoist(self, nodes: Sequence[fx.Node], before: fx.Node) -> None:
        """Move what these nodes are computed from in front of ``before``, in order."""
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        late: set[fx.Node] = set()
        stack = list(nodes)
        while stack:
            n = stack.pop()
            if order[n] > order[before] and n not in late:
                late.add(n)
                stack.extend(n.all_input_nodes)
        for n in sorted(late, key=lambda n: order[n]):
            before.prepend(n)


def _product(program: Program, node: fx.Node) -> Product | None:
    """``x @ W.T`` where W is a parameter, or a range of its rows, and x has a constant number of rows a batch row."""
    bias: Any = None
    if node.target is aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
    elif node.target in (aten.matmul.default, aten.mm.default):
        x, weight = node.args[0], _transposed(node.args[1])
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args[0], node.args[1], _transposed(node.args[2])
    elif node.target is aten.einsum.default:
        x, weight = _einsum(node)
    else:
        return None
    found = _rows_of(program, weight)
    if found is None or not isinstance(x, fx.Node) or not is_tensor(x) or not value(x).is_floating_point():
        return None
    table, first, size = found
    if value(x).dim() < 2 or shape_of(x)[-1] != shape_of(table)[1] or rows_per_row(program, x) is None:
        return None
    if bias is not None and shape_of(bias) != [size]:
        return None
    return Product(node, x, table, first, size, bias)


def _base(program: Program, table: fx.Node) -> str | None:
    """The parameter that a product's table is, or is computed of."""
    return program.parameter(table) or program.parameter(next(iter(computed_by_rows(program, table) or ()), None))


def rows_per_row(program: Program, x: fx.Node) -> int | None:
    """How many vectors (along its last dimension) a value has for each row of the batch; None if that is no number."""
    count = sympy.sympify(prod(shape_of(x)[:-1], start=sympy.Integer(1))) / program.batch
    return int(count) if count.is_Integer else None


def _transposed(node: Any) -> fx.Node | None:
    """The 2-D value that a node is the transpose of."""
    if not isinstance(node, fx.Node) or not is_tensor(node) or value(node).dim() != 2 or node.op != "call_function":
        return None
    arguments: Any = node.args
    if node.target in (aten.t.default, aten.numpy_T.default, aten.transpose.int):
        if node.target is aten.transpose.int and len({d % 2 for d in arguments[1:3]}) != 2:
            return None
        return operand(node)
    if node.target is aten.permute.default and [d % 2 for d in arguments[1]] == [1, 0]:
        return operand(node)
    return None


def _einsum(node: fx.Node) -> tuple[Any, Any]:
    """The operands (x, W) of ``...k,vk->...v``, in either order."""
    args = signature(node)
    equation, operands = args["equation"].replace(" ", ""), args["tensors"]
    inputs, _, output = equation.partition("->")
    names = inputs.split(",")
    if len(names) != 2 or "." in equation or not output:
        return None, None
    for (a, x), (b, w) in (zip(names, operands, strict=True), zip(names[::-1], operands[::-1], strict=True)):
        if len(b) == 2 and len(set(a)) == len(a) and a[-1:] == b[1] and output == a[:-1] + b[0] and b[0] not in a:
            return x, w
    return None, None


def _rows_of(program: Program, node: Any) -> tuple[fx.Node, int, int] | None:
    """(table, first row, rows) of a 2-D parameter, of what is computed of one row by row, or of a range of its rows."""
    if not isinstance(node, fx.Node) or not is_tensor(node) or value(node).dim() != 2:
        return None
    if program.parameter(node) is not None or (
        node.target is not aten.slice.Tensor and computed_by_rows(program, node)
    ):
        return node, 0, int(shape_of(node)[0])
    if node.target is aten.slice.Tensor:
        args = signature(node)
        inner = _rows_of(program, args["self"])
        if inner is not None and args["dim"] % 2 == 0 and args["step"] == 1:
            start, stop, _ = slice(args["start"], args["end"]).indices(inner[2])
            return inner[0], inner[1] + start, max(stop - start, 0)
    return None


def _absorb(program: Program, p: Product) -> bool:
    """Move the only user of the product in front of it, if it is a scale, a reshape, a bias or a slice."""
    if len(p.node.users) != 1:
        return False
    user = next(iter(p.node.users))
    edit = _Editor(program, p.node)
    edit.at(user)
    arguments: Any = user.args
    if user.target in OUTPUT_RESHAPES and arguments[0] is p.node:
        if shape_of(user)[-1:] != [p.size] or rows_per_row(program, user) is None:
            return False
        p.x = edit.call(aten.reshape.default, p.x, [*arguments[1][:-1], int(shape_of(p.x)[-1])])
    elif user.target is aten.flatten.using_ints:
        args, dims = signature(user), value(p.node).dim()
        if args["end_dim"] % dims == dims - 1 or rows_per_row(program, user) is None:
            return False
        p.x = edit.call(user.target, p.x, args["start_dim"], args["end_dim"])
    elif user.target in (aten.mul.Tensor, aten.div.Tensor) and p.bias is None:
        other = arguments[1] if arguments[0] is p.node else arguments[0]
        if arguments[0] is not p.node and user.target is aten.div.Tensor:
            return False
        if not _is_scale(p, other) or shape_of(user) != shape_of(p.node) or value(user).dtype != value(p.x).dtype:
            return False
        p.x = edit.call(user.target, p.x, other)
    elif user.target is aten.add.Tensor and p.bias is None and not user.kwargs:
        other = arguments[1] if arguments[0] is p.node else arguments[0]
        if not isinstance(other, fx.Node) or shape_of(other) != [p.size] or value(other).dtype != value(p.node).dtype:
            return False
        if not _independent(program, other):
            return False
        p.bias = other
    elif user.target is aten.slice.Tensor:
        args = signature(user)
        if args["dim"] % value(p.node).dim() != value(p.node).dim() - 1 or args["step"] != 1:
            return False
        start, stop, _ = slice(args["start"], args["end"]).indices(p.size)
        if stop <= start:
            return False
        if p.bias is not None:
            p.bias = edit.call(aten.slice.Tensor, p.bias, 0, start, stop)
        p.first, p.size = p.first + start, stop - start
    else:
        return False
    p.node = user
    return True


def _is_scale(p: Product, other: Any) -> bool:
    """Whether a factor is the same for all logits of a row of x."""
    if not isinstance(other, fx.Node):
        return isinstance(other, int | float)
    if not is_tensor(other):
        return False
    shape = shape_of(other)
    return not shape or (shape[-1] == 1 and len(shape) <= value(p.x).dim())


def _kinds(program: Program, node: fx.Node) -> set[str]:
    """What kinds of placeholders a value is computed from."""
    return {s.kind for n in ancestors([node]) if (s := program.source(n)) is not None}


def _independent(program: Program, node: fx.Node) -> bool:
    """Whether a value depends on no input: it is the same on every rank."""
    return "input" not in _kinds(program, node)


def _only_data(program: Program, node: fx.Node) -> bool:
    """Whether a value is computed from inputs, buffers and constants alone, so that it is known before any exchange."""
    return "parameter" not in _kinds(program, node)


def _consumer(program: Program, p: Product, node: fx.Node) -> Consumer | None:
    """What a user of the logits asks for; None: the logits themselves."""
    if node.op != "call_function":
        return None
    edit = _Editor(program, p.node)
    edit.at(node)
    target, args, dims = node.target, dict[str, Any](), value(p.node).dim()
    if isinstance(target, torch._ops.OpOverload):
        args = signature(node)
    over = args.get("dim")
    over = over if isinstance(over, list | tuple) else [over]
    last = over != [None] and [d % dims for d in over] == [dims - 1]

    def kept(result: fx.Node) -> fx.Node:
        return edit.call(aten.unsqueeze.default, result, -1) if args["keepdim"] else result

    if target is aten.cross_entropy_loss.default:
        return _cross_entropy(program, p, node, edit)
    if dims == 3 and _swaps_last(node):
        return _classes_in_front(program, p, node)
    if target in (aten.log_softmax.int, aten.softmax.int) and last and args["dtype"] is None:
        return _softmax(program, p, node, edit)
    if target is aten.logsumexp.default and last:
        return Consumer(node, [("log_sum_exp",)], lambda r: {node: kept(r[0])})
    if target is aten.argmax.default and last:
        return Consumer(node, [("max",)], lambda r: {node: kept(r[1])})
    if target in (aten.topk.default, aten.max.dim) and last and args.get("largest", True):
        items: dict[fx.Node, Any] = {u: u.args[1] for u in node.users if u.target is operator.getitem}
        if target is aten.max.dim:
            return Consumer(node, [("max",)], lambda r: {u: kept(r[i]) for u, i in items.items()})
        return Consumer(node, [("top", args["k"])], lambda r: {u: r[i] for u, i in items.items()})
    selected = _selected(program, p, node, edit)
    if selected is None:
        return None
    request, finish = selected
    return Consumer(node, [request], lambda r: {node: finish(r[0])})


def _selected(
    program: Program, p: Product, node: fx.Node, edit: _Editor
) -> tuple[Request, Callable[[fx.Node], fx.Node]] | None:
    """``gather(logits, -1, ids)`` and ``logits[arange(b), ids]``: the request, and its result's last step."""
    shape, arguments = shape_of(p.node), list[Any](node.args)
    if node.target is aten.gather.default and arguments[1] % len(shape) == len(shape) - 1:
        ids = arguments[2]
        if shape_of(ids)[:-1] == shape[:-1] and isinstance(shape_of(ids)[-1], int) and _only_data(program, ids):
            return ("select", ids, None), lambda r: r
    if node.target is aten.index.Tensor and len(shape) == 2 and len(arguments[1]) == 2:
        rows, ids = arguments[1]
        if _counts(rows, shape[0]) and is_tensor(ids) and shape_of(ids) == shape[:1] and _only_data(program, ids):
            if value(ids).dtype == torch.bool:
                return None
            wide = edit.call(aten.unsqueeze.default, ids, -1)
            return ("select", wide, None), lambda r: edit.call(aten.squeeze.dim, r, -1)
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


def _softmax(program: Program, p: Product, node: fx.Node, edit: _Editor) -> Consumer | None:
    """(log-)softmax of which only some ids are used, or the negative log-likelihood."""
    log = node.target is aten.log_softmax.int
    requests: list[Request] = [("log_sum_exp",)]
    steps: list[Callable[[list[fx.Node]], dict[fx.Node, fx.Node]]] = []
    for user in node.users:
        inner = _Editor(program, p.node)
        inner.at(user)
        if log and user.target is aten.nll_loss_nd.default:
            loss = _cross_entropy(program, p, user, inner)
            if loss is None:
                return None
            requests += loss.requests[1:]

            def losses(
                r: list[fx.Node], i: int = len(requests) - 1, build: Build = loss.build
            ) -> dict[fx.Node, fx.Node]:
                return build([r[0], r[i]])

            steps.append(losses)
            continue
        selected = _selected(program, p, user, inner) if user.args[0] is node else None
        if selected is None:
            return None
        request, finish = selected
        requests.append(request)

        def step(
            r: list[fx.Node], i: int = len(requests) - 1, u: fx.Node = user, e: _Editor = inner, f: Any = finish
        ) -> dict[fx.Node, fx.Node]:
            result = e.call(aten.sub.Tensor, r[i], e.call(aten.unsqueeze.default, r[0], -1))
            return {u: f(result if log else e.call(aten.exp.default, result))}

        steps.append(step)

    def build(results: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        return {old: new for step in steps for old, new in step(results).items()}

    return Consumer(node, requests, build) if steps else None


def _classes_in_front(program: Program, p: Product, node: fx.Node) -> Consumer | None:
    """Cross-entropy of ``[b, L, V]`` logits, whose classes it wants in dimension 1."""
    requests: list[Request] = []
    builds: list[tuple[int, int, Build]] = []
    for user in node.users:
        inner = _Editor(program, p.node)
        inner.at(user)
        if user.target is not aten.cross_entropy_loss.default:
            return None
        loss = _cross_entropy(program, p, user, inner)
        if loss is None:
            return None
        builds.append((len(requests), len(requests) + len(loss.requests), loss.build))
        requests += loss.requests
    return Consumer(node, requests, lambda r: {u: x for i, j, build in builds for u, x in build(r[i:j]).items()})


def _cross_entropy(program: Program, p: Product, node: fx.Node, edit: _Editor) -> Consumer | None:
    """Cross-entropy with class ids, or `nll_loss_nd` of log-softmax; classes are in dimension 1, or in front of it."""
    args = signature(node)
    target, ignore, smoothing = args["target"], int(str(args["ignore_index"])), float(args.get("label_smoothing", 0))
    weights = args["weight"]
    if value(target).is_floating_point() or value(p.node).dim() not in (2, 3):
        return None
    if weights is not None and (smoothing or not _independent(program, weights)):
        return None
    if value(p.node).dim() == 3 and not _swaps_last(node.args[0]):
        return None
    if shape_of(target) != shape_of(p.node)[:-1] or not _only_data(program, target):
        return None
    wide = edit.call(aten.unsqueeze.default, target, -1)
    requests: list[Request] = [("log_sum_exp",), ("select", wide, ignore)]
    if smoothing:
        requests.append(("total",))

    def build(r: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        chosen = edit.call(aten.squeeze.dim, r[1], -1)
        losses = edit.call(aten.sub.Tensor, r[0], chosen)
        if smoothing:  # (1 - e) (lse - chosen) + e (lse - mean of the logits)
            uniform = edit.call(aten.sub.Tensor, r[0], edit.call(aten.div.Tensor, r[2], p.size))
            losses = edit.call(
                aten.add.Tensor,
                edit.call(aten.mul.Tensor, losses, 1 - smoothing),
                edit.call(aten.mul.Tensor, uniform, smoothing),
            )
        valid = edit.call(aten.ne.Scalar, target, ignore)
        counted = valid
        if weights is not None:
            theirs = edit.call(aten.index.Tensor, weights, [edit.call(aten.where.ScalarOther, valid, target, 0)])
            losses = edit.call(aten.mul.Tensor, losses, theirs)
            counted = edit.call(aten.where.ScalarOther, valid, theirs, 0.0)
        losses = edit.call(aten.where.ScalarOther, valid, losses, 0.0)
        if args["reduction"] == 0:
            return {node: losses}
        total = edit.call(aten.sum.default, losses)
        if args["reduction"] == 2:
            return {node: total}
        return {node: edit.call(aten.div.Tensor, total, edit.call(aten.sum.default, counted))}

    return Consumer(node, requests, build)

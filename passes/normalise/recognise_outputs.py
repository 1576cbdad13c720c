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
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from descompiler.graph.arguments import LookupCall
from descompiler.graph.nodes import shape_of, target_name, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import eliminate_dead_code, insert_call
from descompiler.ops.vocabulary import Request, outputs_of, vocabulary
from descompiler.passes.normalise.products_with_tables import Product, absorb, parameter_of, product_of
from descompiler.passes.normalise.requests_of_logits import consumer_of


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
            product = product_of(program, node)
            if product is None or (
                parameter_of(program, product.table) not in looked_up and shape_of(product.table)[0] < self.minimum_rows
            ):
                continue
            self._rewrite(program, product)
        eliminate_dead_code(program.graph)
        return program

    def _rewrite(self, program: Program, product: Product) -> None:
        table, first = parameter_of(program, product.table), product.node
        while absorb(program, product):
            pass
        consumers = [consumer_of(program, product, u) for u in product.node.users]
        wanted = [c for c in consumers if c is not None]
        if len(wanted) < len(consumers):
            others = {target_name(u) for u, c in zip(product.node.users, consumers, strict=True) if c is None}
            outputs = _vocabulary(product, [("logits",)], before=product.node)
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
        _hoist([r[1] for r in requests if r[0] == "select"], start)
        outputs = _vocabulary(product, requests, before=start)
        positions = [sum(outputs_of(r[0]) for r in requests[:i]) for i in range(len(requests) + 1)]
        for c, indices in zip(wanted, places, strict=True):
            mine = [outputs[j] for i in indices for j in range(positions[i], positions[i + 1])]
            for old, new in c.build(mine).items():
                old.replace_all_uses_with(new)
        program.note(f"{self.name}: {first.name} with {table}: {', '.join(r[0] for r in requests)}")


def _vocabulary(p: Product, requests: Sequence[Request], before: fx.Node) -> list[fx.Node]:
    """The results of some requests of a product's logits."""
    node = insert_call(before, vocabulary, p.x, p.table, p.bias, p.first, p.size, list(requests))
    node.meta["stack_trace"] = p.node.meta.get("stack_trace")
    return [insert_call(before, operator.getitem, node, i) for i in range(len(value(node)))]


def _hoist(nodes: Sequence[fx.Node], before: fx.Node) -> None:
    """Move what these nodes are computed from in front of ``before``, in order."""
    order = {n: i for i, n in enumerate(before.graph.nodes)}
    late: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        n = stack.pop()
        if order[n] > order[before] and n not in late:
            late.add(n)
            stack.extend(n.all_input_nodes)
    for n in sorted(late, key=lambda n: order[n]):
        before.prepend(n)

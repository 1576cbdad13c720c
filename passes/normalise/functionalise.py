"""functionalise: ``add_(x, y); f(x)  -->  x' = add(x, y); f(x')``
``fill_(x[:n], y); f(x)  -->  x' = slice_scatter(x, fill(x[:n], y), 0, 0, n); f(x')``

An operator that writes to its first argument becomes the one that returns a new value, and later uses take that. It
pays because an emitted program runs nodes in another order than the user's. Writes to buffers (counters of batch norm)
stay. A write that another view of the value would see is refused by name.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from descompiler.errors import UnsupportedError
from descompiler.graph.arguments import operand
from descompiler.graph.nodes import aten, is_view, mutates, storage_roots, value, where
from descompiler.graph.program import Program


@dataclass(frozen=True)
class Functionalise:
    name: str = "functionalise"

    def __call__(self, program: Program) -> Program:
        roots = storage_roots(program.graph)
        order = {n: i for i, n in enumerate(program.graph.nodes)}
        for node in list(program.graph.nodes):
            if node.op != "call_function" or not mutates(node):
                continue
            written = node.args[0]
            source = program.source(roots[written])
            if (source is not None and source.kind == "buffer") or node.target is aten.embedding_renorm_.default:
                continue
            if node.target is aten.detach_.default and source is not None and source.kind == "constant":
                node.replace_all_uses_with(written)
                program.graph.erase_node(node)
                continue
            self._replace(program, node, written, roots, order)
        return program

    def _replace(
        self, program: Program, node: fx.Node, written: fx.Node, roots: dict[fx.Node, fx.Node], order: dict[Any, int]
    ) -> None:
        advice = f"{where(node)} writes to a value in place"
        # aten.copy has no derivative
        functional = aten.expand_as.default if node.target is aten.copy_.default else _functional(node.target)
        arguments = (node.args[1], written) if node.target is aten.copy_.default else node.args
        if program.source(roots[written]) is not None:
            raise UnsupportedError(f"{advice}, of a parameter or an input; write to a copy")
        if functional is None:
            raise UnsupportedError(f"{advice}, by an operator that has no form without '_'; use others")
        position = order[node]
        chain = _scattered(written)
        for other, root in roots.items():
            late = any(order.get(u, position) > position for u in other.users)
            elsewhere = root is roots[written] and other not in chain and order[other] < position and late
            if elsewhere and not _disjoint(other, written):
                raise UnsupportedError(f"{advice}, and a view of it is used afterwards; use the operator without '_'")
        with program.graph.inserting_before(node):
            new = program.graph.call_function(functional, arguments, dict(node.kwargs))
            new.meta = dict(node.meta)
            args, kwargs = fx.map_arg((arguments, node.kwargs), value)
            with value(node).fake_mode:
                promoted = functional(*args, **kwargs)
            if promoted.dtype != value(node).dtype:  # the value written to keeps its dtype
                new.meta["val"] = promoted
                new = program.graph.call_function(aten.to.dtype, (new, value(node).dtype))
                new.meta = dict(node.meta)
            changed = {node: new, written: new}
            for view, of in itertools.pairwise(chain):
                new = program.graph.call_function(SCATTER_OF_VIEW[view.target], (of, new, *view.args[1:]))
                new.meta = dict(node.meta) | {"val": value(of)}
                changed[of] = new
        shared = roots[written]
        for old, now in changed.items():
            order[now] = position
            roots[now] = new  # what was a view of the value still is, for later writes
            for user in list(old.users):
                if order.get(user, 0) > position:
                    user.replace_input_with(old, now)
        program.graph.erase_node(node)
        del roots[node]
        for other, root in roots.items():
            if root is shared and order[other] > position:
                roots[other] = new
        program.note(f"{self.name}: {node.name}")


SCATTER_OF_VIEW: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
"""Of a view, the operator that returns the value with another one in the view's place."""


def _scattered(written: fx.Node) -> list[fx.Node]:
    """What is written to, and what it is a part of, outwards, as far as the parts can be put back."""
    chain = [written]
    while chain[-1].target in SCATTER_OF_VIEW:
        chain.append(operand(chain[-1]))
    return chain


def _functional(target: Any) -> Any:
    """``add.Tensor`` of ``add_.Tensor``; None if there is none that takes the same arguments.

    Names of overloads tell nothing: ``pow_.Scalar`` has a scalar exponent, ``pow.Scalar`` a scalar base.
    """
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    overloads = [getattr(packet, name) for name in packet.overloads()] if packet is not None else []
    return next((o for o in overloads if _arguments(o) == _arguments(target)), None)


def _arguments(operator: Any) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in operator._schema.arguments]


def _disjoint(a: fx.Node, b: fx.Node) -> bool:
    """Whether two views of one value have no element in common: other entries of one dimension."""
    for x, y in zip(_views(a), _views(b), strict=False):
        if x != y:
            entries = x[0] is y[0] is aten.select.int and x[1][0] == y[1][0]
            return entries and (x[1][1] < 0) == (y[1][1] < 0) and x[1][1] != y[1][1]
    return False


def _views(node: fx.Node) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators that make a view of a value, in order, with their other arguments; without slices of everything."""
    chain: list[tuple[Any, tuple[Any, ...]]] = []
    while is_view(node) and not mutates(node):
        if node.target is not aten.slice.Tensor or not _is_whole_slice(*node.args[2:]):
            chain.append((node.target, tuple(node.args[1:])))
        node = operand(node)
    return chain[::-1]


def _is_whole_slice(start: Any = None, end: Any = None, step: Any = 1) -> bool:
    return start in (None, 0) and (end is None or end == sys.maxsize) and step == 1

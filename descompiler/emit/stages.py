"""Stages: what a program computes between two calls of the runtime, a function that `torch.compile` takes whole.

begin, enter_start | linear ...  | exit_wait, take | cat, linear, relu ...  | output     becomes
begin, enter_start , stage_0(..) , exit_wait, take , stage_1(...)           , output

Whatever talks with other ranks stays outside, in its order, and so does what happens once: draws, running statistics.
Lookups stay too: their gradients are rows, which no compiler of graphs makes. Of these those that send nothing may be
called earlier than they were, so that they part no stage. In backward a stage is one node of autograd, in the place of
the newest of those that it replaces, so that exchanges keep their order on every rank.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from descompiler.emit.ahead import happens_once
from descompiler.graph.nodes import aten, shares_memory
from descompiler.ops.local import join_local, plain, pool, take_columns
from descompiler.runtime.untraced import traced

PURE = frozenset({pool, join_local, take_columns, torch.real})
"""Functions of emitted programs that are nothing but operators of torch."""

LOOKUPS = frozenset({aten.embedding.default, aten.embedding_bag.default, aten.embedding_bag.padding_idx})
"""Operators whose gradients may be rows."""

_STAGED: weakref.WeakKeyDictionary[fx.GraphModule, fx.GraphModule] = weakref.WeakKeyDictionary()


class Stage(nn.Module):
    """What is computed between two calls of the runtime, compiled if the call of the module is."""

    def __init__(self, graph: fx.Graph):
        super().__init__()
        self.program = fx.GraphModule(nn.Module(), graph)

    def forward(self, *values: Any) -> Any:
        """The stage's values, of those that it takes."""
        return traced(self.program.forward, *map(_known, values))


def _known(x: Any) -> Any:
    """A piece of a parameter as a tensor of torch's own, which is what compilers know."""
    return plain(x) if isinstance(x, Tensor) and type(x) not in (Tensor, nn.Parameter) else x


def staged(module: fx.GraphModule) -> fx.GraphModule:
    """The program with its stages as submodules: the same call, the same outputs."""
    if module not in _STAGED:
        _STAGED[module] = _in_stages(module.graph)
    return _STAGED[module]


def _in_stages(graph: fx.Graph) -> fx.GraphModule:
    result, found, stages = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, Stage]()
    for nodes in _parts(graph):
        if not any(_computes(n) for n in nodes):
            for n in nodes:
                found[n] = result.node_copy(n, found.__getitem__)
            continue
        name = f"stage_{len(stages)}"
        stages[name], taken, given = _stage(nodes)
        values = result.call_module(name, tuple(found[n] for n in taken))
        found.update({n: result.call_function(operator.getitem, (values, i)) for i, n in enumerate(given)})
    result.lint()
    return fx.GraphModule(stages, result)


def _stage(nodes: Sequence[fx.Node]) -> tuple[Stage, list[fx.Node], list[fx.Node]]:
    """A stage, what it takes, and what of it others take."""
    inside, graph = set(nodes), fx.Graph()
    taken = list(dict.fromkeys(x for n in nodes for x in n.all_input_nodes if x not in inside))
    found = {n: graph.placeholder(n.name) for n in taken}
    for n in nodes:
        found[n] = graph.node_copy(n, found.__getitem__)
    given = [n for n in nodes if any(user not in inside for user in n.users)]
    graph.output([found[n] for n in given])
    return Stage(graph), taken, given


def _parts(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes, in an order in which those of a stage stand together: what is outside, a stage, what is outside ...

    A node's place is twice the number of stages in front of it, and one more in a stage. Calls of the runtime keep
    their order, also with respect to what is computed: work that was put beside an exchange stays beside it.
    """
    place: dict[fx.Node, int] = {}
    floor = latest = 0
    for n in graph.nodes:
        before = max((place[x] for x in n.all_input_nodes), default=0)
        if _is_fixed(n):
            floor = place[n] = latest = latest + latest % 2
        elif _is_inside(n):
            place[n] = max(before, floor) | 1
            latest = max(latest, place[n])
        else:
            place[n] = before + before % 2
            latest = max(latest, place[n])
    parts: list[list[fx.Node]] = [[] for _ in range(latest + 1)]
    for n in graph.nodes:
        parts[place[n]].append(n)
    return parts


def _is_fixed(n: fx.Node) -> bool:
    """Whether a call has its place: it talks with other ranks, or happens once."""
    if n.op in ("placeholder", "output"):
        return n.op == "output"
    if isinstance(n.target, OpOverload):
        return happens_once(n)
    return n.op == "call_method" or any(x.op == "placeholder" and x.target == "runtime" for x in n.all_input_nodes)


def _is_inside(n: fx.Node) -> bool:
    """Whether a call may be part of a stage."""
    if n.op != "call_function":
        return False
    if n.target is operator.getitem:  # of what the runtime or a lookup returns it is no computation
        of: Any = n.args[0]
        return _is_inside(of) and not happens_once(of)
    known = isinstance(n.target, OpOverload) or n.target in PURE or n.target.__module__ == operator.add.__module__
    return known and n.target not in LOOKUPS


def _computes(n: fx.Node) -> bool:
    """Whether there is something to compile: views, sizes and numbers are none."""
    if not _is_inside(n):
        return False
    if isinstance(n.target, OpOverload):
        return not shares_memory(n) and n.target is not aten.sym_size.int
    return n.target in PURE

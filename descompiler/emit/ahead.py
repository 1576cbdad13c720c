"""What a program sends of its inputs alone: the beginning of it, which can be run before the step.

own rows, ids -> begin        (checks; unique ids asked)      becomes a program of these operands
         ids -> enter_start  (ids into the region)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from descompiler.emit.emit import Emitted
from descompiler.graph.arguments import training_norm
from descompiler.graph.nodes import is_random, mutates
from descompiler.graph.rewrite import ancestors
from descompiler.runtime.agreement import any_rows
from descompiler.runtime.dynamic import pull_rows
from descompiler.runtime.fetch import begin_fetch, fetch_rows
from descompiler.runtime.leaf import LeafOnRanks


@dataclass(frozen=True)
class Beginning:
    """The beginning of a program, without what it sends.

    Attributes
    ----------
    module : torch.fx.GraphModule
        ``module(*values)``, values in the order of ``places``; returns own rows, the ids that are checked, those of
        the fetch, and those that enter the region: None where the program has none.
    places : tuple of int
        Of what it takes among ``Emitted.sources``.
    """

    module: fx.GraphModule
    places: tuple[int, ...]


def beginning_of(emitted: Emitted) -> Beginning | None:
    """The beginning of a program; None if it takes more than inputs, buffers and constants.

    None, too, where the step could not begin again: if forward branches on the rows of the batch, or draws or moves
    what it holds before the header has to be heard.
    """
    graph = emitted.module.graph
    if emitted.accepts is not any_rows or any(map(happens_once, _unheard(emitted))):
        return None
    begin = next(n for n in graph.nodes if n.target == "begin" or n.target is begin_fetch)
    enter = next((n for n in graph.nodes if n.op == "call_method" and n.target == "enter_start"), None)
    runtime, *placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    operands: list[Any] = [*begin.args[1:], None] if begin.op == "call_method" else list(begin.args[1:])
    operands.append(None if enter is None else enter.args[1])
    needed = ancestors(x for x in torch.utils._pytree.tree_leaves(operands) if isinstance(x, fx.Node))
    places = [i for i, n in enumerate(placeholders) if n in needed]
    if runtime in needed or any(emitted.sources[i].kind == "parameter" for i in places):
        return None
    result, found = fx.Graph(), dict[fx.Node, fx.Node]()
    for n in graph.nodes:
        if n in needed:
            found[n] = result.placeholder(n.name) if n.op == "placeholder" else result.node_copy(n, found.__getitem__)
    result.output(fx.map_arg(operands, found.__getitem__))
    return Beginning(fx.GraphModule(torch.nn.Module(), result), tuple(places))


def _unheard(emitted: Emitted) -> Iterator[fx.Node]:
    """Calls that come before the first after the beginning that sends something, on every rank."""
    for n in emitted.module.graph.nodes:
        if n.target in ("exit_start", pull_rows) or (n.target is fetch_rows and emitted.layout.fetches[0].divided):
            return
        if n.op == "call_function" and not isinstance(n.target, LeafOnRanks):  # a leaf hears the header first
            yield n


def happens_once(n: fx.Node) -> bool:
    """Whether a call changes what the next one finds: numbers drawn, running statistics."""
    return isinstance(n.target, OpOverload) and (is_random(n) or mutates(n) or training_norm(n) is not None)

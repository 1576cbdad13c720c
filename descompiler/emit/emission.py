"""The state of one rank's emission: what its program is made from, and the graph under construction.

`descompiler.emit.emit` says in which order things are emitted, `descompiler.emit.region` and `descompiler.emit.outside`
how.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from descompiler.graph.nodes import Source
from descompiler.planning.exchanges import layout_of
from descompiler.region.partition import Partition
from descompiler.tables.form import LookupPart, form_named


class Emission:
    """What the emitters share.

    Attributes
    ----------
    graph : torch.fx.Graph
        The program under construction.
    own : dict of node to node
        Emitted nodes that hold own rows, by the node of the original program; parameters and constants too.
    weights : dict of str to node
        Original nodes of the parameters that are used.
    sources, constants
        Of the placeholders: where their values come from.
    rows_local, rows : torch.fx.Node
        Emitted numbers of rows: own, and of the global batch.
    """

    rows_local: fx.Node
    rows: fx.Node

    def __init__(self, partition: Partition, rank: int):
        self.partition, self.program, self.rank, self.ranks = partition, partition.program, rank, partition.ranks
        self.layout = layout_of(partition)
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = dict(partition.program.constants)
        self.sources: list[Source] = []
        self.own: dict[fx.Node, fx.Node] = {}
        self._form_constants: dict[str, dict[str, fx.Node]] = {}  # by table, what its form needs
        self.runtime = self.graph.placeholder("runtime")
        self._placeholders()
        self.weights = {name: n for n in self.own if (name := self.program.parameter(n)) is not None}

    def _placeholders(self) -> None:
        for n in self.program.graph.nodes:
            # inputs go by position; the reducer would wait for the gradient of a parameter that nobody uses
            if n.op == "placeholder" and (n.users or self.program.sources[n.name].kind == "input"):
                self.own[n] = self._placeholder(n.name, self.program.sources[n.name])
        for o in self.partition.operators:
            split = self.partition.splits[o.name]
            for what, tensor in form_named(split.form).constants(split, self.rank).items():
                name = f"{what}_{o.name}"
                self.constants[name] = tensor
                placeholder = self._placeholder(name.replace(".", "_"), Source("constant", name))
                self._form_constants.setdefault(o.name, {})[what] = placeholder

    def _placeholder(self, name: str, source: Source) -> fx.Node:
        self.sources.append(source)
        return self.graph.placeholder(name)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def on_runtime(self, method: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_method(method, (self.runtime, *args), kwargs)

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, node, index)

    def lookup(self, n: fx.Node, ids: fx.Node, weight: fx.Node) -> fx.Node:
        """This rank's part of a lookup, as the table's form has it."""
        o, x = self.partition.lookups[n]
        split, constants = self.partition.splits[o.name], self._form_constants.get(o.name, {})
        part = LookupPart(self.graph, self.runtime, self.rank, self.ranks, o, x, split, weight, ids, constants)
        return form_named(split.form).emit(part)

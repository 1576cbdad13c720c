"""The state of one rank's emission: what its program is made from, the graph under construction, the values in it.

`descompiler.emit.emit` says in which order things are emitted, `descompiler.emit.region` and `descompiler.emit.outside`
how: each makes some versions of values, and asks for those of the other here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from torch import fx

from descompiler.classify import scope
from descompiler.graph.nodes import Source
from descompiler.ops.local import pool
from descompiler.planning.exchanges import layout_of
from descompiler.region.partition import Partition
from descompiler.runtime.dynamic import look_up_dynamic
from descompiler.tables.form import LookupPart, form_named


class Version(StrEnum):
    """What an emitted node holds of a node of the original graph. Coupling asks for the first three of them."""

    OWN = scope.OWN
    """The value for the rank's own rows; parameters, their pieces, and constants too."""
    WHOLE = scope.WHOLE
    """The value for the global batch, where rows mix: computed on every rank, gathered, or reduced from terms."""
    SIZED = scope.SIZED
    """A value that is made from the batch size alone, for the number of own rows."""
    ENTERED = "entered"
    """Ids of the global batch, in the region: the columns that this rank gets."""
    GIVEN = "given"
    """What the region's nodes take beside its values, for the global batch: of weights, ids and sizes alone."""
    PIECE = "piece"
    """This rank's piece of what is computed of a table along the dimension that it is cut in; of a table itself."""
    PART = "part"
    """This rank's part of a value of the region, for the global batch; None where it has none."""
    RECEIVED = "received"
    """What the ranks' parts of a value are, put together, for own rows."""
    LOCAL = "local"
    """What every rank computes of a value of the region from its own rows, None if nothing; and what that takes."""
    ARRIVED = "arrived"
    """A value that left the region, for own rows: what is received, with the local part."""


class Emission:
    """What the emitters share.

    Attributes
    ----------
    graph : torch.fx.Graph
        The program under construction.
    makers : dict of Version to callable
        What makes each version of a node, when it is first asked for.
    weights : dict of str to node
        Original nodes of the parameters that are used.
    sources, constants
        Of the placeholders: where their values come from.
    rows_local, rows : torch.fx.Node
        Emitted numbers of rows: own, and of the global batch.
    checked : set of torch.fx.Node
        Emitted ids that were looked at before anything is sent, on this rank or on the one that they come from.
    taken : dict of torch.fx.Node to int
        Emitted lookups, none of a bag, in rows that were fetched: of which class of the fetch these are.
    """

    rows_local: fx.Node
    rows: fx.Node

    def __init__(self, partition: Partition, rank: int):
        self.partition, self.program, self.rank, self.ranks = partition, partition.program, rank, partition.ranks
        self.layout = layout_of(partition)
        self.graph = fx.Graph()
        self.constants: dict[str, torch.Tensor] = dict(partition.program.constants)
        self.sources: list[Source] = []
        self.makers: dict[Version, Callable[[fx.Node], Any]] = {}
        self.checked: set[fx.Node] = set()
        self.taken: dict[fx.Node, int] = {}
        self._values: dict[tuple[fx.Node, Version], Any] = {}
        self._form_constants: dict[str, dict[str, fx.Node]] = {}  # by table, what its form needs
        self.runtime = self.graph.placeholder("runtime")
        self._placeholders()
        self.weights = {name: n for n, _ in self._values if (name := self.program.parameter(n)) is not None}

    def _placeholders(self) -> None:
        for n in self.program.graph.nodes:
            # inputs go by position; the reducer would wait for the gradient of a parameter that nobody uses
            if n.op == "placeholder" and (n.users or self.program.sources[n.name].kind == "input"):
                self.put(n, Version.OWN, self._placeholder(n.name, self.program.sources[n.name]))
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

    # ---- values

    def value(self, n: fx.Node, version: Version) -> Any:
        """A version of a node's value, made when it is first asked for."""
        if (n, version) not in self._values:
            self._values[n, version] = self.makers[version](n)
        return self._values[n, version]

    def versions(self, version: Version) -> Callable[[fx.Node], Any]:
        """What gives a version of any node."""
        return lambda n: self.value(n, version)

    def put(self, n: fx.Node, version: Version, emitted: Any) -> None:
        """A version that comes with others, not by itself; in place of an earlier one."""
        self._values[n, version] = emitted

    def has(self, n: fx.Node, version: Version) -> bool:
        """Whether a version has been made."""
        return (n, version) in self._values

    def own(self, n: fx.Node) -> Any:
        """The value for the rank's own rows."""
        return self.value(n, Version.OWN)

    def weight(self, name: str) -> Any:
        """What this rank has of a parameter."""
        return self.own(self.weights[name])

    # ---- nodes of the program

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def on_runtime(self, method: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_method(method, (self.runtime, *args), kwargs)

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, node, index)

    def lookup(self, n: fx.Node, ids: fx.Node, weight: fx.Node) -> fx.Node:
        """This rank's part of a lookup, as the table's form has it."""
        o, x = self.partition.lookups[n]
        if x.dynamic is not None:
            of = o.name, weight, ids, x.dynamic.create
            rows = self.call(look_up_dynamic, self.runtime, *of)
            return rows if x.mode is None else self.call(pool, rows, ids, x.mode, None)
        split, constants = self.partition.splits[o.name], self._form_constants.get(o.name, {})
        part = LookupPart(self.graph, self.runtime, self.rank, self.ranks, o, x, split, weight, ids, constants)
        return form_named(split.form).emit(part)

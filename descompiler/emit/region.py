"""Emission of the substituted region: its values for the global batch, what it is given, and what crosses its border.

ids  ->  `enter_start`  ->  `enter_wait`  ->  `emit`  ->  `exit_start`  ->  `exit_wait`  ->  `arrived`, with the parts
of the region's values that every rank computes from its own rows (`local`)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from descompiler.classify.scope import scope_of
from descompiler.emit.emission import Emission
from descompiler.emit.outside import OutsideEmitter
from descompiler.graph.arguments import operand
from descompiler.graph.nodes import aten, tail, value
from descompiler.graph.slicing import emit_slice, follow
from descompiler.layout.placement import LOCAL, Local, Partial, Shard, has_local
from descompiler.layout.spans import at
from descompiler.ops.local import join_local, scale_grad
from descompiler.planning.exchanges import channels_by_rank, lookups_by_ids, norms_inside, shared_weights
from descompiler.region.rule import Part


class RegionEmitter:
    """Emits the region; `outside` makes what it takes, and takes what leaves it."""

    def __init__(self, emission: Emission):
        self.e = emission
        self.outside = OutsideEmitter(emission, self.arrived, self.piece)
        self._values: dict[fx.Node, fx.Node] = {}  # original node -> emitted node holding the global part
        self._local: dict[fx.Node, fx.Node | None] = {}  # original node -> emitted node holding the part of own rows
        self._given: dict[fx.Node, Any] = {}  # original node -> emitted node: what the region's nodes are given
        self._pieces: dict[fx.Node, fx.Node] = {}  # original node -> emitted node, of what is computed of tables
        self._slices: dict[str, fx.Node] = {}  # weight name -> the slice that all ranks hold
        self._entered: dict[fx.Node, tuple[fx.Node, tuple[int, ...] | None]] = {}  # ids -> those here, their columns

    # ---- stages

    def enter_start(self) -> None:
        entry_ids = lookups_by_ids(self.e.program, self.e.operators, self.e.inside)
        self._entering = self.e.on_runtime("enter_start", [self.outside.own(n) for n in entry_ids])

    def enter_wait(self) -> None:
        e = self.e
        arrived = e.on_runtime("enter_wait", self._entering)
        entry_ids = lookups_by_ids(e.program, e.operators, e.inside)
        for i, (n, entry) in enumerate(zip(entry_ids, e.layout.entries, strict=True)):
            if entry.width(e.rank):
                self._entered[n] = (e.item(arrived, i), entry.columns_on(e.rank))

    def emit(self) -> None:
        """Values of the global batch, where this rank has a part of them."""
        e = self.e
        part = self._part(e.rank, e.rows, self._values.get, self.given)
        for n in e.program.graph.nodes:
            if n in e.inside and part.holds(e.placements[n]):
                self._values[n] = self._lookup(n) if n in e.lookups else e.candidates.rules[n].emit(n, part)
        # running statistics that moved on one rank, to all
        if norms := norms_inside(e.program, e.inside):
            buffers = [[e.own[b] for b in norm.statistics if b is not None] for norm in norms]
            channels = [channels_by_rank(norm.node, e.placements[norm.node], e.ranks) for norm in norms]
            e.on_runtime("share_statistics", buffers, channels)

    def exit_start(self) -> None:
        e = self.e
        placed = e.candidates.placed
        unused = [
            e.own[e.weights[name]]
            for n in e.program.graph.nodes
            if n in e.inside and n not in self._values
            for name in placed[n].replicated
        ]
        region = self._parameters()
        anchor = e.on_runtime("anchor", list(dict.fromkeys(unused)), list(region), list(region.values()))
        cut_weights = shared_weights(e.program, placed, e.inside)
        if cut_weights:
            slices = []
            for name, p in cut_weights.items():
                weight = e.own[e.weights[name]]
                slices.append(e.call(aten.narrow.default, weight, p.dim, p.own_size(e.rank), p.shared_size()))
            reduced = e.on_runtime("reduce_shared", anchor, *slices)
            anchor = e.item(reduced, 0)
            self._slices = {name: e.item(reduced, i + 1) for i, name in enumerate(cut_weights)}
        self._started = e.on_runtime("exit_start", anchor, [self._values.get(n) for n in e.exits])

    def _parameters(self) -> dict[fx.Node, bool]:
        """The parameters that any rank uses inside, tables and weights; whether their gradients are sparse."""
        e = self.e
        names: dict[str, bool] = {}
        for n in e.program.graph.nodes:
            if n in e.inside:
                names |= dict.fromkeys((*e.candidates.placed[n].pieces, *e.candidates.placed[n].replicated), False)
                if n in e.lookups:
                    o, _ = e.lookups[n]
                    names |= dict.fromkeys((o.name,) if o.group is None else o.group.tables, o.sparse)
        return {e.own[e.weights[n]]: sparse for n, sparse in names.items() if n in e.weights}

    def exit_wait(self) -> None:
        received = self.e.on_runtime("exit_wait", self._started)
        self._received = {n: self.e.item(received, i) for i, n in enumerate(self.e.exits)}

    def arrived(self, n: fx.Node) -> fx.Node:
        """A value that left the region, for own rows."""
        placement, received = self.e.placements[n], self._received[n]
        assert not isinstance(placement, Local)
        if not has_local(placement):
            return received
        if isinstance(placement, Partial):
            return self.e.call(aten.add.Tensor, received, self.local(n))
        assert isinstance(placement, Shard)
        segments = [[s.size, s.owner] for s in placement.segments]
        return self.e.call(join_local, placement.dim, segments, received, self.local(n))

    # ---- values

    def _part(
        self,
        owner: int,
        rows: fx.Node,
        own: Callable[[fx.Node], fx.Node | None],
        given: Callable[[fx.Node], Any],
    ) -> Part:
        """What rules emit a part of a value with; see `Part`."""
        e = self.e
        return Part(e.graph, e.runtime, e.program, e.rank, e.ranks, owner, rows, e.placements, e.pieces, own, given)

    def local(self, n: fx.Node) -> fx.Node | None:
        """The part of a value of the region that every rank computes from its own rows; None if there is none."""
        if n not in self._local:
            part = self._part(LOCAL, self.e.rows_local, self._local_operand, self._local_given)
            self._local[n] = self.e.candidates.rules[n].emit(n, part) if part.holds(self.e.placements[n]) else None
        return self._local[n]

    def _lookup(self, n: fx.Node) -> fx.Node:
        e = self.e
        o, x = e.lookups[n]
        ids, arrived = self._entered[x.ids]
        wanted = at(e.splits[o.name].columns(o, x), e.rank, ())
        if wanted is not None and wanted != arrived:
            have = list(range(tail(x.ids)[0]) if arrived is None else arrived)
            ids = e.call(operator.getitem, ids, (slice(None), [have.index(c) for c in wanted]))
        table = operand(n)
        if x.computed is None:
            return e.lookup(n, ids, self.outside.own(table))
        assert o.group is not None
        return e.lookup(n, ids, self.piece(table, o.group.tables[0], o.group.dims))

    def piece(self, n: fx.Node, table: str, dims: Mapping[fx.Node, int]) -> fx.Node:
        """This rank's piece of what is computed of a table along the dimension that it is cut in; of a table itself."""
        if n.op == "placeholder":
            return self.e.own[n]
        if n not in self._pieces:
            step = follow(n, dims)
            own = self.e.pieces[table].own(self.e.rank)
            first, size = (own[0].start, own[0].size) if own else (0, 0)
            assert step is not None and len(own) <= 1

            def piece(a: fx.Node) -> fx.Node:
                return self.piece(a, table, dims)

            self._pieces[n] = emit_slice(self.e.graph, n, step, dims, piece, self.given, first, size)
        return self._pieces[n]

    # ---- what the region's nodes are given

    def given(self, node: fx.Node) -> Any:
        """An operand that depends on no batch, or on ids and sizes alone, for the global batch."""
        if node not in self._given:
            self._given[node] = self._emit_given(node)
        return self._given[node]

    def _emit_given(self, node: fx.Node) -> Any:
        e = self.e
        if node in self._entered:
            arrived, dtype = self._entered[node][0], value(node).dtype
            return arrived if dtype == torch.int64 else e.call(aten.to.dtype, arrived, dtype)
        if node in e.candidates.givens.sized:
            return self.outside.whole(node)
        if node.op == "call_function":
            return e.graph.node_copy(node, self.given)
        name = e.program.parameter(node)
        if name is None:  # a constant
            return e.own[node]
        pieces = e.pieces[name]
        if pieces.is_replicated:
            # the reducer divides by the number of ranks what the exchange has divided already
            return e.call(scale_grad, e.own[node], e.ranks)
        if not pieces.shared_size():
            return e.own[node]
        return e.call(aten.narrow.default, e.own[node], pieces.dim, 0, pieces.own_size(e.rank))

    def _local_given(self, node: fx.Node) -> Any:
        """The same for own rows."""
        name = self.e.program.parameter(node)
        return self._own_part(node) if name is None else self._slices.get(name, self.e.own[node])

    def _local_operand(self, node: fx.Node) -> fx.Node | None:
        return self.local(node) if node in self.e.inside else self._own_part(node)

    def _own_part(self, node: fx.Node) -> Any:
        """A value from outside the region, for own rows; of one that is made from the batch size, its own rows."""
        own, scope = self.outside.own(node), scope_of(node)
        if self.e.ranks == 1 or not scope.sized or scope.rows is None or node in self.outside.coupling.slices:
            return own
        return self.e.on_runtime("slice_rows", own, scope.rows.dim, scope.rows.outer, scope.rows.inner)

"""Emission of the substituted region: its values for the global batch, what it is given, and what crosses its border.

ids  ->  `enter_start`  ->  `enter_wait`  ->  `emit`  ->  `exit_start`  ->  `exit_wait`  ->  values that have arrived,
with the parts that every rank computes from its own rows
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from descompiler.classify.scope import scope_of, trained_parameters
from descompiler.emit.emission import Emission, Version
from descompiler.graph.arguments import operand
from descompiler.graph.nodes import aten, tail, value
from descompiler.graph.rewrite import ancestors
from descompiler.graph.slicing import emit_slice, follow
from descompiler.layout.border import Entry
from descompiler.layout.placement import LOCAL, Partial, Shard
from descompiler.layout.spans import at
from descompiler.ops.local import join_local, scale_grad, take_columns
from descompiler.region.rule import Part


class RegionEmitter:
    """Emits the region; what it takes from outside of it, and what is taken from it, are versions of values."""

    def __init__(self, emission: Emission):
        self.e, self.partition = emission, emission.partition
        emission.makers |= {
            Version.GIVEN: self._given,
            Version.PIECE: self._piece,
            Version.PART: self._part,
            Version.LOCAL: self._local,
            Version.ARRIVED: self._arrived,
        }

    # ---- stages

    def enter_start(self) -> None:
        if not self.e.layout.given:
            self._entering = self.e.on_runtime("enter_start", [self.e.own(n) for n in self.partition.readers])

    def enter_wait(self) -> None:
        e = self.e
        arrived = None if e.layout.given else e.on_runtime("enter_wait", self._entering)
        self._columns = {}
        for i, (n, entry) in enumerate(zip(self.partition.readers, e.layout.entries, strict=True)):
            if entry.goes_to(e.rank):
                entered = self._columns_of(n, entry) if arrived is None else e.item(arrived, i)
                e.checked.add(entered)
                e.put(n, Version.ENTERED, entered)
                self._columns[n] = entry.columns_on(e.rank)

    def _columns_of(self, n: fx.Node, entry: Entry) -> fx.Node:
        """What this rank reads of ids that it has for the global batch."""
        e, columns = self.e, entry.columns_on(self.e.rank)
        ids = e.call(aten._to_copy.default, e.own(n), dtype=torch.int64)
        return ids if columns is None else e.call(take_columns, ids, list(columns))

    def emit(self) -> None:
        """Values of the global batch, where this rank has a part of them."""
        e = self.e
        for n in self._nodes():
            e.value(n, Version.PART)
        if norms := self.partition.norms:  # running statistics that moved on one rank, to all
            buffers = [[e.own(b) for b in norm.statistics if b is not None] for norm in norms]
            e.on_runtime("share_statistics", buffers, [self.partition.channels(norm) for norm in norms])

    def exit_start(self) -> None:
        e, placed = self.e, self.partition.candidates.placed
        unused = [n for n in self._nodes() if e.value(n, Version.PART) is None]
        weights = dict.fromkeys(e.weight(name) for n in unused for name in placed[n].replicated)
        region = self._parameters()
        anchor = self._anchor = e.on_runtime("anchor", list(weights), list(region), list(region.values()))
        if shared := self.partition.shared_weights:
            slices = []
            for name, p in shared.items():
                slices.append(e.call(aten.narrow.default, e.weight(name), p.dim, p.own_size(e.rank), p.shared_size()))
            reduced = e.on_runtime("reduce_shared", anchor, *slices)
            anchor = e.item(reduced, 0)
            for i, name in enumerate(shared):
                e.put(e.weights[name], Version.LOCAL, e.item(reduced, i + 1))
        self._started = e.on_runtime("exit_start", anchor, [e.value(n, Version.PART) for n in self.partition.exits])

    def looked_up(self) -> set[fx.Node]:
        """This rank's parts of lookups that the original sends a gradient to."""
        e = self.e
        parts = (e.value(n, Version.PART) for n in self._nodes() if n in self.partition.lookups and scope_of(n).grad)
        return {part for part in parts if part is not None}

    def reach_unread(self, looked_up: Collection[fx.Node]) -> None:
        """Let backward come to what this rank holds and nobody reads, of values that are read in part: gradients of
        zero, as in the original; of sparse ones, in the rows that were looked up."""
        e, pieces = self.e, self.partition.pieces
        held = {e.weight(n) for n in trained_parameters(e.program) if pieces[n].numel(e.rank)}
        ends = [n for n in e.graph.nodes if n is self._started or n.op == "output"]
        read = ancestors(ends)
        if unread := [n for n in e.graph.nodes if n in looked_up and n not in read]:
            self._started.args = (*self._started.args, unread)
        read = ancestors(ends) - {self._anchor}
        given: tuple[Any, ...] = self._anchor.args
        _, elsewhere, region, sparse = given
        idle = [w for w in region if w in held and w not in elsewhere and read.isdisjoint(w.users)]
        kept = [(w, s) for w, s in zip(region, sparse, strict=True) if w not in idle]
        self._anchor.args = (e.runtime, [*elsewhere, *idle], [w for w, _ in kept], [s for _, s in kept])

    def _parameters(self) -> dict[fx.Node, bool]:
        """The parameters that any rank uses inside, tables and weights; whether their gradients are sparse."""
        e, placed = self.e, self.partition.candidates.placed
        names: dict[str, bool] = {}
        for n in self._nodes():
            names |= dict.fromkeys((*placed[n].pieces, *placed[n].replicated), False)
            if n in self.partition.lookups:
                o, _ = self.partition.lookups[n]
                names |= dict.fromkeys((o.name,) if o.group is None else o.group.tables, o.sparse)
        return {e.weight(name): sparse for name, sparse in names.items() if name in e.weights}

    def exit_wait(self) -> None:
        received = self.e.on_runtime("exit_wait", self._started)
        for i, n in enumerate(self.partition.exits):
            self.e.put(n, Version.RECEIVED, self.e.item(received, i))

    def _nodes(self) -> list[fx.Node]:
        return [n for n in self.e.program.graph.nodes if n in self.partition.inside]

    def _arrived(self, n: fx.Node) -> fx.Node:
        e, placement = self.e, self.partition.placements[n]
        received: fx.Node = e.value(n, Version.RECEIVED)
        if isinstance(placement, Partial) and placement.local:
            return e.call(aten.add.Tensor, received, e.value(n, Version.LOCAL))
        if isinstance(placement, Shard) and placement.local:
            segments = [list(x) for x in placement.division.pairs]
            return e.call(join_local, placement.dim, segments, received, e.value(n, Version.LOCAL))
        return received

    # ---- values

    def _by_rule(self, n: fx.Node, owner: int, rows: fx.Node, operands: Version, givens: Version) -> fx.Node | None:
        """A part of a value of the region, made from those versions of its operands; None if there is none."""
        e, p = self.e, self.partition
        operand, given = e.versions(operands), e.versions(givens)
        part = Part(e.graph, e.runtime, p.program, e.rank, e.ranks, owner, rows, p.placements, p.pieces, operand, given)
        if not part.holds(p.placements[n]):
            return None
        return self._lookup(n) if n in p.lookups else p.candidates.rules[n].emit(n, part)

    def _part(self, n: fx.Node) -> fx.Node | None:
        if n not in self.partition.inside:
            return None  # every rank has it for its own rows only
        return self._by_rule(n, self.e.rank, self.e.rows, Version.PART, Version.GIVEN)

    def _local(self, n: fx.Node) -> Any:
        if n in self.partition.inside:
            return self._by_rule(n, LOCAL, self.e.rows_local, Version.LOCAL, Version.LOCAL)
        own, scope = self.e.own(n), scope_of(n)
        if self.e.ranks == 1 or not scope.sized or scope.rows is None or n in self.partition.coupling.slices:
            return own
        return self.e.on_runtime("slice_rows", own, scope.rows.dim, scope.rows.outer, scope.rows.inner)

    def _lookup(self, n: fx.Node) -> fx.Node:
        e = self.e
        o, x = self.partition.lookups[n]
        ids, arrived = e.value(x.ids, Version.ENTERED), self._columns[x.ids]
        wanted = at(self.partition.splits[o.name].columns(o, x), e.rank, ())
        if wanted is not None and wanted != arrived:
            have = list(range(tail(x.ids)[0]) if arrived is None else arrived)
            ids = e.call(operator.getitem, ids, (slice(None), [have.index(c) for c in wanted]))
        return e.lookup(n, ids, e.value(operand(n), Version.OWN if x.computed is None else Version.PIECE))

    def _piece(self, n: fx.Node) -> Any:
        e = self.e
        if n.op == "placeholder":
            return e.own(n)
        table, dims = self.partition.computed[n]
        step = follow(n, dims)
        own = self.partition.pieces[table].own(e.rank)
        first, size = (own[0].start, own[0].size) if own else (0, 0)
        assert step is not None and len(own) <= 1

        piece, given = e.versions(Version.PIECE), e.versions(Version.GIVEN)
        return emit_slice(e.graph, n, step, dims, piece, given, first, size)

    def _given(self, n: fx.Node) -> Any:
        e = self.e
        if e.has(n, Version.ENTERED):
            arrived, dtype = e.value(n, Version.ENTERED), value(n).dtype
            return arrived if dtype == torch.int64 else e.call(aten.to.dtype, arrived, dtype)
        if n in self.partition.candidates.givens.sized:
            return e.value(n, Version.WHOLE)
        if n.op == "call_function":
            return e.graph.node_copy(n, e.versions(Version.GIVEN))
        name = e.program.parameter(n)
        if name is None:  # a constant
            return e.own(n)
        pieces = self.partition.pieces[name]
        if pieces.is_replicated:
            # the reducer divides by the number of ranks what the exchange has divided already
            return e.call(scale_grad, e.own(n), e.ranks)
        if not pieces.shared_size():
            return e.own(n)
        return e.call(aten.narrow.default, e.own(n), pieces.dim, 0, pieces.own_size(e.rank))

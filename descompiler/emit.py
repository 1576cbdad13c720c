"""Emission: this rank's program, from the graph, the splits and the chosen region.

ids, begin (checks, header)  ->  enter_start  ->  enter_wait  ->  region, on the global batch  ->  exit_start
->  local operators that need nothing of the region  ->  exit_wait  ->  the rest, and the outputs
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from descompiler.aggregate import Candidates, Cut, exit_of
from descompiler.layout import Check, Entry, Layout
from descompiler.operators import Lookup, Operator, Split
from descompiler.pieces import Pieces
from descompiler.placement import LOCAL, Local, Partial, Placement, Shard, has_local
from descompiler.program import Program, Source, aten, tail
from descompiler.rule import Part, Placed, Rule
from descompiler.runtime import bag, bag_rows, join_local, lookup, lookup_rows, scale_grad


@dataclass
class Emitted:
    """One rank's program.

    Attributes
    ----------
    module : torch.fx.GraphModule
        ``module(runtime, *values)``, values in the order of ``sources``; returns the flat outputs.
    """

    module: fx.GraphModule
    sources: list[Source]
    constants: dict[str, torch.Tensor]
    layout: Layout
    checks: tuple[Check, ...]


def emit(
    program: Program,
    operators: Sequence[Operator],
    splits: Mapping[str, Split],
    pieces: Mapping[str, Pieces],
    candidates: Candidates,
    cut: Cut,
    rules: Sequence[Rule],
    rank: int,
    ranks: int,
) -> Emitted:
    """Emit one rank's program (see the module's text)."""
    return _Emitter(program, operators, splits, pieces, candidates, cut, rules, rank, ranks).run()


class _Emitter:
    def __init__(
        self,
        program: Program,
        operators: Sequence[Operator],
        splits: Mapping[str, Split],
        pieces: Mapping[str, Pieces],
        candidates: Candidates,
        cut: Cut,
        rules: Sequence[Rule],
        rank: int,
        ranks: int,
    ):
        self.program, self.operators, self.splits, self.pieces = program, operators, splits, pieces
        self.inside, self.exits = cut.inside, cut.exits
        self.placed = candidates.placed
        self.placements: dict[fx.Node, Placement] = {n: candidates.placed[n].placement for n in cut.inside}
        self.rules = {t: r for r in reversed(rules) for t in r.targets}
        self.rank, self.ranks = rank, ranks
        self.lookups: dict[fx.Node, tuple[Operator, Lookup]] = {x.node: (o, x) for o in operators for x in o.lookups}
        self.graph = fx.Graph()
        self.outside: dict[fx.Node, Any] = {}  # original node -> emitted node holding own rows
        self.region: dict[fx.Node, fx.Node] = {}  # original node -> emitted node holding the global part
        self.local: dict[fx.Node, fx.Node] = {}  # original node -> emitted node holding the part of own rows
        self.slices: dict[str, fx.Node] = {}  # weight name -> the slice that all ranks hold
        self.constants: dict[str, torch.Tensor] = dict(program.constants)
        self.sources: list[Source] = []
        self.entered: dict[fx.Node, tuple[fx.Node, tuple[int, ...] | None]] = {}
        self.layout = layout_of(program, operators, splits, pieces, candidates, cut, ranks)

    def run(self) -> Emitted:
        self.runtime = self.graph.placeholder("runtime")
        shifts = self._placeholders()
        dependent = self._dependent_on_region()
        checked = [
            (o, x) for o in self.operators for x in o.lookups if x.ids not in dependent and x.ids.op != "get_attr"
        ]
        for n in self._ancestors([x.ids for _, x in checked]):
            self._emit_outside(n)
        first = next(n for n in self.program.graph.nodes if (s := self.program.source(n)) and s.kind == "input")
        self.rows_local = self.graph.call_function(aten.sym_size.int, (self.outside[first], 0))
        ids = [self.outside[x.ids] for _, x in checked]
        self.rows = self._runtime("begin", self.rows_local, ids)
        if self.inside:
            self._enter()
            for n in self.program.graph.nodes:
                if n in self.inside and self._part(self.rank).holds(self.placements[n]):
                    self.region[n] = self._emit_region(n, shifts)
            self._exit()
        for n in self.program.graph.nodes:
            if n.op == "call_function" and n not in dependent and n not in self.inside:
                self._emit_outside(n)
        if self.exits:
            received = self._runtime("exit_wait", self.started)
            self.received = {n: self._item(received, i) for i, n in enumerate(self.exits)}
        for n in self.program.graph.nodes:
            if n in self.inside:
                part = self._part(LOCAL)
                if part.holds(self.placements[n]):
                    self.local[n] = self.rules[n.target].emit(n, part)
                if n in self.exits:
                    self.outside[n] = self._combine(n)
            elif n.op == "call_function" and n not in self.outside:
                self._emit_outside(n)
            elif n.op == "output":
                self.graph.output([self._runtime("output", self.outside[o]) for o in n.args[0]])
        self._drop_dead_code()
        self.graph.lint()
        by_field = [self.splits[o.name].by_field for o, _ in checked]
        checks = tuple(o.check(by_field=f) for (o, _), f in zip(checked, by_field, strict=True))
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        return Emitted(module, self.sources, self.constants, self.layout, checks)

    # ---- small helpers

    def _runtime(self, method: str, *args: Any) -> fx.Node:
        return self.graph.call_method(method, (self.runtime, *args))

    def _item(self, node: fx.Node, index: int) -> fx.Node:
        return self.graph.call_function(operator.getitem, (node, index))

    def _placeholder(self, name: str, source: Source) -> fx.Node:
        self.sources.append(source)
        return self.graph.placeholder(name)

    def _placeholders(self) -> dict[str, fx.Node]:
        for n in self.program.graph.nodes:
            if n.op == "placeholder":
                self.outside[n] = self._placeholder(n.name, self.program.sources[n.name])
        # where a rank's fields of an offsets table lie side by side, ids move by a constant per field
        shifts: dict[str, fx.Node] = {}
        for o in self.operators:
            if self.splits[o.name].by_field:
                position, moves = 0, []
                for r in self.pieces[o.name].own(self.rank):
                    moves.append(position - r.start)
                    position += r.size
                name = f"shift_{o.name}"
                self.constants[name] = torch.tensor(moves, dtype=torch.int64)
                shifts[o.name] = self._placeholder(name.replace(".", "_"), Source("constant", name))
        return shifts

    def _ancestors(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        needed: set[fx.Node] = set()
        stack = list(nodes)
        while stack:
            n = stack.pop()
            if n not in needed:
                needed.add(n)
                stack.extend(n.all_input_nodes)
        return [n for n in self.program.graph.nodes if n in needed and n.op == "call_function"]

    def _dependent_on_region(self) -> set[fx.Node]:
        result: set[fx.Node] = set()
        for n in self.program.graph.nodes:
            if any(p in self.inside or p in result for p in n.all_input_nodes) and n not in self.inside:
                result.add(n)
        return result

    def _part(self, owner: int) -> Part:
        if owner == LOCAL:
            return Part(
                self.graph,
                self.program,
                self.rank,
                self.ranks,
                LOCAL,
                self.rows_local,
                self.placements,
                self.pieces,
                lambda n: self.local.get(n) if n in self.inside else self.outside.get(n),
                self._local_weight,
            )
        return Part(
            self.graph,
            self.program,
            self.rank,
            self.ranks,
            owner,
            self.rows,
            self.placements,
            self.pieces,
            self.region.get,
            self._region_weight,
        )

    # ---- weights

    def _region_weight(self, node: fx.Node) -> fx.Node:
        name = self.program.parameter(node)
        assert name is not None
        pieces = self.pieces[name]
        if pieces.is_replicated:
            # the reducer divides by the number of ranks what the exchange has divided already
            return self.graph.call_function(scale_grad, (self.outside[node], self.ranks))
        if not pieces.shared_size():
            return self.outside[node]
        return self.graph.call_function(
            aten.narrow.default, (self.outside[node], pieces.dim, 0, pieces.own_size(self.rank))
        )

    def _local_weight(self, node: fx.Node) -> fx.Node:
        name = self.program.parameter(node)
        assert name is not None
        return self.slices.get(name, self.outside[node])

    # ---- stages

    def _enter(self) -> None:
        entry_ids = list(_users_by_ids(self.program, self.operators, self.inside))
        handle = self._runtime("enter_start", [self.outside[n] for n in entry_ids])
        arrived = self._runtime("enter_wait", handle)
        for i, (n, e) in enumerate(zip(entry_ids, self.layout.entries, strict=True)):
            if e.width(self.rank):
                self.entered[n] = (self._item(arrived, i), e.columns[self.rank])

    def _exit(self) -> None:
        unused = [
            self.outside[w]
            for n in self.program.graph.nodes
            if n in self.inside and n not in self.region
            for w in n.all_input_nodes
            if self.program.parameter(w) in self.placed[n].replicated
        ]
        anchor = self._runtime("anchor", *dict.fromkeys(unused))
        cut_weights = _shared_weights(self.program, self.placed, self.inside)
        if cut_weights:
            by_name = {self.program.parameter(n): n for n in self.program.graph.nodes if n.op == "placeholder"}
            slices = []
            for name, p in cut_weights.items():
                args = (self.outside[by_name[name]], p.dim, p.own_size(self.rank), p.shared_size())
                slices.append(self.graph.call_function(aten.narrow.default, args))
            reduced = self._runtime("reduce_shared", anchor, *slices)
            anchor = self._item(reduced, 0)
            self.slices = {name: self._item(reduced, i + 1) for i, name in enumerate(cut_weights)}
        self.started = self._runtime("exit_start", anchor, [self.region.get(n) for n in self.exits])

    def _emit_region(self, n: fx.Node, shifts: Mapping[str, fx.Node]) -> fx.Node:
        if n not in self.lookups:
            return self.rules[n.target].emit(n, self._part(self.rank))
        o, x = self.lookups[n]
        split, pieces = self.splits[o.name], self.pieces[o.name]
        weight = self.outside[n.args[0]]  # type: ignore[index]
        ids, arrived = self.entered[x.ids]
        wanted = split.columns(o, x, self.rank)
        if wanted is not None and wanted != arrived:
            have = range(tail(x.ids)[0]) if arrived is None else arrived
            ids = self.graph.call_function(
                operator.getitem, (ids, (slice(None), [list(have).index(c) for c in wanted]))
            )
        padding = o.padding_idx
        if split.by_field:
            ids = self.graph.call_function(aten.add.Tensor, (ids, shifts[o.name]))
            padding = self._field_padding(o)
        if split.form == "row":
            start = pieces.own(self.rank)[0].start
            near = padding - start if padding >= 0 and 0 <= padding - start < pieces.own_size(self.rank) else -1
            if x.mode is None:
                return self.graph.call_function(lookup_rows, (weight, ids, start, near, o.sparse))
            far = padding if padding >= 0 else None
            return self.graph.call_function(bag_rows, (weight, ids, start, x.mode, far, near, o.sparse))
        if x.mode is None:
            return self.graph.call_function(lookup, (weight, ids, padding, o.sparse))
        return self.graph.call_function(bag, (weight, ids, x.mode, padding if padding >= 0 else None, o.sparse))

    def _field_padding(self, o: Operator) -> int:
        """The row of this rank's piece that is the table's padding row; -1 if it is elsewhere or there is none."""
        position = 0
        for r in self.pieces[o.name].own(self.rank):
            if r.start <= o.padding_idx < r.stop:
                return position + o.padding_idx - r.start
            position += r.size
        return -1

    def _combine(self, n: fx.Node) -> fx.Node:
        placement, received = self.placements[n], self.received[n]
        assert not isinstance(placement, Local)
        if not has_local(placement):
            return received
        if isinstance(placement, Partial):
            return self.graph.call_function(aten.add.Tensor, (received, self.local[n]))
        assert isinstance(placement, Shard)
        segments = [[s.size, s.owner] for s in placement.segments]
        return self.graph.call_function(join_local, (placement.dim, segments, received, self.local[n]))

    def _emit_outside(self, n: fx.Node) -> None:
        if n in self.outside or n.op != "call_function":
            return
        distributed = self.ranks > 1
        if distributed and n in self.lookups:
            o, x = self.lookups[n]
            if o.sparse and o.trained:
                ids = self.outside[x.ids]
                weight = self.outside[n.args[0]]  # type: ignore[index]
                if x.mode is None:
                    self.outside[n] = self._runtime("sparse_lookup", weight, ids, o.padding_idx)
                else:
                    far = o.padding_idx if o.padding_idx >= 0 else None
                    self.outside[n] = self._runtime("sparse_bag", weight, ids, x.mode, far)
                return
        if distributed and n.target is aten.batch_norm.default and n.args[5]:
            x_, w, b, mean, var, _, momentum, eps = n.args[:8]
            args = [self.outside[a] if isinstance(a, fx.Node) else a for a in (x_, w, b, mean, var)]
            self.outside[n] = self._runtime("batch_norm", *args, momentum, eps)
            return
        new = self.graph.node_copy(n, lambda a: self.outside[a])
        self.outside[n] = new

    def _drop_dead_code(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            schema = getattr(node.target, "_schema", None)
            writes = (schema is not None and schema.is_mutable) or node.target is aten.batch_norm.default
            if node.op == "call_function" and not node.users and not writes:
                self.graph.erase_node(node)


def layout_of(
    program: Program,
    operators: Sequence[Operator],
    splits: Mapping[str, Split],
    pieces: Mapping[str, Pieces],
    candidates: Candidates,
    cut: Cut,
    ranks: int,
) -> Layout:
    """What the programs of a choice exchange: the same on every rank, and known without emitting one."""
    entries = []
    for ids, users in _users_by_ids(program, operators, cut.inside).items():
        columns: list[tuple[int, ...] | None] = []
        for r in range(ranks):
            wanted = [splits[o.name].columns(o, x, r) for o, x in users]
            if any(c is None for c in wanted):
                columns.append(None)
            else:
                columns.append(tuple(sorted({i for c in wanted for i in (c or ())})))
        entries.append(Entry(ids.name, tail(ids), tuple(columns)))
    split = {x.node for o in operators if o.sparse and o.trained for x in o.lookups} & cut.inside
    sparse = [(x, o) for o in operators if o.sparse and o.trained for x in o.lookups if x.node not in split]
    norms = [n for n in program.graph.nodes if n.target is aten.batch_norm.default and n.args[5]]
    shared = _shared_weights(program, candidates.placed, cut.inside).values()
    return Layout(
        ranks=ranks,
        entries=tuple(entries),
        exits=tuple(exit_of(n, candidates.placed[n].placement, ranks) for n in cut.exits),
        id_bytes=4 if all(o.rows < 1 << 31 for o in operators) else 8,
        norm_channels=tuple(tail(n.args[0])[0] for n in norms),
        sparse_lookups=tuple((prod(tail(x.ids)), o.dim) for x, o in sparse),
        shared_columns=tuple(prod(p.shape) // p.shape[p.dim] * p.shared_size() for p in shared),
        dense_elements=sum(program.parameters[n].numel() for n in _dense_parameters(program, operators, pieces)),
    )


def _users_by_ids(
    program: Program, operators: Sequence[Operator], inside: frozenset[fx.Node]
) -> dict[fx.Node, list[tuple[Operator, Lookup]]]:
    """The split tables that read each ids, in the order of the graph."""
    lookups = {x.node: (o, x) for o in operators for x in o.lookups}
    result: dict[fx.Node, list[tuple[Operator, Lookup]]] = {}
    for n in program.graph.nodes:
        if n in lookups and n in inside:
            result.setdefault(lookups[n][1].ids, []).append(lookups[n])
    return result


def _shared_weights(
    program: Program, placed: Mapping[fx.Node, Placed], inside: frozenset[fx.Node]
) -> dict[str, Pieces]:
    """Trained co-located weights of which every rank holds a slice."""
    return {
        name: p
        for node in program.graph.nodes
        if node in inside
        for name, p in placed[node].pieces.items()
        if p.shared_size() and program.parameters[name].requires_grad
    }


def _dense_parameters(program: Program, operators: Sequence[Operator], pieces: Mapping[str, Pieces]) -> list[str]:
    """Parameters whose gradients the reducer averages: replicated, trained, used, and not sparse."""
    sparse = {o.name for o in operators if o.sparse}
    used = {program.parameter(n) for n in program.graph.nodes if n.op == "placeholder" and len(n.users)}
    return [
        name
        for name, p in program.parameters.items()
        if p.requires_grad and name in used and name not in sparse and pieces[name].is_replicated
    ]

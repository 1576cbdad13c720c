"""Emission: this rank's program, from the graph, the splits and the chosen region.

ids, begin (checks, header)  ->  enter_start  ->  enter_wait  ->  region, on the global batch  ->  exit_start
->  local operators that need nothing of the region  ->  exit_wait  ->  the rest, and the outputs
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from descompiler.aggregate import Candidates, Cut, exit_of
from descompiler.operators import Lookup, Operator, Split
from descompiler.pieces import Pieces
from descompiler.placement import LOCAL, Local, Partial, Placement, Shard, has_local
from descompiler.program import Program, Source, aten, tail
from descompiler.rule import Part, Rule
from descompiler.runtime import Check, Entry, Layout, bag, bag_rows, join_local, lookup, lookup_rows, scale_grad


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
        self.shared_columns: list[int] = []
        self.sparse: list[tuple[int, int]] = []
        self.norms: list[int] = []

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
        entries = self._entries()
        if self.inside:
            self._enter(entries)
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
        layout = Layout(
            ranks=self.ranks,
            entries=tuple(entries),
            exits=tuple(exit_of(n, self.placed[n].placement, self.ranks) for n in self.exits),
            id_bytes=4 if all(o.rows < 1 << 31 for o in self.operators) else 8,
            norm_channels=tuple(self.norms),
            sparse_lookups=tuple(self.sparse),
            shared_columns=tuple(self.shared_columns),
            dense_elements=sum(self.program.parameters[n].numel() for n in dense_parameters(self)),
        )
        by_field = [self.splits[o.name].by_field for o, _ in checked]
        checks = tuple(o.check(by_field=f) for (o, _), f in zip(checked, by_field, strict=True))
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        return Emitted(module, self.sources, self.constants, layout, checks)

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

    def _entries(self) -> list[Entry]:
        by_ids: dict[fx.Node, list[tuple[Operator, Lookup]]] = {}
        for n in self.program.graph.nodes:
            if n in self.lookups and n in self.inside:
                by_ids.setdefault(self.lookups[n][1].ids, []).append(self.lookups[n])
        entries = []
        for ids, users in by_ids.items():
            columns: list[tuple[int, ...] | None] = []
            for r in range(self.ranks):
                wanted = [self.splits[o.name].columns(o, x, r) for o, x in users]
                if any(c is None for c in wanted):
                    columns.append(None)
                else:
                    columns.append(tuple(sorted({i for c in wanted for i in (c or ())})))
            entries.append(Entry(ids.name, tail(ids), tuple(columns)))
        self.entry_ids = list(by_ids)
        return entries

    def _enter(self, entries: list[Entry]) -> None:
        handle = self._runtime("enter_start", [self.outside[n] for n in self.entry_ids])
        arrived = self._runtime("enter_wait", handle)
        for i, (n, e) in enumerate(zip(self.entry_ids, entries, strict=True)):
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
        cut_weights = {
            n: p
            for node in self.program.graph.nodes
            if node in self.inside
            for n, p in self.placed[node].pieces.items()
            if p.shared_size() and self.program.parameters[n].requires_grad
        }
        if cut_weights:
            by_name = {self.program.parameter(n): n for n in self.program.graph.nodes if n.op == "placeholder"}
            slices = []
            for name, p in cut_weights.items():
                args = (self.outside[by_name[name]], p.dim, p.own_size(self.rank), p.shared_size())
                slices.append(self.graph.call_function(aten.narrow.default, args))
                size = p.shape[p.dim]
                self.shared_columns.append(torch.Size(p.shape).numel() // size * p.shared_size())
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
                width = torch.Size(tail(x.ids)).numel()
                self.sparse.append((width, o.dim))
                if x.mode is None:
                    self.outside[n] = self._runtime("sparse_lookup", weight, ids, o.padding_idx)
                else:
                    far = o.padding_idx if o.padding_idx >= 0 else None
                    self.outside[n] = self._runtime("sparse_bag", weight, ids, x.mode, far)
                return
        if distributed and n.target is aten.batch_norm.default and n.args[5]:
            x_, w, b, mean, var, _, momentum, eps = n.args[:8]
            args = [self.outside[a] if isinstance(a, fx.Node) else a for a in (x_, w, b, mean, var)]
            self.norms.append(tail(x_)[0])  # type: ignore[arg-type]
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


def dense_parameters(emitter: _Emitter) -> list[str]:
    """Parameters whose gradients the reducer averages: replicated, trained, used, and not sparse."""
    sparse = {o.name for o in emitter.operators if o.sparse}
    used = {emitter.program.parameter(n) for n in emitter.program.graph.nodes if n.op == "placeholder" and len(n.users)}
    return [
        name
        for name, p in emitter.program.parameters.items()
        if p.requires_grad and name in used and name not in sparse and emitter.pieces[name].is_replicated
    ]

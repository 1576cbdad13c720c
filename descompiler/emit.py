"""Emission: this rank's program, from the graph, the splits and the chosen region.

ids, begin (checks, header)  ->  enter_start  ->  enter_wait  ->  region, on the global batch  ->  exit_start
->  local operators that need nothing of the region  ->  exit_wait  ->  the rest, and the outputs

Outside the region a node's value has versions (`descompiler.coupling`): of own rows, and of the global batch where rows
mix; the emitter makes those that `couple` says are needed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from descompiler.aggregate import Candidates, Cut, exit_of
from descompiler.coupling import (
    CONSTANT,
    GLOBAL,
    OWN,
    SIZE,
    SIZED,
    WHOLE,
    Stage,
    couple,
    coupled_nodes,
    is_coupled,
    scope_of,
    size_terms,
)
from descompiler.coupling import LOCAL as LOCAL_SCOPE
from descompiler.fetch import begin_fetch, fetch_late, fetch_rows, fetch_start, fetch_wait, take
from descompiler.follow import emit_slice, follow
from descompiler.form import LookupPart, Split, form_named
from descompiler.layout import Check, Entry, Exchange, Fetch, FetchTable, Layout, Whole
from descompiler.leaf import Leaf, LeafOnRanks
from descompiler.operators import Lookup, Operator
from descompiler.outputs import checks_of, layouts_of, outputs_in_order
from descompiler.pieces import Pieces
from descompiler.placement import LOCAL, Local, Owned, Partial, Placement, Shard, has_local
from descompiler.program import Program, Source, ancestors, aten, elements_per_row, is_tensor, signature, tail, value
from descompiler.regularisers import divided, emit_total, find_totals
from descompiler.regularisers import exchanges as total_exchanges
from descompiler.rows import Rows
from descompiler.rule import Part, Placed
from descompiler.runtime import join_local, scale_grad


@dataclass
class Emitted:
    """One rank's program.

    Attributes
    ----------
    module : torch.fx.GraphModule
        ``module(runtime, *values)``, values in the order of ``sources``; returns the flat outputs.
    outputs : tuple of Rows or None
        Where a rank's own rows are in each output; None: the output is the global batch's, equal on all ranks.
    """

    module: fx.GraphModule
    sources: list[Source]
    constants: dict[str, torch.Tensor]
    layout: Layout
    checks: tuple[Check, ...]
    outputs: tuple[Rows | None, ...]


def emit(
    program: Program,
    operators: Sequence[Operator],
    splits: Mapping[str, Split],
    pieces: Mapping[str, Pieces],
    candidates: Candidates,
    cut: Cut,
    rank: int,
    ranks: int,
) -> Emitted:
    """Emit one rank's program (see the module's text)."""
    return _Emitter(program, operators, splits, pieces, candidates, cut, rank, ranks).run()


class _Emitter:
    def __init__(
        self,
        program: Program,
        operators: Sequence[Operator],
        splits: Mapping[str, Split],
        pieces: Mapping[str, Pieces],
        candidates: Candidates,
        cut: Cut,
        rank: int,
        ranks: int,
    ):
        self.program, self.operators, self.splits, self.pieces = program, operators, splits, pieces
        self.inside, self.exits = cut.inside, cut.exits
        self.placed = candidates.placed
        self.placements: dict[fx.Node, Placement] = {n: candidates.placed[n].placement for n in cut.inside}
        self.rules, self.givens = candidates.rules, candidates.givens
        self.rank, self.ranks = rank, ranks
        self.lookups: dict[fx.Node, tuple[Operator, Lookup]] = {x.node: (o, x) for o in operators for x in o.lookups}
        self.graph = fx.Graph()
        self.outside: dict[fx.Node, Any] = {}  # original node -> emitted node holding own rows
        self.region: dict[fx.Node, fx.Node] = {}  # original node -> emitted node holding the global part
        self.local: dict[fx.Node, fx.Node | None] = {}  # original node -> emitted node holding the part of own rows
        self.sliced: dict[fx.Node, fx.Node] = {}  # original node -> emitted node, of tables computed by columns
        self.given: dict[fx.Node, Any] = {}  # original node -> emitted node: what the region's nodes are given
        self.row_sliced: dict[fx.Node, fx.Node] = {}  # the same, of tables computed by rows
        self.slices: dict[str, fx.Node] = {}  # weight name -> the slice that all ranks hold
        self.constants: dict[str, torch.Tensor] = dict(program.constants)
        self.form_constants: dict[str, dict[str, fx.Node]] = {}  # by table, what its form needs
        self.sources: list[Source] = []
        self.entered: dict[fx.Node, tuple[fx.Node, tuple[int, ...] | None]] = {}
        self.layout = layout_of(program, operators, splits, pieces, candidates, cut, ranks)
        self.outputs = outputs_in_order(program, operators, splits)
        # of a fetched lookup: the number of its fetch, and its own in there
        self.fetched = {name: (f, i) for f, x in enumerate(self.layout.fetches) for i, name in enumerate(x.names)}
        self.fetches: dict[int, fx.Node] = {}  # what is under way, by number of the fetch
        self.fetched_rows: dict[int, tuple[fx.Node, fx.Node]] = {}  # the fetch, and its rows
        self.coupling = couple(program, cut.inside)
        self.stage_of = {n: s for s in self.coupling.stages for n in s.members}
        self.totals = {t.node: t for t in divided(find_totals(program), splits)} if ranks > 1 else {}
        self.whole: dict[fx.Node, Any] = {}  # original node -> emitted node holding the global batch
        self.sized: dict[fx.Node, Any] = {}  # original node -> emitted node made from the number of own rows
        self.rows: fx.Node | None = None  # of the global batch

    def run(self) -> Emitted:
        self.runtime = self.graph.placeholder("runtime")
        self._placeholders()
        dependent = _dependent_on(self.program, self.inside, self.inside)
        layout = self.layout
        checked, targets = _checked(self.program, self.operators, self.inside, layout.wholes, layout.fetches)
        needed = ancestors([*(x.ids for _, x in checked), *(n for n, _ in targets)])
        for n in self.program.graph.nodes:
            if n in needed and n.op == "call_function":
                self._own(n)
        first = next(n for n in self.program.graph.nodes if (s := self.program.source(n)) and s.kind == "input")
        self.rows_local = self.graph.call_function(aten.sym_size.int, (self.outside[first], 0))
        ids = [self.outside[x.ids] for _, x in checked] + [self.outside[n] for n, _ in targets]
        if self.layout.early:
            self._begin_fetch(ids)
        else:
            self.rows = self._runtime("begin", self.rows_local, ids)
        if self.layout.wholes:
            self._gather_tables()
        if self.inside:
            entering = self._runtime("enter_start", self._entry_ids())
        if self.layout.early:
            self._fetch_rows(0)
        if self.inside:
            self._enter(entering)
            for n in self.program.graph.nodes:
                if n in self.inside and self._part(self.rank).holds(self.placements[n]):
                    self.region[n] = self._emit_region(n)
            self._share_statistics()
            self._exit()
        demands: dict[fx.Node, list[str]] = {}
        for n, version in self.coupling.demands:
            demands.setdefault(n, []).append(version)
        for n in self.program.graph.nodes:
            if n.op == "call_function" and n not in dependent and n not in self.inside:
                self._emit_versions(n, demands.get(n, []))
        if self.exits:
            received = self._runtime("exit_wait", self.started)
            self.received = {n: self._item(received, i) for i, n in enumerate(self.exits)}
        for n in self.program.graph.nodes:
            if n in self.inside:
                self._local(n)
                if n in self.exits:
                    self._own(n)
            elif n.op == "call_function":
                self._emit_versions(n, demands.get(n, []))
            elif n.op == "output":
                outputs = n.args[0]
                self.graph.output(self._outputs(outputs))
        self._drop_dead_code()
        self._reach_fetches([scope_of(o).grad for o in outputs])
        self.graph.lint()
        checks = [self._check(o, x) for o, x in checked]
        checks += [c for _, c in targets]
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        own = tuple(scope_of(o).rows for o in outputs)
        return Emitted(module, self.sources, self.constants, self.layout, tuple(checks), own)

    # ---- small helpers

    def _check(self, o: Operator, x: Lookup) -> Check:
        found = form_named(self.splits[o.name].form).check(self.splits[o.name], o)
        if x.computed is None:
            return found
        assert o.group is not None
        return replace(found, table=f"computed of {', '.join(o.group.tables)}", rows=x.computed)

    def _runtime(self, method: str, *args: Any) -> fx.Node:
        return self.graph.call_method(method, (self.runtime, *args))

    def _item(self, node: fx.Node, index: int) -> fx.Node:
        return self.graph.call_function(operator.getitem, (node, index))

    def _placeholder(self, name: str, source: Source) -> fx.Node:
        self.sources.append(source)
        return self.graph.placeholder(name)

    def _placeholders(self) -> None:
        for n in self.program.graph.nodes:
            # inputs go by position; the reducer would wait for the gradient of a parameter that nobody uses
            if n.op == "placeholder" and (n.users or self.program.sources[n.name].kind == "input"):
                self.outside[n] = self._placeholder(n.name, self.program.sources[n.name])
        for o in self.operators:
            split = self.splits[o.name]
            for what, tensor in form_named(split.form).constants(split, self.rank).items():
                name = f"{what}_{o.name}"
                self.constants[name] = tensor
                placeholder = self._placeholder(name.replace(".", "_"), Source("constant", name))
                self.form_constants.setdefault(o.name, {})[what] = placeholder

    def _part(self, owner: int) -> Part:
        if owner == LOCAL:
            return Part(
                self.graph,
                self.runtime,
                self.program,
                self.rank,
                self.ranks,
                LOCAL,
                self.rows_local,
                self.placements,
                self.pieces,
                lambda n: self._local(n) if n in self.inside else self._own_part(n),
                self._local_given,
            )
        return Part(
            self.graph,
            self.runtime,
            self.program,
            self.rank,
            self.ranks,
            owner,
            self.rows,
            self.placements,
            self.pieces,
            self.region.get,
            self._region_given,
        )

    # ---- what the region's nodes are given

    def _region_given(self, node: fx.Node) -> Any:
        """An operand that depends on no batch, or on ids and sizes alone, for the global batch."""
        if node not in self.given:
            self.given[node] = self._emit_given(node)
        return self.given[node]

    def _emit_given(self, node: fx.Node) -> Any:
        if node in self.entered:
            arrived, dtype = self.entered[node][0], value(node).dtype
            return arrived if dtype == torch.int64 else self.graph.call_function(aten.to.dtype, (arrived, dtype))
        if node in self.givens.sized:
            return self._whole(node)
        if node.op == "call_function":
            return self.graph.node_copy(node, self._region_given)
        name = self.program.parameter(node)
        if name is None:  # a constant
            return self.outside[node]
        pieces = self.pieces[name]
        if pieces.is_replicated:
            # the reducer divides by the number of ranks what the exchange has divided already
            return self.graph.call_function(scale_grad, (self.outside[node], self.ranks))
        if not pieces.shared_size():
            return self.outside[node]
        return self.graph.call_function(
            aten.narrow.default, (self.outside[node], pieces.dim, 0, pieces.own_size(self.rank))
        )

    def _local_given(self, node: fx.Node) -> Any:
        """The same for own rows."""
        name = self.program.parameter(node)
        return self._own_part(node) if name is None else self.slices.get(name, self.outside[node])

    def _own_part(self, node: fx.Node) -> Any:
        """A value from outside the region, for own rows; of one that is made from the batch size, its own rows."""
        own, scope = self._own(node), scope_of(node)
        if self.ranks == 1 or not scope.sized or scope.rows is None or node in self.coupling.slices:
            return own
        return self._runtime("slice_rows", own, scope.rows.dim, scope.rows.outer, scope.rows.inner)

    # ---- stages

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(function, args)

    def _gather_tables(self) -> None:
        by_name = {self.program.parameter(n): n for n in self.outside if n.op == "placeholder"}
        nodes = [by_name[t.name] for t in self.layout.wholes]
        gathered = self._runtime("gather_tables", *(self.outside[n] for n in nodes))
        self.outside.update({n: self._item(gathered, i) for i, n in enumerate(nodes)})

    def _fetch_ids(self, number: int) -> list[fx.Node]:
        by_name = {n.name: x.ids for n, (_, x) in self.lookups.items()}
        return [self._own(by_name[name]) for name in self.layout.fetches[number].names]

    def _begin_fetch(self, ids: list[fx.Node]) -> None:
        begun = self._call(begin_fetch, self.runtime, self.rows_local, ids, self._fetch_ids(0))
        self.rows = self._item(begun, 0)
        self.fetches[0] = self._call(fetch_start, self.runtime, self._item(begun, 1))

    def _fetch_rows(self, number: int) -> None:
        by_name = {self.program.parameter(n): n for n in self.program.graph.nodes if n.op == "placeholder"}
        weights = [self.outside[by_name[t.name]] for t in self.layout.fetches[number].tables]
        self.fetches[number] = self._call(fetch_rows, self.runtime, self.fetches[number], *weights)

    def _emit_fetched(self, n: fx.Node) -> fx.Node:
        number, index = self.fetched[n.name]
        if number not in self.fetched_rows:
            if number not in self.fetches:
                begun = self._call(fetch_late, self.runtime, number, self._fetch_ids(number))
                self.fetches[number] = self._call(fetch_start, self.runtime, begun)
                self._fetch_rows(number)
            under_way = self.fetches[number]
            fetching = self._item(under_way, 0)
            self.fetched_rows[number] = fetching, self._call(fetch_wait, self.runtime, under_way)
        return self._call(take, *self.fetched_rows[number], index, self.lookups[n][1].mode)

    def _entry_ids(self) -> list[fx.Node]:
        return [self._own(n) for n in _users_by_ids(self.program, self.operators, self.inside)]

    def _enter(self, entering: fx.Node) -> None:
        entry_ids = list(_users_by_ids(self.program, self.operators, self.inside))
        arrived = self._runtime("enter_wait", entering)
        for i, (n, e) in enumerate(zip(entry_ids, self.layout.entries, strict=True)):
            if e.width(self.rank):
                self.entered[n] = (self._item(arrived, i), e.columns[self.rank])

    def _share_statistics(self) -> None:
        """Running statistics that moved on one rank, to all."""
        if norms := norms_inside(self.program, self.inside):
            buffers = [[self.outside[b] for b in n.args[3:5]] for n in norms]  # type: ignore[index]
            channels = [channels_by_rank(n, self.placements[n], self.ranks) for n in norms]
            self._runtime("share_statistics", buffers, channels)

    def _exit(self) -> None:
        by_name = {self.program.parameter(w): x for w, x in self.outside.items()}
        unused = [
            by_name[name]
            for n in self.program.graph.nodes
            if n in self.inside and n not in self.region
            for name in self.placed[n].replicated
        ]
        anchor = self._runtime("anchor", *dict.fromkeys(unused))
        cut_weights = _shared_weights(self.program, self.placed, self.inside)
        if cut_weights:
            slices = []
            for name, p in cut_weights.items():
                args = (by_name[name], p.dim, p.own_size(self.rank), p.shared_size())
                slices.append(self.graph.call_function(aten.narrow.default, args))
            reduced = self._runtime("reduce_shared", anchor, *slices)
            anchor = self._item(reduced, 0)
            self.slices = {name: self._item(reduced, i + 1) for i, name in enumerate(cut_weights)}
        self.started = self._runtime("exit_start", anchor, [self.region.get(n) for n in self.exits])

    def _emit_region(self, n: fx.Node) -> fx.Node:
        if n not in self.lookups:
            return self.rules[n].emit(n, self._part(self.rank))
        o, x = self.lookups[n]
        ids, arrived = self.entered[x.ids]
        wanted = self.splits[o.name].columns(o, x, self.rank)
        if wanted is not None and wanted != arrived:
            have = range(tail(x.ids)[0]) if arrived is None else arrived
            ids = self.graph.call_function(
                operator.getitem, (ids, (slice(None), [list(have).index(c) for c in wanted]))
            )
        return self._emit_lookup(n, ids)

    def _emit_lookup(self, n: fx.Node, ids: fx.Node, weight: fx.Node | None = None) -> fx.Node:
        o, x = self.lookups[n]
        split, weight = self.splits[o.name], weight or self._table(n, x)
        constants = self.form_constants.get(o.name, {})
        part = LookupPart(self.graph, self.runtime, self.rank, self.ranks, o, x, split, weight, ids, constants)
        return form_named(split.form).emit(part)

    def _table(self, n: fx.Node, x: Lookup) -> fx.Node:
        """What a lookup takes rows of: a table, or what is computed of tables."""
        table: Any = n.args[0]
        return self._columns(table) if x.computed is not None and n in self.inside else self._own(table)

    def _columns(self, n: fx.Node) -> fx.Node:
        """This rank's columns of a computed table, or of a table that goes into it."""
        if n.op == "placeholder":
            return self.outside[n]
        if n not in self.sliced:
            group = next(o.group for o in self.operators if o.group is not None and n in o.group.dims)
            step = follow(n, group.dims)
            (own,) = self.pieces[group.tables[0]].own(self.rank)
            assert step is not None
            self.sliced[n] = emit_slice(
                self.graph, n, step, group.dims, self._columns, self._region_given, own.start, own.size
            )
        return self.sliced[n]

    def _rows_of(self, n: fx.Node, o: Operator, dims: Mapping[fx.Node, int]) -> fx.Node:
        """This rank's rows of what is computed of a table row by row."""
        if n.op == "placeholder":
            return self.outside[n]
        if n not in self.row_sliced:
            step = follow(n, dims)
            own = self.pieces[o.name].own(self.rank)
            first, size = (own[0].start, own[0].size) if own else (0, 0)
            assert step is not None

            def piece(a: fx.Node) -> fx.Node:
                return self._rows_of(a, o, dims)

            self.row_sliced[n] = emit_slice(self.graph, n, step, dims, piece, self._region_given, first, size)
        return self.row_sliced[n]

    def _local(self, n: fx.Node) -> fx.Node | None:
        """The part of a value of the region that every rank computes from its own rows; None if there is none."""
        if n not in self.local:
            part = self._part(LOCAL)
            self.local[n] = self.rules[n].emit(n, part) if part.holds(self.placements[n]) else None
        return self.local[n]

    def _combine(self, n: fx.Node) -> fx.Node:
        placement, received = self.placements[n], self.received[n]
        assert not isinstance(placement, Local)
        if not has_local(placement):
            return received
        if isinstance(placement, Partial):
            return self.graph.call_function(aten.add.Tensor, (received, self._local(n)))
        assert isinstance(placement, Shard)
        segments = [[s.size, s.owner] for s in placement.segments]
        return self.graph.call_function(join_local, (placement.dim, segments, received, self._local(n)))

    # ---- outside the region

    def _emit_versions(self, n: fx.Node, versions: Sequence[str]) -> None:
        makers = {OWN: self._own, WHOLE: self._whole, SIZED: self._sized}
        for version in versions if self.ranks > 1 else versions and [OWN]:
            makers[version](n)

    def _own(self, n: fx.Node) -> Any:
        """The value for the rank's own rows."""
        if n in self.outside:
            return self.outside[n]
        scope = scope_of(n)
        if n in self.inside:
            new = self._combine(n)
        elif n.name in self.fetched:
            new = self._emit_fetched(n)
        elif n in self.lookups and (scope.kind != GLOBAL or self.ranks == 1):
            new = self._emit_lookup(n, self._version(n, self.lookups[n][1].ids))
        elif n in self.outputs:
            new = self._emit_output(n)
        elif self.ranks == 1:
            new = self._copy(n, self._own)
        elif n in self.totals:
            t = self.totals[n]
            weight = self.outside[t.weight]
            new = emit_total(self.graph, self.runtime, t, weight, self.pieces[t.table], self.rank)
        elif scope.kind == SIZE:
            new = self._size(n, OWN)
        elif scope.kind == GLOBAL:
            new = self._from_global(n, self._whole(n))
        elif n.target is aten.batch_norm.default and n.args[5] and scope.kind == LOCAL_SCOPE:
            x_, w, b, mean, var, _, momentum, eps = n.args[:8]
            args = [self._own(a) if isinstance(a, fx.Node) else a for a in (x_, w, b, mean, var)]
            new = self._runtime("batch_norm", *args, momentum, eps)
        else:
            new = self._copy(n, lambda a: self._version(n, a))
        self.outside[n] = new
        return new

    def _version(self, n: fx.Node, operand: fx.Node) -> Any:
        """An operand in the version that a node takes."""
        uses = scope_of(n).uses if self.ranks > 1 else ()
        version = uses[n.all_input_nodes.index(operand)] if uses else OWN
        return {OWN: self._own, WHOLE: self._whole, SIZED: self._sized}[version](operand)

    def _whole(self, n: fx.Node) -> Any:
        """The value for the global batch, as every rank computes it."""
        if n in self.whole:
            return self.whole[n]
        scope = scope_of(n)
        if scope.kind == CONSTANT:
            own, name = self._own(n), self.program.parameter(n)
            trained = scope.grad if name is None else self.program.parameters[name].requires_grad
            # every rank has all of its gradient, and the reducer averages over ranks
            self.whole[n] = self.graph.call_function(scale_grad, (own, 1 / self.ranks)) if trained else own
        elif scope.kind == SIZE:
            self.whole[n] = self._size(n, WHOLE)
        elif n in self.stage_of:
            self._emit_stage(self.stage_of[n])
        elif scope.drawn and not isinstance(n.target, Leaf):
            args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), self._whole)
            number = self._number(n)
            function: Any = n.target
            self.whole[n] = self.graph.call_method("draw", (self.runtime, number, function, *args), kwargs)
        elif n in self.lookups:
            weight = self._whole(n.args[0])  # type: ignore[arg-type]
            self.whole[n] = self._emit_lookup(n, self._whole(self.lookups[n][1].ids), weight)
        else:
            self.whole[n] = self._copy(n, self._whole, self._number(n) if scope.drawn else None)
        return self.whole[n]

    def _number(self, n: fx.Node) -> int:
        return list(self.program.graph.nodes).index(n)

    def _copy(self, n: fx.Node, find: Callable[[fx.Node], Any], drawn: int | None = None) -> fx.Node:
        """A node outside the region as it is, with other operands."""
        if not isinstance(n.target, Leaf):
            return self.graph.node_copy(n, find)
        args = (self.runtime, *fx.map_arg(n.args, find))
        new = self.graph.create_node(n.op, LeafOnRanks(n.target, drawn), args, {}, n.name)
        new.meta = dict(n.meta)
        return new

    def _sized(self, n: fx.Node) -> Any:
        """A value made from the batch size, for the number of own rows."""
        if n not in self.sized:
            find = lambda a: self._sized(a) if scope_of(a).sized else self._own(a)  # noqa: E731
            self.sized[n] = self._copy(n, find)
        return self.sized[n]

    def _emit_stage(self, stage: Stage) -> None:
        """One collective for all values of a stage."""
        for n, version in self.coupling.before(stage):
            self._emit_versions(n, [version])
        if stage.kind == "gather":
            rows = [scope_of(n).rows or Rows() for n in stage.members]
            layouts = [[r.dim, r.outer, r.inner] for r in rows]
            wholes = self._runtime("gather_rows", [self._own(n) for n in stage.members], layouts)
            self.whole.update({n: self._item(wholes, i) for i, n in enumerate(stage.members)})
            return
        terms = []
        for n in stage.members:
            args, dtype = signature(n), {"dtype": value(n).dtype} if signature(n)["dtype"] is not None else {}
            x, dims = self._own(n.all_input_nodes[0]), args.get("dim") or list(range(value(n.args[0]).dim()))
            terms.append(self.graph.call_function(aten.sum.dim_IntList, (x, dims, args.get("keepdim", False)), dtype))
        totals = self._runtime("sum_terms", terms)
        for i, n in enumerate(stage.members):
            self.whole[n] = self._item(totals, i)
            if n.target in (aten.mean.default, aten.mean.dim):
                self.whole[n] = self.graph.call_function(aten.div.Tensor, (self.whole[n], self._count(n)))

    def _count(self, n: fx.Node) -> Any:
        """Elements of the global batch that a mean is over."""
        x = n.all_input_nodes[0]
        rows, dims, count = scope_of(x).rows, signature(n).get("dim"), value(x).dim()
        assert rows is not None
        over = [d % count for d in dims] if dims else range(count)
        result: Any = self.graph.call_function(operator.mul, (self.rows, rows.multiple))
        for d in over:
            if d == rows.dim:
                continue
            size = value(x).shape[d]
            factor = size if isinstance(size, int) else self.graph.call_function(aten.sym_size.int, (self._own(x), d))
            result = self.graph.call_function(operator.mul, (result, factor))
        return result

    def _from_global(self, n: fx.Node, whole: Any) -> Any:
        """What local nodes and the user take of a value that every rank has."""
        if n in self.coupling.slices:
            rows = scope_of(n).rows or Rows()
            if not scope_of(n).grad and is_tensor(n) and value(n).is_floating_point():
                whole = self.graph.call_function(aten.detach.default, (whole,))
            return self._runtime("slice_rows", whole, rows.dim, rows.outer, rows.inner)
        return self._runtime("spread", whole) if n in self.coupling.spreads and scope_of(n).grad else whole

    def _size(self, n: fx.Node, version: str) -> Any:
        """A number made from the batch size."""
        find = self._own if version == OWN else self._whole
        if n.target is not aten.sym_size.int:
            return self.graph.node_copy(n, find)
        x, terms = n.all_input_nodes[0], size_terms(self.program, n)
        if terms is None:
            find = self._whole if scope_of(x).kind == GLOBAL else self._own
            return self.graph.node_copy(n, find)
        if version == OWN and (x in self.outside or scope_of(x).kind == LOCAL_SCOPE):
            return self.graph.node_copy(n, self._own)
        result: Any = terms[-1]
        rows = self.rows if version == WHOLE else self._runtime("own_rows")
        for c in reversed(terms[:-1]):  # Horner
            result = self.graph.call_function(operator.mul, (rows, result)) if result != 1 else rows
            result = self.graph.call_function(operator.add, (result, c)) if c else result
        return result

    def _outputs(self, outputs: Sequence[fx.Node]) -> list[Any]:
        result = [self._own(o) for o in outputs]
        joined = [i for i, o in enumerate(outputs) if scope_of(o).grad]
        if self.ranks > 1 and (self.coupling.backward or self.layout.wholes) and len(joined) > 1:
            together = self._runtime("together", [result[i] for i in joined])
            for position, i in enumerate(joined):
                result[i] = self._item(together, position)
        # what is equal on all ranks counts once: averaging over ranks is right for every kind of loss
        return [
            self._runtime("output", x) if scope_of(o).rows is not None else x
            for o, x in zip(outputs, result, strict=True)
        ]

    def _emit_output(self, n: fx.Node) -> fx.Node:
        number = list(self.outputs).index(n)
        _, x = self.outputs[n]
        o, bias = self.outputs[n][0], x.bias
        weight = self._rows_of(n.args[1], o, x.rows) if x.rows else self._own(n.args[1])  # type: ignore[arg-type]
        if bias is not None:
            name = self.program.parameter(bias)
            bias = self._own(bias)
            if name is None or self.pieces[name].is_replicated:
                # each owner adds its part; the reducer divides by the number of ranks what the product has divided
                start, size, _ = self.layout.vocabularies[number].parts.get(self.rank, (0, 0, 0))
                bias = self.graph.call_function(aten.narrow.default, (bias, 0, start, size))
                bias = self.graph.call_function(scale_grad, (bias, self.ranks))
        ids = [self._version(n, r[1]) for r in x.requests if r[0] == "select"]
        return self._runtime("vocabulary", number, self._version(n, x.x), weight, bias, ids)

    def _drop_dead_code(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            schema = getattr(node.target, "_schema", None)
            writes = (schema is not None and schema.is_mutable) or node.target is aten.batch_norm.default
            # collectives: every rank makes them, and the plan counts them, also where nobody reads what they bring
            writes |= isinstance(node.target, LeafOnRanks) or node.target in FETCHING
            if node.op == "call_function" and not node.users and not writes:
                self.graph.erase_node(node)

    def _reach_fetches(self, trained: Sequence[bool]) -> None:
        """Let backward come to fetches whose rows nobody reads: owners get gradients of zero, as in the original."""
        unread = [n for n in self.graph.nodes if n.target is fetch_wait and not n.users]
        if not unread or not any(trained):
            return
        output = next(n for n in self.graph.nodes if n.op == "output")
        results = list(output.args[0])
        i = list(trained).index(True)
        with self.graph.inserting_before(output):
            results[i] = self._runtime("reach", results[i], unread)
        output.args = (results,)


FETCHING = frozenset({begin_fetch, fetch_start, fetch_rows, fetch_wait, fetch_late})


def _dependent_on(program: Program, nodes: Collection[fx.Node], inside: Collection[fx.Node]) -> set[fx.Node]:
    """What is computed from any of some nodes, but for the region's own."""
    result: set[fx.Node] = set()
    for n in program.graph.nodes:
        if n not in inside and any(p in nodes or p in result for p in n.all_input_nodes):
            result.add(n)
    return result


def _checked(
    program: Program,
    operators: Sequence[Operator],
    inside: frozenset[fx.Node],
    wholes: Sequence[Whole],
    fetches: Sequence[Fetch],
) -> tuple[list[tuple[Operator, Lookup]], list[tuple[fx.Node, Check]]]:
    """Lookups whose ids, and targets that, are known before the header, and are checked then."""
    gathered, fetched = {t.name for t in wholes}, {name for f in fetches for name in f.names}
    lookups = {x.node: (o, x) for o in operators for x in o.lookups}  # once, also of a table computed of several
    sources = {n for n in program.graph.nodes if program.parameter(n) in gathered}
    sources |= {n for n in lookups if n.name in fetched}
    late = _dependent_on(program, {*inside, *sources}, inside) | coupled_nodes(program)
    checked = [
        (o, x)
        for o, x in lookups.values()
        if x.ids not in late and x.ids.op != "get_attr" and scope_of(x.node).kind != GLOBAL
    ]
    return checked, [(n, c) for n, c in checks_of(operators) if n not in late]


def _leaf_runs(
    program: Program,
    operators: Sequence[Operator],
    inside: frozenset[fx.Node],
    wholes: Sequence[Whole],
    fetches: Sequence[Fetch],
) -> int:
    """How often a step runs an opaque leaf after the header, which tells of those before it."""
    if not any(isinstance(n.target, Leaf) for n in program.graph.nodes):
        return 0
    checked, targets = _checked(program, operators, inside, wholes, fetches)
    before = ancestors([*(x.ids for _, x in checked), *(n for n, _ in targets)])
    runs = {
        (n, WHOLE if scope_of(n).kind == GLOBAL else version)  # others' rows of a global value are cut out of it
        for n, version in couple(program, inside).demands
        if isinstance(n.target, Leaf) and n not in before
    }
    return len(runs)


def norms_inside(program: Program, inside: Collection[fx.Node]) -> list[fx.Node]:
    """Batch norms in the region whose running statistics move."""
    norms = [n for n in program.graph.nodes if n in inside and n.target is aten.batch_norm.default]
    return [n for n in norms if n.args[5] and n.args[3] is not None]


def channels_by_rank(norm: fx.Node, placement: Placement, ranks: int) -> list[list[int]]:
    """The channels that each rank normalises."""
    if isinstance(placement, Shard):
        return [placement.positions(r) for r in range(ranks)]
    return [list(range(tail(norm)[0])) if placement == Owned(r) else [] for r in range(ranks)]


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
        columns: list[tuple[int, ...] | None] = [()] * ranks
        for r in set().union(*(splits[o.name].pieces.owners for o, _ in users)):
            wanted = [splits[o.name].columns(o, x, r) for o, x in users]
            columns[r] = None if None in wanted else tuple(sorted({i for c in wanted for i in (c or ())}))
        entries.append(Entry(ids.name, tail(ids), tuple(columns)))
    exchanges: tuple[Exchange, ...] = ()
    totals = [t for t in divided(find_totals(program), splits) if t.node.users]
    own = set(program.graph.nodes) - cut.inside
    if is_coupled(program):
        coupling = couple(program, cut.inside)
        exchanges = coupling.exchanges
        own = {n for n, version in coupling.demands if version == OWN and scope_of(n).kind != GLOBAL} - cut.inside
    fetches, early = _fetches(program, operators, splits, cut.inside, ranks)
    norms = [n for n in program.graph.nodes if n in own and n.target is aten.batch_norm.default and n.args[5]]
    shared = _shared_weights(program, candidates.placed, cut.inside).values()
    wholes = _wholes(program, splits) if ranks > 1 else ()
    return Layout(
        ranks=ranks,
        entries=tuple(entries),
        exits=tuple(exit_of(n, candidates.placed[n].placement, ranks) for n in cut.exits),
        id_bytes=4 if all(o.rows < 1 << 31 for o in operators) else 8,
        norm_channels=tuple(tail(n.args[0])[0] for n in norms),
        norm_shares=tuple(
            tuple(map(len, channels_by_rank(n, candidates.placed[n].placement, ranks)))
            for n in norms_inside(program, cut.inside)
        ),
        fetches=fetches,
        early=early,
        shared_columns=tuple(prod(p.shape) // p.shape[p.dim] * p.shared_size() for p in shared),
        vocabularies=layouts_of(program, operators, splits),
        dense_elements=sum(program.parameters[n].numel() for n in _dense_parameters(program, splits, pieces)),
        exchanges=exchanges + total_exchanges(totals, lambda n: scope_of(n).grad),
        wholes=wholes,
        leaves=_leaf_runs(program, operators, cut.inside, wholes, fetches) if ranks > 1 else 0,
    )


def _wholes(program: Program, splits: Mapping[str, Split]) -> tuple[Whole, ...]:
    """The tables that a program uses, and gathers for that."""
    result = []
    for n in program.graph.nodes:
        name = program.parameter(n)
        if name is not None and n.users and name in splits and splits[name].whole:
            trained = program.parameters[name].requires_grad and any(scope_of(u).grad for u in n.users)
            result.append(Whole(name, splits[name].pieces, trained))
    return tuple(result)


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


def _fetches(
    program: Program,
    operators: Sequence[Operator],
    splits: Mapping[str, Split],
    inside: frozenset[fx.Node],
    ranks: int,
) -> tuple[tuple[Fetch, ...], bool]:
    """Lookups that are fetched: together those whose ids are known at the start (then True), the others one by one."""
    if ranks == 1:
        return (), False
    fetching = [o for o in operators if form_named(splits[o.name].form).fetches(splits[o.name])]
    users = {x.node: (o, x) for o in fetching for x in o.lookups}
    late: set[fx.Node] = set()
    for n in program.graph.nodes:
        if any(p in inside or p in users or p in late for p in n.all_input_nodes):
            late.add(n)
    late |= coupled_nodes(program)
    order = [users[n] for n in program.graph.nodes if n in users]
    early = [(o, x) for o, x in order if x.ids not in late]
    groups = [early] if early else []
    groups += [[u] for u in order if u[1].ids in late]
    return tuple(_fetch(group, splits) for group in groups), bool(early)


def _fetch(lookups: Sequence[tuple[Operator, Lookup]], splits: Mapping[str, Split]) -> Fetch:
    tables: dict[str, FetchTable] = {}
    for o, x in lookups:
        s, before = splits[o.name], tables.get(o.name)
        ids = elements_per_row(x.ids) + (before.ids if before else 0)
        tables[o.name] = FetchTable(o.name, s.pieces, ids, o.padding_idx, o.sparse, o.trained, s.gathered, str(o.dtype))
    ordered = sorted(tables.values(), key=lambda t: t.kind)
    position = {t.name: i for i, t in enumerate(ordered)}
    return Fetch(
        tuple(ordered),
        tuple(position[o.name] for o, _ in lookups),
        tuple(x.node.name for _, x in lookups),
        tuple(form_named(splits[o.name].form).check(splits[o.name], o) for o, _ in lookups),
    )


def _dense_parameters(program: Program, splits: Mapping[str, Split], pieces: Mapping[str, Pieces]) -> list[str]:
    """Parameters whose gradients the reducer averages: replicated, trained, used, and not gathered."""
    gathered = {name for name, s in splits.items() if s.gathered}
    used = {program.parameter(n) for n in program.graph.nodes if n.op == "placeholder" and len(n.users)}
    return [
        name
        for name, p in program.parameters.items()
        if p.requires_grad and name in used and name not in gathered and pieces[name].is_replicated
    ]

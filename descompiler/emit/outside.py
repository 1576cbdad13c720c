"""Emission outside the region: values in the versions that `descompiler.classify.coupling` says are needed.

Lookups here take rows that are at hand, or fetch them; products with divided tables exchange by themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from descompiler.classify.behind import reach_of
from descompiler.classify.coupling import CouplingStage
from descompiler.classify.scope import CONSTANT, GLOBAL, OWN_ROWS, SIZE, scope_of, size_terms
from descompiler.emit.emission import Emission, Version
from descompiler.graph.arguments import operand, training_norm
from descompiler.graph.leaf import Leaf
from descompiler.graph.nodes import aten, is_tensor, signature, value
from descompiler.layout.rows import Rows
from descompiler.ops.local import differentiable, scale_grad
from descompiler.runtime.dynamic import pull_rows, pull_wait, take_pulled
from descompiler.runtime.fetch import begin_fetch, fetch_late, fetch_rows, fetch_start, fetch_wait, take
from descompiler.runtime.leaf import LeafOnRanks
from descompiler.tables.totals import emit_total


class OutsideEmitter:
    """Emits what is outside the region."""

    def __init__(self, emission: Emission):
        self.e, self.partition, self.graph = emission, emission.partition, emission.graph
        self._global = emission.versions(Version.WHOLE)
        emission.makers |= {Version.OWN: self._own, Version.WHOLE: self._whole, Version.SIZED: self._sized}
        self.coupling = self.partition.coupling
        self._demands: dict[fx.Node, list[Version]] = {}
        for n, version in self.coupling.demands:
            self._demands.setdefault(n, []).append(Version(version))
        self._stage_of = {n: s for s in self.coupling.stages for n in s.members}
        # of a fetched lookup: the number of its fetch, and its own in there
        self._fetched = {name: (f, i) for f, x in enumerate(emission.layout.fetches) for i, name in enumerate(x.names)}
        self._fetches: dict[int, fx.Node] = {}  # what is under way, by number of the fetch
        self._fetched_rows: dict[int, tuple[fx.Node, fx.Node]] = {}  # the fetch, and its rows

    # ---- versions

    def emit(self, n: fx.Node) -> None:
        """Every version of a node that is needed."""
        self._emit_versions(n, self._demands.get(n, []))

    def _emit_versions(self, n: fx.Node, versions: Sequence[Version]) -> None:
        for version in versions if self.e.ranks > 1 else versions and [Version.OWN]:
            self.e.value(n, version)

    def _operand(self, n: fx.Node, operand: fx.Node) -> Any:
        """An operand in the version that a node takes."""
        uses = scope_of(n).uses if self.e.ranks > 1 else ()
        return self.e.value(operand, Version(uses[n.all_input_nodes.index(operand)]) if uses else Version.OWN)

    def _own(self, n: fx.Node) -> Any:
        e, p, scope = self.e, self.partition, scope_of(n)
        if n in p.inside:
            return e.value(n, Version.ARRIVED)
        if n.name in self._fetched:
            return self._emit_fetched(n)
        if n in p.lookups and (scope.kind != GLOBAL or e.ranks == 1):
            return e.lookup(n, self._operand(n, p.lookups[n][1].ids), e.own(operand(n)))
        if n in p.products:
            return self._emit_product(n)
        if e.ranks == 1:
            return self._copy(n, e.own)
        if n in p.totals:
            t = p.totals[n]
            return emit_total(self.graph, e.runtime, t, e.own(t.weight), p.pieces[t.table], e.rank)
        if scope.kind == SIZE:
            return self._size(n, Version.OWN)
        if scope.kind == GLOBAL:
            return self._from_global(n, self._global(n))
        if (norm := training_norm(n)) is not None and scope.kind == OWN_ROWS:
            args = [None if a is None else e.own(a) for a in (norm.x, *norm.affine, *norm.statistics)]
            return e.on_runtime("batch_norm", *args, *norm.options)
        copied = self._copy(n, lambda a: self._operand(n, a))
        if scope.kind == OWN_ROWS and "spare_row" in n.meta:
            copied.target = n.meta["spare_row"]
        return copied

    def _whole(self, n: fx.Node) -> Any:
        e, scope = self.e, scope_of(n)
        if n in self._stage_of:
            return self._emit_stage(self._stage_of[n])[n]
        if scope.kind == CONSTANT:
            own, name = e.own(n), e.program.parameter(n)
            trained = scope.grad if name is None else e.program.parameters[name].requires_grad
            # every rank has all of its gradient, and the reducer averages over ranks
            return e.call(scale_grad, own, 1 / e.ranks) if trained else own
        if scope.kind == SIZE:
            return self._size(n, Version.WHOLE)
        if scope.drawn and not isinstance(n.target, Leaf):
            args, kwargs = fx.map_arg((n.args, dict(n.kwargs)), self._global)
            return e.on_runtime("draw", n.target, *args, **kwargs)
        if n in self.partition.lookups:
            return e.lookup(n, self._global(self.partition.lookups[n][1].ids), self._global(operand(n)))
        return self._copy(n, self._global, scope.drawn)

    def _sized(self, n: fx.Node) -> Any:
        return self._copy(n, lambda a: self.e.value(a, Version.SIZED if scope_of(a).sized else Version.OWN))

    def _copy(self, n: fx.Node, find: Callable[[fx.Node], Any], drawn: bool = False) -> fx.Node:
        """A node outside the region as it is, with other operands."""
        if not isinstance(n.target, Leaf):
            return self.graph.node_copy(n, find)
        args = (self.e.runtime, *fx.map_arg(n.args, find))
        target = LeafOnRanks(n.target, drawn=drawn, own_rows=scope_of(n).kind == OWN_ROWS, reach=reach_of(n))
        new = self.graph.create_node(n.op, target, args, {}, n.name)
        new.meta = dict(n.meta)
        return new

    # ---- between versions

    def _emit_stage(self, stage: CouplingStage) -> dict[fx.Node, fx.Node]:
        """One collective for all values of a stage: their versions for the global batch."""
        e = self.e
        for n, version in self.coupling.before(stage):
            self._emit_versions(n, [Version(version)])
        result = {}
        if stage.kind == "gather":
            rows = [scope_of(n).rows or Rows() for n in stage.members]
            layouts = [[r.dim, r.outer, r.inner] for r in rows]
            collected = e.on_runtime("gather_rows", [e.own(n) for n in stage.members], layouts)
        else:
            collected = e.on_runtime("sum_terms", [self._term(n) for n in stage.members])
        for i, n in enumerate(stage.members):
            result[n] = e.item(collected, i)
            if stage.kind != "gather" and n.target in (aten.mean.default, aten.mean.dim):
                result[n] = e.call(aten.div.Tensor, result[n], self._count(n))
            e.put(n, Version.WHOLE, result[n])
        return result

    def _term(self, n: fx.Node) -> fx.Node:
        """A rank's term of a sum, or of a mean's."""
        args, dtype = signature(n), {"dtype": value(n).dtype} if signature(n)["dtype"] is not None else {}
        x, dims = self.e.own(n.all_input_nodes[0]), args.get("dim") or list(range(value(operand(n)).dim()))
        return self.e.call(aten.sum.dim_IntList, x, dims, args.get("keepdim", False), **dtype)

    def _count(self, n: fx.Node) -> Any:
        """Elements of the global batch that a mean is over."""
        x = n.all_input_nodes[0]
        rows, dims, count = scope_of(x).rows, signature(n).get("dim"), value(x).dim()
        assert rows is not None
        over = [d % count for d in dims] if dims else range(count)
        result: Any = self.e.call(operator.mul, self.e.rows, rows.multiple)
        for d in over:
            if d == rows.dim:
                continue
            size = value(x).shape[d]
            factor = size if isinstance(size, int) else self.e.call(aten.sym_size.int, self.e.own(x), d)
            result = self.e.call(operator.mul, result, factor)
        return result

    def _from_global(self, n: fx.Node, whole: Any) -> Any:
        """What local nodes and the user take of a value that every rank has."""
        if n in self.coupling.slices:
            rows = scope_of(n).rows or Rows()
            if not scope_of(n).grad and is_tensor(n) and differentiable(value(n)):
                whole = self.e.call(aten.detach.default, whole)
            return self.e.on_runtime("slice_rows", whole, rows.dim, rows.outer, rows.inner)
        return self.e.on_runtime("spread", whole) if n in self.coupling.spreads and scope_of(n).grad else whole

    def _size(self, n: fx.Node, version: Version) -> Any:
        """A number made from the batch size."""
        find = self.e.own if version == Version.OWN else self._global
        if n.target is not aten.sym_size.int:
            return self.graph.node_copy(n, find)
        x, terms = n.all_input_nodes[0], size_terms(self.e.program, n)
        if terms is None:
            find = self._global if scope_of(x).kind == GLOBAL else self.e.own
            return self.graph.node_copy(n, find)
        if version == Version.OWN and (self.e.has(x, version) or scope_of(x).kind == OWN_ROWS):
            return self.graph.node_copy(n, self.e.own)
        result: Any = terms[-1]
        rows = self.e.rows if version == Version.WHOLE else self.e.on_runtime("own_rows")
        for c in reversed(terms[:-1]):  # Horner
            result = self.e.call(operator.mul, rows, result) if result != 1 else rows
            result = self.e.call(operator.add, result, c) if c else result
        return result

    # ---- outputs, tables that are gathered or fetched

    def outputs(self, outputs: Sequence[fx.Node]) -> list[Any]:
        result = [self.e.own(o) for o in outputs]
        joined = [i for i, o in enumerate(outputs) if scope_of(o).grad]
        several = len(joined) > 1 and (self.coupling.backward or self.e.layout.wholes)
        if self.e.ranks > 1 and (several or self.e.layout.leaves_backward):
            together = self.e.on_runtime("together", [result[i] for i in joined])
            for position, i in enumerate(joined):
                result[i] = self.e.item(together, position)
        # what is equal on all ranks counts once: averaging over ranks is right for every kind of loss
        return [
            self.e.on_runtime("output", x) if scope_of(o).rows is not None else x
            for o, x in zip(outputs, result, strict=True)
        ]

    def _emit_product(self, n: fx.Node) -> fx.Node:
        e, products = self.e, self.partition.products
        number = list(products).index(n)
        _, x = products[n]
        bias = x.bias
        weight = e.value(x.weight, Version.PIECE if x.rows else Version.OWN)
        if bias is not None:
            name = e.program.parameter(bias)
            bias = e.own(bias)
            if name is None or self.partition.pieces[name].is_replicated:
                # each owner adds its part; the reducer divides by the number of ranks what the product has divided
                start, size, _ = e.layout.vocabularies[number].parts.get(e.rank, (0, 0, 0))
                bias = e.call(scale_grad, e.call(aten.narrow.default, bias, 0, start, size), e.ranks)
        ids = [self._operand(n, r[1]) for r in x.requests if r[0] == "select"]
        return e.on_runtime("vocabulary", number, self._operand(n, x.x), weight, bias, ids)

    def gather_tables(self) -> None:
        names = [t.name for t in self.e.layout.wholes]
        gathered = self.e.on_runtime("gather_tables", *(self.e.weight(name) for name in names))
        for i, name in enumerate(names):
            self.e.put(self.e.weights[name], Version.OWN, self.e.item(gathered, i))

    def _fetch_ids(self, number: int) -> list[fx.Node]:
        by_name = {n.name: x.ids for n, (_, x) in self.partition.lookups.items()}
        return [self.e.own(by_name[name]) for name in self.e.layout.fetches[number].names]

    def fetched_early(self) -> list[fx.Node]:
        """The lookups whose rows are under way from the start."""
        if not self.e.layout.early:
            return []
        return [n for n in self.partition.lookups if self._fetched.get(n.name, (-1,))[0] == 0]

    def begin_fetch(self, ids: list[fx.Node]) -> None:
        begun = self.e.call(begin_fetch, self.e.runtime, self.e.rows_local, ids, self._fetch_ids(0))
        self.e.rows = self.e.item(begun, 0)
        self._fetches[0] = self.e.call(fetch_start, self.e.runtime, self.e.item(begun, 1))

    def fetch_rows(self, number: int) -> None:
        fetch, begun = self.e.layout.fetches[number], self._fetches[number]
        weights = [self.e.weight(t.name) for t in fetch.tables]
        if fetch.dynamic:
            created = {o.name for o, x in self.partition.lookups.values() if x.dynamic is not None and x.dynamic.create}
            creates = [t.name in created for t in fetch.tables]
            self._fetches[number] = self.e.call(pull_rows, self.e.runtime, begun, creates, *weights)
        else:
            self._fetches[number] = self.e.call(fetch_rows, self.e.runtime, begun, *weights)

    def _emit_fetched(self, n: fx.Node) -> fx.Node:
        number, index = self._fetched[n.name]
        _, x = self.partition.lookups[n]
        wait, take_one = (fetch_wait, take) if x.dynamic is None else (pull_wait, take_pulled)
        if number not in self._fetched_rows:
            if number not in self._fetches:
                begun = self.e.call(fetch_late, self.e.runtime, number, self._fetch_ids(number))
                self._fetches[number] = self.e.call(fetch_start, self.e.runtime, begun)
                self.fetch_rows(number)
            under_way = self._fetches[number]
            fetching = self.e.item(under_way, 0)
            self._fetched_rows[number] = fetching, self.e.call(wait, self.e.runtime, under_way)
        taken = self.e.call(take_one, *self._fetched_rows[number], index, x.mode)
        if x.dynamic is None and x.mode is None:
            fetch = self.e.layout.fetches[number]
            self.e.taken[taken] = fetch.class_of[fetch.lookups[index]]
        return taken

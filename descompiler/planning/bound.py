"""What no plan can be below: a relaxation of the joint choice of forms and aggregation points, solved exactly.

Let T be the tables. A plan gives table t a form f(t), which keeps its lookups outside the substituted region, at a cost
a(t, f) that nothing else changes (its gradients are reduced, its rows fetched), or puts them inside; and it chooses the
set I of nodes inside (`descompiler.region.cut`). The bytes that all ranks send are at least

    sum over t outside  a(t, f(t))
  + sum over t inside   e(t, f(t))            its ids; ids that n tables could share are counted as an n-th for each
  + sum over v in I with a user outside, over the parts p of v that come from tables inside    2 (N-1) b s |p|
  + sum over weights and parts p   2 (N-1) s |weight of p|     unless the weight is cut: its node and p are inside
  + the all-reduce of the weights that no rule can cut

A value's parts are what single tables contribute, as long as the rules keep them apart (`Shard`); once they are summed,
the value is one part, of full width, whatever the number of ranks that hold terms of it. The relaxation forgets three
things: that several ranks may hold terms of one part, that a node's parts leave the region together, and that a node
which mixes several parts needs them all inside. Each only lowers the cost, and what is left is a minimum cut over the
parts, tables being nodes of it (`Relaxation.cut_graph`).

The busiest rank sends at least the mean over ranks. It also sends at least one rank's share of what leaves the region:
where a sum over tables of p elements a row leaves, a rank that has a term of it sends (N-1) b s ceil(p / c), c being
the most column shards of a table. So the bound (`Relaxation.solve`) is the least, over the widths q of such sums, of

    max(the minimum cut in which no wider sum leaves,  (N-1) b s ceil(q / c) + the all-reduce of what no rule can cut)

and, for q = 0, of the cut in which none does.

Which operators a rule can place is asked three times: with every table on a rank of its own, where placements show the
parts; with all tables on one rank, where every rule that needs its operands together says yes; and with every table's
rows on two ranks, as terms go where whole values don't.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import networkx as nx
from torch import fx

from descompiler.graph.nodes import elements_per_row, tail
from descompiler.graph.program import Program
from descompiler.layout.border import Columns
from descompiler.layout.pieces import ALL, Pieces
from descompiler.layout.placement import LOCAL, Disjoint, Owned, Partial, Region, Shard
from descompiler.layout.spans import Spans, alike
from descompiler.region import flow
from descompiler.region.cut import Candidates, Weights
from descompiler.region.place import place
from descompiler.region.rule import Placed, Rule
from descompiler.tables.form import Split
from descompiler.tables.tables import Lookup, Operator

Least = tuple[int | None, int | None]
"""What a table costs at least outside of the region, and inside; None where no form puts it there."""

MIXED = ""
"""The part of a value to which several tables contribute."""


@dataclass(frozen=True)
class FormCost:
    """What a form costs a table by itself: bytes that all ranks send.

    Attributes
    ----------
    inside : bool
        Whether its lookups are in the region: then these are the ids', and what leaves the region comes on top.
    column_shards : int
        Ranks that have columns of its results; 1 if they have whole ones.
    """

    inside: bool
    sent_bytes: float
    column_shards: int = 1


@dataclass(frozen=True)
class Alone(Split):
    """A split of the relaxation: a table of which one rank has all; or every rank has, and its lookups are outside."""

    def placement(self, operator: Operator, lookup: Lookup) -> Region | None:
        return None if self.pieces.is_replicated else Owned(self.pieces.owners[0])

    def columns(self, operator: Operator, lookup: Lookup) -> Spans[Columns]:
        return alike(self.pieces.owners, None)


class InTerms(Alone):
    """A split of the relaxation: a table of which each rank has some rows, and its lookups are the ranks' terms."""

    def placement(self, operator: Operator, lookup: Lookup) -> Region | None:
        ranks = self.pieces.owners
        if lookup.mode is not None:
            return Partial(ranks)
        return Disjoint(ranks, lookup.ids.name, 1 + len(tail(lookup.ids)))


@dataclass(frozen=True)
class Bound:
    """The relaxation's optimum.

    Attributes
    ----------
    sent_bytes : float
        By the busiest rank in a step.
    inside : frozenset of str
        The tables that it puts in the region.
    """

    sent_bytes: float
    inside: frozenset[str]


@dataclass
class Relaxation:
    """The relaxed problem of one program; `solve` it for any choice of forms that are still possible.

    Attributes
    ----------
    costs : mapping
        By table and form.
    fixed_bytes : float
        That all ranks send whatever is chosen, all dense weights' all-reduce included.
    """

    program: Program
    operators: Sequence[Operator]
    rules: Sequence[Rule]
    w: Weights
    costs: Mapping[str, Mapping[str, FormCost]]
    fixed_bytes: float
    solver: str = flow.DEFAULT
    _cuts: dict[tuple[tuple[Least, ...], int | None], tuple[int, frozenset[str]] | None] = field(default_factory=dict)
    _reduced: dict[int | None, nx.DiGraph] = field(default_factory=dict)

    def _place(self, owner: Callable[[int], int], ranks: int) -> Candidates:
        splits = {}
        for i, o in enumerate(self.operators):
            able = any(c.inside for c in self.costs[o.name].values())
            pieces = Pieces.whole(o.shape, owner(i), ranks) if able else Pieces.replicate(o.shape, ranks)
            splits[o.name] = Alone("", pieces)
        return place(self.program, self.operators, splits, self.rules, ranks)

    @cached_property
    def _apart(self) -> Candidates:
        return self._place(lambda i: i, max(len(self.operators), 2))

    @cached_property
    def _together(self) -> Candidates:
        return self._place(lambda i: 0, max(len(self.operators), 2))

    @cached_property
    def _in_terms(self) -> Candidates:
        """Terms meet values from outside where whole values don't: ``stack([terms, local])[:, 1]``."""
        splits: dict[str, Split] = {}
        for o in self.operators:
            able = any(c.inside for c in self.costs[o.name].values())
            splits[o.name] = (
                InTerms("", Pieces.even(o.shape, 0, 2)) if able else Alone("", Pieces.replicate(o.shape, 2))
            )
        return place(self.program, self.operators, splits, self.rules, 2)

    @cached_property
    def _placed(self) -> dict[fx.Node, Placed]:
        return {**self._in_terms.placed, **self._together.placed}

    @cached_property
    def parts(self) -> dict[fx.Node, dict[str, int]]:
        """Elements per row of each part of every node that a rule may place."""
        names = [o.name for o in self.operators]
        result: dict[fx.Node, dict[str, int]] = {}
        for node in self.program.graph.nodes:
            if node not in self._placed:
                continue
            answer = self._apart.placed.get(node)
            seen = [n for p in node.all_input_nodes for n in result.get(p, {}).values()]
            # what can't leave by itself leaves as what is made of it, which may be narrower
            elements = min(seen) if node in self._together.confined else elements_per_row(node)
            if answer is None:  # only where its operands are together: as narrow as any of their parts, at least
                result[node] = {MIXED: min([elements, *seen])}
            elif isinstance(answer.placement, Owned):
                result[node] = {names[answer.placement.rank]: elements}
            elif isinstance(answer.placement, Shard):
                size = sum(answer.placement.widths.values())
                widths = {names[r]: n for r, n in answer.placement.widths.items() if r != LOCAL}
                result[node] = {name: elements // size * n for name, n in widths.items()}
            else:
                result[node] = {MIXED: elements}
        return result

    @cached_property
    def _saved(self) -> list[tuple[int, fx.Node, str | None]]:
        """Bytes saved by cutting a weight for one part of its node's operand: (bytes, node, part or None for any)."""
        result: list[tuple[int, fx.Node, str | None]] = []
        names = [o.name for o in self.operators]
        for node, together in self._placed.items():
            answer = self._apart.placed.get(node)
            for name, pieces in together.pieces.items():
                if not self.program.parameters[name].requires_grad:
                    continue
                cut = answer.pieces.get(name) if answer is not None else None
                if cut is None:
                    own = int(pieces.sizes[:ALL].sum())
                    result.append((self._all_reduce(pieces, own), node, None))
                else:
                    result += [(self._all_reduce(cut, cut.own_size(r)), node, names[r]) for r in cut.owners]
                    # what is mixed of several tables: if each is divided by columns, so may be its part of the weight
                    if shared := cut.shared_size():
                        result.append((self._all_reduce(cut, shared), node, MIXED))
        return result

    def _all_reduce(self, pieces: Pieces, size: int) -> int:
        """Bytes that all ranks send to reduce ``size`` of the divided dimension."""
        whole = pieces.shape[pieces.dim] if pieces.shape else 1
        return 2 * (self.w.ranks - 1) * self.w.itemsize * (prod(pieces.shape) // max(whole, 1) * size)

    def solve(self, forms: Mapping[str, Sequence[str]]) -> Bound:
        """The least that the busiest rank sends, in any plan with these forms."""
        w = self.w
        shards = max((self.costs[n][f].column_shards for n, allowed in forms.items() for f in allowed), default=1)
        uncut = (self.fixed_bytes - sum(b for b, _, _ in self._saved)) / w.ranks
        best: Bound | None = None
        for widest in [0, *sorted({p[MIXED] for p in self.parts.values() if MIXED in p})]:
            share = (w.ranks - 1) * w.rows * w.narrow_size_of(None) * -(-widest // shards) + (uncut if widest else 0)
            if best is not None and share >= best.sent_bytes:
                break  # and so are all wider ones
            cut = self.cut(forms, widest)
            bound = Bound(max(cut.sent_bytes, share), cut.inside)
            if best is None or bound.sent_bytes < best.sent_bytes:
                best = bound
        assert best is not None
        return best

    def cut(self, forms: Mapping[str, Sequence[str]], widest: int | None = None) -> Bound:
        """The least mean over ranks, of plans in which no sum of more than ``widest`` elements leaves the region."""
        fixed = self.fixed_bytes - sum(b for b, _, _ in self._saved)
        least = []
        for o in self.operators:
            costs = [self.costs[o.name][f] for f in forms[o.name]]
            out = min((c.sent_bytes for c in costs if not c.inside), default=None)
            into = min((c.sent_bytes for c in costs if c.inside), default=None)
            if into is None:
                assert out is not None
                fixed += out
            # cut off to whole bytes so that flows are exact
            least.append((None if out is None else int(out), None if into is None else int(into)))
        found = self._cut(tuple(least), widest)
        if found is None:  # a table that must be inside can only leave as a wider sum
            return Bound(float("inf"), frozenset())
        cost, inside = found
        return Bound((fixed + cost) / self.w.ranks, inside)

    def _cut(self, least: tuple[Least, ...], widest: int | None) -> tuple[int, frozenset[str]] | None:
        """The minimum cut and the tables inside, remembered: many choices of forms have the same least costs."""
        key = least, widest
        if key not in self._cuts:
            self._cuts[key] = None
            if (found := flow.solve(self.cut_graph(least, widest), self.solver)) is not None:
                cost, side = found
                self._cuts[key] = cost, frozenset(o.name for o in self.operators if ("table", o.name) in side)
        return self._cuts[key]

    def cut_graph(self, least: Sequence[Least], widest: int | None) -> nx.DiGraph:
        """The reduced graph whose minimum cut is the bound, given what each table costs at least outside and inside."""
        if widest not in self._reduced:
            tables = [("table", o.name) for o in self.operators]
            self._reduced[widest] = flow.reduced(self._parts_graph(widest), tables)
        graph = self._reduced[widest].copy()
        for o, (out, into) in zip(self.operators, least, strict=True):
            table = ("table", o.name)
            flow.add(graph, table, flow.SINK, into)  # beside what it costs to leave, if it leaves as it is
            if into is not None:
                flow.add(graph, flow.SOURCE, table, out)
        return graph

    def _parts_graph(self, widest: int | None) -> nx.DiGraph:
        """`cut_graph` without what tables cost: parts as they are inside, and as they leave, weights that are cut."""
        graph, w = nx.DiGraph(), self.w
        graph.add_nodes_from((flow.SOURCE, flow.SINK))
        each = 2 * (w.ranks - 1) * w.rows * w.narrow_size_of(None)
        for o in self.operators:
            table = ("table", o.name)
            graph.add_node(table)
            for x in o.lookups:
                if x.node in self.parts:
                    graph.add_edge(table, ("in", x.node, o.name))
                    graph.add_edge(("in", x.node, o.name), table)
        for v, parts in self.parts.items():
            for part, elements in parts.items():
                wide = part == MIXED and widest is not None and elements > widest
                leaves = {} if wide else {"capacity": each * elements}
                graph.add_edge(("in", v, part), ("out", v, part), **leaves)
                for u in v.users:
                    if u not in self.parts:
                        graph.add_edge(("out", v, part), flow.SINK)
                    elif (below := self._below(part, u)) is not None:
                        graph.add_edge(("out", v, part), ("in", u, below))
            self._close(graph, v)
        for number, (saved, node, of) in enumerate(self._saved):
            graph.add_edge(flow.SOURCE, ("saved", number), capacity=saved)
            parts = self.parts[node]
            for part in parts if of is None else (p for p in (of, MIXED) if p in parts):
                graph.add_edge(("saved", number), ("in", node, part))
            if of not in (None, MIXED):
                graph.add_edge(("saved", number), ("table", of))
        return graph

    def _below(self, part: str, user: fx.Node) -> str | None:
        """The part of a user that a part goes into; None if the user takes another part of the value."""
        parts = self.parts[user]
        return part if part in parts else MIXED if MIXED in parts else None

    def _close(self, graph: nx.DiGraph, v: fx.Node) -> None:
        """A part that comes from one part alone is inside only if that is."""
        above: dict[str | None, list[tuple[fx.Node, str]]] = {}
        for a in v.all_input_nodes:
            for q in self.parts.get(a, ()):
                above.setdefault(self._below(q, v), []).append((a, q))
        for part in self.parts[v]:
            if len(sources := above.get(part, [])) == 1:
                graph.add_edge(("in", v, part), ("in", *sources[0]))

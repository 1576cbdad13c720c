"""Partitions: one program, divided among ranks in one way. What is asked of it is found once, and only when asked.

The planner makes one for every choice that it tries, to count what crosses (`descompiler.planning.exchanges`) and what
ranks hold (`descompiler.planning.memory`); the chosen one is emitted (`descompiler.emit.emit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from descompiler.classify.coupling import Coupling, couple
from descompiler.classify.scope import GLOBAL, scope_of
from descompiler.errors import PlanError
from descompiler.graph.arguments import BatchNormCall, training_norm
from descompiler.graph.nodes import tail, target_name, user_line
from descompiler.graph.program import Program
from descompiler.graph.rewrite import ancestors, descendants
from descompiler.layout.id_checks import Check
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import Owned, Placement, Shard
from descompiler.region.cut import Candidates, Cut
from descompiler.region.known import Known
from descompiler.tables.form import Split, form_named
from descompiler.tables.products import bias_pieces, checks_of, outputs_in_order
from descompiler.tables.tables import Lookup, Operator, Output, lookups_by_node
from descompiler.tables.totals import Total, divided


@dataclass(frozen=True, eq=False)
class Partition:
    """A program with everything divided: each table's split, the pieces of each parameter, the region, for N ranks.

    Attributes
    ----------
    candidates : Candidates
        The nodes that rules can place, and where.
    cut : Cut
        Those that are in the region, and those that leave it.
    planned : mapping of str to Pieces, optional
        What ranks hold already, by a plan for another graph of the model (other training flags).
    wire_dtype : torch.dtype or None
        As `descompiler.layout.layout.Layout` has it.
    global_ids : bool
        Whether every rank is given the global batch of what lookups read.
    shared : Known, optional
        What other partitions of the program have found of it.
    """

    program: Program
    operators: Sequence[Operator]
    splits: Mapping[str, Split]
    candidates: Candidates
    cut: Cut
    ranks: int
    planned: Mapping[str, Pieces] | None = None
    wire_dtype: torch.dtype | None = None
    global_ids: bool = False
    shared: Known | None = None

    @cached_property
    def known(self) -> Known:
        """What is the same in all partitions of the program."""
        return Known(self.program) if self.shared is None else self.shared

    @cached_property
    def pieces(self) -> Mapping[str, Pieces]:
        """Of every parameter: tables by their splits, weights inside and biases of products by co-location, the others
        replicated."""
        if self.planned is not None:
            return self.planned
        result = self.known.replicated(self.ranks) | {n: s.pieces for n, s in self.splits.items()}
        for node in self.inside:
            result.update(self.candidates.placed[node].pieces)
        return result | bias_pieces(self.program, self.products, self.splits)

    # ---- the region

    @property
    def inside(self) -> frozenset[fx.Node]:
        """The nodes of the region."""
        return self.cut.inside

    @property
    def exits(self) -> tuple[fx.Node, ...]:
        """The nodes whose values leave the region."""
        return self.cut.exits

    @cached_property
    def placements(self) -> dict[fx.Node, Placement]:
        """Where each node of the region has its value."""
        return {n: self.candidates.placed[n].placement for n in self.inside}

    @cached_property
    def readers(self) -> dict[fx.Node, list[tuple[Operator, Lookup]]]:
        """The ids that enter the region, and the lookups that read them, in the order of the graph."""
        result: dict[fx.Node, list[tuple[Operator, Lookup]]] = {}
        for n in self.program.graph.nodes:
            if n in self.lookups and n in self.inside:
                result.setdefault(self.lookups[n][1].ids, []).append(self.lookups[n])
        return result

    @cached_property
    def given(self) -> tuple[fx.Node, ...]:
        """The inputs that are the global batch's, if ids are: those that lookups in the region read, and nothing else.

        Raises
        ------
        PlanError
            If anything else reads one, or ids are made of anything else.
        """
        if not self.global_ids or not self.inside:
            return ()
        graph, sources = self.program.graph, self.program.sources
        needed = ancestors(self.readers)
        inputs = {n for n in needed if n.op == "placeholder" and sources[n.name].kind == "input"}
        for n in graph.nodes:
            if n in needed and (n in inputs or not inputs.isdisjoint(ancestors([n]))):
                for u in n.users:
                    if u not in needed and u not in self.inside and not self._is_for_lookups(u):
                        raise PlanError(
                            f"ids='global': {target_name(u)} reads {n.name!r} too, on a rank's own rows "
                            f"({user_line(u)}); give ids that only lookups read, or leave ids='own'"
                        )
        return tuple(n for n in graph.nodes if n in inputs)

    def _is_for_lookups(self, n: fx.Node) -> bool:
        """Whether it makes rows of a stand-in, for lookups in the region, which have the ids."""
        return n.target is torch.ops.descompiler.stand_in_rows.default and self.inside.issuperset(n.users)

    @cached_property
    def norms(self) -> list[BatchNormCall]:
        """Batch norms in the region whose running statistics move."""
        norms = [training_norm(n) for n in self.program.graph.nodes if n in self.inside]
        return [norm for norm in norms if norm is not None and norm.statistics[0] is not None]

    def channels(self, norm: BatchNormCall) -> list[list[int]]:
        """The channels of a batch norm in the region that each rank normalises."""
        placement = self.placements[norm.node]
        if isinstance(placement, Shard):
            return [placement.positions(r) for r in range(self.ranks)]
        return [list(range(tail(norm.node)[0])) if placement == Owned(r) else [] for r in range(self.ranks)]

    @cached_property
    def shared_weights(self) -> dict[str, Pieces]:
        """Trained co-located weights of which every rank holds a slice."""
        trained = self.known.trained
        return {
            name: p
            for node in self.program.graph.nodes
            if node in self.inside
            for name, p in self.candidates.placed[node].pieces.items()
            if p.shared_size() and name in trained
        }

    # ---- outside of it

    @cached_property
    def coupling(self) -> Coupling:
        """Which versions of values are computed, since rows of the batch mix."""
        return couple(self.program, self.inside)

    @cached_property
    def lookups(self) -> dict[fx.Node, tuple[Operator, Lookup]]:
        """Every lookup, with its table."""
        return lookups_by_node(self.operators)

    @cached_property
    def fetched(self) -> tuple[list[tuple[Operator, Lookup]], list[list[tuple[Operator, Lookup]]]]:
        """The lookups that are fetched: those of which the header tells, and the others, together as they are fetched.

        Of ids that are known at the start the header tells, but of dynamic tables only where there are no static ones.
        """
        if self.ranks == 1:
            return [], []
        splits = self.splits
        users = lookups_by_node([o for o in self.operators if form_named(splits[o.name].form).fetches(splits[o.name])])
        late = descendants(self.program.graph, {*self.inside, *users}) | self.known.coupled
        order = [users[n] for n in self.program.graph.nodes if n in users]
        known = [u for u in order if u[1].ids not in late]
        early = [u for u in known if u[1].dynamic is None]
        dynamic = [u for u in known if u[1].dynamic is not None]
        by_themselves = [[u] for u in order if u[1].ids in late]
        return (early, [dynamic, *by_themselves]) if early and dynamic else (early or dynamic, by_themselves)

    @cached_property
    def wholes(self) -> dict[str, fx.Node]:
        """The tables that the program uses, and ranks gather for that."""
        if self.ranks == 1:
            return {}
        used = [(name, n) for n in self.program.graph.nodes if n.users and (name := self.program.parameter(n))]
        return {name: n for name, n in used if name in self.splits and self.splits[name].whole}

    @cached_property
    def products(self) -> dict[fx.Node, tuple[Operator, Output]]:
        """The products with divided tables, in the order of the graph."""
        return outputs_in_order(self.program, self.operators, self.splits)

    @cached_property
    def computed(self) -> dict[fx.Node, tuple[str, Mapping[fx.Node, int]]]:
        """What is computed of divided tables and divided with them: by which of them, and along which dimensions.

        Column by column, of tables whose computed rows are looked up in the region; row by row, for products.
        """
        result: dict[fx.Node, tuple[str, Mapping[fx.Node, int]]] = {}
        for n, (o, x) in self.lookups.items():
            if n in self.inside and x.computed is not None and o.group is not None:
                result.update(dict.fromkeys(o.group.dims, (o.group.tables[0], o.group.dims)))
        for o, product in self.products.values():
            result.update(dict.fromkeys(product.rows, (o.name, product.rows)))
        return result

    @cached_property
    def totals(self) -> dict[fx.Node, Total]:
        """Sums over all rows of divided tables."""
        return {t.node: t for t in divided(self.known.totals, self.splits)}

    @cached_property
    def early_checks(self) -> tuple[list[tuple[Operator, Lookup]], list[tuple[fx.Node, Check]]]:
        """Lookups whose ids, and targets that, are known before the header, and are checked then."""
        early, others = self.fetched
        sources = {*self.wholes.values(), *(x.node for lookups in (early, *others) for _, x in lookups)}
        late = descendants(self.program.graph, {*self.inside, *sources}) | self.known.coupled
        checked = [
            (o, x)
            for o, x in self.lookups.values()
            if x.ids not in late and x.ids.op != "get_attr" and scope_of(x.node).kind != GLOBAL
        ]
        return checked, [(n, c) for n, c in checks_of(self.operators) if n not in late]

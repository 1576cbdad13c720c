"""The objective: what a choice of forms costs, counted by placing, cutting and laying out its programs.

A choice determines a plan:

    owners        of whole tables, by longest processing time first (`assign`); of rows, by what is asked for. Where
                  that does not fit into memory, by what is held
    placements    of every operator that a rule keeps in the region (`descompiler.region.place.place`)
    aggregation   the minimum cut, or the lookups themselves where the busiest rank then sends less (`Objective.trial`)

Its price is the bytes that the busiest rank sends in a step or, on a cluster, the seconds of the step's collectives
and, if the cluster's rates are known, of what the busiest rank does itself (`descompiler.planning.work`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial

import torch

from descompiler.errors import PlanError
from descompiler.graph.nodes import elements_per_row
from descompiler.graph.program import Program
from descompiler.layout.layout import Layout
from descompiler.layout.spans import Spans
from descompiler.layout.statistics import Statistics
from descompiler.layout.transfer import crosses_in
from descompiler.planning.cluster import Cluster
from descompiler.planning.exchanges import layout_of
from descompiler.planning.memory import Memory, memory_of
from descompiler.planning.pins import Forbidden
from descompiler.planning.work import Work
from descompiler.region.cut import Weights, at_lookups, minimum_cut
from descompiler.region.flow import DEFAULT, SOLVERS
from descompiler.region.known import Known
from descompiler.region.partition import Partition
from descompiler.region.place import place
from descompiler.region.rule import Rule
from descompiler.tables.form import Choice, Split, form_named, split_as
from descompiler.tables.tables import Operator

WIRE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What values may be rounded to where they cross."""


IDS = ("own", "global")
"""Whose rows the ids are that each rank is given: its own, or those of all."""


@dataclass(frozen=True)
class Terms:
    """What a plan has to satisfy, besides pins.

    Attributes
    ----------
    forbid : mapping
        Forms that tables must not take.
    cluster : Cluster, optional
        Then seconds are minimised, not bytes; its memory is the limit if there is no other.
    memory_bytes : int, optional
        Limit of each rank.
    optimizer : str
        Whose state counts in memory: a key of `descompiler.cost_models.memory.STATE`. One that looks at whole rows
        (``OF_WHOLE_ROWS`` there) forbids that ranks have columns of them.
    effort : int
        Multiplies the choices that are tried: 1 is for compiling, more for a model that will run for weeks.
    statistics : Statistics, optional
        Of the ids; assumed if not given.
    solver : str
        Who finds the minimum cuts: a name of `descompiler.region.flow.SOLVERS`. All find the same.
    wire_dtype : torch.dtype, optional
        What wider values are rounded to where they cross (`descompiler.layout.layout.Layout`).
    ids : {"own", "global"}
        Whose rows the ids are that each rank is given.
    """

    forbid: Forbidden = field(default_factory=dict)
    cluster: Cluster | None = None
    memory_bytes: int | None = None
    optimizer: str = "adagrad"
    effort: int = 1
    statistics: Statistics | None = None
    solver: str = DEFAULT
    wire_dtype: torch.dtype | None = None
    ids: str = IDS[0]

    def __post_init__(self) -> None:
        SOLVERS.named(self.solver)
        if self.ids not in IDS:
            raise PlanError(f"ids={self.ids!r}; it is one of {', '.join(map(repr, IDS))}")
        if self.wire_dtype not in (None, *WIRE_DTYPES):
            names = ", ".join(map(str, WIRE_DTYPES))
            raise PlanError(f"wire_dtype={self.wire_dtype!r}; it is one of {names}, or None: nothing is rounded")

    @property
    def limit_bytes(self) -> int | None:
        if self.memory_bytes is not None or self.cluster is None:
            return self.memory_bytes
        return self.cluster.memory_bytes


@dataclass
class Trial:
    """One choice of forms, with all that follows from it."""

    partition: Partition
    layout: Layout
    aggregate: str
    score: Score
    memory: Spans[Memory]
    work_s: float


@dataclass(frozen=True, order=True)
class Score:
    """What trials are compared by, in this order."""

    missing_bytes: int  # of the rank that is farthest above the limit of memory
    price: float  # in units of the objective
    price_bytes: int
    calls: int  # of collectives


class Objective:
    """Prices choices of forms for one program.

    Attributes
    ----------
    statistics : Statistics
        Of the ids; assumed if none are given.
    unique : dict of str to float
        Expected unique ids of a rank's batch, by table.
    """

    def __init__(
        self,
        program: Program,
        operators: Sequence[Operator],
        rules: Sequence[Rule],
        w: Weights,
        terms: Terms,
    ):
        self.program, self.operators, self.rules, self.w, self.terms = program, operators, rules, w, terms
        self.split = cache(split_as)
        self.choice = cache(self._choice)

    @cached_property
    def statistics(self) -> Statistics:
        return self.terms.statistics or Statistics.assumed(o.table for o in self.operators)

    def _choice(self, o: Operator, form: str, by_memory: bool = False) -> Choice:
        """Boundaries of rows, and hot rows, by statistics; with ``by_memory``, ranks hold equally many rows."""
        size = crosses_in(o.dtype, self.w.wire_dtype).itemsize
        return form_named(form).choose(o, self.w.ranks, self.statistics, self.w.rows, by_memory, size)

    @cached_property
    def unique(self) -> dict[str, float]:
        """Expected unique ids of a rank's batch, by table."""
        return {o.name: self.statistics.unique(o.name, self.w.rows) for o in self.operators}

    @cached_property
    def work(self) -> Work | None:
        """What ranks do themselves; None where nothing is known of it."""
        cluster = self.terms.cluster
        if cluster is None or cluster.rates is None:
            return None
        return Work(self.w, self.unique, cluster.rates, cluster.flops_per_s)

    @cached_property
    def known(self) -> Known:
        """What all partitions that are tried have in common."""
        return Known(self.program)

    def trial(self, forms: Mapping[str, str]) -> Trial:
        """Assign, place, cut and price one choice."""
        found: list[Trial] = []
        for by_memory in (False, True):
            choice = partial(self.choice, by_memory=by_memory)
            splits = assign(self.operators, forms, self.w.ranks, by_memory=by_memory, split=self.split, choice=choice)
            candidates = place(self.program, self.operators, splits, self.rules, self.w.ranks)
            cuts = {"cut": minimum_cut(self.program, candidates, self.w, solver=self.terms.solver)}
            if cuts["cut"].exits != (other := at_lookups(candidates)).exits:
                cuts["lookups"] = other
            for aggregate, cut in cuts.items():
                of = self.program, self.operators, splits, candidates, cut, self.w.ranks
                partition = Partition(*of, None, self.w.wire_dtype, self.w.global_ids, self.known)
                found.append(self._price(partition, aggregate))
            best = min(found, key=lambda t: t.score)
            if not best.score.missing_bytes:
                break
        return best

    def _price(self, partition: Partition, aggregate: str) -> Trial:
        limit, layout = self.terms.limit_bytes, layout_of(partition)
        every = layout.predict_kinds(self.w.rows, self.w.itemsize, self.statistics)
        memory: Spans[Memory] = ()
        missing = 0
        if limit is not None:
            memory = self.memory(partition)
            missing = max(0, max(m.total for _, _, m in memory) - limit)
        price_bytes = max(t.total for t in every)
        cluster = self.terms.cluster
        work_s = 0.0 if self.work is None else float(self.work.seconds(partition).max())  # the busiest rank's
        price = float(price_bytes) if cluster is None else cluster.seconds(every) + work_s
        score = Score(missing, price, price_bytes, max(t.calls for t in every))
        return Trial(partition, layout, aggregate, score, memory, work_s)

    def memory(self, partition: Partition) -> Spans[Memory]:
        return memory_of(partition, self.w, self.terms.optimizer, self.unique)


def assign(
    operators: Sequence[Operator],
    forms: Mapping[str, str],
    ranks: int,
    *,
    by_memory: bool = False,
    split: Callable[[Operator, str, int, Choice | None], Split] = split_as,
    choice: Callable[[Operator, str], Choice] = lambda operator, form: Choice(),
) -> dict[str, Split]:
    """Splits in given forms; tables with owners go to ranks by longest processing time first (Graham, 1969).

    Tables that read the same ids share a rank. The load is what they send, elements a row, then bytes held; the other
    way round with ``by_memory``.
    """
    groups: dict[str, list[Operator]] = {}
    splits: dict[str, Split] = {}
    for o in operators:
        if not form_named(forms[o.name]).has_owners:
            splits[o.name] = split(o, forms[o.name], ranks, choice(o, forms[o.name]))
        else:
            groups.setdefault(o.lookups[0].ids.name, []).append(o)

    def load(group: Sequence[Operator]) -> tuple[int, int]:
        sent = sum(elements_per_row(x.node) for o in group for x in o.lookups)
        size = sum(o.size_bytes for o in group)
        return (size, sent) if by_memory else (sent, size)

    least = [(0, 0, r) for r in range(ranks)]
    for group in sorted(groups.values(), key=load, reverse=True):
        if all(o.starts is not None and o.starts == group[0].starts for o in group):
            owners = tuple(_field_owners(group[0], ranks))
            splits.update({o.name: split(o, forms[o.name], ranks, Choice(field_owners=owners)) for o in group})
            continue
        first, second, owner = least[0]
        more = load(group)
        heapq.heapreplace(least, (first + more[0], second + more[1], owner))
        splits.update({o.name: split(o, forms[o.name], ranks, Choice(owner=owner)) for o in group})
    return splits


def _field_owners(o: Operator, ranks: int) -> list[int]:
    assert o.starts is not None
    sizes = [b - a for a, b in zip(o.starts, (*o.starts[1:], o.rows), strict=True)]
    count, rows = [0] * ranks, [0] * ranks
    owners = [0] * len(sizes)
    for f in sorted(range(len(sizes)), key=lambda f: -sizes[f]):
        owners[f] = min(range(ranks), key=lambda r: (count[r], rows[r], r))
        count[owners[f]] += 1
        rows[owners[f]] += sizes[f]
    return owners

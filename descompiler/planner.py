"""Planning: which form each table takes, and where its results are aggregated; the cheapest becomes the plan.

Given are a program with tables T, the forms F(t) that each may take, N ranks, a batch, and a limit M of memory. A
choice f in the product of the F(t) determines a plan:

    owners        of whole tables, by longest processing time first (`assign`)
    placements    of every operator that a rule keeps in the region (`descompiler.aggregate.place`)
    aggregation   the minimum cut, or the lookups themselves where the busiest rank then sends less (`Search.trial`)

    minimise      max over ranks r of bytes(r)     or, given a cluster, seconds of the collectives    (`Search._price`)
    subject to    weights + gradients + optimiser state + activations of every rank <= M              (`memory_of`)

over f (`Search.run`). Tables share aggregation points, so the price is no sum over tables. The search is a descent from
several starts (one form for all; each table's cheapest by itself; the relaxation's optimum) with three kinds of moves:
all tables of a class (same width, forms, ids and gradients) to another form, its m smallest or largest, single tables.
The relaxation of `descompiler.bound` is below every plan; with few tables the choice then is completed to the optimum
by branch and bound over it (`Search.complete`), else its distance is reported as the gap. All is counted, nothing
timed: the same inputs give the same plan anywhere.
"""

from __future__ import annotations

import fnmatch
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import prod
from typing import Any

import numpy as np
import sympy
from torch import fx

from descompiler.aggregate import Candidates, Cut, Weights, at_lookups, minimum_cut, place
from descompiler.bound import FormCost, Relaxation
from descompiler.cluster import COLLECTIVES, Cluster
from descompiler.communication import layout_of
from descompiler.computed import Group, groups_of, whole_notes
from descompiler.computed import notes_of as computed_notes
from descompiler.cost_models.symbols import L as IDS
from descompiler.cost_models.symbols import N, U, V, b, i, k, s
from descompiler.coupling import notes_of
from descompiler.errors import PlanError
from descompiler.form import Choice, Split, form_named, split_as
from descompiler.layout import Layout
from descompiler.memory import Memory, check_optimizer, memory_of
from descompiler.operators import Operator
from descompiler.outputs import bias_pieces, outputs_in_order
from descompiler.passes import FORMS as ALL_FORMS
from descompiler.pieces import Pieces
from descompiler.plan import Crossing, Plan, Table
from descompiler.program import Program, shape_of, tail, target_name, user_line
from descompiler.rule import Rule
from descompiler.statistics import Statistics
from descompiler.traffic import Traffic

FORMS = tuple(f.name for f in ALL_FORMS)

EXACT_TABLES = 12
"""Free tables up to which the choice is completed to the optimum, if the effort is enough."""

Forbidden = Mapping[str, str | Sequence[str]]
"""Table names or patterns to forms."""


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
        Whose state counts in memory: a key of `descompiler.cost_models.memory.STATE`.
    effort : int
        Multiplies the choices that are tried: 1 is for compiling, more for a model that will run for weeks.
    statistics : Statistics, optional
        Of the ids; assumed if not given.
    """

    forbid: Forbidden = field(default_factory=dict)
    cluster: Cluster | None = None
    memory_bytes: int | None = None
    optimizer: str = "adagrad"
    effort: int = 1
    statistics: Statistics | None = None

    @property
    def limit_bytes(self) -> int | None:
        if self.memory_bytes is not None or self.cluster is None:
            return self.memory_bytes
        return self.cluster.memory_bytes


@dataclass
class Trial:
    """One choice of forms, with all that follows from it."""

    splits: dict[str, Split]
    candidates: Candidates
    cut: Cut
    pieces: dict[str, Pieces]
    layout: Layout
    aggregate: str
    score: Score
    memory: list[Memory]


@dataclass(frozen=True, order=True)
class Score:
    """What trials are compared by, in this order."""

    missing_bytes: int  # of the rank that is farthest above the limit of memory
    price: float  # in units of the objective
    price_bytes: int
    calls: int  # of collectives


def parameter_pieces(
    program: Program, splits: Mapping[str, Split], candidates: Candidates, cut: Cut, ranks: int
) -> dict[str, Pieces]:
    """Pieces of every parameter: tables by their splits, weights inside by co-location, the others replicated."""
    result = {n: Pieces.replicate(tuple(p.shape), ranks) for n, p in program.parameters.items()}
    result.update({n: s.pieces for n, s in splits.items()})
    for node in cut.inside:
        result.update(candidates.placed[node].pieces)
    return result


def assign(
    operators: Sequence[Operator],
    forms: Mapping[str, str],
    ranks: int,
    *,
    by_memory: bool = False,
    split: Callable[[Operator, str, int, Choice | None], Split] = split_as,
    choice: Callable[[Operator, str], Choice] = lambda operator, form: Choice(),
) -> dict[str, Split]:
    """Splits in given forms; whole tables go to ranks by longest processing time first (Graham, 1969).

    Tables that read the same ids share a rank. The load is what they send, elements a row, then bytes held; the other
    way round with ``by_memory``.
    """
    groups: dict[str, list[Operator]] = {}
    splits: dict[str, Split] = {}
    for o in operators:
        if forms[o.name] != "field":
            splits[o.name] = split(o, forms[o.name], ranks, choice(o, forms[o.name]))
        else:
            groups.setdefault(o.lookups[0].ids.name, []).append(o)

    def load(group: Sequence[Operator]) -> tuple[int, int]:
        sent = sum(prod(tail(x.node)) for o in group for x in o.lookups)
        size = sum(o.size_bytes for o in group)
        return (size, sent) if by_memory else (sent, size)

    least = [(0, 0, r) for r in range(ranks)]
    for group in sorted(groups.values(), key=load, reverse=True):
        if all(o.starts is not None and o.starts == group[0].starts for o in group):
            owners = tuple(_field_owners(group[0], ranks))
            splits.update({o.name: split(o, "field", ranks, Choice(field_owners=owners)) for o in group})
            continue
        first, second, owner = least[0]
        more = load(group)
        heapq.heapreplace(least, (first + more[0], second + more[1], owner))
        splits.update({o.name: split(o, "field", ranks, Choice(owner=owner)) for o in group})
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


ALIASES = {"rows": "row", "columns": "column", "table": "field", "tables": "field", "fields": "field"}
"""Names that people use for forms."""


def form_name(name: str, about: str) -> str:
    """The form that a user's name means; `PlanError` if none."""
    form = ALIASES.get(name, name)
    if form not in FORMS:
        aliases = ", ".join(f"{a!r} for {f!r}" for a, f in ALIASES.items())
        raise PlanError(f"{about}: no form {name!r}; the forms are {', '.join(FORMS)} (also {aliases})")
    return form


def tables_named(operators: Sequence[Operator], pattern: str, about: str) -> list[Operator]:
    """Tables whose parameter is named so, or whose module is, or whose name ends so; or that match a pattern.

    >>> from types import SimpleNamespace as Named
    >>> tables = [Named(name="user.id.weight"), Named(name="item.id.weight")]
    >>> [t.name for t in tables_named(tables, "user.id", "pins")]
    ['user.id.weight']
    >>> [t.name for t in tables_named(tables, "*", "pins")]
    ['user.id.weight', 'item.id.weight']
    """
    names = names_matching([o.name for o in operators], pattern, about)
    return [o for o in operators if o.name in names]


def names_matching(names: Sequence[str], pattern: str, about: str) -> list[str]:
    """As `tables_named`, of names."""
    for wanted in (pattern, f"{pattern}.weight", f"*.{pattern}", f"*.{pattern}.weight"):
        if found := [n for n in names if fnmatch.fnmatchcase(n, wanted)]:
            return found
    some = ", ".join(sorted(names)[:20])
    raise PlanError(f"{about} names {pattern!r}, which is no table of the model; tables: {some}")


def allowed_forms(
    operators: Sequence[Operator],
    pins: Mapping[str, str] | None = None,
    forbid: Forbidden | None = None,
) -> dict[str, tuple[str, ...]]:
    """The forms that each table may take: those it can, less the forbidden; the pinned one, if it is pinned.

    A name must be able to take its pinned form; a pattern (with ``*``, ``?`` or ``[``) pins where it is possible. Later
    pins go before earlier ones.

    Raises
    ------
    PlanError
        For a name that is no table, a form that does not exist, or a table that is left without one.
    """
    result = {o.name: o.forms for o in operators}
    for pattern, forms in (forbid or {}).items():
        about = f"forbid[{pattern!r}]"
        for name in [forms] if isinstance(forms, str) else forms:
            form = form_name(name, about)
            for o in tables_named(operators, pattern, about):
                result[o.name] = tuple(f for f in result[o.name] if f != form)
    for pattern, name in (pins or {}).items():
        about = f"plan for {pattern!r}"
        form = form_name(name, about)
        for o in tables_named(operators, pattern, about):
            if form not in o.refusals:
                result[o.name] = (form,)
            elif not set(pattern) & set("*?["):
                raise PlanError(f"table {o.name!r} can't take the form {form}: {o.refusals[form]}")
    _tie(result, groups_of(operators))
    for o in operators:
        if not result[o.name]:
            why = "; ".join(f"{f}: {reason}" for f, reason in o.refusals.items())
            raise PlanError(
                f"table {o.name!r} is left without a form: all that it can take ({', '.join(o.forms)}) are "
                f"forbidden" + (f", and it can't take {why}" if why else "") + "; forbid less"
            )
    return result


def _tie(allowed: dict[str, tuple[str, ...]], groups: Sequence[Group]) -> None:
    """Tables that a computed table is made of are divided by columns together, or not."""
    for g in groups:
        pinned = [n for n in g.tables if allowed[n] == ("column",)]
        unable = [n for n in g.tables if "column" not in allowed[n]]
        if pinned and unable:
            raise PlanError(
                f"tables {', '.join(g.tables)} are computed together ({user_line(g.nodes[0])}), so {pinned[0]!r} can "
                f"be divided by columns only if {unable[0]!r} is: pin both"
            )
        for n in g.tables:
            if pinned:
                allowed[n] = ("column",)
            elif unable:
                allowed[n] = tuple(f for f in allowed[n] if f != "column")


class Search:
    """The choice of forms for one program (see the module's text).

    Attributes
    ----------
    allowed : dict of str to tuple of str
        The forms that each table may take.
    trials : int
        Choices that were placed, cut and priced.
    """

    def __init__(
        self,
        program: Program,
        operators: Sequence[Operator],
        rules: Sequence[Rule],
        w: Weights,
        allowed: Mapping[str, tuple[str, ...]],
        terms: Terms,
        progress: Callable[[str], None] = lambda text: None,
    ):
        self.program, self.operators, self.rules, self.w = program, operators, rules, w
        self.allowed, self.terms, self.progress = allowed, terms, progress
        self.best: Trial | None = None
        self.scores: dict[tuple[str, ...], Score] = {}
        self.exact = False
        self.groups = groups_of(operators)
        self.split = cache(split_as)
        self.choice = cache(self._choice)
        # a dozen tables are planned in a second, a thousand on as many ranks in less than a minute
        self.budget = 40 * terms.effort

    @property
    def trials(self) -> int:
        return len(self.scores)

    # ---- one choice

    def tied(self, forms: Mapping[str, str], move: Mapping[str, str]) -> dict[str, str]:
        """The forms after a move, and what it takes with it: see `_tie`."""
        result = {**forms, **move}
        for g in self.groups:
            by_columns = [n for n in g.tables if result[n] == "column"]
            if len(by_columns) in (0, len(g.tables)):
                continue
            to_columns = any(move.get(n) == "column" for n in g.tables)
            for n in g.tables if to_columns else by_columns:
                result[n] = "column" if to_columns else next(f for f in self.allowed[n] if f != "column")
        return result

    def score(self, forms: Mapping[str, str]) -> Score:
        """The score of a choice, remembered; the best trial so far is kept."""
        key = tuple(forms[o.name] for o in self.operators)
        if key not in self.scores:
            trial = self.trial(forms)
            self.scores[key] = trial.score
            if self.best is None or trial.score < self.best.score:
                self.best = trial
                self.progress(f"{self.trials} trials, {trial.score.price_bytes:,} B")
        return self.scores[key]

    def trial(self, forms: Mapping[str, str]) -> Trial:
        """Assign, place, cut and price one choice."""
        found: list[Trial] = []
        for by_memory in (False, True):
            splits = assign(
                self.operators, forms, self.w.ranks, by_memory=by_memory, split=self.split, choice=self.choice
            )
            candidates = place(self.program, self.operators, splits, self.rules, self.w.ranks)
            cuts = {"cut": minimum_cut(self.program, candidates, self.w)}
            if cuts["cut"].exits != (other := at_lookups(candidates)).exits:
                cuts["lookups"] = other
            found += [self._price(splits, candidates, cut, aggregate) for aggregate, cut in cuts.items()]
            best = min(found, key=lambda t: t.score)
            if not best.score.missing_bytes:
                break
        return best

    def _price(self, splits: dict[str, Split], candidates: Candidates, cut: Cut, aggregate: str) -> Trial:
        w, terms = self.w, self.terms
        pieces = parameter_pieces(self.program, splits, candidates, cut, w.ranks)
        pieces.update(bias_pieces(self.program, self.operators, splits))
        layout = layout_of(self.program, self.operators, splits, pieces, candidates, cut, w.ranks)
        every = self.traffic(layout, _busy(layout))
        price_bytes = max(t.total for t in every)
        calls = max(t.calls for t in every)
        price = float(price_bytes) if terms.cluster is None else terms.cluster.seconds(every)
        memory: list[Memory] = []
        missing = 0
        if terms.limit_bytes is not None:
            memory = self.memory(pieces, candidates, cut, layout)
            missing = max(0, max(m.total for m in memory) - terms.limit_bytes)
        score = Score(missing, price, price_bytes, calls)
        return Trial(splits, candidates, cut, pieces, layout, aggregate, score, memory)

    def traffic(self, layout: Layout, ranks: Iterable[int]) -> list[Traffic]:
        """What ranks send, in expectation."""
        rows = [self.w.rows] * self.w.ranks
        unique = [layout.expected(r, rows, self.statistics) if layout.fetches else {} for r in ranks]
        return [layout.predict(r, rows, self.w.itemsize, unique=x) for r, x in zip(ranks, unique, strict=True)]

    def memory(self, pieces: Mapping[str, Pieces], candidates: Candidates, cut: Cut, layout: Layout) -> list[Memory]:
        wholes = {t.name for t in layout.wholes}
        placements = candidates.placements()
        operators, w, optimizer = self.operators, self.w, self.terms.optimizer
        return memory_of(self.program, operators, pieces, placements, cut, w, optimizer, self.unique, wholes)

    def _choice(self, o: Operator, form: str) -> Choice:
        """Boundaries of rows, and hot rows, by statistics."""
        return form_named(form).choose(o, self.w.ranks, self.statistics, self.w.rows)

    @cached_property
    def statistics(self) -> Statistics:
        return self.terms.statistics or Statistics.assumed(self.operators)

    @cached_property
    def unique(self) -> dict[str, float]:
        """Expected unique ids of a rank's batch, by table."""
        return {o.name: self.statistics.unique(o.name, self.w.rows) for o in self.operators}

    # ---- what forms cost by themselves

    @cached_property
    def costs(self) -> dict[str, dict[str, FormCost]]:
        """By table and allowed form, over all ranks; formulas that need more than is known count nothing."""
        readers: dict[fx.Node, int] = {}
        for o in self.operators:
            for ids in {x.ids for x in o.lookups}:
                readers[ids] = readers.get(ids, 0) + 1
        return {o.name: {f: self._cost(o, f, readers) for f in self.allowed[o.name]} for o in self.operators}

    def _cost(self, o: Operator, form: str, readers: Mapping[fx.Node, int]) -> FormCost:
        w = self.w
        split = self.split(o, form, w.ranks, self.choice(o, form))
        if any(split.placement(o, x) is not None for x in o.lookups):
            sent = 0.0
            for ids in dict.fromkeys(x.ids for x in o.lookups):
                x = next(x for x in o.lookups if x.ids is ids)
                width = prod(tail(ids))
                if split.columns(o, x, split.pieces.owners[0]) is None:
                    width *= len(split.pieces.owners)
                sent += 4 * w.rows * (w.ranks - 1) * width / readers[ids]
            return FormCost(True, sent)
        if form == "hot":  # every row the cheaper way
            _, present, other = self.statistics.presence(o.name, w.rows)
            fetched, reduced = 4 + 2 * o.dim * w.itemsize, 2 * o.dim * w.itemsize
            some = float(np.minimum(present * fetched, reduced).sum())
            least = some + (o.rows - len(present)) * min(other * fetched, reduced)
            return FormCost(False, (w.ranks - 1) * least * (1 - 1e-9))
        values: dict[Any, float] = {N: w.ranks, b: w.rows, s: w.itemsize, i: 4, V: o.rows, k: o.dim, IDS: o.ids}
        values[U] = self.unique[o.name]
        total = 0.0
        known = o.trained and (not o.outputs or split.at_hand)  # products with a divided table are more
        for formula in form_named(form).costs(o.sparse).values():
            if known and formula.free_symbols <= set(values):
                symbols, function = _compiled(formula)
                total += max(0.0, function(*(values[x] for x in symbols)))
        # a byte for each term that a layout rounds
        return FormCost(False, max(0.0, total - 4) * w.ranks * (1 - 1e-9))

    @cached_property
    def relaxation(self) -> Relaxation:
        w, program = self.w, self.program
        used = {program.parameter(n) for n in program.graph.nodes if n.op == "placeholder" and len(n.users)}
        tables = {o.name for o in self.operators}
        tables |= {str(program.parameter(x.bias)) for o in self.operators for x in o.outputs}  # cut with their tables
        dense = sum(p.numel() for n, p in program.parameters.items() if n in used - tables and p.requires_grad)
        fixed = 2 * (w.ranks - 1) * dense * w.itemsize
        return Relaxation(program, self.operators, self.rules, w, self.costs, fixed)

    def in_units(self, sent_bytes: float) -> float:
        """A bound on the objective from one on the bytes of the busiest rank: seconds at the fastest of the links."""
        cluster = self.terms.cluster
        if cluster is None:
            return sent_bytes
        sizes = (1e9, 2e9)
        return sent_bytes * min(
            (cluster.seconds_of(c, sizes[1]) - cluster.seconds_of(c, sizes[0])) / (sizes[1] - sizes[0])
            for c in COLLECTIVES
        )

    # ---- the search

    def run(self) -> tuple[dict[str, str], float]:
        """The forms, and the bound in units of the objective."""
        relaxed = self.relaxation.solve(self.allowed)
        bound = self.in_units(relaxed.sent_bytes)
        forms = min(self._starts(relaxed.inside), key=self.score)
        improved = True
        while improved and self.trials < self.budget:
            improved = False
            for move in self._moves(forms):
                other = self.tied(forms, move)
                if self.score(other) < self.score(forms):
                    forms, improved = other, True
                if self.trials >= self.budget:
                    break
        if not self.score(forms).missing_bytes and self.score(forms).price > bound:
            forms = self.complete(forms)
        if self.exact or self.score(forms).price <= bound:
            self.exact, bound = True, self.score(forms).price
        return forms, bound

    def _starts(self, inside: frozenset[str]) -> Iterator[dict[str, str]]:
        """One form for all that can take it; each table's cheapest by itself; the relaxation's choice."""
        own = {n: min(c, key=lambda f: (c[f].inside, c[f].sent_bytes, FORMS.index(f))) for n, c in self.costs.items()}
        own = self.tied(own, {})
        yield own
        for form in FORMS:
            if any(form in forms for forms in self.allowed.values()):
                yield self.tied(own, {n: form for n, forms in self.allowed.items() if form in forms})
        for form in FORMS:
            if 0 < len(inside) < len(own):
                able = {n for n in inside if form in self.costs[n] and self.costs[n][form].inside}
                if able:
                    yield self.tied(own, dict.fromkeys(able, form))

    @cached_property
    def classes(self) -> list[list[Operator]]:
        """Free tables that are alike, smallest first."""
        found: dict[Any, list[Operator]] = {}
        for o in self.operators:
            if len(self.allowed[o.name]) > 1:
                uses = (tuple((x.mode, str(shape_of(x.ids)[1:])) for x in o.lookups), tuple(map(str, o.outputs)))
                found.setdefault((o.dim, self.allowed[o.name], o.starts is None, uses, o.sparse), []).append(o)
        return [sorted(members, key=lambda o: o.rows) for members in found.values()]

    def _moves(self, forms: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """Classes, then the smallest or the largest of each, then single tables where there are not too many."""
        for members in self.classes:
            for form in self.allowed[members[0].name]:
                yield {o.name: form for o in members}
        for members in self.classes:
            for form in self.allowed[members[0].name]:
                others = [o for o in members if forms[o.name] != form]
                for m in _sizes(len(others)):
                    yield {o.name: form for o in others[:m]}
                    yield {o.name: form for o in others[-m:]}
        if len(self.operators) <= EXACT_TABLES:
            for members in self.classes:
                for o in members:
                    for form in self.allowed[o.name]:
                        yield {o.name: form}

    def complete(self, forms: dict[str, str]) -> dict[str, str]:
        """Branch and bound over the forms of every table; `exact` says whether it came to the end."""
        free = [o.name for o in sorted(self.operators, key=lambda o: -o.size_bytes) if len(self.allowed[o.name]) > 1]
        if len(free) > EXACT_TABLES:
            return forms
        best, nodes = dict(forms), 0
        limit = (300 if len(free) <= EXACT_TABLES // 2 else 60) * self.terms.effort

        def visit(partial: dict[str, tuple[str, ...]], depth: int) -> bool:
            nonlocal best, nodes
            if depth == len(free):
                choice = self.tied({n: f[0] for n, f in partial.items()}, {})
                if self.score(choice) < self.score(best):
                    best = choice
                return True
            children = []
            for form in self.allowed[free[depth]]:
                nodes += 1
                child = {**partial, free[depth]: (form,)}
                children.append((self.in_units(self.relaxation.solve(child).sent_bytes), form, child))
            for below, _, child in sorted(children, key=lambda x: x[:2]):
                if below >= self.score(best).price:
                    continue
                if nodes > limit or not visit(child, depth + 1):
                    return False
            return True

        self.exact = visit(dict(self.allowed), 0)
        return best


def _busy(layout: Layout, most: int = 48) -> list[int]:
    """One rank of each kind; of very many kinds those that send or receive most and least of each thing."""
    kinds = list(layout.kinds)
    if len(kinds) <= most:
        return kinds
    found: set[int] = set()
    for loads in (layout.enter_widths, layout.exit_widths, layout.fetch_loads):
        ordered = sorted(kinds, key=lambda r: loads[r])
        found.update((*ordered[:2], *ordered[-4:]))
    return sorted(found)


def _sizes(count: int) -> list[int]:
    """Sizes of parts of a class to try: all of few, powers of two of many."""
    if count <= 8:
        return list(range(1, count))
    return [1 << e for e in range(count.bit_length()) if 1 << e < count]


@cache
def _compiled(formula: sympy.Expr) -> tuple[list[sympy.Symbol], Callable[..., float]]:
    symbols = sorted(formula.free_symbols, key=str)
    return symbols, sympy.lambdify(symbols, formula, "math")


def choose(
    program: Program,
    operators: Sequence[Operator],
    rules: Sequence[Rule],
    w: Weights,
    pins: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
    *,
    terms: Terms | None = None,
) -> Plan:
    """The cheapest plan that the search finds (see the module's text).

    Raises
    ------
    PlanError
        If pins or forbidden forms are wrong, or no plan fits into memory.
    """
    terms = terms or Terms()
    w = w.on(terms.cluster)
    check_optimizer(terms.optimizer)
    if terms.cluster is not None and terms.cluster.ranks != w.ranks:
        raise PlanError(
            f"cluster {terms.cluster.name!r} has {terms.cluster.ranks} ranks, the plan is for {w.ranks}: "
            f"cluster.with_ranks({w.ranks})"
        )
    allowed = allowed_forms(operators, pins, terms.forbid)
    if w.ranks == 1:
        allowed = {o.name: ("replicate",) for o in operators}
    measured = terms.statistics.measured if terms.statistics is not None else {}
    for name, forms_of in allowed.items():  # nothing says which rows are hot
        if name not in measured and len(forms_of) > 1:
            allowed[name] = tuple(f for f in forms_of if f != "hot")
    search = Search(program, operators, rules, w, allowed, terms, progress)
    forms, bound = search.run()
    best = search.trial(forms)
    every = search.traffic(best.layout, best.layout.kinds)  # trials look at some of very many kinds of ranks
    price_bytes = max(t.total for t in every)
    if best.score.missing_bytes:
        raise PlanError(_does_not_fit(search, forms, best, pins))
    prices, missing = _alternatives(search, forms, price_bytes)
    return Plan(
        ranks=w.ranks,
        rows=w.rows,
        itemsize=w.itemsize,
        tables=[_table(o) for o in operators],
        splits=best.splits,
        pieces=best.pieces,
        layout=best.layout,
        crossings=_crossings(program, operators, best),
        price_bytes=price_bytes,
        prices=prices,
        fingerprint=program.fingerprint(),
        aggregate=best.aggregate,
        objective="bytes" if terms.cluster is None else "seconds",
        price=float(price_bytes) if terms.cluster is None else terms.cluster.seconds(every),
        bound=bound,
        exact=search.exact,
        trials=search.trials,
        cluster=terms.cluster,
        statistics=search.statistics.source,
        unique=search.unique,
        optimizer=terms.optimizer,
        limit_bytes=terms.limit_bytes,
        missing=missing,
        memories=best.memory or search.memory(best.pieces, best.candidates, best.cut, best.layout),
        notes=notes_of(program, best.layout.exchanges)
        + computed_notes(groups_of(operators), forms)
        + whole_notes(operators, best.splits),
        replan=lambda changed: choose(program, operators, rules, w, changed, terms=terms),
    )


def _alternatives(
    search: Search, forms: Mapping[str, str], price_bytes: int
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Bytes of the busiest rank, and bytes of memory that are missing, if the tables of a class took another form."""
    prices = {o.name: {forms[o.name]: price_bytes} for o in search.operators}
    missing: dict[str, dict[str, int]] = {}
    for members in search.classes:
        for form in search.allowed[members[0].name]:
            changed = {o.name: form for o in members}
            if all(forms[n] == form for n in changed):
                continue
            score = search.score(search.tied(forms, changed))
            for n in changed:
                prices[n].setdefault(form, score.price_bytes)
                if score.missing_bytes:
                    missing.setdefault(n, {})[form] = score.missing_bytes
    return prices, missing


def _does_not_fit(search: Search, forms: Mapping[str, str], best: Trial, pins: Mapping[str, str] | None) -> str:
    """Which ranks lack how much, and what would fit."""
    limit, w = search.terms.limit_bytes, search.w
    assert limit is not None
    over = [(r, m) for r, m in enumerate(best.memory) if m.total > limit]
    lines = [f"no plan fits {limit:,} B a rank; the closest is short on {len(over)} of {w.ranks} ranks:"]
    lines += [f"rank {r} is short of {m.total - limit:,} B: it needs {m}" for r, m in over[:8]]
    if len(over) > 8:
        lines.append(f"and {len(over) - 8} more")
    if pins or search.terms.forbid:
        free = Search(search.program, search.operators, search.rules, w, allowed_forms(search.operators), search.terms)
        found, _ = free.run()
        if not free.score(found).missing_bytes:
            changed = sorted({f"{n}: {found[n]}" for n in found if found[n] != forms[n]})
            return "\n".join([*lines, f"without the pins and forbidden forms it fits, with {', '.join(changed[:8])}"])
    for factor in (2, 4, 8, 16, 32, 64):
        more = Weights(w.ranks * factor, w.rows, w.itemsize, w.flops_per_byte, w.backward)
        terms = Terms(search.terms.forbid, None, limit, search.terms.optimizer)
        wider = Search(search.program, search.operators, search.rules, more, search.allowed, terms)
        if not min(wider.score(x) for x in wider._starts(frozenset())).missing_bytes:
            return "\n".join([*lines, f"{more.ranks} ranks would fit, with {w.rows:,} rows each"])
    most = max(best.memory, key=lambda m: m.total)
    largest = max(("weights", "gradients", "state", "activations"), key=lambda x: getattr(most, f"{x}_bytes"))
    advice = {
        "activations": "a smaller batch would help",
        "state": "an optimiser with less state would help: rowwise_adagrad, sgd",
    }.get(largest, "sparse gradients (sparse=True) or smaller tables would help")
    return "\n".join([*lines, f"not even {w.ranks * 64} ranks would; most of it is {largest}: {advice}"])


def _table(o: Operator) -> Table:
    uses = sorted({target_name(u) for x in o.lookups for u in x.node.users})
    vectors = sum(1 if x.mode else prod(tail(x.ids)) for x in o.lookups)
    outputs = tuple(str(x) for x in o.outputs)
    size = o.dtype.itemsize
    whole = bool(o.outputs or o.other_uses or o.group is not None)
    refused = dict(o.refusals)
    return Table(o.name, o.rows, o.dim, size, o.ids, vectors, o.sparse, tuple(uses), refused, o.line, outputs, whole)


def _crossings(program: Program, operators: Sequence[Operator], best: Trial) -> list[Crossing]:
    """What crosses, with the tables that it comes from or goes to."""
    sources: dict[fx.Node, set[str]] = {x.node: {o.name} for o in operators for x in o.lookups}
    nodes = {n.name: n for n in program.graph.nodes}
    for n in program.graph.nodes:
        if n in best.cut.inside and n not in sources:
            sources[n] = set().union(*(sources.get(p, set()) for p in n.all_input_nodes))
    result = []
    for e in best.layout.entries:
        reads = {o.name for o in operators for x in o.lookups if x.ids.name == e.name and x.node in best.cut.inside}
        width = sum(e.width(r) for r in range(best.layout.ranks))
        result.append(Crossing("ids", e.name, "Shard(0)", width, tuple(sorted(reads)), user_line(nodes[e.name])))
    for node, x in zip(best.cut.exits, best.layout.exits, strict=True):
        placement = str(best.candidates.placed[node].placement)
        width = sum(x.width(r) for r in range(best.layout.ranks))
        result.append(
            Crossing("values", target_name(node), placement, width, tuple(sorted(sources[node])), user_line(node))
        )
    products = outputs_in_order(program, operators, best.splits)
    for (node, (o, output)), v in zip(products.items(), best.layout.vocabularies, strict=True):
        result.append(Crossing("product", str(output), "Shard(0)", v.elements, (o.name,), user_line(node), v.ids))
    return result

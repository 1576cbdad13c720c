"""Search: the choice of forms with the least objective, and how far it can be from the optimum.

A descent from several starts (one form for all; each table's cheapest by itself; the relaxation's optimum) with three
kinds of moves: all tables of a class (same width, forms, ids and gradients) to another form, its m smallest or largest,
single tables. The relaxation of `bound` is below every plan; with few tables the choice then is completed
to the optimum by branch and bound over it (`Search.complete`), else its distance is reported as the gap. All is
counted, nothing timed: the same inputs give the same plan anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import sympy
from torch import fx

from descompiler.classify.scope import trained_parameters
from descompiler.cost_models.symbols import L as IDS
from descompiler.cost_models.symbols import N, U, V, b, d, i, k, s
from descompiler.errors import DescompilerError
from descompiler.graph.nodes import shape_of, tail
from descompiler.graph.program import Program
from descompiler.layout.border import Entry
from descompiler.layout.spans import summed
from descompiler.planning.bound import FormCost, Relaxation
from descompiler.planning.cluster import COLLECTIVES
from descompiler.planning.objective import Objective, Score, Terms, Trial
from descompiler.region.cut import Weights
from descompiler.region.rule import Rule
from descompiler.tables.computed import groups_of
from descompiler.tables.form import FORMS, form_named
from descompiler.tables.tables import Operator

EXACT_TABLES = 12
"""Free tables up to which the choice is completed to the optimum, if the effort is enough."""


TIE = 0.01
"""Share of a price within which choices are as good as each other."""


ROUNDING = 1e-9
"""Share of a price that sums of floats may be off by."""


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
        self.objective = Objective(program, operators, rules, w, terms)
        self.best: Trial | None = None
        self.best_key: tuple[str, ...] = ()
        self.scores: dict[tuple[str, ...], Score] = {}
        self.exact = False
        self.groups = groups_of(operators)
        # a dozen tables are planned in a second, a thousand on as many ranks in less than a minute
        self.budget = 40 * terms.effort

    @property
    def trials(self) -> int:
        return len(self.scores)

    # ---- choices

    def tied(self, forms: Mapping[str, str], move: Mapping[str, str]) -> dict[str, str]:
        """The forms after a move, and what it takes with it: see `descompiler.planning.pins`."""
        result = {**forms, **move}
        for g in self.groups:
            taken = dict.fromkeys(result[n] for n in g.tables)
            divided = [f for f in taken if form_named(f).by_columns]
            if len(taken) == 1 or not divided:
                continue
            others = {n: [f for f in self.allowed[n] if not form_named(f).by_columns] for n in g.tables}
            moved = [f for f in divided if any(move.get(n) == f for n in g.tables)]
            if not moved and not all(others.values()):
                moved = divided  # they can't but be divided by columns
            for n in g.tables:
                if moved:
                    result[n] = moved[0]
                elif result[n] in divided:
                    result[n] = others[n][0]
        return result

    def score(self, forms: Mapping[str, str]) -> Score:
        """The score of a choice, remembered; the best trial so far is kept."""
        key = self._key(forms)
        if key not in self.scores:
            trial = self.objective.trial(forms)
            self.scores[key] = trial.score
            if self.best is None or trial.score < self.best.score:
                self.best, self.best_key = trial, key
                self.progress(f"{self.trials} trials, {trial.score.price_bytes:,} B")
        return self.scores[key]

    def trial(self, forms: Mapping[str, str]) -> Trial:
        """A choice with all that belongs to it; that of the best score is there."""
        if self.best is not None and self.best_key == self._key(forms):
            return self.best
        return self.objective.trial(forms)

    def _key(self, forms: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(forms[o.name] for o in self.operators)

    # ---- what forms cost by themselves

    @cached_property
    def costs(self) -> dict[str, dict[str, FormCost]]:
        """By table and allowed form, over all ranks; formulas that need more than is known count nothing."""
        readers: dict[fx.Node, int] = {}
        for o in self.operators:
            for ids in {x.ids for x in o.lookups}:
                readers[ids] = readers.get(ids, 0) + 1
        return {o.name: {f: self._cost(o, f, readers) for f in self.allowed[o.name]} for o in self.operators}

    @cached_property
    def least(self) -> Weights:
        """What no plan weighs less than: every element is as narrow as the narrowest that may cross."""
        sizes = [self.w.itemsize, *(dtype.itemsize for dtype in self.program.other_dtypes())]
        return replace(self.w, itemsize=min(sizes))

    def _cost(self, o: Operator, form: str, readers: Mapping[fx.Node, int]) -> FormCost:
        w, narrow = self.least, self.least.narrow_size_of(None)
        split = self.objective.split(o, form, w.ranks, self.objective.choice(o, form))
        if any(split.placement(o, x) is not None for x in o.lookups):
            sent = 0.0
            for ids in dict.fromkeys(x.ids for x in o.lookups):
                x = next(x for x in o.lookups if x.ids is ids)
                width = summed(Entry(ids.name, tail(ids), split.columns(o, x)).widths)
                sent += 4 * w.rows * (w.ranks - 1) * width / readers[ids] * (not w.global_ids)
            return FormCost(True, sent, len(split.pieces.owners) if split.pieces.dim == 1 else 1)
        least = form_named(form).least_bytes(o, w.ranks, self.objective.statistics, w.rows, narrow)
        if least is not None:
            return FormCost(False, least * (1 - ROUNDING))
        values: dict[Any, float] = {N: w.ranks, b: w.rows, s: narrow, i: 1, d: 1, V: o.rows, k: o.dim, IDS: o.ids}
        values[U] = self.objective.unique[o.name]
        total = 0.0
        known = o.trained and (not o.outputs or split.at_hand)  # products with a divided table are more
        for formula in form_named(form).costs(o.table).values():
            if known and formula.free_symbols <= set(values):
                symbols, function = _compiled(formula)
                total += max(0.0, function(*(values[x] for x in symbols)))
        # a byte for each term that a layout rounds
        return FormCost(False, max(0.0, total - 4) * w.ranks * (1 - ROUNDING))

    @cached_property
    def relaxation(self) -> Relaxation:
        w, program = self.least, self.program
        tables = {o.name for o in self.operators}
        tables |= {str(program.parameter(x.bias)) for o in self.operators for x in o.outputs}  # cut with their tables
        dense = sum(program.parameters[n].numel() for n in trained_parameters(program) - tables)
        fixed = 2 * (w.ranks - 1) * dense * w.itemsize
        return Relaxation(program, self.operators, self.rules, w, self.costs, fixed, self.terms.solver)

    def bound_of(self, sent_bytes: float, allowed: Mapping[str, Sequence[str]]) -> float:
        """A bound on the objective, of choices among such forms, from one on the bytes of the busiest rank.

        The busiest rank works at least as long as ranks do on average.
        """
        bound, work = self.in_units(sent_bytes), self.objective.work
        if work is None:
            return bound
        least = sum(min(self.work_s[name][f] for f in forms) for name, forms in allowed.items())
        least += work.least(self.objective.known)
        return bound + least * (1 - ROUNDING)

    @cached_property
    def work_s(self) -> dict[str, dict[str, float]]:
        """By table and allowed form, seconds of its lookups and updates, the mean over ranks: whoever owns its rows."""
        objective, work = self.objective, self.objective.work
        assert work is not None

        def least(o: Operator, form: str) -> float:
            choices = (objective.choice(o, form, by_memory) for by_memory in (False, True))
            splits = (objective.split(o, form, self.w.ranks, choice) for choice in choices)
            return min(float(work.of_operator(o, x).mean()) for x in splits)

        return {o.name: {f: least(o, f) for f in self.allowed[o.name]} for o in self.operators}

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
        """The forms, and the bound in units of the objective.

        Raises
        ------
        DescompilerError
            If the plan is cheaper than the bound: then one of them is wrong.
        """
        relaxed = self.relaxation.solve(self.allowed)
        bound = self.bound_of(relaxed.sent_bytes, self.allowed)
        forms = min(self.starts(relaxed.inside), key=self.score)
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
        price = self.score(forms).price
        if price < bound * (1 - ROUNDING):
            raise DescompilerError(
                f"a plan is priced {price:,.6g}, which is less than the {bound:,.6g} that no plan should be below "
                "(planning/bound.py): one of the two is wrong, so nothing is known of how good the plan is; "
                "please report the model"
            )
        if self.exact or price <= bound:
            self.exact, bound = True, price
        return forms, bound

    def with_fewest_calls(self, forms: dict[str, str]) -> dict[str, str]:
        """Of the choices that were priced within `TIE` of this one, that with the fewest collectives.

        Each collective has a latency and Python of its own, which bytes say nothing of.
        """
        own = self.score(forms)
        near = {k: x for k, x in self.scores.items() if not x.missing_bytes and x.price <= own.price * (1 + TIE)}
        if own.missing_bytes or not near:
            return forms
        key = min(near, key=lambda k: (near[k].calls, near[k]))
        return forms if near[key].calls == own.calls else {o.name: f for o, f in zip(self.operators, key, strict=True)}

    def starts(self, inside: frozenset[str]) -> Iterator[dict[str, str]]:
        """One form for all that can take it; each table's cheapest by itself; the relaxation's choice."""
        own = {
            n: min(c, key=lambda f: (c[f].inside, c[f].sent_bytes, FORMS.names.index(f))) for n, c in self.costs.items()
        }
        own = self.tied(own, {})
        yield own
        for form in FORMS.names:
            if any(form in forms for forms in self.allowed.values()):
                yield self.tied(own, {n: form for n, forms in self.allowed.items() if form in forms})
        for form in FORMS.names:
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
            for position, form in enumerate(self.allowed[free[depth]]):
                nodes += 1
                child = {**partial, free[depth]: (form,)}
                children.append((self.bound_of(self.relaxation.solve(child).sent_bytes, child), position, child))
            for below, _, child in sorted(children, key=lambda x: x[:2]):
                if below >= self.score(best).price:
                    continue
                if nodes > limit or not visit(child, depth + 1):
                    return False
            return True

        self.exact = visit(dict(self.allowed), 0)
        return best


def _sizes(count: int) -> list[int]:
    """Sizes of parts of a class to try: all of few, powers of two of many."""
    if count <= 8:
        return list(range(1, count))
    return [1 << e for e in range(count.bit_length()) if 1 << e < count]


@cache
def _compiled(formula: sympy.Expr) -> tuple[list[sympy.Symbol], Callable[..., float]]:
    symbols = sorted(formula.free_symbols, key=str)
    return symbols, sympy.lambdify(symbols, formula, "math")

"""What forms send as curves over ranks and rows of a table, and where one overtakes another.

The forms' own formulas are the curves of what depends on a table alone. What is computed in the region depends on what
leaves it too: one curve where vectors leave (all-to-all), one where sums do, of which each rank sends a term.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import sympy

from descompiler.cost_models.crossovers import Crossover, crossovers
from descompiler.cost_models.exchange import IDS_IN, VALUES_OUT_AND_BACK
from descompiler.cost_models.symbols import UH, H, L, N, U, V, b, d, i, k, p, s, w
from descompiler.layout.statistics import zipf_unique
from descompiler.layout.transfer import narrow_size
from descompiler.planning.chosen import Chosen, Crossing, PlannedTable
from descompiler.planning.kinds import TableKind
from descompiler.tables.form import FORMS, form_named

_VALUES = VALUES_OUT_AND_BACK.subs(w, p * k)


_SUMS = VALUES_OUT_AND_BACK.subs(w, N * w)  # each of N ranks sends a term


OWN_SYMBOLS = {N, b, s, i, d, V, k, U}
"""Symbols that are a table's own, whatever is chosen for the others."""


Curve = tuple[str, sympy.Expr]
"""A name, and bytes per rank and step."""


def formula_of(plan: Chosen, t: PlannedTable, form: str) -> sympy.Expr:
    """Bytes that a form sends for a table of a plan: the mean over ranks."""
    return sum(plan.costs(t, form).values(), sympy.Integer(0))


def bytes_alone(plan: Chosen, kind: TableKind, form: str) -> int | None:
    """What one table of the kind, of the mean size, sends in a form; None if that depends on other tables.

    The formula of rows that are frequent has a number for the split that was chosen, and for no other.
    """
    formula, known = formula_of(plan, kind.tables[0], form), OWN_SYMBOLS | ({H, UH} if form == kind.form else set())
    if formula.free_symbols <= known:
        return plan.bytes_of(formula, **{x.name: n for x, n in numbers(plan, kind).items()})
    return None


def numbers(plan: Chosen, kind: TableKind) -> dict[sympy.Symbol, float]:
    """The symbols' numbers, of one table of the kind's mean size.

    What several kinds of tables share (their ids, the sums that they are in) counts for each of them in part.
    """
    count, t = len(kind.tables), kind.tables[0]
    names = {x.name for x in kind.tables}
    own = [plan.numbers_of(x) for x in kind.tables]

    def shared(crossing: Crossing) -> float:
        return crossing.width * len(names & set(crossing.tables)) / len(crossing.tables) / count

    receivers = max(1, len(plan.splits[t.name].pieces.owners))
    ids = sum(shared(c) for c in plan.crossings if c.kind == "ids" and names & set(c.tables)) / receivers
    sums = sum(shared(c) for c in _leaving(plan, kind) if c.sums)
    return {
        N: plan.ranks,
        b: plan.rows,
        L: ids or t.ids,
        p: t.vectors,
        s: t.itemsize,
        i: plan.layout.id_bytes,
        w: sums / plan.ranks,
        **{x: sum(n[x.name] for n in own) / count for x in (V, k, U, d, H, UH)},
    }


def _leaving(plan: Chosen, kind: TableKind) -> list[Crossing]:
    names = {t.name for t in kind.tables}
    return [c for c in plan.crossings if c.kind == "values" and names & set(c.tables)]


def chosen_curve(plan: Chosen, kind: TableKind) -> Curve | None:
    """What tables send in the form that was chosen; None for a form whose curve depends on frequencies of ids."""
    formula = formula_of(plan, kind.tables[0], kind.form)
    if formula.free_symbols <= OWN_SYMBOLS:
        return kind.form, formula
    if not (leave := _leaving(plan, kind)):
        return None
    several = not form_named(kind.form).has_owners and len(plan.splits[kind.tables[0].name].pieces.owners) > 1
    return _in_region(plan, kind, kind.form, sums=all(c.sums for c in leave), receivers=N if several else 1)


def _in_region(plan: Chosen, kind: TableKind, form: str, *, sums: bool, receivers: sympy.Expr | int = 1) -> Curve:
    """A form whose lookups are in the region: ids to each receiver, and vectors or sums back."""
    ids = 0 if plan.layout.given else IDS_IN.subs(L, receivers * L)
    itemsize = narrow_size(kind.tables[0].itemsize, None, plan.wire_dtype)
    values = (_SUMS if sums else _VALUES).subs({} if plan.wire_dtype is None else {s: itemsize})
    return (f"{form}, partial sums" if sums else f"{form}, all-to-all"), ids + values


def curves(plan: Chosen, kind: TableKind) -> list[Curve]:
    """What tables of a kind send in the forms that they can take, the chosen one's first if it has a curve.

    Of the forms in the region, besides the chosen one, it is those that deal whole tables to owners: each id has one
    receiver.
    """
    t, mine = kind.tables[0], chosen_curve(plan, kind)
    priced = {kind.form, *(form for _, form in kind.others)}
    # a table that was pinned has one price
    possible = priced if kind.others else {form.name for form in FORMS if form.name not in t.refusals}
    result = [] if mine is None else [mine]
    for form in FORMS:
        if form.name in possible and (formula := formula_of(plan, t, form.name)).free_symbols <= OWN_SYMBOLS:
            result.append((form.name, formula))
    for form in FORMS:
        if form.has_owners and form.name in possible:
            result.append(_in_region(plan, kind, form.name, sums=False))
            if numbers(plan, kind)[w]:
                result.append(_in_region(plan, kind, form.name, sums=True))
    names: dict[sympy.Expr, str] = {}
    for name, formula in result:
        names.setdefault(formula, name)  # of forms that cost the same, the chosen one or the first
    return [(name, formula) for formula, name in names.items()]


def overtakes(plan: Chosen, kind: TableKind, *, every: bool = False) -> Iterator[Crossover]:
    """Where other forms overtake the chosen one, against ranks and rows of a table; with ``every``, any any other.

    All other numbers are the plan's.
    """
    mine, of, known = chosen_curve(plan, kind), curves(plan, kind), numbers(plan, kind)
    for first, second in itertools.combinations(of, 2):
        if first != mine and not every:
            return
        yield from crossovers(first, second, N, {x: n for x, n in known.items() if x is not N})
        symbols = first[1].free_symbols | second[1].free_symbols
        if V in symbols:
            others = {x: n for x, n in known.items() if x is not V}
            yield from (
                _against_rows(plan, kind, first, second, others)
                if U in symbols
                else crossovers(first, second, V, others)
            )


MOST_STEPS, TOLERANCE = 100, 0.01
"""Towards the unique ids at a crossover."""


def _against_rows(
    plan: Chosen, kind: TableKind, first: Curve, second: Curve, known: Mapping[sympy.Symbol, float]
) -> list[Crossover]:
    """Where unique ids count, which grow with a table's rows: V = threshold(U(V)), if ids are assumed.

    The threshold is proportional to U, and U is concave in V: from above, V := threshold(U(V)) falls to the largest
    solution.
    """
    t = kind.tables[0]
    draws = t.ids * plan.rows
    if any(not math.isclose(plan.numbers_of(x)["U"], zipf_unique(x.rows, draws)) for x in kind.tables):
        return []  # measured: nobody knows the ids of another table
    found = crossovers(first, second, V, {**known, U: draws})
    if len(found) != 1 or (rows_per_unique := found[0].value / draws) <= 1:
        return []  # a table has no more unique ids than rows
    unique = float(draws)
    for _ in range(MOST_STEPS):
        fewer = zipf_unique(math.ceil(unique * rows_per_unique), draws)
        if unique - fewer < TOLERANCE:
            break
        unique = fewer
    return crossovers(first, second, V, {**known, U: unique})

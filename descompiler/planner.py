"""Planning: trials of splits, each placed, cut and priced; the cheapest becomes the plan."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import fx

from descompiler.aggregate import Candidates, Cut, Weights, minimum_cut, place
from descompiler.emit import layout_of
from descompiler.errors import PlanError
from descompiler.form import Choice, Split, split_as
from descompiler.layout import Layout
from descompiler.operators import Operator
from descompiler.passes import FORMS as ALL_FORMS
from descompiler.pieces import Pieces
from descompiler.plan import Crossing, Plan, Table
from descompiler.program import Program, tail, target_name, user_line
from descompiler.rule import Rule

FORMS = tuple(f.name for f in ALL_FORMS)


@dataclass
class Trial:
    """One choice of splits, priced."""

    splits: dict[str, Split]
    candidates: Candidates
    cut: Cut
    pieces: dict[str, Pieces]
    layout: Layout
    price_bytes: int


def parameter_pieces(
    program: Program, splits: Mapping[str, Split], candidates: Candidates, cut: Cut, ranks: int
) -> dict[str, Pieces]:
    """Pieces of every parameter: tables by their splits, weights inside by co-location, the others replicated."""
    result = {n: Pieces.replicate(tuple(p.shape), ranks) for n, p in program.parameters.items()}
    result.update({n: s.pieces for n, s in splits.items()})
    for node in cut.inside:
        result.update(candidates.placed[node].pieces)
    return result


def try_splits(
    program: Program,
    operators: Sequence[Operator],
    splits: dict[str, Split],
    rules: Sequence[Rule],
    w: Weights,
) -> Trial:
    """Place, cut and price one choice of splits: the bytes that the busiest rank sends."""
    candidates = place(program, operators, splits, rules, w.ranks)
    cut = minimum_cut(program, candidates, w)
    pieces = parameter_pieces(program, splits, candidates, cut, w.ranks)
    layout = layout_of(program, operators, splits, pieces, candidates, cut, w.ranks)
    rows = [w.rows] * w.ranks
    price = max(layout.predict(r, rows, w.itemsize).total for r in layout.kinds)
    return Trial(splits, candidates, cut, pieces, layout, price)


def assign(operators: Sequence[Operator], forms: Mapping[str, str], ranks: int) -> dict[str, Split]:
    """Splits in given forms; field-split tables that read the same ids share a rank, balanced by width, then bytes."""
    groups: dict[str, list[Operator]] = {}
    load = [(0, 0)] * ranks
    splits: dict[str, Split] = {}
    for o in operators:
        if forms[o.name] != "field":
            splits[o.name] = split_as(o, forms[o.name], ranks)
        else:
            groups.setdefault(o.lookups[0].ids.name, []).append(o)
    for group in sorted(groups.values(), key=lambda g: (-sum(o.dim for o in g), -sum(o.rows for o in g))):
        if all(o.starts is not None and o.starts == group[0].starts for o in group) and group[0].starts is not None:
            owners = tuple(_field_owners(group[0], ranks))
            splits.update({o.name: split_as(o, "field", ranks, Choice(field_owners=owners)) for o in group})
            continue
        owner = min(range(ranks), key=lambda r: load[r])
        width, size = load[owner]
        load[owner] = (width + sum(o.dim for o in group), size + sum(o.size_bytes for o in group))
        splits.update({o.name: split_as(o, "field", ranks, Choice(owner=owner)) for o in group})
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


def pinned_forms(operators: Sequence[Operator], pins: Mapping[str, str] | None) -> dict[str, str]:
    """Forms that the user fixed: exact names must be possible, patterns apply where they are.

    Raises
    ------
    PlanError
        For a name that is no table, a form that does not exist, or one that the table can't take.
    """
    result: dict[str, str] = {}
    names = {o.name for o in operators}
    for pattern, form in (pins or {}).items():
        if form not in FORMS:
            raise PlanError(f"plan for {pattern!r}: no form {form!r}; the forms are {', '.join(FORMS)}")
        matches = [o for o in operators if fnmatch.fnmatchcase(o.name, pattern)]
        if not matches:
            raise PlanError(
                f"plan names {pattern!r}, which is no table of the model; tables: {', '.join(sorted(names))}"
            )
        for o in matches:
            if form not in o.refusals:
                result[o.name] = form
            elif pattern == o.name:
                raise PlanError(f"table {o.name!r} can't be split by {form}: {o.refusals[form]}")
    return result


def choose(
    program: Program,
    operators: Sequence[Operator],
    rules: Sequence[Rule],
    w: Weights,
    pins: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Choose splits by coordinate descent over classes of similar tables, then over small tables to replicate."""
    fixed = pinned_forms(operators, pins)
    classes: dict[object, list[Operator]] = {}
    for o in operators:
        key = fixed.get(o.name) or (o.dim, o.forms, o.starts is None, tuple(x.mode for x in o.lookups), o.sparse)
        classes.setdefault(key, []).append(o)
    cache: dict[tuple[tuple[str, str], ...], Trial] = {}

    def trial(forms: Mapping[str, str]) -> Trial:
        key = tuple(sorted(forms.items()))
        if key not in cache:
            cache[key] = try_splits(program, operators, assign(operators, forms, w.ranks), rules, w)
        return cache[key]

    if w.ranks == 1 or not operators:
        forms = {o.name: "replicate" for o in operators}
    else:
        starts = [{o.name: fixed.get(o.name, f if f in o.forms else "replicate") for o in operators} for f in FORMS]
        forms = min(starts, key=lambda f: trial(f).price_bytes)
        improved = True
        while improved:
            improved = False
            for members in classes.values():
                for form in FORMS:
                    other = {**forms, **{o.name: form for o in members if form in o.forms and o.name not in fixed}}
                    if trial(other).price_bytes < trial(forms).price_bytes:
                        forms, improved = other, True
        forms = _replicate_small(operators, forms, fixed, trial)
    best = trial(forms)
    prices: dict[str, dict[str, int]] = {o.name: {forms[o.name]: best.price_bytes} for o in operators}
    for members in classes.values() if w.ranks > 1 else ():
        for form in FORMS:
            changed = {o.name: form for o in members if form in o.forms and o.name not in fixed}
            if any(forms[n] != form for n in changed):
                price = trial({**forms, **changed}).price_bytes
                for n in changed:
                    prices[n].setdefault(form, price)
    return Plan(
        ranks=w.ranks,
        rows=w.rows,
        itemsize=max((o.dtype.itemsize for o in operators), default=4),
        tables=[_table(o) for o in operators],
        splits=best.splits,
        pieces=best.pieces,
        layout=best.layout,
        crossings=_crossings(program, operators, best),
        price_bytes=best.price_bytes,
        prices=prices,
        fingerprint=program.fingerprint(),
    )


def _table(o: Operator) -> Table:
    uses = sorted({target_name(u) for x in o.lookups for u in x.node.users})
    ids = sum(prod(tail(x.ids)) for x in o.lookups)
    vectors = sum(1 if x.mode else prod(tail(x.ids)) for x in o.lookups)
    return Table(o.name, o.rows, o.dim, o.dtype.itemsize, ids, vectors, o.sparse, tuple(uses), dict(o.refusals), o.line)


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
    return result


def _replicate_small(
    operators: Sequence[Operator],
    forms: dict[str, str],
    fixed: Mapping[str, str],
    trial: Callable[[Mapping[str, str]], Trial],
) -> dict[str, str]:
    """Replicate the m smallest split tables, doubling m as long as it pays."""
    small = sorted(
        (o for o in operators if forms[o.name] != "replicate" and o.name not in fixed), key=lambda o: o.size_bytes
    )
    best, m = forms, 1
    while m <= len(small):
        other = {**forms, **{o.name: "replicate" for o in small[:m]}}
        if trial(other).price_bytes < trial(best).price_bytes:
            best = other
        m *= 2
    return best

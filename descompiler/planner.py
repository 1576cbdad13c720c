"""Planning: trials of splits, each placed, cut and priced; the cheapest becomes the plan."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import fx

from descompiler.aggregate import Candidates, Cut, Weights, minimum_cut, place
from descompiler.emit import layout_of
from descompiler.errors import PlanError
from descompiler.form import Choice, Split, split_as
from descompiler.layout import Layout
from descompiler.operators import Operator
from descompiler.outputs import bias_pieces, outputs_in_order
from descompiler.passes import FORMS as ALL_FORMS
from descompiler.pieces import Pieces
from descompiler.plan import Crossing, Plan, Table
from descompiler.program import Program, tail, target_name, user_line
from descompiler.rule import Rule

FORMS = tuple(f.name for f in ALL_FORMS)


Forbidden = Mapping[str, str | Sequence[str]]
"""Table names or patterns to forms."""


@dataclass(frozen=True)
class Terms:
    """What a plan has to satisfy, besides pins.

    Attributes
    ----------
    forbid : mapping
        Forms that tables must not take.
    """

    forbid: Forbidden = field(default_factory=dict)


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
    pieces.update(bias_pieces(program, operators, splits))
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
    for wanted in (pattern, f"{pattern}.weight", f"*.{pattern}", f"*.{pattern}.weight"):
        if found := [o for o in operators if fnmatch.fnmatchcase(o.name, wanted)]:
            return found
    names = ", ".join(sorted(o.name for o in operators)[:20])
    raise PlanError(f"{about} names {pattern!r}, which is no table of the model; tables: {names}")


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
    for o in operators:
        if not result[o.name]:
            why = "; ".join(f"{f}: {reason}" for f, reason in o.refusals.items())
            raise PlanError(
                f"table {o.name!r} is left without a form: all that it can take ({', '.join(o.forms)}) are "
                f"forbidden" + (f", and it can't take {why}" if why else "") + "; forbid less"
            )
    return result


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
    """Choose splits by coordinate descent over classes of similar tables, then over small tables to replicate."""
    terms = terms or Terms()
    allowed = allowed_forms(operators, pins, terms.forbid)
    fixed = {name: forms[0] for name, forms in allowed.items() if len(forms) == 1}
    classes: dict[object, list[Operator]] = {}
    for o in operators:
        uses = (tuple(x.mode for x in o.lookups), tuple(map(str, o.outputs)))
        key = fixed.get(o.name) or (o.dim, o.forms, o.starts is None, uses, o.sparse)
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
        price=float(best.price_bytes),
        replan=lambda changed: choose(program, operators, rules, w, changed, terms=terms),
    )


def _table(o: Operator) -> Table:
    uses = sorted({target_name(u) for x in o.lookups for u in x.node.users})
    ids = sum(prod(tail(x.ids)) for x in o.lookups)
    vectors = sum(1 if x.mode else prod(tail(x.ids)) for x in o.lookups)
    outputs = tuple(str(x) for x in o.outputs)
    size = o.dtype.itemsize
    return Table(o.name, o.rows, o.dim, size, ids, vectors, o.sparse, tuple(uses), dict(o.refusals), o.line, outputs)


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

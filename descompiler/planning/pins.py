"""Pins and forbidden forms: which forms each table may take."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from descompiler.cost_models.memory import OF_WHOLE_ROWS
from descompiler.errors import PlanError
from descompiler.graph.nodes import user_line
from descompiler.tables.aliases import current_name
from descompiler.tables.computed import Group, groups_of
from descompiler.tables.form import form_named
from descompiler.tables.tables import Operator

Forbidden = Mapping[str, str | Sequence[str]]
"""Table names or patterns to forms."""


def allowed_forms(
    operators: Sequence[Operator],
    pins: Mapping[str, str] | None = None,
    forbid: Forbidden | None = None,
    optimizer: str = "",
) -> dict[str, tuple[str, ...]]:
    """The forms that each table may take: those it can, less the forbidden; the pinned one, if it is pinned.

    A name must be able to take its pinned form; a pattern (with ``*``, ``?`` or ``[``) pins where it is possible. Later
    pins go before earlier ones. What the ``optimizer`` has no step for, no table takes that is trained.

    Raises
    ------
    PlanError
        For a name that is no table, a form that does not exist, or a table that is left without one.
    """
    refusals = {o.name: o.refusals | _without_step(o, optimizer) for o in operators}
    result = {o.name: tuple(f for f in o.forms if f not in refusals[o.name]) for o in operators}
    takes = dict(result)
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
            if form not in refusals[o.name]:
                result[o.name] = (form,)
            elif not set(pattern) & set("*?["):
                raise PlanError(f"table {o.name!r} can't take the form {form}: {refusals[o.name][form]}")
    _tie(result, groups_of(operators))
    for o in operators:
        if not result[o.name]:
            why = "; ".join(f"{f}: {reason}" for f, reason in refusals[o.name].items())
            raise PlanError(
                f"table {o.name!r} is left without a form: all that it can take ({', '.join(takes[o.name])}) are "
                f"forbidden" + (f", and it can't take {why}" if why else "") + "; forbid less"
            )
    return result


def _without_step(o: Operator, optimizer: str) -> dict[str, str]:
    """Forms whose pieces an optimiser can't step on, and why."""
    if optimizer not in OF_WHOLE_ROWS or not o.trained:
        return {}
    why = f"optimizer={optimizer!r} looks at whole rows, and ranks would have columns of them"
    return {form: why for form in o.forms if form_named(form).by_columns}


def _tie(allowed: dict[str, tuple[str, ...]], groups: Sequence[Group]) -> None:
    """Tables that a computed table is made of are divided by columns together, in one form, or not."""
    for g in groups:
        divided = {n: [f for f in allowed[n] if form_named(f).by_columns] for n in g.tables}
        shared = [f for f in divided[g.tables[0]] if all(f in x for x in divided.values())]
        pinned = [n for n in g.tables if divided[n] and len(divided[n]) == len(allowed[n])]
        if pinned and not shared:
            apart = [n for n in g.tables if not set(divided[n]) & set(divided[pinned[0]])]
            unable = (apart or [n for n in g.tables if n != pinned[0]])[0]
            raise PlanError(
                f"tables {', '.join(g.tables)} are computed together ({user_line(g.nodes[0])}), so {pinned[0]!r} can "
                f"be divided by columns only if {unable!r} is: pin both"
            )
        for n in g.tables:
            allowed[n] = tuple(f for f in allowed[n] if f in shared or not (pinned or f in divided[n]))


def form_name(name: str, about: str) -> str:
    """The form that a user's name means; `PlanError` if none."""
    try:
        return form_named(current_name(name)).name
    except PlanError as error:
        raise PlanError(f"{about}: {error}") from None


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

"""A plan that the user gives: followed if it is for this model and these ranks, and planned anew if it was edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from descompiler.errors import PlanError
from descompiler.graph.program import Program
from descompiler.graph.text import fingerprint
from descompiler.planning.cluster import Cluster
from descompiler.planning.objective import Terms
from descompiler.planning.plan import Plan
from descompiler.planning.planner import choose
from descompiler.region.cut import Weights
from descompiler.region.rule import Rule
from descompiler.runtime.ranks import Ranks
from descompiler.tables.tables import Operator
from descompiler.units import MOST_RANKS, MOST_ROWS

T = TypeVar("T", Mapping[str, str] | None, None)


MOST_TOLD = 8
"""Tables that an error lists."""


GivenPlan = Plan | str | Path | Mapping[str, str] | None
"""A plan, the file of one, or forms to pin."""


def loaded(plan: Plan | str | Path | T) -> Plan | T:
    return Plan.load(plan) if isinstance(plan, str | Path) else plan


def follow_or_choose(
    program: Program,
    operators: list[Operator],
    rules: Sequence[Rule],
    w: Weights,
    plan: GivenPlan,
    terms: Terms | None,
) -> Plan:
    """The given plan, or the best that satisfies what is given."""
    plan = loaded(plan)
    if not isinstance(plan, Plan):
        return choose(program, operators, rules, w, plan, terms=terms)
    check_ranks(plan, w.ranks)
    if plan.fingerprint != fingerprint(program):
        raise PlanError(
            f"the plan is for another model ({plan.fingerprint}, this one is {fingerprint(program)}): "
            f"{_what_differs(plan, operators)}; plan again with des.plan(model, inputs, ranks={plan.ranks})"
        )
    if plan.changes:  # edited in the file: the other tables keep their forms
        w = replace(w, rows=plan.rows)
        return choose(program, operators, rules, w, {**plan.forms, **plan.changes}, terms=terms)
    return plan


def check_counts(ranks: Any, batch: Any) -> None:
    """Raise unless they are whole numbers of ranks, and of rows of each, that anything can be planned for."""
    for what, number, most in (("ranks", ranks, MOST_RANKS), ("batch", batch, MOST_ROWS)):
        if number is not None and (type(number) is not int or not 1 <= number <= most):
            raise PlanError(f"{what}={number!r}; it is a whole number from 1 to {most:,}")


def check_ranks(plan: Plan, ranks: int) -> None:
    if plan.ranks != ranks:
        raise PlanError(
            f"the plan is for {plan.ranks} ranks, and this is {ranks} ranks: plan again with des.plan(model, inputs, "
            f"ranks={ranks}), or start {plan.ranks} processes"
        )


def _what_differs(plan: Plan, operators: list[Operator]) -> str:
    """How the tables of a model are not a plan's."""
    mine, its = {o.name: o.shape for o in operators}, {t.name: (t.rows, t.dim) for t in plan.tables}
    for name in dict.fromkeys((*its, *mine)):
        if name not in mine:
            return f"this model has no table {name!r}"
        if name not in its:
            return f"the plan has no table {name!r}"
        if mine[name] != its[name]:
            return f"table {name!r} is {list(its[name])} in the plan, {list(mine[name])} in the model"
    itemsizes = {o.name: o.dtype.itemsize for o in operators}
    for t in plan.tables:
        if t.itemsize != itemsizes[t.name]:
            return f"table {t.name!r} has {t.itemsize} bytes an element in the plan, {itemsizes[t.name]} in the model"
    return "the tables are the same, what is computed from them (in these training flags), or another parameter, is not"


def setting_of(
    ranks: int | None,
    batch: int | None,
    pins: Mapping[str, str] | None,
    plan: Plan | str | Path | None,
    cluster: Cluster | None,
) -> tuple[int, int | None, Mapping[str, str] | None]:
    """Ranks, rows and pins to plan for; those of a plan where there is one."""
    given = loaded(plan)
    if ranks is None:
        if cluster is None and given is None:
            raise PlanError("des.plan needs ranks=, or cluster= with them")
        ranks = cluster.ranks if cluster is not None else given.ranks  # type: ignore[union-attr]
    if given is not None:
        batch, pins = batch or given.rows, {**given.forms, **given.changes, **(pins or {})}
    return ranks, batch, pins


def agree(plan: Plan, ranks: Ranks) -> None:
    """Every rank raises if any rank has another model or plan."""
    tables = ", ".join(f"{t.name} [{t.rows}, {t.dim}]" for t in plan.tables[:MOST_TOLD]) or "none"
    elements = sum(prod(p.shape) for p in plan.pieces.values())
    ranks.same("model", plan.fingerprint, f"({elements:,} elements in {len(plan.pieces)} parameters; tables {tables})")
    ranks.same("plan", plan.digest(), str(dict(sorted(plan.forms.items()))))

"""A plan that the user gives: followed if it is for this model and these ranks, and planned anew if it was edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from descompiler.errors import PlanError, step_of
from descompiler.graph.program import Program
from descompiler.graph.text import fingerprint
from descompiler.planning.assumed import GivenCluster
from descompiler.planning.cluster import Cluster
from descompiler.planning.objective import IDS, Terms
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


Pins = Mapping[str, str] | None


@dataclass(frozen=True)
class Asked:
    """What one rank asks a plan for: its model, in whatever way it was captured.

    Attributes
    ----------
    fingerprint, told : str
        Of the model, and more about it for people.
    differs : callable
        How the model of a plan with another fingerprint is not this one.
    search : callable
        The best plan that satisfies pins and terms, for so many rows.
    check : callable
        Raises unless a plan that was not made here is one of this rank's program.
    """

    fingerprint: str
    told: str
    differs: Callable[[Plan], str]
    search: Callable[[Pins, int, Terms], Plan]
    check: Callable[[Plan], Any]

    def read(self, plan: GivenPlan, ranks: int) -> Plan | Pins:
        """What is given, from its file, if it is for this model and so many ranks."""
        given = loaded(plan)
        if isinstance(given, Plan):
            check_ranks(given, ranks)
            if given.fingerprint != self.fingerprint:
                raise PlanError(
                    f"the plan is for another model {self.differs(given)}; plan again with des.plan(model, inputs, "
                    f"ranks={given.ranks})"
                )
        return given


def asked_of(
    program: Program,
    operators: list[Operator],
    rules: Sequence[Rule],
    w: Weights,
    check: Callable[[Plan], Any],
) -> Asked:
    """What is asked for a captured model."""
    mine = fingerprint(program)
    tables = ", ".join(f"{o.name} [{o.rows}, {o.dim}]" for o in operators[:MOST_TOLD]) or "none"
    elements = sum(prod(p.shape) for p in program.parameters.values())
    return Asked(
        mine,
        f"({elements:,} elements in {len(program.parameters)} parameters; tables {tables})",
        lambda other: f"({other.fingerprint}, this one is {mine}): {_what_differs(other, operators)}",
        lambda pins, rows, terms: choose(program, operators, rules, replace(w, rows=rows), pins, terms=terms),
        check,
    )


def agreed(asked: Asked, plan: GivenPlan, rows: int, terms: Terms, ranks: Ranks) -> Plan:
    """The one plan of all ranks: the given one, or the best of the first rank's search. Collective.

    Searching takes processor time, which ranks of one machine share, and every rank would find the same. The others
    get the plan as they would read it from a file, and check it as they check one.

    Raises
    ------
    RankError
        If any rank has another model, or is given another plan or other terms.
    PlanError
        On every rank, if the given plan is wrong or there is none that satisfies what is given.
    """

    def read() -> tuple[Plan | Pins, Terms]:
        given = asked.read(plan, ranks.count)
        return given, as_planned(given, terms)

    given, terms = ranks.everywhere(step_of("reading the plan", read))
    ranks.same("model", asked.fingerprint, asked.told)
    if isinstance(given, Plan):
        ranks.same("plan", given.digest(), str(dict(sorted(given.forms.items()))))
    else:
        ranks.same("plan", f"plan={sorted((given or {}).items())}")
    ranks.same("option", str(replace(terms, statistics=None)))
    pins: Pins
    if not isinstance(given, Plan):
        pins = given
    elif given.changes:  # edited in the file: the other tables keep their forms
        pins, rows = {**given.forms, **given.changes}, given.rows
    else:
        ranks.everywhere(step_of("following the plan", lambda: asked.check(given)))
        return given
    found = ranks.by_first(step_of("planning", lambda: asked.search(pins, rows, terms)))
    text = ranks.of_first(found.to_json() if found is not None and ranks.count > 1 else "")

    def follow() -> Plan:
        if found is not None:
            return found
        plan = Plan.from_json(text)
        asked.check(plan)
        return replace(
            plan,
            replan=lambda changed: asked.search(changed, rows, terms),
            graph_of_cut=lambda: asked.search(plan.forms, rows, terms).cut_graph(),
        )

    return ranks.everywhere(step_of("following the first rank's plan", follow))


def as_planned(plan: GivenPlan, terms: Terms) -> Terms:
    """The terms, with what values are rounded to and whose rows ids are as a given plan has them.

    Raises
    ------
    PlanError
        If the user asks for something else.
    """
    given = loaded(plan)
    if not isinstance(given, Plan):
        return terms
    ids = IDS[1] if given.layout.given else IDS[0]
    for what, asked, its in (("wire_dtype", terms.wire_dtype, given.wire_dtype), ("ids", terms.ids, ids)):
        if asked not in (None, IDS[0], its) and given.ranks > 1:
            raise PlanError(
                f"{what}={asked}, and the plan has {its}: plan again with des.plan(model, inputs, ranks={given.ranks}, "
                f"pins=plan.forms, {what}=...), or leave {what} to the plan"
            )
    return replace(terms, wire_dtype=given.wire_dtype, ids=ids)


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
    cluster: GivenCluster,
) -> tuple[int, int | None, Mapping[str, str] | None]:
    """Ranks, rows and pins to plan for; those of a plan where there is one."""
    given = loaded(plan)
    if ranks is None:
        if not isinstance(cluster, Cluster) and given is None:
            raise PlanError("des.plan needs ranks=, or cluster= with them")
        ranks = cluster.ranks if isinstance(cluster, Cluster) else given.ranks  # type: ignore[union-attr]
    if given is not None:
        batch, pins = batch or given.rows, {**given.forms, **given.changes, **(pins or {})}
    return ranks, batch, pins

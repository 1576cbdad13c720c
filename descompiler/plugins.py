"""Plug-ins: what other distributions, or one call of `compile`, add to what is built in.

A distribution names entry points in two groups:

    descompiler.passes        a placement rule, a form, a normalise pass, or a sequence of them
    descompiler.cost_models   a baseline (`Baseline`), a cluster (`Cluster`), or a sequence of them

They are loaded at the first compilation. What has the name of another is refused, both named; what can't be loaded is
reported with its distribution, for a rule that is missing on one rank would be another plan there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from descompiler.cost_models.baselines import BASELINES, Baseline
from descompiler.errors import PlanError
from descompiler.graph.rewrite import Pass
from descompiler.passes import FORMS, NORMALISE, RULES
from descompiler.planning.cluster import CLUSTERS, Cluster
from descompiler.region.rule import Rule
from descompiler.registry import BUILT_IN, Registry
from descompiler.tables.form import Form

PASSES = "descompiler.passes"
COST_MODELS = "descompiler.cost_models"
"""Groups of entry points."""

ADDED: Registry[Pass] = Registry("normalise pass", dict.fromkeys(NORMALISE))
"""Normalise passes; those that plug-ins add run after the built-in ones."""

HAS: dict[str, tuple[Registry[Any], tuple[str, ...]]] = {
    "rule": (RULES, ("name", "targets", "place", "emit")),
    "form": (FORMS, ("name", "refuses", "split", "placement", "emit", "costs")),
    "normalise pass": (ADDED, ("name", "__call__")),
}
"""What things of a kind have, and where they are kept; the first kind that fits is meant."""


FORMS_OF_A_CALL = "compile(forms=...)"
"""The origin of forms that one call was given."""


@dataclass(frozen=True)
class Kit:
    """What a compilation is made with.

    Attributes
    ----------
    passes : tuple of Pass
        From a captured program to its normal form, in order.
    rules : tuple of Rule
        The first that can place an operator does.
    forms : tuple of Form
        That tables may take.
    """

    passes: tuple[Pass, ...]
    rules: tuple[Rule, ...]
    forms: tuple[Form, ...]

    @classmethod
    def of(cls, rules: Sequence[Rule] = (), forms: Sequence[Form] = ()) -> Kit:
        """All that is built in or installed, and what one call adds.

        Both are the call's alone: no other considers them. A form is still found by its name afterwards, so that plans
        with it can be followed, and may be given anew, as a notebook does that defines it again.

        Raises
        ------
        PlanError
            If two things of a kind have one name, or a plug-in can't be loaded.
        """
        installed()
        chosen = Registry("rule", RULES)
        for rule in rules:
            _expect(rule, "rule", "compile(rules=...)")
            chosen.add(rule, "compile(rules=...)")
        considered = Registry[Form]("form", reserved=FORMS.reserved)
        for form in FORMS:
            if FORMS.origin(form.name) != FORMS_OF_A_CALL:
                considered.add(form, FORMS.origin(form.name))
        for form in forms:
            _expect(form, "form", FORMS_OF_A_CALL)
            considered.add(form, FORMS_OF_A_CALL)
        for form in forms:  # all or none
            FORMS.replace(form, FORMS_OF_A_CALL)
        mine = tuple(p for p in ADDED if ADDED.origin(p.name) != BUILT_IN)
        return cls((*NORMALISE, *mine), tuple(chosen), tuple(considered))


@cache
def installed() -> tuple[str, ...]:
    """Load the plug-ins that are installed, once; the names of their entry points.

    Raises
    ------
    PlanError
        With the distribution of what can't be loaded, is no plug-in, or has a name that is taken.
    """
    found = []
    for group, add in ((PASSES, add_to_passes), (COST_MODELS, add_to_cost_models)):
        for point in entry_points(group=group):
            for item in _load(point):
                add(item, _distribution(point))
            found.append(point.name)
    return tuple(found)


FORMS.discover = installed  # plan files name forms before anything is compiled


def add_to_passes(item: Any, origin: str) -> None:
    """Add a rule, a form or a normalise pass.

    Raises
    ------
    PlanError
        If it is none, or another has its name.
    """
    for registry, attributes in HAS.values():
        if all(hasattr(item, a) for a in attributes):
            registry.add(item, origin)
            return
    raise PlanError(
        f"{type(item).__name__} of {origin} is no plug-in of {PASSES}: a rule has {', '.join(HAS['rule'][1])}; a form "
        f"{', '.join(HAS['form'][1])}; a normalise pass a name, and is called with a program"
    )


def add_to_cost_models(item: Any, origin: str) -> None:
    """Add a baseline or a cluster.

    Raises
    ------
    PlanError
        If it is neither, or another has its name.
    """
    if isinstance(item, Baseline):
        BASELINES.add(item, origin)
    elif isinstance(item, Cluster):
        CLUSTERS.add(item, origin)
    else:
        raise PlanError(f"{type(item).__name__} of {origin} is no plug-in of {COST_MODELS}: give a Baseline or Cluster")


def _expect(item: Any, kind: str, origin: str) -> None:
    if missing := [a for a in HAS[kind][1] if not hasattr(item, a)]:
        raise PlanError(f"{item!r} of {origin} is no {kind}: it has no {', '.join(missing)}")


def _load(point: EntryPoint) -> Iterable[Any]:
    try:
        loaded = point.load()
    except Exception as error:  # whatever importing somebody's module raises
        raise PlanError(
            f"plug-in {point.name!r} of {_distribution(point)} ({point.value}) can't be loaded: "
            f"{type(error).__name__}: {error}; mend or uninstall it"
        ) from error
    return loaded if isinstance(loaded, list | tuple) else (loaded,)


def _distribution(point: EntryPoint) -> str:
    return "an unknown distribution" if point.dist is None else f"{point.dist.name} {point.dist.version}"

"""What a plan's file has to be in itself, whatever the model: its parts agree, and what is told of it can be counted.

Whether it is a plan of a model is asked where one is at hand (`descompiler.builder.Builder.follow`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from descompiler.cost_models.memory import STATE
from descompiler.errors import PlanError
from descompiler.layout.division import Division
from descompiler.planning.chosen import Chosen
from descompiler.units import MOST_RANKS, MOST_ROWS

MOST_SHOWN = 6
"""Names that an error lists."""

MOST_QUOTED = 500
"""Characters of what an error quotes of a file."""


EDITED = (
    "it was edited. In a plan's file only forms may be, which are priced anew; plan again with "
    "des.plan(model, inputs, ranks=...)"
)
"""Why a plan that is none of the model's is refused, and what to do."""


def check_pieces(plan: Chosen, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless a plan has pieces of a model's parameters, and those of its splits.

    Raises
    ------
    PlanError
    """
    if missing := sorted(set(shapes) - set(plan.pieces)):
        raise PlanError(f"the plan has no pieces of {', '.join(missing[:MOST_SHOWN])}: {EDITED}")
    for name, shape in shapes.items():
        if plan.pieces[name].shape != shape:
            was = list(plan.pieces[name].shape)
            raise PlanError(f"the plan's pieces of {name!r} are of shape {was}, in the model {list(shape)}: {EDITED}")
        if name in plan.splits and plan.splits[name].pieces != plan.pieces[name]:
            raise PlanError(f"the plan's pieces of {name!r} are not those of its split: {EDITED}")


def shortened(text: str) -> str:
    """What is quoted of a file may be of any length."""
    return text if len(text) <= MOST_QUOTED else text[:MOST_QUOTED] + "..."


def check_file(plan: Chosen, forms: Mapping[str, str]) -> None:
    """Raise unless the parts of a plan agree.

    Parameters
    ----------
    forms : mapping of str to str
        Of each table, as the file has them at its beginning, where they may be edited.

    Raises
    ------
    PlanError
    """
    for what in _faults(plan, forms):
        raise PlanError(f"of the plan in this file, {shortened(what)}: {EDITED}")


def _faults(plan: Chosen, forms: Mapping[str, str]) -> Iterator[str]:
    """What is wrong, the first of it first: each is asked only if what is before it is right."""
    for what, number, most in (
        ("ranks", plan.ranks, MOST_RANKS),
        ("rows", plan.rows, MOST_ROWS),
        ("itemsize", plan.itemsize, 16),
    ):
        if not 1 <= number <= most:
            yield f"{what} is {number:,}, it has to be from 1 to {most:,}"
    if plan.layout.ranks != plan.ranks:
        yield f"ranks is {plan.ranks}, and its layout is for {plan.layout.ranks}"
    allowed = {"objective": ("bytes", "seconds"), "aggregate": ("cut", "lookups"), "optimizer": tuple(STATE)}
    for what, names in allowed.items():
        if getattr(plan, what) not in names:
            yield f"{what} is {getattr(plan, what)!r}, it has to be one of {', '.join(names)}"
    numbers = {"price_bytes": plan.price_bytes, "price": plan.price, "bound": plan.bound, "trials": plan.trials}
    numbers |= {f"unique of {n!r}": x for n, x in plan.unique.items()}
    numbers |= {f"price of {n!r}": x for n, of in plan.prices.items() for x in of.values()}
    numbers |= {f"seconds of {n!r}": x for n, of in plan.seconds.items() for x in of.values()} | {"work_s": plan.work_s}
    for what, amount in numbers.items():
        if not 0 <= amount < math.inf:
            yield f"{what} is {amount}, which is no finite number from 0 on"
    tables = {t.name: t for t in plan.tables}
    if len(tables) < len(plan.tables):
        yield "a table is listed twice"
    for what, named in (("splits", set(plan.splits)), ("forms", set(forms))):
        if difference := sorted(named ^ set(tables)):
            yield f"tables and {what} differ in {', '.join(difference[:MOST_SHOWN])}"
    for name, t in tables.items():
        split, pieces = plan.splits[name], plan.pieces.get(name)
        if pieces is None:
            yield f"it has no pieces of {name!r}"
        elif pieces != split.pieces:
            yield f"the pieces of {name!r} are not those of its split"
        # of a model in part, a table is a parameter of any shape
        elif not pieces.shape or pieces.shape[0] != t.rows or min(t.rows, t.dim, t.ids, t.vectors) < 0:
            yield f"table {name!r} has {t.rows:,} rows of {t.dim:,}, its pieces are of {list(pieces.shape)}"
    for name, pieces in plan.pieces.items():
        if pieces.ranks != plan.ranks:
            yield f"the pieces of {name!r} are for {pieces.ranks} ranks"
    for name in (*plan.prices, *plan.seconds, *plan.missing, *plan.unique, *(n for x in plan.labels for n in x.tables)):
        if name not in tables:
            yield f"it says something of {name!r}, which is none of its tables"
    if plan.memories and not _tiles([(a, b) for a, b, _ in plan.memories], plan.ranks):
        yield f"its memories are not one of each of {plan.ranks} ranks"
    for division in _divisions(plan.layout):
        if not division.fits(plan.ranks):
            yield f"{division.runs} are no ranges of {plan.ranks} ranks"
    # only now: it takes room for each rank. What the layout's numbers can't be, counting with them finds
    sent = plan.layout.predict_kinds(plan.rows, plan.itemsize)
    if any(size < 0 for traffic in sent for size in traffic.bytes_by_collective.values()):
        yield "by its layout, less than nothing is sent"


def _tiles(spans: list[tuple[int, int]], ranks: int) -> bool:
    """Whether every rank is in one span, in order."""
    ends = [0, *(stop for _, stop in spans)]
    return ends[-1] == ranks and all(a == first < stop for a, (first, stop) in zip(ends, spans, strict=False))


def _divisions(x: Any) -> Iterator[Division]:
    """All divisions in a layout."""
    if isinstance(x, Division):
        yield x
    elif isinstance(x, tuple):
        for part in x:
            yield from _divisions(part) if not isinstance(part, int | str) else ()
    elif is_dataclass(x):
        for f in fields(x):
            yield from _divisions(getattr(x, f.name))

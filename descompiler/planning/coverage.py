"""Coverage: what became of every weights-rich parameter, and why not better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from descompiler.graph.nodes import target_name
from descompiler.graph.program import Failure, Program
from descompiler.planning.plan import Plan
from descompiler.tables.form import fallback
from descompiler.tables.tables import WEIGHTS_RICH_ELEMENTS, Operator

IN_PART = "partial"
"""The last rung: the user's own forward runs, and uses of split parameters are intercepted."""


@dataclass(frozen=True)
class Covered:
    """One weights-rich parameter.

    Attributes
    ----------
    form : str
        A form, "co-located" or "unused".
    why : str
        The reason that it is not split, or not split better; empty if there is nothing to say.
    choice : bool
        Whether the form was the cheapest of several possible ones, rather than the only one.
    """

    name: str
    size_bytes: int
    form: str
    rung: str
    why: str
    choice: bool = False


@dataclass(frozen=True)
class Coverage:
    """Every weights-rich parameter of a model.

    Attributes
    ----------
    rung : str
        The tracer that captured the model, or `IN_PART`.
    failures : tuple of Failure
        Why each rung before failed.
    parameters : tuple of Covered
    note : str
        What else every rank has to compute for want of a graph; empty if nothing.
    """

    rung: str
    failures: tuple[Failure, ...]
    parameters: tuple[Covered, ...]
    note: str = ""

    @property
    def left_whole(self) -> list[Covered]:
        """Parameters that every rank holds whole because no split form is possible, largest first."""
        found = [p for p in self.parameters if p.form == fallback().name and not p.choice]
        return sorted(found, key=lambda p: -p.size_bytes)

    def warning(self) -> str | None:
        """What to warn about; None if nothing weights-rich is left whole for want of a form, and there is no note."""
        whole = self.left_whole
        names = "; ".join(f"{p.name!r} ({p.size_bytes:,} B: {p.why})" for p in whole)
        total = sum(p.size_bytes for p in whole)
        texts = [self.note, f"left whole on every rank, {total:,} B: {names}" if whole else ""]
        return "; ".join(filter(None, texts)) or None

    def __str__(self) -> str:
        lines = [f"captured by: {self.rung}"]
        lines += [f"  not by {f}" for f in self.failures]
        lines += [f"  {self.note}"] if self.note else []
        for p in self.parameters:
            lines.append(f"{p.name}  {p.size_bytes:,} B  {p.form} ({p.rung})")
            if p.why:
                lines.append(f"  {p.why}")
        return "\n".join(lines)


def coverage_of(program: Program, operators: Sequence[Operator], plan: Plan) -> Coverage:
    """Coverage of a model that was captured whole."""
    by_name = {o.name: o for o in operators}
    users: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if (name := program.parameter(node)) is not None:
            users.setdefault(name, []).extend(target_name(u) for u in node.users)
    found = []
    for name, p in program.parameters.items():
        if p.numel() < WEIGHTS_RICH_ELEMENTS and name not in by_name:
            continue
        size = p.numel() * p.dtype.itemsize
        if name in by_name:
            form, why, choice = plan.splits[name].form, _why(by_name[name], plan), len(by_name[name].forms) > 1
        elif not plan.pieces[name].is_replicated:
            form, why, choice = "co-located", "", False
        elif not users.get(name):
            form, why, choice = (
                "unused",
                f"forward does not use it{'' if program.training else ' in evaluation'}",
                False,
            )
        else:
            uses = ", ".join(sorted(set(users[name])))
            form, why, choice = fallback().name, f"used by {uses}, not by a lookup", False
        found.append(Covered(name, size, form, program.rung, why, choice))
    return Coverage(program.rung, program.failures, tuple(found), "; ".join(_graph_notes(program)))


def _graph_notes(program: Program) -> Iterator[str]:
    if program.left_behind:
        yield (
            f"forward leaves values with gradients on the model, in {', '.join(program.left_behind)}; the compiled "
            "model does not: return from forward what a loss is made of"
        )


def _why(operator: Operator, plan: Plan) -> str:
    form = plan.splits[operator.name].form
    whole = form == fallback().name
    reasons = [f"not {f}: {why}" for f, why in operator.refusals.items()]
    prices = plan.prices.get(operator.name, {})
    if whole and len(prices) > 1:
        others = ", ".join(f"{f} {price:,} B" for f, price in sorted(prices.items(), key=lambda x: x[1]) if f != form)
        reasons.insert(
            0, f"a step sends {prices.get(form, plan.price_bytes):,} B with it replicated, otherwise {others}"
        )
    elif whole and len(operator.forms) > 1:
        reasons.insert(0, "chosen by the plan")
    return "; ".join(dict.fromkeys(reasons))

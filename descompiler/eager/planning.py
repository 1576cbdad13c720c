"""Plans of models captured in part: the planner's, for their outline (`descompiler.eager.outline`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from descompiler.eager.outline import Outline, fetched_form, outline_of
from descompiler.eager.survey import Survey
from descompiler.errors import PlanError
from descompiler.graph.program import Failure
from descompiler.layout.pieces import Pieces
from descompiler.model.random_state import ONE_DRAW
from descompiler.planning.checked import EDITED, check_pieces
from descompiler.planning.coverage import IN_PART, Coverage, Covered
from descompiler.planning.given import Asked
from descompiler.planning.objective import IDS, Terms
from descompiler.planning.pins import allowed_forms, form_name
from descompiler.planning.plan import Plan
from descompiler.planning.planner import choose
from descompiler.region.cut import Weights
from descompiler.tables.form import Split, fallback, form_named
from descompiler.tables.made import made_by_its_form
from descompiler.tables.tables import WEIGHTS_RICH_ELEMENTS


def asked_in_part(template: nn.Module, seen: Survey, ranks: int) -> Asked:
    """What is asked for a model of which the user's forward runs."""
    mine, parameters = _fingerprint(template), list(template.parameters())
    return Asked(
        mine,
        f"({sum(p.numel() for p in parameters):,} elements in {len(parameters)} parameters)",
        lambda other: f"({other.fingerprint}), or for a graph of this one; it is captured in part ({mine})",
        lambda pins, rows, terms: plan_partial(template, seen, ranks, rows, pins, terms),
        lambda plan: _check(template, plan, outline_of(template, seen, ranks)),
    )


def _check(template: nn.Module, plan: Plan, outline: Outline) -> None:
    """Raise unless the pieces of a plan are those that its forms make of the model."""
    check_pieces(plan, {n: tuple(p.shape) for n, p in template.named_parameters()})
    _check_wire_dtype(plan.wire_dtype)
    operators = {o.name: o for o in outline.operators}
    for name, pieces in plan.pieces.items():
        split, o = plan.splits.get(name), operators.get(name)
        if split is None or o is None:
            right = pieces.is_replicated
        else:
            known = form_named(split.form).fallback or split.form == fetched_form()
            rows = not pieces.dim or pieces.is_replicated
            right = known and rows and made_by_its_form(o, replace(split, pieces=replace(pieces, shape=o.shape)))
        if not right:
            raise PlanError(f"the plan's pieces of {name!r} are none that its form makes: {EDITED}")


def _check_wire_dtype(wire_dtype: torch.dtype | None) -> None:
    if wire_dtype is not None:
        raise PlanError(
            f"wire_dtype={wire_dtype}: no tracer captured the model, and what its own forward uses of other ranks' "
            "rows is not rounded. Leave wire_dtype out, or make forward traceable (coverage() says what was in the way)"
        )


def plan_partial(
    template: nn.Module, seen: Survey, ranks: int, rows: int, pins: Mapping[str, str] | None, terms: Terms
) -> Plan:
    """The best plan that satisfies the terms, as `choose` finds it.

    Raises
    ------
    PlanError
        As `choose`.
    """
    _check_wire_dtype(terms.wire_dtype)
    if terms.ids != IDS[0]:
        raise PlanError(f"ids={terms.ids!r}: no tracer captured the model, and its own forward reads ids of own rows")
    outline = outline_of(template, seen, ranks)
    wanted = {pattern: _in_part(form, pattern) for pattern, form in (pins or {}).items()}
    # small tables stay whole: each use of a divided one costs collectives of its own
    allowed = allowed_forms(outline.operators, wanted, terms.forbid, terms.optimizer)
    small = [o.name for o in outline.operators if o.rows * o.dim < WEIGHTS_RICH_ELEMENTS and len(allowed[o.name]) > 1]
    w = Weights(ranks, rows, max((p.element_size() for p in template.parameters()), default=4))
    wanted |= dict.fromkeys(small, fallback().name)
    chosen = choose(outline.program, outline.operators, (), w, wanted, terms=terms)
    if ranks == 1:  # nothing crosses, and the planner looks at no pin; what is pinned is done as on more ranks
        fetched = fetched_form()
        divided = [o for o in outline.operators if allowed[o.name] == (fetched,) and o.dynamic is None]
        cut = {o.name: Split(fetched, Pieces.even(o.shape, 0, 1)) for o in divided}
        chosen = replace(chosen, splits=chosen.splits | cut)
    return _of_the_model(template, seen, outline, chosen, terms)


def _in_part(form: str, pattern: str) -> str:
    """What a form that the user pins is here: where ranks hold the same, rows are fetched (`Form.in_part`)."""
    name = form_name(form, f"plan for {pattern!r}")
    return form_named(name).in_part or name


def _of_the_model(template: nn.Module, seen: Survey, outline: Outline, chosen: Plan, terms: Terms) -> Plan:
    """An outline's plan as one of the model: its parameters have their own shapes, rows cut as in the outline."""
    ranks, rows = chosen.ranks, chosen.rows
    pieces = {n: Pieces.replicate(tuple(p.shape), ranks) for n, p in template.named_parameters()}
    for name, split in chosen.splits.items():
        if not split.pieces.is_replicated:
            pieces[name] = replace(split.pieces, shape=pieces[name].shape)
    splits = {n: replace(split, pieces=pieces[n]) for n, split in chosen.splits.items()}
    return replace(
        chosen,
        tables=outline.tables,
        splits=splits,
        pieces=pieces,
        fingerprint=_fingerprint(template),
        notes=_notes_in_part(seen, ranks, rows),
        replan=lambda changed: plan_partial(template, seen, ranks, rows, changed, terms),
        graph_of_cut=None,
    )


def _fingerprint(template: nn.Module) -> str:
    parameters = sorted((n, tuple(p.shape), str(p.dtype)) for n, p in template.named_parameters())
    return hashlib.sha256(f"partial {parameters}".encode()).hexdigest()[:16]


def _notes_in_part(seen: Survey, ranks: int, rows: int) -> list[str]:
    if not seen.coupled or ranks == 1:
        return []
    note = (
        f"{seen.coupled}, and no tracer captured the model: every rank gathers the inputs of all "
        f"({(ranks - 1) * rows * seen.input_bytes:,} B sent) and computes the global batch, exactly, "
        "but no faster than one process. Move what combines rows into the loss, or make forward traceable"
    )
    drawn = f"random numbers: {ONE_DRAW}"
    return [note, drawn] if seen.random else [note]


def coverage_partial(template: nn.Module, seen: Survey, plan: Plan, failures: tuple[Failure, ...]) -> Coverage:
    """Coverage of a model of which the user's forward runs."""
    found = []
    for name, p in template.named_parameters():
        use = seen.uses.get(name)
        if p.numel() < WEIGHTS_RICH_ELEMENTS and name not in plan.splits:
            continue
        size = p.numel() * p.element_size()
        if use is None:
            entry = Covered(name, size, "unused", IN_PART, "forward does not use it on the example inputs")
        elif name in plan.splits and not use.others:
            price = ", ".join(f"{f} {x:,} B" for f, x in plan.prices[name].items())
            entry = Covered(name, size, plan.splits[name].form, IN_PART, f"a step sends: {price}", choice=True)
        else:
            entry = Covered(
                name, size, fallback().name, IN_PART, f"used by {', '.join(sorted(use.others))}, not only by lookups"
            )
        found.append(entry)
    return Coverage(IN_PART, failures, tuple(found), "; ".join(plan.notes))

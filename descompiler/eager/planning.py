"""Plans of models captured in part: which parameters are divided by rows and fetched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import nn

from descompiler.eager.survey import Survey, Use
from descompiler.errors import PlanError
from descompiler.graph.program import Failure
from descompiler.layout.layout import Layout
from descompiler.layout.pieces import Pieces
from descompiler.layout.step import DenseGradients, Header
from descompiler.model.random_state import ONE_DRAW
from descompiler.planning.coverage import PARTIAL, Coverage, Covered
from descompiler.planning.given import Given, check_ranks, loaded
from descompiler.planning.pins import names_matching
from descompiler.planning.plan import Plan, Table
from descompiler.tables.form import Split
from descompiler.tables.tables import WEIGHTS_RICH_ELEMENTS


def follow_or_choose_in_part(template: nn.Module, seen: Survey, ranks: int, rows: int, plan: Given) -> Plan:
    """As `follow_or_choose`, for a model of which the user's forward runs."""
    plan = loaded(plan)
    if not isinstance(plan, Plan):
        return plan_partial(template, seen, ranks, rows, plan)
    check_ranks(plan, ranks)
    fingerprint = plan_partial(template, seen, ranks, rows, None).fingerprint
    if plan.fingerprint != fingerprint:
        raise PlanError(
            f"the plan is for another model ({plan.fingerprint}), or for a graph of this one; it is captured in part "
            f"({fingerprint}): plan again with des.plan(model, inputs, ranks={plan.ranks})"
        )
    if plan.changes:
        return plan_partial(template, seen, ranks, plan.rows, {**plan.forms, **plan.changes})
    return plan


def plan_partial(template: nn.Module, seen: Survey, ranks: int, rows: int, pins: Mapping[str, str] | None) -> Plan:
    """Divide by rows what is only looked up, if that sends fewer bytes (or is pinned); replicate the rest."""
    parameters = dict(template.named_parameters())
    fixed = _pinned(parameters, seen, pins)
    tables, splits, prices = [], {}, {}
    pieces = {n: Pieces.replicate(tuple(p.shape), ranks) for n, p in parameters.items()}
    for name, p in parameters.items():
        use = seen.uses.get(name)
        if use is None or not use.lookups:
            continue
        size, width = p.numel() * p.element_size(), p.shape[1:].numel()
        ids = -(-use.ids * rows * (ranks if seen.coupled else 1) // max(seen.rows, 1))
        unique = min(ids, p.shape[0])
        crossing = ranks - 1
        price = {
            "replicate": 2 * crossing * size // ranks if p.requires_grad else 0,
            "pull": crossing * unique * (8 + (2 if p.requires_grad else 1) * width * p.element_size()) // ranks,
        }
        refusals = _refusals(use)
        form = "replicate"
        if not refusals:
            cheaper = price["pull"] < price["replicate"] and p.numel() >= WEIGHTS_RICH_ELEMENTS
            form = "pull" if cheaper or (use.sparse and ranks > 1) else "replicate"
        form = fixed.get(name, form)
        if form == "pull":
            pieces[name] = Pieces.even(tuple(p.shape), 0, ranks)
        splits[name], prices[name] = Split(form, pieces[name]), {} if refusals else price
        per_row, vectors = -(-use.ids // max(seen.rows, 1)), -(-use.vectors // max(seen.rows, 1))
        uses = tuple(sorted(use.lookups | use.others))
        tables.append(
            Table(name, p.shape[0], width, p.element_size(), per_row, vectors, use.sparse, uses, refusals, "")
        )
    dense = sum(
        p.numel() for n, p in parameters.items() if p.requires_grad and pieces[n].is_replicated and n in seen.uses
    )
    itemsize = max((p.element_size() for p in parameters.values()), default=4)
    price_bytes = sum(prices[n].get(s.form, 0) for n, s in splits.items())
    digest = hashlib.sha256(
        f"partial {sorted((n, tuple(p.shape), str(p.dtype)) for n, p in parameters.items())}".encode()
    )
    return Plan(
        ranks=ranks,
        rows=rows,
        itemsize=itemsize,
        tables=tables,
        splits=splits,
        pieces=pieces,
        layout=Layout(ranks, (Header(), DenseGradients(dense)) if dense else (Header(),)),
        crossings=[],
        price_bytes=price_bytes,
        prices=prices,
        fingerprint=digest.hexdigest()[:16],
        notes=_notes(seen, ranks, rows),
        replan=lambda changed: plan_partial(template, seen, ranks, rows, changed),
    )


def _notes(seen: Survey, ranks: int, rows: int) -> list[str]:
    if not seen.coupled or ranks == 1:
        return []
    note = (
        f"{seen.coupled}, and no tracer captured the model: every rank gathers the inputs of all "
        f"({(ranks - 1) * rows * seen.input_bytes:,} B sent) and computes the global batch, exactly, "
        "but no faster than one process. Move what combines rows into the loss, or make forward traceable"
    )
    drawn = f"random numbers: {ONE_DRAW}"
    return [note, drawn] if seen.random else [note]


def _refusals(use: Use) -> dict[str, str]:
    return {"pull": f"the table is also used by {', '.join(sorted(use.others))}"} if use.others else {}


def _pinned(parameters: Mapping[str, nn.Parameter], seen: Survey, pins: Mapping[str, str] | None) -> dict[str, str]:
    """Forms that the user fixed; "row" is "pull" here, and what a pattern can't have, it does not get."""
    result = {}
    tables = [n for n in parameters if n in seen.uses and seen.uses[n].lookups]
    for pattern, form in (pins or {}).items():
        matches = names_matching(tables, pattern, "plan")
        wanted = "pull" if form == "row" else form
        for name in matches:
            why = (
                None
                if wanted in ("pull", "replicate")
                else "the model is captured in part; there it is pull or replicate"
            )
            if wanted == "pull":
                why = _refusals(seen.uses[name]).get("pull")
            elif wanted == "replicate" and seen.uses[name].sparse and not seen.uses[name].others:
                why = "its gradients are sparse, and only those of fetched rows stay so"
            if why is None:
                result[name] = wanted
            elif not set("*?[") & set(pattern):
                raise PlanError(f"table {name!r} can't be split by {form}: {why}")
    return result


def coverage_partial(template: nn.Module, seen: Survey, plan: Plan, failures: tuple[Failure, ...]) -> Coverage:
    """Coverage of a model of which the user's forward runs."""
    found = []
    for name, p in template.named_parameters():
        use = seen.uses.get(name)
        if p.numel() < WEIGHTS_RICH_ELEMENTS and name not in plan.splits:
            continue
        size = p.numel() * p.element_size()
        if use is None:
            entry = Covered(name, size, "unused", PARTIAL, "forward does not use it on the example inputs")
        elif name in plan.splits and not use.others:
            price = ", ".join(f"{f} {x:,} B" for f, x in plan.prices[name].items())
            entry = Covered(name, size, plan.splits[name].form, PARTIAL, f"a step sends: {price}", choice=True)
        else:
            entry = Covered(
                name, size, "replicate", PARTIAL, f"used by {', '.join(sorted(use.others))}, not only by lookups"
            )
        found.append(entry)
    return Coverage(PARTIAL, failures, tuple(found), "; ".join(plan.notes))

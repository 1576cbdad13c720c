"""Planning: which form each table takes, and where its results are aggregated; the cheapest becomes the plan.

Given are a program with tables T, the forms F(t) that each may take (`descompiler.planning.pins`), N ranks, a batch,
and a limit M of memory.

    minimise      max over ranks r of bytes(r)     or, given a cluster, seconds of the collectives
    subject to    weights + gradients + optimiser state + activations of every rank <= M

over f in the product of the F(t). Tables share aggregation points, so the price is no sum over tables:
`descompiler.planning.objective` counts it for one f, `descompiler.planning.search` looks for the best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import fx

from descompiler.classify.coupling import coupling_notes
from descompiler.errors import PlanError
from descompiler.graph.nodes import target_name, user_line
from descompiler.graph.program import Program
from descompiler.graph.text import fingerprint
from descompiler.layout.layout import Layout
from descompiler.layout.transfer import crosses_in
from descompiler.planning.chosen import Label, PlannedTable
from descompiler.planning.memory import check_optimizer
from descompiler.planning.objective import IDS, Score, Terms, Trial
from descompiler.planning.pins import allowed_forms
from descompiler.planning.plan import Plan
from descompiler.planning.search import TIE, Search
from descompiler.region.cut import Weights
from descompiler.region.named import named_cut_graph
from descompiler.region.partition import Partition
from descompiler.region.rule import Rule
from descompiler.tables.computed import groups_of, notes_of_computed, whole_notes
from descompiler.tables.form import fallback, form_named, split_as
from descompiler.tables.tables import Operator
from descompiler.units import format_seconds


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
    """The cheapest plan that the search finds (see the module's text).

    Raises
    ------
    PlanError
        If pins or forbidden forms are wrong, or no plan fits into memory.
    """
    terms = terms or Terms()
    w = w.worth(terms.cluster.flops_per_byte if terms.cluster is not None else None)
    w = replace(w, wire_dtype=_narrower(program, terms.wire_dtype), global_ids=terms.ids == IDS[1] and w.ranks > 1)
    check_optimizer(terms.optimizer)
    if terms.cluster is not None and terms.cluster.ranks != w.ranks:
        raise PlanError(
            f"cluster {terms.cluster.name!r} has {terms.cluster.ranks} ranks, the plan is for {w.ranks}: "
            f"cluster.with_ranks({w.ranks})"
        )
    allowed = allowed_forms(operators, pins, terms.forbid, terms.optimizer)
    if w.ranks == 1:
        allowed = {o.name: (fallback().name,) for o in operators}
    if w.global_ids:
        allowed = {o.name: _inside(o, allowed[o.name], w.ranks) for o in operators}
    measured = terms.statistics.measured if terms.statistics is not None else {}
    for name, forms_of in allowed.items():
        if name not in measured and len(forms_of) > 1:
            allowed[name] = tuple(f for f in forms_of if not form_named(f).needs_statistics) or forms_of
    search = Search(program, operators, rules, w, allowed, terms, progress)
    least, bound = search.run()
    forms = search.with_fewest_calls(least)
    best = search.trial(forms)
    partition = best.partition
    if best.score.missing_bytes:
        raise PlanError(_does_not_fit(search, forms, best, pins))
    prices, seconds, missing = _alternatives(search, forms, best.score)
    return Plan(
        ranks=w.ranks,
        rows=w.rows,
        itemsize=w.itemsize,
        tables=[_table(o) for o in operators],
        splits=dict(partition.splits),
        pieces=dict(partition.pieces),
        layout=best.layout,
        labels=labels_of(partition, best.layout),
        price_bytes=best.score.price_bytes,
        prices=prices,
        fingerprint=fingerprint(program),
        aggregate=best.aggregate,
        objective="bytes" if terms.cluster is None else "seconds",
        price=best.score.price,
        work_s=best.work_s,
        seconds=seconds if terms.cluster is not None else {},
        bound=bound,
        exact=search.exact and best.score.price <= bound,
        trials=search.trials,
        cluster=terms.cluster,
        statistics=search.objective.statistics.source,
        unique=search.objective.unique,
        optimizer=terms.optimizer,
        limit_bytes=terms.limit_bytes,
        missing=missing,
        memories=best.memory or search.objective.memory(partition),
        notes=_tie_notes(search.score(least), best.score, terms.cluster is not None)
        + coupling_notes(program, best.layout.exchanges)
        + notes_of_computed(groups_of(operators), {n for n, f in forms.items() if form_named(f).by_columns})
        + whole_notes(operators, partition.splits),
        replan=lambda changed: choose(program, operators, rules, w, changed, terms=terms),
        graph_of_cut=lambda: named_cut_graph(program, partition.candidates, w, partition.inside),
    )


def _inside(o: Operator, forms: Sequence[str], ranks: int) -> tuple[str, ...]:
    """The forms in which a table is looked up for the global batch."""

    def inside(form: str) -> bool:
        split = split_as(o, form, ranks)
        return not (o.outputs or o.other_uses) and all(split.placement(o, x) is not None for x in o.lookups)

    if found := tuple(form for form in forms if inside(form)):
        return found
    why = "; ".join(f"{f}: {reason}" for f, reason in o.refusals.items())
    raise PlanError(
        f"ids='global': table {o.name!r} is used on own rows in the forms that it may take ({', '.join(forms)})"
        + (f", and it can't take {why}" if why else "")
    )


def _narrower(program: Program, wire_dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype that values are to be rounded to, if anything of the model's would be."""
    if wire_dtype is not None and program.dtype.is_complex:
        raise PlanError(f"wire_dtype={wire_dtype}: the model is of {program.dtype}, and complex values are not rounded")
    if wire_dtype is not None and crosses_in(program.dtype, wire_dtype) == program.dtype:
        raise PlanError(f"wire_dtype={wire_dtype} is no narrower than the model's {program.dtype}: leave it out")
    return wire_dtype


def _tie_notes(least: Score, chosen: Score, seconds: bool) -> list[str]:
    if chosen.calls == least.calls:
        return []
    what = f"seconds, {format_seconds(least.price)}," if seconds else f"bytes, {least.price_bytes:,} B,"
    return [
        f"{chosen.calls} collectives a step where the least {what} take {least.calls}: within "
        f"{100 * TIE:g} % the fewest are chosen"
    ]


def _alternatives(
    search: Search, forms: Mapping[str, str], chosen: Score
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """Bytes of the busiest rank, the price, and bytes of memory that are missing, if the tables of a class took another
    form."""
    prices = {o.name: {forms[o.name]: chosen.price_bytes} for o in search.operators}
    units = {o.name: {forms[o.name]: chosen.price} for o in search.operators}
    missing: dict[str, dict[str, int]] = {}
    for members in search.classes:
        for form in search.allowed[members[0].name]:
            changed = {o.name: form for o in members}
            if all(forms[n] == form for n in changed):
                continue
            score = search.score(search.tied(forms, changed))
            for n in changed:
                prices[n].setdefault(form, score.price_bytes)
                units[n].setdefault(form, score.price)
                if score.missing_bytes:
                    missing.setdefault(n, {})[form] = score.missing_bytes
    return prices, units, missing


def _does_not_fit(search: Search, forms: Mapping[str, str], best: Trial, pins: Mapping[str, str] | None) -> str:
    """Which ranks lack how much, and what would fit."""
    limit, w = search.terms.limit_bytes, search.w
    assert limit is not None
    over = [(range(first, stop), m) for first, stop, m in best.memory if m.total > limit]
    count = sum(len(ranks) for ranks, _ in over)
    lines = [f"no plan fits {limit:,} B a rank; the closest is short on {count} of {w.ranks} ranks:"]
    each = ((r, m) for ranks, m in over for r in ranks)
    lines += [f"rank {r} is short of {m.total - limit:,} B: it needs {m}" for r, m in islice(each, 8)]
    if count > 8:
        lines.append(f"and {count - 8} more")
    if pins or search.terms.forbid:
        allowed = allowed_forms(search.operators, optimizer=search.terms.optimizer)
        free = Search(search.program, search.operators, search.rules, w, allowed, search.terms)
        found, _ = free.run()
        if not free.score(found).missing_bytes:
            changed = sorted({f"{n}: {found[n]}" for n in found if found[n] != forms[n]})
            return "\n".join([*lines, f"without the pins and forbidden forms it fits, with {', '.join(changed[:8])}"])
    for factor in (2, 4, 8, 16, 32, 64):
        more = replace(w, ranks=w.ranks * factor)
        terms = Terms(search.terms.forbid, None, limit, search.terms.optimizer, solver=search.terms.solver)
        wider = Search(search.program, search.operators, search.rules, more, search.allowed, terms)
        if not min(wider.score(x) for x in wider.starts(frozenset())).missing_bytes:
            return "\n".join([*lines, f"{more.ranks} ranks would fit, with {w.rows:,} rows each"])
    most = max((m for _, _, m in best.memory), key=lambda m: m.total)
    largest = max(("weights", "gradients", "state", "activations"), key=lambda x: getattr(most, f"{x}_bytes"))
    advice = {
        "activations": "a smaller batch would help",
        "state": "an optimiser with less state would help: rowwise_adagrad, sgd",
    }.get(largest, "sparse gradients (sparse=True) or smaller tables would help")
    return "\n".join([*lines, f"not even {w.ranks * 64} ranks would; most of it is {largest}: {advice}"])


def _table(o: Operator) -> PlannedTable:
    uses = sorted({target_name(u) for x in o.lookups for u in x.node.users})
    whole = bool(o.outputs or o.other_uses or o.group is not None)
    return PlannedTable(o.table, tuple(uses), dict(o.refusals), tuple(map(str, o.outputs)), whole)


def labels_of(partition: Partition, layout: Layout) -> list[Label]:
    """Of what crosses: what it is, where, and the tables that it comes from or goes to."""
    program, operators = partition.program, partition.operators
    sources: dict[fx.Node, set[str]] = {x.node: {o.name} for o in operators for x in o.lookups}
    for n in program.graph.nodes:
        if n in partition.inside and n not in sources:
            sources[n] = set().union(*(sources.get(p, set()) for p in n.all_input_nodes))
    readers: dict[str, set[str]] = {}
    for o in operators:
        for x in o.lookups:
            if x.node in partition.inside:
                readers.setdefault(x.ids.name, set()).add(o.name)
    nodes = {n.name: n for n in program.graph.nodes}
    products = {x.node: (o.name, str(x)) for o in operators for x in o.outputs}
    result = []
    for crossed in layout.crossed:
        node = nodes[crossed.value]
        name, placement = node.name, "Shard(0)"
        if crossed.kind == "ids":
            tables = readers[name]
        elif crossed.kind == "values":
            name, placement, tables = target_name(node), str(partition.placements[node]), sources[node]
        else:
            table, name = products[node]
            tables = {table}
        result.append(Label(name, placement, tuple(sorted(tables)), user_line(node)))
    return result

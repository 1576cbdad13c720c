"""Emission: this rank's program, from the graph, the splits and the chosen region.

ids, begin (checks, header), fetch_start  ->  enter_start  ->  fetch_rows  ->  enter_wait
->  region, on the global batch  ->  exit_start
->  local operators that need nothing of what is under way, and the region's parts for own rows
->  fetch_wait  ->  those that need nothing of the region  ->  exit_wait  ->  the rest, and the outputs

Each exchange starts as soon as its operands are there, and is waited for where nothing else is left to do. Backward
finds the same order the other way round.

This file has the order; `descompiler.emit.region` and `descompiler.emit.outside` emit the values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from descompiler.classify.behind import Behind
from descompiler.classify.scope import scope_of, trained_parameters
from descompiler.emit.emission import Emission, Version
from descompiler.emit.outside import OutsideEmitter
from descompiler.emit.reads import columns_read
from descompiler.emit.region import RegionEmitter
from descompiler.emit.together import look_up_together
from descompiler.graph.nodes import Source, aten
from descompiler.graph.rewrite import ancestors, descendants, eliminate_dead_code
from descompiler.layout.id_checks import Check
from descompiler.layout.layout import Layout
from descompiler.layout.rows import Rows
from descompiler.model.attributes import Place
from descompiler.model.calls import Signature
from descompiler.planning.chosen import Label
from descompiler.region.partition import Partition
from descompiler.runtime.agreement import any_rows
from descompiler.runtime.dynamic import pull_rows, pull_wait
from descompiler.runtime.fetch import begin_fetch, fetch_late, fetch_rows, fetch_start, fetch_wait
from descompiler.runtime.leaf import LeafOnRanks
from descompiler.tables.form import Split, form_named
from descompiler.tables.tables import Lookup, Operator

FETCHING = frozenset({begin_fetch, fetch_start, fetch_rows, fetch_wait, fetch_late, pull_rows, pull_wait})


@dataclass
class Emitted:
    """One rank's program.

    Attributes
    ----------
    module : torch.fx.GraphModule
        ``module(runtime, *values)``, values in the order of ``sources``; returns the flat outputs.
    outputs : tuple of Rows or None
        Where a rank's own rows are in each output; None: the output is the global batch's, equal on all ranks.
    untrained : frozenset of str
        Parameters that require gradients and get none.
    behind : Behind
        Which parameters are behind each output.
    reads : frozenset of (str, str)
        See `Program`.
    total : torch.fx.Node
        Of the module's graph: the rows of the global batch.
    labels : list of Label
        Of what crosses, as a plan has them.
    signature : Signature or None
        How forward is called, and what it returns, in the training flags of the program.
    mixed : mapping of str to str
        See `descompiler.emit.by_size.mixed_sizes`.
    accepts : callable
        Whether it is the program for so many rows of the global batch.
    id_columns : mapping of int to (frozenset of int or None)
        See `descompiler.emit.reads.columns_read`.
    planned : bool
        Whether the plan's crossings are those of the graph that it was emitted from.
    """

    module: fx.GraphModule
    sources: list[Source]
    constants: dict[str, torch.Tensor]
    layout: Layout
    checks: tuple[Check, ...]
    outputs: tuple[Rows | None, ...]
    untrained: frozenset[str]
    behind: Behind
    reads: frozenset[Place]
    total: fx.Node
    signature: Signature | None = None
    mixed: Mapping[str, str] = field(default_factory=dict)
    accepts: Callable[[int], bool] = any_rows
    labels: list[Label] = field(default_factory=list)
    planned: bool = True
    id_columns: Mapping[int, frozenset[int] | None] = field(default_factory=dict)

    def constant(self, name: str, device: torch.device) -> torch.Tensor:
        """A constant where it is needed, and stays."""
        found = self.constants[name] = self.constants[name].to(device)
        return found


def emit(partition: Partition, rank: int) -> Emitted:
    """Emit one rank's program (see the module's text)."""
    program, inside = partition.program, partition.inside
    e = Emission(partition, rank)
    region, outside = RegionEmitter(e), OutsideEmitter(e)
    checks = _begin(e, outside)
    if e.layout.wholes:
        outside.gather_tables()
    if inside:
        region.enter_start()
    if e.layout.early:
        outside.fetch_rows(0)
    if inside:
        region.enter_wait()
        region.emit()
        region.exit_start()
    for awaited in ({*inside, *outside.fetched_early()}, inside):
        for n in _without(program.graph, awaited):
            if n.op == "call_function":
                outside.emit(n)
    after = descendants(program.graph, inside) - inside
    for n in _without(program.graph, after):
        if n in inside:
            e.value(n, Version.LOCAL)
    if partition.exits:
        region.exit_wait()
    for n in program.graph.nodes:
        if n in inside:
            e.value(n, Version.LOCAL)
            if n in partition.exits:
                e.own(n)
        elif n.op == "call_function":
            outside.emit(n)
        elif n.op == "output":
            outputs: Sequence[fx.Node] = n.args[0]
    e.graph.output(outside.outputs(outputs))
    looked_up = region.looked_up() if inside else set()
    eliminate_dead_code(e.graph, keep=lambda n: is_collective(n) or n in looked_up)
    if inside:
        region.reach_unread(looked_up)
    _reach_fetches(e, [scope_of(o).grad for o in outputs])
    held = zip([n for n in e.graph.nodes if n.op == "placeholder"][1:], e.sources, strict=True)
    weights = {n: program.parameters[s.name] for n, s in held if s.kind == "parameter"}
    kinds = {n: (p.dtype, p.shape[1:]) for n, p in weights.items()}
    look_up_together(e.graph, lambda n: kinds.get(n, n), e.checked, e.taken)
    e.graph.lint()
    rows = tuple(scope_of(o).rows for o in outputs)
    module = fx.GraphModule(torch.nn.Module(), e.graph)
    wanted = frozenset(n for n, p in program.parameters.items() if p.requires_grad)
    untrained = wanted - trained_parameters(program)
    behind = Behind(program)
    of = module, e.sources, e.constants, e.layout, checks, rows, untrained, behind, program.reads, e.rows
    return Emitted(*of, id_columns=columns_read(partition, e.layout, rank) if e.layout.given else {})


def _without(graph: fx.Graph, awaited: Collection[fx.Node]) -> list[fx.Node]:
    """What needs none of some values, and is none of them."""
    needing = descendants(graph, awaited)
    return [n for n in graph.nodes if n not in needing and n not in awaited]


def _begin(e: Emission, outside: OutsideEmitter) -> tuple[Check, ...]:
    """The header: the rows of all ranks, and checks of what is known by then."""
    lookups, targets = e.partition.early_checks
    checked = [*(x.ids for _, x in lookups), *(n for n, _ in targets)]
    needed = ancestors(checked)
    for n in e.program.graph.nodes:
        if n in needed and n.op == "call_function":
            e.own(n)
    given = e.partition.given
    inputs = [n for n in e.program.graph.nodes if (s := e.program.source(n)) and s.kind == "input"]
    first = next((n for n in inputs if n not in given), inputs[0])
    e.rows_local = e.call(aten.sym_size.int, e.own(first), 0)
    if first in given:
        e.rows_local = e.on_runtime("share_of", e.rows_local)
    ids = [e.own(n) for n in checked]
    e.checked.update(ids)
    if e.layout.early:
        outside.begin_fetch(ids)
    else:
        total = [e.call(aten.sym_size.int, e.own(n), 0) for n in given[:1]]
        e.rows = e.on_runtime("begin", e.rows_local, ids, *total)
    return (*(_check(e.partition.splits[o.name], o, x) for o, x in lookups), *(c for _, c in targets))


def _check(split: Split, o: Operator, x: Lookup) -> Check:
    found = form_named(split.form).check(split, o)
    if x.computed is None:
        return found
    assert o.group is not None
    return replace(found, table=f"computed of {', '.join(o.group.tables)}", rows=x.computed)


def is_collective(n: fx.Node) -> bool:
    """Every rank makes it, and the plan counts it, also where nobody reads what it brings."""
    return isinstance(n.target, LeafOnRanks) or n.target in FETCHING


def _reach_fetches(e: Emission, trained: Sequence[bool]) -> None:
    """Let backward come to fetches whose rows nobody reads: owners get gradients of zero, as in the original."""
    unread = [n for n in e.graph.nodes if n.target in (fetch_wait, pull_wait) and not n.users]
    if not unread or not any(trained):
        return
    output = next(n for n in e.graph.nodes if n.op == "output")
    results = list(output.args[0])
    i = list(trained).index(True)
    with e.graph.inserting_before(output):
        results[i] = e.on_runtime("reach", results[i], unread)
    output.args = (results,)

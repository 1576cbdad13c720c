"""Communication of a partition: what its programs exchange, the same on every rank, and known without emitting one.

`layout_of` is called for every choice that the planner tries, and for the one that is emitted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod

import torch

from descompiler.classify.scope import (
    GLOBAL,
    OWN,
    WHOLE,
    is_coupled,
    scope_of,
)
from descompiler.graph.arguments import training_norm
from descompiler.graph.leaf import Leaf
from descompiler.graph.nodes import tail, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import ancestors
from descompiler.layout.border import Columns, Entry, IdsIn, SharedColumns, ValuesOut
from descompiler.layout.fetches import Fetch, FetchTable
from descompiler.layout.global_values import CoupledValues, NormOutside, NormsInside, Whole, WholeTables
from descompiler.layout.layout import Layout
from descompiler.layout.spans import union
from descompiler.layout.step import DenseGradients, LeafStatus, StepHeader, UsedOutputs
from descompiler.layout.transfer import Transfer
from descompiler.region.cut import exit_of
from descompiler.region.partition import Partition
from descompiler.tables.form import Split, form_named
from descompiler.tables.products import layouts_of
from descompiler.tables.tables import Lookup, Operator
from descompiler.tables.totals import exchanges as total_exchanges


def layout_of(partition: Partition) -> Layout:
    """What the programs of a partition exchange: the same on every rank, and known without emitting one."""
    p, nodes = partition, partition.program.graph.nodes
    id_bytes = 4 if all(o.rows < 1 << 31 and o.dynamic is None for o in p.operators) else 8
    own, coupled = set(nodes) - p.inside, tuple[CoupledValues, ...]()
    if is_coupled(p.program):
        coupled, demands = p.coupling.exchanges, p.coupling.demands
        own = {n for n, version in demands if version == OWN and scope_of(n).kind != GLOBAL} - p.inside
    transfers: list[Transfer] = [StepHeader()]
    if p.wholes:
        transfers.append(WholeTables(tuple(_whole(p, name) for name in p.wholes)))
    transfers += [*_border(p, id_bytes), *_fetches(p)]
    if any(isinstance(n.target, Leaf) for n in nodes):
        backward = any(isinstance(n.target, Leaf) and scope_of(n).grad for n in nodes)
        transfers.append(LeafStatus(_leaf_runs(p), backward))
    norms = [norm for n in nodes if n in own and (norm := training_norm(n)) is not None]
    transfers += [NormOutside(tail(norm.x)[0], p.program.wire_dtype(norm.dtype)) for norm in norms]
    transfers += layouts_of(p.program, p.products, p.splits)
    totals = [t for t in p.totals.values() if t.node.users]
    transfers += [*coupled, *total_exchanges(p.program, totals, lambda n: scope_of(n).grad)]
    behind = p.known.behind
    if behind.size or len(set(filter(None, behind.possible))) > 1:
        transfers.append(UsedOutputs(len(behind.possible), behind.size))
    if dense := _dense_elements(p):
        others = tuple((dtype, n) for dtype, n in dense.items() if dtype is not None)
        transfers.append(DenseGradients(dense.get(None, 0), others))
    return Layout(p.ranks, tuple(transfers), id_bytes, p.wire_dtype)


def _border(p: Partition, id_bytes: int) -> list[Transfer]:
    """What crosses the border of the region, if there is one."""
    result, entries = list[Transfer](), []
    for ids, users in p.readers.items():
        columns = [p.splits[o.name].columns(o, x) for o, x in users]
        entries.append(Entry(ids.name, tail(ids), union(columns, _together)))
    if entries:
        inputs = [n for n in p.program.graph.nodes if (s := p.program.source(n)) and s.kind == "input"]
        result.append(IdsIn(tuple(entries), id_bytes, tuple(inputs.index(n) for n in p.given)))
        result.append(ValuesOut(tuple(exit_of(p.program, n, p.candidates.placed[n].placement) for n in p.exits)))
    if p.norms:
        channels = tuple(tuple(map(len, p.channels(norm))) for norm in p.norms)
        statistics = (value(norm.statistics[0]).dtype for norm in p.norms)
        result.append(NormsInside(channels, _dtypes(p, statistics)))
    if shared := p.shared_weights:
        elements = tuple(prod(x.shape) // x.shape[x.dim] * x.shared_size() for x in shared.values())
        result.append(SharedColumns(elements, _dtypes(p, (p.program.parameters[n].dtype for n in shared))))
    return result


def _dtypes(p: Partition, several: Iterable[torch.dtype]) -> tuple[torch.dtype | None, ...]:
    """In which dtypes several values cross; empty: all in the model's."""
    found = tuple(map(p.program.wire_dtype, several))
    return found if any(found) else ()


def _together(wanted: list[Columns]) -> Columns:
    """The columns of ids that a rank gets for several tables."""
    return None if None in wanted else tuple(sorted({i for columns in wanted for i in columns or ()}))


def _whole(p: Partition, name: str) -> Whole:
    """A table that ranks gather."""
    trained = p.program.parameters[name].requires_grad and any(scope_of(u).grad for u in p.wholes[name].users)
    return Whole(name, p.splits[name].pieces, trained, p.program.wire_dtype(p.program.parameters[name].dtype))


def _fetches(p: Partition) -> tuple[Fetch, ...]:
    """What is fetched: together the lookups whose ids are known at the start, the others one by one."""
    early, late = p.fetched
    result, counted = [], set[str]()
    for group in [*([early] if early else []), *late]:
        result.append(_fetch(p.program, group, p.splits, counted, group is early))
        counted.update(o.name for o, _ in group)
    return tuple(result)


def _fetch(
    program: Program,
    lookups: Sequence[tuple[Operator, Lookup]],
    splits: Mapping[str, Split],
    counted: Collection[str],
    early: bool,
) -> Fetch:
    """One fetch of some lookups; unique ids of the tables ``counted`` are counted by one before it."""
    tables: dict[str, FetchTable] = {}
    for o, _ in lookups:
        split = splits[o.name]
        wire_dtype = program.wire_dtype(o.dtype)
        tables[o.name] = FetchTable(o.table, split.pieces, split.gathered, o.name not in counted, wire_dtype)
    ordered = sorted(tables.values(), key=lambda t: t.kind)
    position = {t.name: i for i, t in enumerate(ordered)}
    return Fetch(
        tuple(ordered),
        tuple(position[o.name] for o, _ in lookups),
        tuple(x.node.name for _, x in lookups),
        tuple(form_named(splits[o.name].form).check(splits[o.name], o) for o, _ in lookups),
        early,
    )


def _dense_elements(p: Partition) -> dict[torch.dtype | None, int]:
    """By dtype, of parameters whose gradients the reducer averages: replicated, trained, and not gathered."""
    gathered = {name for name, s in p.splits.items() if s.gathered}
    trained = p.known.trained - gathered
    result: dict[torch.dtype | None, int] = {}
    for n, x in p.program.parameters.items():
        if n in trained and p.pieces[n].is_replicated:
            wire_dtype = p.program.wire_dtype(x.dtype)
            result[wire_dtype] = result.get(wire_dtype, 0) + x.numel()
    return result


def _leaf_runs(p: Partition) -> int:
    """How often a step runs an opaque leaf after the header, which tells of those before it."""
    if p.ranks == 1:
        return 0
    checked, targets = p.early_checks
    before = ancestors([*(x.ids for _, x in checked), *(n for n, _ in targets)])
    runs = {
        (n, WHOLE if scope_of(n).kind == GLOBAL else version)  # others' rows of a global value are cut out of it
        for n, version in p.coupling.demands
        if isinstance(n.target, Leaf) and n not in before
    }
    return len(runs)

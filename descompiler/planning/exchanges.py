"""Communication of a choice: what its programs exchange, the same on every rank, and known without emitting one.

`layout_of` is called for every choice that the planner tries, and for the one that is emitted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

from torch import fx

from descompiler.classify.coupling import couple
from descompiler.classify.scope import GLOBAL, OWN, WHOLE, coupled_nodes, is_coupled, scope_of, trained_parameters
from descompiler.graph.arguments import BatchNormCall, training_norm
from descompiler.graph.leaf import Leaf
from descompiler.graph.nodes import tail
from descompiler.graph.program import Program
from descompiler.graph.rewrite import ancestors, descendants
from descompiler.layout.border import Columns, Entry, IdsIn, SharedColumns, ValuesOut
from descompiler.layout.fetches import Fetch, FetchTable
from descompiler.layout.global_values import CoupledValues, NormOutside, NormsInside, Whole, WholeTables
from descompiler.layout.id_checks import Check
from descompiler.layout.layout import Layout
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import Owned, Placement, Shard
from descompiler.layout.spans import union
from descompiler.layout.step import DenseGradients, LeafStatus, StepHeader
from descompiler.layout.transfer import Transfer
from descompiler.planning.products import checks_of, layouts_of
from descompiler.region.cut import Candidates, Cut, exit_of
from descompiler.region.rule import Placed
from descompiler.tables.form import Split, form_named
from descompiler.tables.tables import Lookup, Operator, lookups_by_node
from descompiler.tables.totals import divided, find_totals
from descompiler.tables.totals import exchanges as total_exchanges


def layout_of(
    program: Program,
    operators: Sequence[Operator],
    splits: Mapping[str, Split],
    pieces: Mapping[str, Pieces],
    candidates: Candidates,
    cut: Cut,
    ranks: int,
) -> Layout:
    """What the programs of a choice exchange: the same on every rank, and known without emitting one."""
    id_bytes = 4 if all(o.rows < 1 << 31 for o in operators) else 8
    own, coupled = set(program.graph.nodes) - cut.inside, tuple[CoupledValues, ...]()
    if is_coupled(program):
        coupling = couple(program, cut.inside)
        coupled = coupling.exchanges
        own = {n for n, version in coupling.demands if version == OWN and scope_of(n).kind != GLOBAL} - cut.inside
    totals = [t for t in divided(find_totals(program), splits) if t.node.users]
    wholes = _wholes(program, splits) if ranks > 1 else ()
    fetches = _fetches(program, operators, splits, cut.inside) if ranks > 1 else ()
    transfers: list[Transfer] = [StepHeader()]
    if wholes:
        transfers.append(WholeTables(wholes))
    transfers += [*_border(program, operators, splits, candidates, cut, ranks, id_bytes), *fetches]
    if any(isinstance(n.target, Leaf) for n in program.graph.nodes):
        runs = _leaf_runs(program, operators, cut.inside, wholes, fetches) if ranks > 1 else 0
        backward = any(isinstance(n.target, Leaf) and scope_of(n).grad for n in program.graph.nodes)
        transfers.append(LeafStatus(runs, backward))
    norms = [norm for n in program.graph.nodes if n in own and (norm := training_norm(n)) is not None]
    transfers += [NormOutside(tail(norm.x)[0]) for norm in norms]
    transfers += layouts_of(program, operators, splits)
    transfers += [*coupled, *total_exchanges(totals, lambda n: scope_of(n).grad)]
    if dense := sum(program.parameters[n].numel() for n in _dense_parameters(program, splits, pieces)):
        transfers.append(DenseGradients(dense))
    return Layout(ranks, tuple(transfers), id_bytes)


def _border(
    program: Program,
    operators: Sequence[Operator],
    splits: Mapping[str, Split],
    candidates: Candidates,
    cut: Cut,
    ranks: int,
    id_bytes: int,
) -> list[Transfer]:
    """What crosses the border of the region, if there is one."""
    placed, result = candidates.placed, list[Transfer]()
    entries = []
    for ids, users in lookups_by_ids(program, operators, cut.inside).items():
        entries.append(Entry(ids.name, tail(ids), union([splits[o.name].columns(o, x) for o, x in users], _together)))
    if entries:
        result.append(IdsIn(tuple(entries), id_bytes))
        result.append(ValuesOut(tuple(exit_of(n, placed[n].placement) for n in cut.exits)))
    if norms := norms_inside(program, cut.inside):
        channels = (channels_by_rank(norm.node, placed[norm.node].placement, ranks) for norm in norms)
        result.append(NormsInside(tuple(tuple(map(len, x)) for x in channels)))
    if shared := shared_weights(program, placed, cut.inside).values():
        result.append(SharedColumns(tuple(prod(p.shape) // p.shape[p.dim] * p.shared_size() for p in shared)))
    return result


def _together(wanted: list[Columns]) -> Columns:
    """The columns of ids that a rank gets for several tables."""
    return None if None in wanted else tuple(sorted({i for columns in wanted for i in columns or ()}))


def _wholes(program: Program, splits: Mapping[str, Split]) -> tuple[Whole, ...]:
    """The tables that a program uses, and gathers for that."""
    result = []
    for n in program.graph.nodes:
        name = program.parameter(n)
        if name is not None and n.users and name in splits and splits[name].whole:
            trained = program.parameters[name].requires_grad and any(scope_of(u).grad for u in n.users)
            result.append(Whole(name, splits[name].pieces, trained))
    return tuple(result)


def lookups_by_ids(
    program: Program, operators: Sequence[Operator], inside: frozenset[fx.Node]
) -> dict[fx.Node, list[tuple[Operator, Lookup]]]:
    """The split tables that read each ids, in the order of the graph."""
    lookups = lookups_by_node(operators)
    result: dict[fx.Node, list[tuple[Operator, Lookup]]] = {}
    for n in program.graph.nodes:
        if n in lookups and n in inside:
            result.setdefault(lookups[n][1].ids, []).append(lookups[n])
    return result


def shared_weights(program: Program, placed: Mapping[fx.Node, Placed], inside: frozenset[fx.Node]) -> dict[str, Pieces]:
    """Trained co-located weights of which every rank holds a slice."""
    trained = trained_parameters(program)
    return {
        name: p
        for node in program.graph.nodes
        if node in inside
        for name, p in placed[node].pieces.items()
        if p.shared_size() and name in trained
    }


def _fetches(
    program: Program,
    operators: Sequence[Operator],
    splits: Mapping[str, Split],
    inside: frozenset[fx.Node],
) -> tuple[Fetch, ...]:
    """Lookups that are fetched: together those whose ids are known at the start, the others one by one."""
    fetching = [o for o in operators if form_named(splits[o.name].form).fetches(splits[o.name])]
    users = lookups_by_node(fetching)
    late = descendants(program.graph, {*inside, *users}) | coupled_nodes(program)
    order = [users[n] for n in program.graph.nodes if n in users]
    early = [(o, x) for o, x in order if x.ids not in late]
    groups = [early] if early else []
    groups += [[u] for u in order if u[1].ids in late]
    result, counted = [], set[str]()
    for group in groups:
        result.append(_fetch(group, splits, counted, group is early))
        counted.update(o.name for o, _ in group)
    return tuple(result)


def _fetch(
    lookups: Sequence[tuple[Operator, Lookup]], splits: Mapping[str, Split], counted: Collection[str], early: bool
) -> Fetch:
    """One fetch of some lookups; unique ids of the tables ``counted`` are counted by one before it."""
    tables: dict[str, FetchTable] = {}
    for o, _ in lookups:
        split = splits[o.name]
        tables[o.name] = FetchTable(o.table, split.pieces, split.gathered, o.name not in counted)
    ordered = sorted(tables.values(), key=lambda t: t.kind)
    position = {t.name: i for i, t in enumerate(ordered)}
    return Fetch(
        tuple(ordered),
        tuple(position[o.name] for o, _ in lookups),
        tuple(x.node.name for _, x in lookups),
        tuple(form_named(splits[o.name].form).check(splits[o.name], o) for o, _ in lookups),
        early,
    )


def _dense_parameters(program: Program, splits: Mapping[str, Split], pieces: Mapping[str, Pieces]) -> list[str]:
    """Parameters whose gradients the reducer averages: replicated, trained, and not gathered."""
    gathered = {name for name, s in splits.items() if s.gathered}
    trained = trained_parameters(program)
    return [n for n in program.parameters if n in trained and n not in gathered and pieces[n].is_replicated]


def early_checks(
    program: Program,
    operators: Sequence[Operator],
    inside: frozenset[fx.Node],
    wholes: Sequence[Whole],
    fetches: Sequence[Fetch],
) -> tuple[list[tuple[Operator, Lookup]], list[tuple[fx.Node, Check]]]:
    """Lookups whose ids, and targets that, are known before the header, and are checked then."""
    gathered, fetched = {t.name for t in wholes}, {name for f in fetches for name in f.names}
    lookups = lookups_by_node(operators)
    sources = {n for n in program.graph.nodes if program.parameter(n) in gathered}
    sources |= {n for n in lookups if n.name in fetched}
    late = descendants(program.graph, {*inside, *sources}) | coupled_nodes(program)
    checked = [
        (o, x)
        for o, x in lookups.values()
        if x.ids not in late and x.ids.op != "get_attr" and scope_of(x.node).kind != GLOBAL
    ]
    return checked, [(n, c) for n, c in checks_of(operators) if n not in late]


def _leaf_runs(
    program: Program,
    operators: Sequence[Operator],
    inside: frozenset[fx.Node],
    wholes: Sequence[Whole],
    fetches: Sequence[Fetch],
) -> int:
    """How often a step runs an opaque leaf after the header, which tells of those before it."""
    checked, targets = early_checks(program, operators, inside, wholes, fetches)
    before = ancestors([*(x.ids for _, x in checked), *(n for n, _ in targets)])
    runs = {
        (n, WHOLE if scope_of(n).kind == GLOBAL else version)  # others' rows of a global value are cut out of it
        for n, version in couple(program, inside).demands
        if isinstance(n.target, Leaf) and n not in before
    }
    return len(runs)


def norms_inside(program: Program, inside: Collection[fx.Node]) -> list[BatchNormCall]:
    """Batch norms in the region whose running statistics move."""
    norms = [training_norm(n) for n in program.graph.nodes if n in inside]
    return [norm for norm in norms if norm is not None and norm.statistics[0] is not None]


def channels_by_rank(norm: fx.Node, placement: Placement, ranks: int) -> list[list[int]]:
    """The channels that each rank normalises."""
    if isinstance(placement, Shard):
        return [placement.positions(r) for r in range(ranks)]
    return [list(range(tail(norm)[0])) if placement == Owned(r) else [] for r in range(ranks)]

"""Weights-rich operators: the tables of a program, and how they are used."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import fx

from descompiler.classify.scope import GLOBAL, coupled_nodes, scope_of, trained_parameters
from descompiler.cost_models.table import OfTable, Table
from descompiler.dynamic.stand_in import DynamicIds
from descompiler.errors import PlanError, UnsupportedError
from descompiler.graph.arguments import LookupCall, VocabularyCall, operand
from descompiler.graph.nodes import aten, elements_per_row, shape_of, storage_roots, tail, user_line, where
from descompiler.graph.program import Program, rowwise
from descompiler.graph.rewrite import descendants
from descompiler.tables import totals as regularisers
from descompiler.tables.computed import Group, computed_by_rows, find_groups, whole_parameters, whole_tables

WEIGHTS_RICH_ELEMENTS = 1 << 14
"""A parameter is weights-rich if it has at least this many elements, or is looked up by ids."""


@dataclass(frozen=True)
class Lookup:
    """One use of a table: ``node = table[ids]``, pooled over dim 1 if ``mode`` is given; padding -1 is none.

    Of a `computed` table, made of this one and perhaps of others (`descompiler.tables.computed`), if ``computed`` is
    given: then it has ``computed`` rows. Of a dynamic table, whose rows the graph has a stand-in for, if ``dynamic`` is
    given: then ids are any integers.
    """

    node: fx.Node
    ids: fx.Node
    mode: str | None = None
    padding_idx: int = -1
    sparse: bool = False
    computed: int | None = None
    dynamic: DynamicIds | None = None

    @property
    def padding(self) -> int | None:
        """The padding row as `nn.EmbeddingBag` names it: None for none."""
        return self.padding_idx if self.padding_idx >= 0 else None


@dataclass(frozen=True)
class Output(VocabularyCall):
    """One product with a table.

    Attributes
    ----------
    rows : mapping of node to int
        If the product is with what is computed of the table row by row: the table, the values up to that, and which of
        their dimensions the rows are.
    """

    rows: Mapping[fx.Node, int] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return ", ".join(str(r[0]) for r in self.requests)


@dataclass(frozen=True)
class Operator(OfTable):
    """A table and all that the graph does with it.

    Attributes
    ----------
    outputs : tuple of Output
        Products with it: an output layer, full scores.
    starts : tuple of int or None
        First row of each field, if ids are ``x + offsets``.
    other_uses : tuple of torch.fx.Node
        Nodes that use the table otherwise, or what is computed of it column by column.
    group : Group or None
        What is computed of the table column by column and looked up, and the other tables that go into it.
    whole_in_region : bool
        Whether pieces of other tables are computed with all of it.
    computed_ids : bool
        Whether ids of a lookup are computed from another lookup of a table.
    coupled_ids : bool
        Whether ids of a lookup are computed from the whole batch.
    coupled : bool
        Whether a lookup has to be made for the whole batch on every rank.
    forms : tuple of str
        The forms that it can take; none before `descompiler.tables.form.find_tables` has asked them.
    refusals : dict of str to str
        The forms that it can't take, and why.
    """

    lookups: tuple[Lookup, ...]
    starts: tuple[int, ...] | None = None
    outputs: tuple[Output, ...] = ()
    other_uses: tuple[fx.Node, ...] = ()
    group: Group | None = None
    whole_in_region: bool = False
    computed_ids: bool = False
    coupled_ids: bool = False
    coupled: bool = False
    forms: tuple[str, ...] = ()
    refusals: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def dynamic(self) -> DynamicIds | None:
        """How ids are looked up if it is the stand-in of a dynamic table."""
        return next((x.dynamic for x in self.lookups), None)

    @property
    def uniform(self) -> bool:
        """Whether all lookups have the same padding row and kind of gradient."""
        return len({(x.padding_idx, x.sparse) for x in self.lookups}) <= 1


def lookups_by_node(operators: Sequence[Operator]) -> dict[fx.Node, tuple[Operator, Lookup]]:
    """Every lookup once, with its table; with the last of them where it is of a table computed of several."""
    return {x.node: (o, x) for o in operators for x in o.lookups}


def find_operators(program: Program) -> list[Operator]:
    """All tables that the program looks up, takes products with or computes looked-up tables of, in the order of the
    model's parameters.

    Raises
    ------
    UnsupportedError
        For ``max_norm`` (it writes to the table in forward) and ``scale_grad_by_freq`` (it counts ids in the batch).
    """
    found: dict[str, list[Lookup]] = {}
    products: dict[str, list[Output]] = {}
    uses: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target is aten.embedding_renorm_.default:
            name = program.parameter(storage_roots(program.graph)[operand(node)])
            of = "" if name is None else f", table {name!r}"  # of one that forward computes there is no name
            raise UnsupportedError(
                f"embedding with max_norm ({where(node)}{of}): it changes rows in forward, which differs between "
                "ranks; normalise the looked-up vectors instead"
            )
        call = LookupCall.of(node)
        if call is not None and (name := program.parameter(call.weight)) is not None:
            if call.counts_frequency:
                raise UnsupportedError(
                    f"embedding with scale_grad_by_freq ({where(node)}, table {name!r}): it counts ids within one "
                    "rank's batch; leave it out, or scale the loss"
                )
            found.setdefault(name, []).append(_lookup_of(call))
        own_rows = scope_of(node).kind != GLOBAL  # what every rank repeats on the global batch needs the whole table
        if (product := VocabularyCall.of(node)) is not None and own_rows:
            rows = {} if program.parameter(product.weight) else computed_by_rows(program, product.weight) or {}
            if (name := program.parameter(next(iter(rows), product.weight))) is not None:
                products.setdefault(name, []).append(Output(node, rows))
        for n in node.all_input_nodes:
            if (name := program.parameter(n)) is not None:
                uses.setdefault(name, []).append(node)
    _check_dynamic(program, uses, found)
    order = {name: i for i, name in enumerate(program.parameters)}
    depends = descendants(program.graph, {x.node for xs in found.values() for x in xs})
    coupled = coupled_nodes(program)
    in_totals = regularisers.uses(regularisers.find_totals(program))
    found_groups = find_groups(program)
    groups = {name: g for g in found_groups for name in g.tables}
    for name, g in groups.items():
        of_computed = [_lookup_of(LookupCall(n), computed=True) for n in g.lookups]
        found.setdefault(name, []).extend(of_computed)
    result, trained = [], trained_parameters(program)
    in_region = {name for g in found_groups for name in g.replicated}
    for chain in (x.rows for xs in products.values() for x in xs):
        in_region |= whole_parameters(program, chain)
    whole = [n for n in whole_tables(program) if program.parameters[n].numel() >= WEIGHTS_RICH_ELEMENTS]
    for name in sorted({*found, *products, *whole}, key=lambda n: order[n]):
        lookups, outputs = tuple(found.get(name, ())), tuple(products.get(name, ()))
        parameter = program.parameters[name]
        nodes = [x.node for x in lookups] + [x.node for x in outputs]
        group = groups.get(name)
        # a product's gradient is dense, and so is that of what is computed of whole tables
        sparse = bool(lookups) and lookups[0].sparse and not outputs and group is None
        others = tuple(u for u in uses[name] if u not in nodes and (sparse or u not in in_totals))
        computed = {n: None for x in outputs for n in x.rows}
        others = tuple(u for u in others if u not in computed)
        others += tuple(
            u for n in computed if n.op == "call_function" for u in n.users if u not in computed and u not in nodes
        )
        if group is not None:
            others = (*(u for u in others if u not in group.dims), *group.others)
        result.append(
            Operator(
                Table(
                    name,
                    parameter.shape[0],
                    parameter.shape[1],
                    parameter.dtype,
                    ids=sum(elements_per_row(x.ids) for x in lookups),
                    vectors=sum(1 if x.mode else elements_per_row(x.ids) for x in lookups),
                    padding_idx=lookups[0].padding_idx if lookups else -1,
                    sparse=sparse,
                    trained=name in trained,
                    line=user_line((*nodes, *others)[0]),
                    dynamic=name in program.dynamic,
                ),
                lookups,
                None if program.dynamic & {name} else _starts(program, lookups),
                outputs=outputs,
                other_uses=others,
                group=group,
                whole_in_region=name in in_region,
                computed_ids=any(x.ids in depends for x in lookups),
                coupled_ids=any(x.ids in coupled for x in lookups),
                coupled=any(scope_of(x.node).kind == GLOBAL for x in lookups),
            )
        )
    return result


def _check_dynamic(
    program: Program, uses: Mapping[str, Sequence[fx.Node]], found: Mapping[str, Sequence[Lookup]]
) -> None:
    """Raise if anything but lookups has a dynamic table's rows."""
    for name in program.dynamic & uses.keys():
        looked_up = {x.node for x in found.get(name, ()) if x.dynamic is not None}
        if others := [n for n in uses[name] if n not in looked_up]:
            raise UnsupportedError(
                f"the rows of dynamic table {name.removesuffix('.weight')!r} are used by {where(others[0])}: they come "
                "and go, and nothing but its own lookups can have them"
            )


@contextmanager
def sparse_lookups(program: Program, names: Collection[str]) -> Iterator[None]:
    """Let the gradients of tables be sparse meanwhile, as if their modules had been made with ``sparse=True``.

    Raises
    ------
    PlanError
        For the maximum over a bag, of which torch has none.
    """
    calls = [call for n in program.graph.nodes if (call := LookupCall.of(n)) is not None]
    dense = [call for call in calls if not call.sparse and program.parameter(call.weight) in names]
    for call in dense:
        if call.mode == "max":
            raise PlanError(f"the maximum over a bag ({where(call.node)}) has no sparse gradient: mode='sum' or 'mean'")
    for call in dense:
        call.let_sparse(True)
    try:
        yield
    finally:
        for call in dense:
            call.let_sparse(False)


def _lookup_of(call: LookupCall, *, computed: bool = False) -> Lookup:
    rows = int(shape_of(call.weight)[0]) if computed else None
    dynamic = call.dynamic
    ids = call.ids if dynamic is None else operand(call.ids)
    return Lookup(call.node, ids, call.mode, call.padding_idx, call.sparse, rows, dynamic)


def _starts(program: Program, lookups: Sequence[Lookup]) -> tuple[int, ...] | None:
    """Offsets of the fields if the ids are ``x + offsets`` in every lookup, x as the user passed it.

    Arithmetic before the sum (``x * fields + offsets``) says that the constants are no starts of fields.
    """
    starts: set[tuple[int, ...]] = set()
    for x in lookups:
        found = None
        if x.ids.target is aten.add.Tensor and rowwise(program, x.ids) and len(tail(x.ids)) == 1 and x.mode is None:
            for a in x.ids.args:
                source = program.source(a)
                if source is not None and source.name in program.constants and source.kind != "parameter":
                    values = program.constants[source.name].reshape(-1).tolist()
                    if len(values) == tail(x.ids)[0] and not _calculated(x.ids):
                        found = tuple(int(v) for v in values)
        if found is None or found[0] != 0 or any(a >= b for a, b in itertools.pairwise(found)):
            return None
        starts.add(found)
    return starts.pop() if len(starts) == 1 else None


ARITHMETIC = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.remainder.Scalar, aten.remainder.Tensor}


def _calculated(ids: fx.Node) -> bool:
    """Whether an operand of a sum of ids is the result of arithmetic itself."""
    stack, seen = list(ids.all_input_nodes), set()
    while stack:
        n = stack.pop()
        if n.target in ARITHMETIC:
            return True
        if n not in seen:
            seen.add(n)
            stack.extend(n.all_input_nodes)
    return False

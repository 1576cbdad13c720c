"""The outline of a model whose own forward runs, for the planner: a program of its lookups, and one opaque node.

The opaque node stands for all that is not a lookup: it takes what is looked up, and the parameters that are used
otherwise, and what autograd keeps for it is its result. So the planner prices lookups as those of any program, but for
the forms: what Python does with a row is not known, so only those will do that give it rows.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from descompiler.classify.scope import CONSTANT, OWN_ROWS, Scope
from descompiler.dynamic.stand_in import named_stand_ins
from descompiler.eager.recorder import Use
from descompiler.eager.survey import Survey
from descompiler.errors import UnsupportedError
from descompiler.graph.nodes import Source, aten
from descompiler.graph.program import Program
from descompiler.layout.rows import Rows
from descompiler.planning.chosen import PlannedTable
from descompiler.tables.form import FORMS, ROWS_THAT_GO, fallback
from descompiler.tables.tables import Lookup, Operator


def users_forward(*values: Tensor) -> Tensor:
    """The opaque node: what the user's forward makes of parameters and looked-up rows."""
    raise NotImplementedError("an outline is planned, and not run")


@dataclass(frozen=True)
class Outline:
    """What the planner sees.

    Attributes
    ----------
    program : Program
        Tables have two dimensions here: rows, and all others.
    operators : list of Operator
    tables : list of PlannedTable
        The same, for people: with ids of a rank's own rows.
    """

    program: Program
    operators: list[Operator]
    tables: list[PlannedTable]


def outline_of(template: nn.Module, seen: Survey, ranks: int) -> Outline:
    """The outline of a model, for a number of ranks: each looks up the global batch where its rows are coupled."""
    graph, sources, parameters = fx.Graph(), dict[str, Source](), dict[str, Tensor]()
    mode = FakeTensorMode(shape_env=ShapeEnv())
    symbolic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    batch: Any = mode.from_tensor(torch.empty(7), symbolic_context=symbolic).shape[0]
    batches = ranks if seen.coupled else 1

    def placeholder(kind: str, name: str, shape: tuple[Any, ...], dtype: torch.dtype) -> fx.Node:
        node = graph.placeholder(f"p{len(sources)}")
        sources[node.name] = Source(kind, name)
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def call(target: object, args: tuple[object, ...], elements: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        with mode:
            node.meta.update(val=torch.empty((batch, *elements), dtype=dtype), scope=Scope(OWN_ROWS, Rows(), grad=True))
        return node

    weights, ids = {}, {}
    dynamic = {n: m.dynamic for n, m in named_stand_ins(template)}
    uses = _uses(seen, dynamic)
    looked_up = {n: p for n, p in template.named_parameters() if n in dynamic or (n in uses and uses[n].lookups)}
    tables = {n: uses[n].table(n, p, seen.rows, batches, dynamic=n in dynamic) for n, p in looked_up.items()}
    for name, p in template.named_parameters():
        shape = tables[name].shape if name in tables else tuple(p.shape)
        parameters[name] = torch.empty(shape, dtype=p.dtype, device="meta", requires_grad=p.requires_grad)
        weights[name] = placeholder("parameter", name, shape, p.dtype)
        weights[name].meta["scope"] = Scope(CONSTANT, grad=name in uses)
    for name, table in tables.items():
        ids[name] = placeholder("input", f"ids of {name}", (batch, table.ids), torch.int64)
    operators, kept = [], seen.kept * batches
    for name, table in tables.items():
        node = call(aten.embedding.default, (weights[name], ids[name]), (table.vectors, table.dim), table.dtype)
        kept = max(0, kept - table.vectors * table.dim)  # what is looked up is among it
        refusals = refused(uses[name], ranks, dynamic=name in dynamic)
        operators.append(
            Operator(
                table,
                (Lookup(node, ids[name], sparse=table.sparse, dynamic=dynamic.get(name)),),
                forms=tuple(f for f in FORMS.names if f not in refusals),
                refusals=refusals,
            )
        )
    others = [w for n, w in weights.items() if n in uses and uses[n].others]
    inner = (*others, *(x.node for o in operators for x in o.lookups))
    graph.output([call(users_forward, inner, (kept,), torch.get_default_dtype())])
    program = Program(graph, sources, {}, parameters, template.training, batch.node.expr)
    return Outline(program, operators, [_planned(o, uses[o.name], seen.rows, looked_up[o.name]) for o in operators])


def _uses(seen: Survey, dynamic: Collection[str]) -> dict[str, Use]:
    """What was seen of parameters; of dynamic tables also of those of which nothing was.

    Raises
    ------
    UnsupportedError
        If anything but lookups has a dynamic table's rows.
    """
    uses = {**dict.fromkeys(dynamic, Use(sparse=True)), **seen.uses}
    for name in dynamic:
        if uses[name].others:
            raise UnsupportedError(
                f"the rows of dynamic table {name.removesuffix('.weight')!r} are used by "
                f"{', '.join(sorted(uses[name].others))}: they come and go, and nothing but its own lookups can have "
                "them"
            )
    return uses


def fetched_form() -> str:
    """The form of tables whose rows are fetched when the user's forward looks them up."""
    return next(f.name for f in FORMS if f.in_part == f.name and not f.fallback)


def refused(use: Use, ranks: int, *, dynamic: bool = False) -> dict[str, str]:
    """The forms that a table can't take, and why."""
    kept, fetched = fallback().name, fetched_form()
    result = dict.fromkeys(FORMS.names, f"the model is captured in part; there it is {kept} or {fetched}")
    for form in (kept, fetched):
        del result[form]
    if use.others:
        result[fetched] = f"the table is also used by {', '.join(sorted(use.others))}"
    elif dynamic:
        result[kept] = f"{ROWS_THAT_GO}: in a model that is captured in part take {fetched}"
    elif use.sparse and ranks > 1:
        result[kept] = "its gradients are sparse, and only those of fetched rows stay so"
    return result


def _planned(o: Operator, use: Use, rows: int, parameter: Tensor) -> PlannedTable:
    refusals = {f: why for f, why in o.refusals.items() if f in (fallback().name, fetched_form())}
    table = use.table(o.name, parameter, rows, dynamic=o.dynamic is not None)
    return PlannedTable(table, tuple(sorted(use.lookups | use.others)), refusals)

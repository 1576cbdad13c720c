"""Where a divided dimension goes: `graph/slicing`, against numbers, and against what the placement rules answer."""

from collections.abc import Iterator, Mapping
from itertools import product

import pytest
import torch
from torch import Tensor, fx

from descompiler.capture.ladder import capture
from descompiler.examples import MODELS, make_inputs
from descompiler.graph.nodes import aten, is_tensor, shape_of
from descompiler.graph.slicing import emit_slice, follow
from descompiler.layout.placement import Region, Shard
from descompiler.model.probe import blueprint
from descompiler.passes import NORMALISE, RULES
from descompiler.planning.objective import assign
from descompiler.region.place import place
from descompiler.region.rule import Placed
from descompiler.tables.form import find_tables
from tests.harness.calls import BUFFER, PARAMETER, Call, Operand, Site, site_of
from tests.harness.cases import cases
from tests.harness.family import FAMILIES, family, placed_values
from tests.harness.rules import answer

FIRST, SIZE = 1, 1
"""The slice that is computed of slices: every divided dimension of the calls has two elements or more."""


def table(name: str, *shape: int) -> Operand:
    return Operand(name, PARAMETER, shape)


def chosen(*ids: int, shape: tuple[int, ...] = ()) -> Operand:
    return Operand("chosen", BUFFER, shape or (len(ids),), ids)


U, V, A, SHORT = table("u", 4, 3), table("v", 4, 3), Operand("a", BUFFER, (5, 4)), table("short", 2, 3)
WIDE = chosen(0, 3, 1, 1, 2, 2, shape=(2, 3))

OF_TABLES = [
    Call(aten.cat.default, ([U, SHORT],)),
    Call(aten.cat.default, ([U, V], 1)),
    Call(aten.stack.default, ([U, V],)),
    Call(aten.stack.default, ([U, V], -1)),
    Call(aten.mm.default, (A, U)),
    Call(aten.mm.default, (U, table("w", 3, 2))),
    Call(aten.matmul.default, (A, U)),
    Call(aten.matmul.default, (U, table("w", 3))),
    Call(aten.matmul.default, (table("x", 3, 3), table("x", 3, 3))),
    Call(aten.addmm.default, (table("w", 2), U, table("x", 3, 2))),
    Call(aten.addmm.default, (table("w", 5, 3), A, U)),
    Call(aten.linear.default, (U, table("w", 2, 3), table("c", 2))),
    Call(aten.layer_norm.default, (U, [3], table("w", 3))),
    Call(aten.mul.Tensor, (U, table("w", 4, 1))),
    Call(aten.add.Tensor, (U, table("w", 3))),
    Call(aten.add.Tensor, (table("w", 3), table("x", 3, 3))),
    Call(aten.index_add.default, (U, 0, chosen(1, 0), SHORT)),
    Call(aten.scatter_add.default, (U, 0, WIDE, SHORT)),
    Call(aten.scatter_reduce.two, (U, 0, WIDE, SHORT, "amax")),
    Call(aten.index_select.default, (U, 0, chosen(3, 1))),
    Call(aten.index.Tensor, (U, [chosen(3, 1)])),
    Call(aten.index.Tensor, (U, [WIDE])),
    Call(aten.index.Tensor, (U, [None, chosen(2, 0)])),
    Call(aten.index.Tensor, (table("x", 2, 4, 3), [None, WIDE, chosen(2, 0, 1)])),
    Call(aten.index.Tensor, (table("x", 2, 4, 3, 2), [None, WIDE, chosen(-1, 0, 1)])),
    Call(aten.index.Tensor, (table("x", 3, 4, 3), [chosen(1, 0), None, chosen(-1, 0)])),
    Call(aten.embedding.default, (U, WIDE)),
    Call(aten.gather.default, (U, 0, WIDE)),
    Call(aten.gather.default, (U, 0, chosen(2, 0, shape=(2, 1)))),
    Call(aten.scatter_add.default, (U, 0, chosen(2, 0, shape=(2, 1)), SHORT)),
    Call(aten.einsum.default, ("ij,jk->ik", [table("x", 1, 4), U])),
    Call(aten.einsum.default, ("ij,kj->ikj", [U, table("x", 2, 1)])),
    Call(aten.einsum.default, ("ij,ji->ij", [table("x", 3, 3), table("x", 3, 3)])),
    Call(aten.bmm.default, (table("x", 2, 4, 3), table("y", 2, 3, 4))),
    Call(aten.repeat.default, (U, [1, 2, 1])),
    Call(aten.prelu.default, (U, table("w", 3))),
    Call(aten.sum.dim_IntList, (U, [0])),
    Call(aten.mean.dim, (U, [0], True)),
    Call(aten.linalg_vector_norm.default, (U, 2, [1], True)),
    Call(aten.norm.ScalarOpt_dim, (U, 2, [1], True)),
    Call(aten.softmax.int, (U, 0)),
    Call(aten.narrow.default, (U, 0, 1, 2)),
    Call(aten.slice.Tensor, (U, 0, 0, 4, 2)),
    Call(aten.select.int, (table("x", 2, 4, 3), 0, 1)),
    Call(aten.t.default, (U,)),
    Call(aten.numpy_T.default, (U,)),
    Call(aten.permute.default, (U, [1, 0])),
    Call(aten.transpose.int, (U, 0, 1)),
    Call(aten.unsqueeze.default, (U, 1)),
    Call(aten.squeeze.dim, (table("x", 4, 1, 3), 1)),
    Call(aten.expand.default, (U, [2, 4, 3])),
    Call(aten.expand.default, (table("x", 4, 1), [4, 3])),
    Call(aten.expand.default, (table("x", 1, 3), [4, 3])),
    Call(aten.reshape.default, (U, [2, 2, 3])),
    Call(aten.reshape.default, (U, [4, 3, 1])),
    Call(aten.reshape.default, (table("x", 4, 2, 3), [4, 6])),
    Call(aten.view.default, (table("x", 2, 3, 2), [2, 3, 2, 1])),
    Call(aten.reshape.default, (U, [12])),
]
"""What models compute of whole tables."""


def divisions(site: Site) -> Iterator[dict[fx.Node, int]]:
    """Every way to divide some of a call's operands along one dimension each, of one size of two or more."""
    ways = [[None, *range(len(x.tensor().shape))] for x in site.call.operands]
    for dims in product(*ways):
        found = {site.nodes[x]: d for x, d in zip(site.call.operands, dims, strict=True) if d is not None}
        sizes = [shape_of(n)[d] for n, d in found.items()]
        if found and sizes.count(sizes[0]) == len(sizes) and sizes[0] not in (0, 1):
            yield found


def slice_of(site: Site, dims: Mapping[fx.Node, int]) -> tuple[Tensor, int] | None:
    """A slice of a call's result as slicing computes it, and its dimension; None if it does not."""
    step = follow(site.node, dims)
    if step is None:
        return None
    names, graph, values = {n: x for x, n in site.nodes.items()}, fx.Graph(), []

    def put(x: Tensor) -> fx.Node:
        values.append(x)
        return graph.placeholder(f"x{len(values)}")

    def piece(n: fx.Node) -> fx.Node:
        return put(site.numbers[names[n]].narrow(dims[n], FIRST, SIZE))

    def whole(n: fx.Node) -> fx.Node:
        return put(site.numbers[names[n]].clone())

    graph.output(emit_slice(graph, site.node, step, dims, piece, whole, FIRST, SIZE))
    return fx.Interpreter(torch.nn.Module(), graph=graph).run(*values), step.dim


def wrong_slices(calls: list[Call]) -> tuple[list[str], int]:
    """Slices that are not the result's, and how many were computed."""
    found, computed = [], 0
    for call in calls:
        site = site_of(call)
        for dims in divisions(site) if is_tensor(site.node) else ():
            where = f"{call}, { ({n.name: d for n, d in dims.items()}) }"
            try:
                made = slice_of(site, dims)
            except Exception as error:  # whatever it raises is its fault
                found.append(f"{where}: {type(error).__name__}: {error}")
                continue
            if made is None:
                continue
            computed += 1
            expected = site.result.narrow(made[1], FIRST, SIZE)
            if made[0].shape != expected.shape or not torch.allclose(made[0], expected, equal_nan=True):
                found.append(f"{where}: not the slice along {made[1]}")
    return found, computed


@pytest.mark.long(but=1)
@pytest.mark.parametrize("name", FAMILIES)
def test_slices_of_what_rules_place_are_right(name):
    found, computed = wrong_slices(family(name))
    assert not found
    assert computed


def test_slices_of_what_is_computed_of_tables_are_right():
    found, computed = wrong_slices(OF_TABLES)
    assert not found
    assert computed > len(OF_TABLES)


def compared(node: fx.Node, at: Mapping[fx.Node, Region], placement: Region) -> str | None:
    """What slicing says of a rule's answer for values that are divided alike; None where one of them does not speak."""
    divided = [p for p in at.values() if isinstance(p, Shard)]
    if len(divided) < len(at) or any(p.division != divided[0].division for p in divided):
        return None
    step = follow(node, {n: p.dim for n, p in at.items()})
    if step is None or not isinstance(placement, Shard):
        return None
    same = placement == Shard(step.dim, divided[0].division)
    return (
        "" if same else f"{node.format_node()}, { ({n.name: str(p) for n, p in at.items()}) }: {placement} and {step}"
    )


@pytest.mark.long(but=1)
@pytest.mark.parametrize("name", FAMILIES)
def test_rules_and_slicing_agree(name):
    found: list[str] = []
    for call in family(name):
        site = site_of(call)
        for placed in placed_values(call):
            said, _ = answer(site, placed)
            if isinstance(said, Placed):
                at = {site.nodes[x]: p for x, p in placed.items()}
                found += [words] if (words := compared(site.node, at, said.placement)) is not None else []
    assert found
    assert not any(found), [x for x in found if x]


@pytest.mark.parametrize("model", cases(MODELS, ["dlrm", "xdeepfm"]))
def test_rules_and_slicing_agree_on_models(model):
    inputs = make_inputs(model)
    program, _ = capture(blueprint(MODELS[model]()), inputs, passes=NORMALISE)
    operators = find_tables(program)
    found = []
    for form in ("column_wise", "table_wise"):
        forms = {o.name: form if form in o.forms else o.forms[0] for o in operators}
        candidates = place(program, operators, assign(operators, forms, 2), RULES, 2)
        placements = {n: p.placement for n, p in candidates.placed.items()}
        for node in candidates.rules:
            at = {n: placements[n] for n in node.all_input_nodes if n in placements}
            found += [words] if (words := compared(node, at, placements[node])) is not None else []
    assert not any(found), [x for x in found if x]

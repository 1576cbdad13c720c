"""What needs no exchange is emitted between an exchange's start and its wait, and each starts with its operands."""

import pytest
import torch
from torch import fx

from descompiler.capture.ladder import capture
from descompiler.emit.emit import Emitted, emit
from descompiler.examples import MODELS, make_inputs
from descompiler.graph.nodes import aten
from descompiler.graph.rewrite import ancestors, descendants
from descompiler.model.probe import blueprint
from descompiler.passes import NORMALISE, RULES
from descompiler.planning.objective import assign
from descompiler.region.cut import Weights, minimum_cut
from descompiler.region.partition import Partition
from descompiler.region.place import place
from descompiler.tables.form import find_tables
from tests.harness.cases import cases

RANKS = 2
STARTS = ("fetch_start", "fetch_rows", "enter_start", "exit_start")
WAITS = ("enter_wait", "fetch_wait", "exit_wait")


def emitted(name: str, form: str, mixed: bool = False) -> Emitted:
    """Rank 0's program; ``mixed``: the last table is divided by rows."""
    inputs = make_inputs(name)
    program, _ = capture(blueprint(MODELS[name]()), inputs, passes=NORMALISE)
    operators = find_tables(program)
    forms = {o.name: form for o in operators}
    if mixed:
        forms[operators[-1].name] = "row_wise"
    splits = assign(operators, forms, RANKS)
    candidates = place(program, operators, splits, RULES, RANKS)
    cut = minimum_cut(program, candidates, Weights(RANKS, 8))
    return emit(Partition(program, operators, splits, candidates, cut, RANKS), 0)


def called(graph: fx.Graph, names: tuple[str, ...]) -> list[fx.Node]:
    return [
        n for n in graph.nodes if (n.target if n.op == "call_method" else getattr(n.target, "__name__", "")) in names
    ]


def late_starts(graph: fx.Graph) -> list[str]:
    """Dense layers that stand in front of an exchange's start, and that it does not need."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    layers = [n for n in graph.nodes if n.target is aten.linear.default]
    found = []
    for start in called(graph, STARTS):
        needed = ancestors([start])
        found += [f"{x} before {start}" for x in layers if place[x] < place[start] and x not in needed]
    return found


def early_waits(graph: fx.Graph) -> list[str]:
    """Dense layers that stand behind a wait, and need none that was before them."""
    found, waited = [], set[fx.Node]()
    for n in graph.nodes:
        if n in called(graph, WAITS[1:]):
            waited |= {n, *descendants(graph, [n])}
        elif n.target is aten.linear.default and waited and n not in waited:
            found.append(f"{n} behind a wait")
    return found


CASES = [(name, form) for name in ("deepfm", "wide_deep", "dlrm") for form in ("unique_rows", "row_wise")]


@pytest.mark.parametrize(("name", "form"), cases(CASES, [("dlrm", "unique_rows"), ("wide_deep", "row_wise")]))
@pytest.mark.parametrize("mixed", [False, True])
def test_dense_layers_run_while_exchanges_are_under_way(name, form, mixed):
    graph = emitted(name, form, mixed).module.graph
    assert not late_starts(graph) and not early_waits(graph)
    if name == "dlrm":  # its bottom tower
        place = {n: i for i, n in enumerate(graph.nodes)}
        (wait, *_), start = called(graph, WAITS[1:]), called(graph, STARTS)[-1]
        between = [n for n in graph.nodes if n.target is aten.linear.default and place[start] < place[n] < place[wait]]
        assert len(between) >= 2


def test_a_layer_at_a_wrong_place_is_found():
    graph = fx.Graph()
    x = graph.placeholder("x")
    idle = graph.call_function(aten.linear.default, (x, x))
    start = graph.call_method("exit_start", (x,))
    wait = graph.call_method("exit_wait", (start,))
    late = graph.call_function(aten.linear.default, (x, x))
    needed = graph.call_function(torch.add, (wait, x))
    graph.output([idle, late, needed])
    assert len(late_starts(graph)) == 1 and len(early_waits(graph)) == 1

"""The graph of the cut: networkx solves it as the planner does, whoever is asked, and a user can read it."""

import doctest
import itertools
import math
from functools import cache

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import descompiler as des
from descompiler.captured import Captured
from descompiler.graph.text import canonical, named_lines
from descompiler.planning.objective import Terms
from descompiler.planning.pins import allowed_forms
from descompiler.planning.search import Search
from descompiler.region.cut import Weights
from descompiler.region.flow import SINK, SOLVERS, SOURCE, reduced, solve
from examples.models import CTR_MODELS, MODELS
from tests.harness.cases import cases
from tests.harness.models import IDS, Branch

FIELDS = 4


@cache
def captured(name):
    with torch.device("meta"):
        model = MODELS[name]("fields", vocab_sizes=[50, 5_000, 100_000, 1_000_000], dim=16, hidden=(64, 32))
    return Captured.of(model, (torch.randn(4, 3), torch.zeros(4, FIELDS, dtype=torch.int64)))


def crossing(graph, side):
    return [d for a, b, d in graph.edges(data=True) if a in side and b not in side]


CAPACITIES = [0, 1, 2, 3, 7, 2**40 + 1, None]
"""Few, so that several cuts are the least; large ones too; None is unlimited."""


def graph_of(nodes, edges):
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from((a, b, {} if c is None else {"capacity": c}) for a, b, c in edges)
    return graph


def test_edges_that_become_one_have_both_capacities():
    """Two paths of two edges each; a cycle of unlimited edges whose nodes have an edge each to the same node."""
    paths = [(SOURCE, "a", 3), ("a", SINK, 4), (SOURCE, "b", 2), ("b", SINK, 1)]
    assert list(reduced(graph_of((), paths), ()).edges(data="capacity")) == [(SOURCE, SINK, 4)]
    cycle = [(SOURCE, "a", 9), ("a", "b", None), ("b", "a", None), ("a", SINK, 3), ("b", SINK, 4)]
    assert list(reduced(graph_of((), cycle), ()).edges(data="capacity")) == [(SOURCE, SINK, 7)]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_reduced_graph_has_the_same_cuts(data):
    """Between the nodes that are kept, also when these get edges that the reduction knew nothing of."""
    kept = list(range(data.draw(st.integers(0, 2))))
    nodes = [SOURCE, SINK, *kept, *"abcde"]
    pairs = st.sampled_from(list(itertools.permutations(nodes, 2)))
    edges = data.draw(st.dictionaries(pairs, st.sampled_from(CAPACITIES), min_size=3, max_size=14))
    graph = graph_of(nodes, [(*pair, c) for pair, c in edges.items()])
    small = reduced(graph, kept)
    for a, b in itertools.permutations([SOURCE, SINK, *kept], 2):
        if not graph.has_edge(a, b):
            more = data.draw(st.integers(0, 5))
            graph.add_edge(a, b, capacity=more)
            if not small.has_edge(a, b):
                small.add_edge(a, b, capacity=more)
            elif "capacity" in small.edges[a, b]:
                small.edges[a, b]["capacity"] += more
    expected, found = solve(graph, "dinic"), solve(small, "dinic")
    assert len(small) <= len(graph) and set(kept) <= set(small)
    if expected is None:
        assert found is None
    else:
        assert (found[0], found[1] & set(kept)) == (expected[0], expected[1] & set(kept))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_solvers_agree_on_random_graphs(data):
    """On the capacity, on the largest side of the source, and that no cut is finite; large capacities too."""
    nodes = [SOURCE, SINK, *range(data.draw(st.integers(1, 6)))]
    pairs = [
        (a, b, data.draw(st.sampled_from(["none", "none", *CAPACITIES]))) for a, b in itertools.permutations(nodes, 2)
    ]
    graph = graph_of(data.draw(st.permutations(nodes)), [x for x in pairs if x[2] != "none"])
    found = [solve(graph, name) for name in SOLVERS.names]
    assert all(f == found[0] for f in found)
    inner = [set(x) for n in range(len(nodes) - 1) for x in itertools.combinations(nodes[2:], n)]
    cuts = [(sum(d.get("capacity", math.inf) for d in crossing(graph, {SOURCE} | x)), {SOURCE} | x) for x in inner]
    least = min(c for c, _ in cuts)
    if found[0] is None:
        assert least == math.inf
    else:
        assert found[0] == (least, set().union(*(side for c, side in cuts if c == least)))


@pytest.mark.parametrize("name", cases(CTR_MODELS, ["fm", "dlrm", "dcn"]))
def test_solvers_give_equal_plans_of_the_examples(name):
    searched = [(2, {})] if name in ("deepfm", "dlrm") else []  # branch and bound: hundreds of cuts
    for ranks, terms in ((64, {"pins": {"*": "table_wise"}}), (3, {"pins": {"*": "column_wise"}}), *searched):
        texts = [captured(name).plan(ranks=ranks, batch=256, solver=s, **terms).to_json() for s in SOLVERS.names]
        assert len(set(texts)) == 1


def test_solvers_give_equal_bounds():
    found = captured("deepfm")
    allowed = allowed_forms(found.operators, forbid={"*": "hot_rows"})
    fixed = dict.fromkeys(allowed, ("column_wise",))
    for forms, widest in ((allowed, None), (allowed, 0), (fixed, 0), (fixed, 16)):
        bounds = []
        for solver in SOLVERS.names:
            search = Search(found.program, found.operators, found.build.kit.rules, Weights(8, 256), allowed, Terms())
            search.relaxation.solver = solver
            bounds.append(search.relaxation.cut(forms, widest))
        assert all(b == bounds[0] for b in bounds)


@pytest.mark.parametrize("name", CTR_MODELS)
@pytest.mark.parametrize("ranks", [2, 64])
def test_networkx_finds_the_cost_and_the_region_of_a_plan(name, ranks):
    plan = captured(name).plan(ranks=ranks, batch=256, pins={"*": "table_wise"})
    graph = plan.cut_graph()
    cost, (side, _) = nx.minimum_cut(graph, "source", "sink")
    cut = captured(name).partition(plan).cut
    lines = named_lines(captured(name).program.graph, captured(name).program.sources)
    assert {n for n, d in graph.nodes(data=True) if d["kind"] == "value" and d["inside"]} == {
        lines[n][0] for n in cut.inside
    }
    if plan.aggregate == "cut":
        assert cost == graph.graph["cost"] and side == {n for n, inside in graph.nodes(data="inside") if inside}
        assert cost == sum(d["capacity"] for d in crossing(graph, side))
    else:
        assert cost <= graph.graph["cost"]


class Scores(nn.Module):
    """Two tables and one number for each: sums of products cross, or the vectors."""

    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(1000, 8), nn.Embedding(5000, 8)

    def forward(self, user, item):
        return (self.user(user) * self.item(item)).sum(1)


INPUTS = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)


def test_nodes_and_edges_say_what_they_are():
    plan = des.plan(Scores(), INPUTS, ranks=2, batch=10, pins={"*": "column_wise"})
    graph = plan.cut_graph()
    text = canonical(Captured.of(Scores(), INPUTS).program)
    kinds = {"source": {"source"}, "sink": {"sink"}, "value": set(), "out": set()}
    for name, d in graph.nodes(data=True):
        kinds[d["kind"]].add(name)
        if d["kind"] in ("value", "out"):
            assert d["text"] in text and d["text"].startswith(name.removesuffix(" out")) and d["rule"]
            assert d["placement"] and "test_cut_graph.py:" in d["line"]
    assert kinds["source"] == {"source"} and kinds["sink"] == {"sink"}
    assert kinds["out"] == {f"{name} out" for name in kinds["value"]}
    lookups = {b for a, b, purpose in graph.edges(data="purpose") if purpose == "lookup"}
    assert len(lookups) == 2 and all(graph.nodes[n]["rule"] == "lookup" for n in lookups)
    purposes = {d["purpose"]: "capacity" in d for _, _, d in graph.edges(data=True)}
    assert purposes == {"lookup": False, "leaves": True, "used": False, "needed": False}
    # one sum a row has a term on each rank, which goes to the other, and its gradient comes back: 10 rows of 4 bytes
    assert graph.graph["cost"] == nx.minimum_cut_value(graph, "source", "sink") == 2 * 2 * 10 * 4


def test_the_example_of_the_documentation():
    failed, tried = doctest.testfile("../docs/planner.md")
    assert tried >= 8 and not failed


def test_the_graph_says_what_is_saved_and_what_is_worked():
    graph = captured("deepfm").plan(ranks=64, batch=256, pins={"*": "table_wise"}).cut_graph()
    purposes = {d["purpose"] for _, _, d in graph.edges(data=True)}
    assert {"saved", "work"} <= purposes
    for _, _, d in graph.edges(data=True):
        assert ("capacity" in d) == (d["purpose"] in ("saved", "work", "leaves"))


def test_a_plan_with_nothing_inside_has_a_graph_with_nothing_to_cut():
    graph = des.plan(Scores(), INPUTS, ranks=2, pins={"*": "replicate"}).cut_graph()
    assert set(graph) == {"source", "sink"} and nx.minimum_cut_value(graph, "source", "sink") == 0


def test_a_plan_from_a_file_says_how_to_get_its_graph(tmp_path):
    plan = des.plan(Scores(), INPUTS, ranks=2, batch=10, pins={"*": "column_wise"})
    plan.save(tmp_path / "plan.json")
    with pytest.raises(des.PlanError, match=r"des\.plan\(model, inputs, plan=\.\.\.\)"):
        des.Plan.load(tmp_path / "plan.json").cut_graph()
    again = des.plan(Scores(), INPUTS, plan=tmp_path / "plan.json").cut_graph()
    assert nx.utils.graphs_equal(again, plan.cut_graph())


def test_a_model_captured_in_part_has_no_graph():
    plan = des.plan(Branch(), (IDS,), ranks=2)
    with pytest.raises(des.PlanError, match="captured in part"):
        plan.cut_graph()


def test_the_solver_is_chosen_by_name(monkeypatch):
    """For the cuts of planning, of the bound, and of the program that is emitted; an unknown one is refused."""
    asked = []
    named = SOLVERS.named
    monkeypatch.setattr(SOLVERS, "named", lambda name: asked.append(name) or named(name))
    for solver in SOLVERS.names:
        asked.clear()
        module = des.compile(Scores(), INPUTS, solver=solver)
        module(*INPUTS)
        des.plan(Scores(), INPUTS, ranks=2, solver=solver)
        assert set(asked) == {solver}
    for refused in (des.plan, des.compile):
        terms = {"ranks": 2} if refused is des.plan else {}
        with pytest.raises(des.PlanError, match="no solver 'gurobi'; the solvers are dinic, networkx"):
            refused(Scores(), INPUTS, solver="gurobi", **terms)

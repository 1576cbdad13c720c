"""The minimum cut is the cheapest legal choice of aggregation points."""

import re
from math import inf

import pytest
import torch
from torch import nn

from descompiler.capture.ladder import capture
from descompiler.classify.scope import trained_parameters
from descompiler.graph.rewrite import run_passes
from descompiler.graph.text import canonical_graph
from descompiler.model.probe import blueprint
from descompiler.passes import NORMALISE, RULES
from descompiler.planning.exchanges import layout_of
from descompiler.planning.objective import assign
from descompiler.region.cut import Cut, Weights, exit_bytes, minimum_cut, saved_bytes, work_bytes
from descompiler.region.partition import Partition
from descompiler.region.place import place
from descompiler.tables.form import find_tables
from examples.models import MODELS
from tests.harness.sent import gradients_reduced, headers, ids_in, legal_sets, norms, values_out


class Random(nn.Module):
    """A few fields and a chain of consumers, chosen by the test."""

    def __init__(self, dims, steps, hidden):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(7, dims) for _ in range(3))
        self.steps = steps
        self.first = nn.Linear(3 * dims, hidden)
        self.mixed = nn.Linear(3 * dims + 2, hidden)
        self.linear, self.one = nn.Linear(dims, 2), nn.Linear(6 * dims, 1)
        self.norm = nn.BatchNorm1d(3 * dims)
        self.norm_of_one = nn.BatchNorm1d(dims, track_running_stats=False)

    def forward(self, x, dense):
        e = torch.stack([t(x[:, i]) for i, t in enumerate(self.tables)], 1)
        out = []
        for step in self.steps:
            if step == "sum":
                out.append(e.sum(1).sum(1))
            elif step == "fm":
                out.append((e.sum(1) ** 2 - (e**2).sum(1)).sum(1))
            elif step == "deep":
                out.append(torch.relu(self.first(e.flatten(1))).sum(1))
            elif step == "mixed":  # each rank has a slice of the weight, for the dense features
                out.append(self.mixed(torch.cat([e.flatten(1), dense], 1)).sum(1))
            elif step == "each":
                out.append(self.linear(e).sum((1, 2)))
            elif step == "norm":
                out.append((self.norm(e.flatten(1)) ** 2).sum(1) + self.norm_of_one(e[:, 0]).tanh().sum(1))
            elif step == "wide":  # what a layer inside is made of has to be inside, though it also leaves
                twice = torch.cat([e.flatten(1)] * 2, 1)
                out.append(self.one(twice).squeeze(1) + twice.sort(1).values[:, 0])
            elif step == "mask":  # what is no number can't leave
                out.append((e > 0.1).to(e.dtype).sum((1, 2)))
        return torch.stack(out, 1)


STEPS = ["sum", "fm", "deep", "mixed", "each", "norm", "wide", "mask"]


def lay_out(program, operators, splits, candidates, inside, w):
    """The layout of a set of inside nodes, and how the weights are divided then."""
    exits = tuple(n for n in candidates.placed if n in inside and any(u not in inside for u in n.users))
    cut = Cut(inside, 0, exits)
    partition = Partition(program, operators, splits, candidates, cut, w.ranks, wire_dtype=w.wire_dtype)
    return layout_of(partition), partition.pieces


def compare_with_layouts(program, operators, forms, w):
    """The objective of each legal set, and the cut's, which is the least of all, with what layouts send."""
    ranks, rows = w.ranks, w.rows
    splits = assign(operators, {o.name: f for o, f in zip(operators, forms, strict=True)}, ranks)
    candidates = place(program, operators, splits, RULES, ranks)
    placements, trained = candidates.placements(), trained_parameters(program)
    largest, most = lay_out(program, operators, splits, candidates, frozenset(candidates.placed), w)
    always = gradients_reduced(most, trained, w.itemsize) + norms(largest, w.itemsize)  # what no set saves
    costs = {}
    for inside in legal_sets(candidates):
        layout, pieces = lay_out(program, operators, splits, candidates, inside, w)
        reduced = gradients_reduced(pieces, trained, w.itemsize) + norms(layout, w.itemsize)
        out = values_out(layout, rows, w.itemsize if w.wire_dtype is None else w.wire_dtype.itemsize)
        exits = (n for n in inside if any(u not in inside for u in n.users))
        assert sum(exit_bytes(program, n, placements[n], w) for n in exits) == out
        saved = sum(saved_bytes(program, n, x, w) for n, x in candidates.placed.items() if n not in inside)
        assert saved == reduced - always
        extra = sum(work_bytes(n, placements[n], placements, w) for n in inside)
        assert not extra or w.flops_per_byte < inf
        costs[inside] = out + reduced - always + extra
        sent = [layout.predict(r, [rows] * ranks, w.itemsize).bytes_by_collective for r in range(ranks)]
        assert sum(sum(s.values()) for s in sent) == headers(layout) + ids_in(layout, rows) + out + reduced
    cut = minimum_cut(program, candidates, w)
    assert cut.cost == costs[cut.inside] == min(costs.values())
    assert set(cut.exits) == {n for n in cut.inside if any(u not in cut.inside for u in n.users)}


@pytest.mark.parametrize("step", STEPS)
def test_costs_are_what_the_layout_of_every_legal_set_sends(step, draws):
    """The objective of each set, and the cut's, which is the least of all; each counted from the layout's shapes."""
    steps = [step, *draws.sample(STEPS, draws.choice([0, 0, 1]))]
    program, _ = capture(blueprint(Random(3, steps, 4)), (torch.randint(7, (5, 3)), torch.randn(5, 2)))
    program = run_passes(program, NORMALISE)
    operators = find_tables(program)
    # columns let every step be inside, and few rows make weights dear; the others differ in who has what
    mixed = [draws.choice(["table_wise", "row_wise", "column_wise"]) for _ in range(2)]
    for forms, rows in ((["column_wise"] * 3, draws.choice([1, 2])), ([*mixed, "replicate"], draws.randint(1, 300))):
        ranks, work = draws.randint(2, 8), draws.random() < 0.5
        for wire_dtype in (None, torch.bfloat16):
            print(f"{steps}, {forms}, {ranks=}, {rows=}, {work=}, {wire_dtype=}")
            w = Weights(ranks, rows, flops_per_byte=40 if work else inf, wire_dtype=wire_dtype)
            compare_with_layouts(program, operators, forms, w)


@pytest.mark.parametrize("ranks, at", [(2, {"aten.linear"}), (64, {"aten.stack"})])
def test_deepfm_changes_its_form_with_the_ranks(ranks, at):
    """Few ranks: partial sums; many: the embeddings themselves."""
    import descompiler as des

    model = MODELS["deepfm"]("fields", vocab_sizes=[100_000] * 26, dim=16, hidden=(64, 32))
    inputs = (torch.randn(4, 3), torch.randint(100, (4, 26)))
    plan = des.plan(model, inputs, ranks=ranks, batch=1024, pins={"*": "table_wise"}, cluster="bytes")
    assert at <= {e.split()[0] for e in plan.exits}


def test_the_explanation_names_every_table_its_price_and_its_runner_up():
    import descompiler as des

    model = MODELS["deepfm"]("fields", vocab_sizes=[100_000] * 3, dim=16, hidden=(64, 32))
    plan = des.plan(model, (torch.randn(4, 3), torch.randint(100, (4, 3))), ranks=4, batch=1024, cluster="bytes")
    text = plan.explain()
    for t in plan.tables:
        assert any(t.name in line and str(plan.splits[t.name]) in line for line in text.splitlines())
        assert "chosen" in (one := plan.explain(t.name)) and "runner-up" in one
    assert "unique ids" in text and not plan.crossings  # 1,024 draws of 100,000 ids are few different ones
    inputs = (torch.randn(4, 3), torch.randint(100, (4, 3)))
    plan = des.plan(model, inputs, ranks=4, batch=1024, pins={"*": "table_wise"})
    first = plan.crossings[0]
    entered = [c for c in plan.crossings if c.kind == "ids" and c.line == first.line]
    size = plan.bytes_of(first.formula, L=sum(c.width for c in entered))
    assert re.search(rf"ids .*L = {sum(c.width for c in entered)} +{size:,} B", plan.explain())


def test_a_fingerprint_does_not_depend_on_the_number_of_the_device():
    def text(device):
        graph = torch.fx.Graph()
        graph.output(graph.call_function(torch.ops.aten.zeros.default, ([2],), {"device": torch.device(device)}))
        return canonical_graph(graph, {})

    assert text("cuda:0") == text("cuda:1") != text("cpu")

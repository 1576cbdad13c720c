"""The minimum cut is the cheapest legal choice of aggregation points."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from descompiler.aggregate import Weights, brute_force, evaluate, is_legal, minimum_cut, place
from descompiler.capture import capture
from descompiler.objective import assign
from descompiler.operators import find_operators
from descompiler.passes import NORMALISE, RULES
from descompiler.probe import blueprint
from descompiler.program import canonical_graph, run_passes
from examples.models import MODELS


class Random(nn.Module):
    """A few fields and a chain of consumers, chosen by the test."""

    def __init__(self, dims, steps, hidden):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(7, dims) for _ in range(3))
        self.steps = steps
        self.first = nn.Linear(3 * dims, hidden)
        self.linear = nn.Linear(dims, 2)

    def forward(self, x):
        e = torch.stack([t(x[:, i]) for i, t in enumerate(self.tables)], 1)
        out = []
        for step in self.steps:
            if step == "sum":
                out.append(e.sum(1).sum(1))
            elif step == "fm":
                out.append((e.sum(1) ** 2 - (e**2).sum(1)).sum(1))
            elif step == "deep":
                out.append(torch.relu(self.first(e.flatten(1))).sum(1))
            elif step == "each":
                out.append(self.linear(e).sum((1, 2)))
        return torch.stack(out, 1)


@settings(max_examples=15, deadline=None)
@given(
    dims=st.integers(1, 5),
    steps=st.lists(st.sampled_from(["sum", "fm", "deep", "each"]), min_size=1, max_size=2, unique=True),
    hidden=st.integers(1, 40),
    ranks=st.integers(2, 8),
    rows=st.integers(1, 300),
    form=st.sampled_from(["field", "row", "column"]),
)
def test_minimum_cut_is_brute_force(dims, steps, hidden, ranks, rows, form):
    program, _ = capture(blueprint(Random(dims, steps, hidden)), torch.randint(7, (5, 3)))
    program = run_passes(program, NORMALISE)
    operators = find_operators(program)
    splits = assign(operators, {o.name: form for o in operators}, ranks)
    candidates = place(program, operators, splits, RULES, ranks)
    w = Weights(ranks, rows)
    cut = minimum_cut(program, candidates, w)
    assert is_legal(candidates, cut.inside)
    assert cut.cost == evaluate(program, candidates, cut.inside, w) == brute_force(program, candidates, w)


@pytest.mark.parametrize("ranks, at", [(2, {"aten.linear"}), (64, {"aten.stack"})])
def test_deepfm_changes_its_form_with_the_ranks(ranks, at):
    """Few ranks: partial sums; many: the embeddings themselves."""
    import descompiler as des

    model = MODELS["deepfm"]("fields", vocab_sizes=[100_000] * 26, dim=16, hidden=(64, 32))
    inputs = (torch.randn(4, 3), torch.randint(100, (4, 26)))
    plan = des.plan(model, inputs, ranks=ranks, batch=1024, pins={"*": "field"})
    assert at <= {e.split()[0] for e in plan.exits}


def test_the_explanation_names_every_table_its_price_and_its_runner_up():
    import descompiler as des

    model = MODELS["deepfm"]("fields", vocab_sizes=[100_000] * 3, dim=16, hidden=(64, 32))
    plan = des.plan(model, (torch.randn(4, 3), torch.randint(100, (4, 3))), ranks=4, batch=1024)
    text = plan.explain()
    for t in plan.tables:
        block = text[text.index(t.name) :]
        assert str(plan.splits[t.name]) in block and "runner-up" in block
    assert "unique ids" in text and not plan.crossings  # 1,024 draws of 100,000 ids are few different ones
    inputs = (torch.randn(4, 3), torch.randint(100, (4, 3)))
    plan = des.plan(model, inputs, ranks=4, batch=1024, pins={"*": "field"})
    assert f"= {plan.bytes_of(plan.crossings[0].formula, L=plan.crossings[0].width):,} B" in plan.explain()


def test_a_fingerprint_does_not_depend_on_the_number_of_the_device():
    def text(device):
        graph = torch.fx.Graph()
        graph.output(graph.call_function(torch.ops.aten.zeros.default, ([2],), {"device": torch.device(device)}))
        return canonical_graph(graph, {})

    assert text("cuda:0") == text("cuda:1") != text("cpu")

"""Each consumer of embeddings, with every form forced, on two real ranks: what rules keep inside, and what they do not.

`make test` runs those that a rule of their own is about; `make test-all` runs all.
"""

import copy
import time

import pytest
import torch

import descompiler as des
from examples.models import DeepFM
from tests.harness.cases import cases
from tests.harness.consumers import CONSUMERS
from tests.harness.plans import EVERY
from tests.harness.pool import here
from tests.harness.random_models import fixed

ALWAYS = {
    "attention with heads",
    "batch norm, then narrow",
    "compressed interaction",
    "cosine",
    "pairs by index",
    "recurrent history, all states",
    "repeated",
    "target attention",
}


def forced(rank, ranks, text):
    """On every rank: verify the model of a text with each form on all tables."""
    space = {"__name__": "model"}
    exec(compile(text, "<model>", "exec"), space)
    return des.verify(space["Model"](), space["inputs"](), ranks=ranks, plans=EVERY, launch=here)


@pytest.mark.parametrize("consumer", cases(sorted(CONSUMERS), ALWAYS))
def test_every_form(on_ranks, consumer):
    report = on_ranks(forced, 2, fixed(consumer).text)[0]
    assert report.cases == len(EVERY)
    assert max(report.worst.values()) <= 1e-10


MASKED = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Embedding(7, 4, padding_idx=0), nn.Embedding(5, 4, padding_idx=0)

    def forward(self, x, y):
        mask = (x != 0).unsqueeze(-1).float()
        mean = (self.a(x) * mask).sum(1) / mask.sum(1).clamp(min=1)
        product = torch.bmm((y > 0).float().unsqueeze(1), self.b(y)).squeeze(1)
        return (mean * product).sum(1)

def inputs():
    g = torch.Generator().manual_seed(0)
    return torch.randint(7, (6, 3), generator=g), torch.randint(3, (6, 2), generator=g)
"""


def test_masked_sums(on_ranks):
    report = on_ranks(forced, 2, MASKED)[0]
    assert report.cases == len(EVERY)


PAIR = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Embedding(7, 4), nn.Embedding(5, 4)
        {module}

    def forward(self, x, y):
        a, b = self.a(x), self.b(y)
        return {result}

def inputs():
    g = torch.Generator().manual_seed(0)
    return torch.randint(7, (6,), generator=g), torch.randint(5, (6,), generator=g)
"""

ONCE_WRONG = {
    "concatenations of other widths": (
        "self.w = nn.Parameter(torch.ones(()))",
        "(torch.cat([a, b[:, :2]], 1) * torch.cat([a[:, :2], b], 1)).sum(1) * self.w",
    ),
    "root of scaled rows": (
        "self.w = nn.Parameter(torch.ones(4))",
        "(a.square() * self.w).pow(0.5).sum(1) + b.sum(1)",
    ),
    "scales of two sizes in front": (
        "self.w = nn.Parameter(torch.randn(3, 1, 2, 1))",
        "(self.w * torch.stack([a, b], 1)).tanh().sum((0, 2, 3))",
    ),
}
"""What rules did wrong, as models of two lookups: their modules and results."""


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_what_was_wrong_once(on_ranks, name):
    module, result = ONCE_WRONG[name]
    report = on_ranks(forced, 2, PAIR.format(module=module, result=result))[0]
    assert report.cases == len(EVERY)
    assert max(report.worst.values()) <= 1e-10


def compile_s(rank, ranks, fields):
    """On every rank: how long a model with two tables for each field takes to compile, from a cold start."""
    model = DeepFM([1000] * fields)
    ids = torch.randint(1000, (64, fields))
    start = time.perf_counter()
    plan = des.compile(model, (torch.randn(64, 13), ids)).plan
    return len(plan.tables), time.perf_counter() - start


@pytest.mark.slow
def test_a_hundred_tables_compile_in_half_a_minute(on_ranks):
    for tables, seconds in on_ranks(compile_s, 2, 50):
        assert tables == 100
        assert seconds < 30


def evaluated(rank, ranks, form, training_first):
    """On every rank: train two steps, evaluate, train again; the largest difference from the original."""
    space = {"__name__": "model"}
    exec(compile(fixed("batch norm, then narrow").text, "<model>", "exec"), space)
    model, inputs = space["Model"]().double(), space["inputs"]()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    reference = copy.deepcopy(model)
    module = des.compile(model.train(training_first), inputs, plan={"*": form})
    mine = slice(4 * rank, 4 * rank + 4)  # four rows and two
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (reference, module)]
    worst = 0.0
    for training in (True, True, False, True, False):
        reference.train(training), module.train(training)
        expected, got = reference(*inputs), module(*(x[mine] for x in inputs))
        worst = max(worst, float((got - expected[mine]).detach().abs().max() / expected.detach().abs().max()))
        if training:
            expected.square().mean().backward()
            (got.square().sum() * ranks / len(expected)).backward()
            for o in optimizers:
                o.step(), o.zero_grad()
    state = des.full_state_dict(module)
    for name, value in reference.state_dict().items():
        worst = max(worst, float((state[name] - value).abs().max()))
    inside = any("norm_inside" in str(n.target) for e in module._programs for n in e.module.graph.nodes)
    return worst, inside


@pytest.mark.parametrize(("form", "training_first"), [("table_wise", True), ("column_wise", False)])
def test_batch_norm_evaluates_with_the_statistics_of_the_global_batch(on_ranks, form, training_first):
    for worst, inside in on_ranks(evaluated, 2, form, training_first):
        assert inside
        assert worst < 1e-10

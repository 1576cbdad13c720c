"""Advice: whether another plan is better for the ids that training has seen."""

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.module.advice import FIRST, Advice

ROWS = 64
TERMS = {"cluster": "bytes"}


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.top = nn.Embedding(20_000, 32, sparse=True), nn.Linear(32, 8)

    def forward(self, ids):
        return self.top(self.table(ids).sum(1).relu()).sum(1)


def batches(different, steps=FIRST + 2):
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(different, (ROWS, 20), generator=draw) for _ in range(steps)]


def _trained(rank, ranks, different):
    example = torch.zeros(ROWS, 20, dtype=torch.int64)
    torch.manual_seed(0)
    module = des.compile(Scores(), example, **TERMS)
    with torch.no_grad():
        module(example)  # says nothing of training
    with pytest.raises(des.InputError, match="no step of training has run"):
        module.advise()
    for ids in batches(different):
        module(ids).sum().backward()
    assert len(module._first) == (FIRST if rank == 0 else 0)
    advice = module.advise()
    return module.plan.forms, advice.present.forms, advice.best.forms, advice.saving, advice.advised, str(advice)


def test_few_ids_are_seen_and_the_better_plan_is_told(on_ranks):
    of_ranks = on_ranks(_trained, 2, 3)
    assert of_ranks[0] == of_ranks[1]
    forms, present, best, saving, advised, text = of_ranks[0]
    assert forms == present != best and advised and saving > 0.05
    assert "another plan would take" in text and "table.weight" in text and f"measured on {FIRST} batches" in text


def test_ids_as_assumed_ask_for_no_other_plan(on_ranks):
    (forms, present, _, saving, advised, text), _ = on_ranks(_trained, 2, 20_000)
    assert forms == present and not advised and saving <= 0.05 and text.startswith("the plan is within 5 %")


def test_the_advised_plan_is_followed():
    module = des.compile(Scores(), torch.zeros(ROWS, 20, dtype=torch.int64))
    module(batches(3)[0]).sum().backward()
    advice = module.advise()
    assert isinstance(advice, Advice) and des.compile(Scores(), batches(3)[0], plan=advice.best).plan == advice.best


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 4)

    def forward(self, ids):
        found = self.table(torch.tensor(ids.tolist()))
        return found.sum(1) if (ids == 3).any() else found.prod(1)


def test_a_model_in_part_is_refused():
    module = des.compile(Branch(), torch.ones(4, 2, dtype=torch.int64))
    with pytest.raises(des.UnsupportedError, match=r"captured in part.*samples="):
        module.advise()

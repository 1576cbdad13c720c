"""Bad input gets an error that names what is wrong."""

import pytest
import torch
from torch import nn

import descompiler as des
from examples.models import MODELS, make_inputs


class Table(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.users = nn.Embedding(5, 3, **options)

    def forward(self, x):
        return self.users(x).sum(-1)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_options_that_depend_on_the_batch_are_refused(option):
    with pytest.raises(des.DescompilerError, match=next(iter(option))):
        des.compile(Table(**option), (torch.tensor([1, 2, 3]),))


@pytest.mark.parametrize("bad", [-1, 5])
def test_ids_out_of_range(bad):
    module = des.compile(Table(), (torch.tensor([1, 2, 3]),))
    with pytest.raises(des.InputError, match=rf"'users.weight'.*id {bad} in row 1"):
        module(torch.tensor([1, bad]))


def test_inputs_that_do_not_fit():
    module = des.compile(Table(), (torch.tensor([1, 2, 3]),))
    with pytest.raises(des.InputError, match="nested"):
        module(torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(des.InputError, match="can't run example_inputs"):
        des.compile(Table(), (torch.randn(3, 2),))
    module = des.compile(MODELS["fm"]("fields"), make_inputs("fm", "fields", 8))
    dense, ids = make_inputs("fm", "fields", 8)
    with pytest.raises(des.InputError, match=r"dim 0 of every input is the batch.*\[8, 7\]"):
        module(dense, ids[:7])


@pytest.mark.parametrize("rows", [4, 6])
def test_states_that_do_not_fit(rows):
    """Of more rows too, of which the first could be taken."""
    module = des.compile(Table(), (torch.tensor([1, 2, 3]),))
    before = module.users.weight.clone()
    with pytest.raises(des.InputError, match=rf"'users.weight' has shape \({rows}, "):
        des.load_full_state_dict(module, {"users.weight": torch.zeros(rows, before.shape[1])})
    assert torch.equal(module.users.weight, before)


def test_unknown_tables_and_forms():
    model, inputs = MODELS["fm"]("fields"), make_inputs("fm", "fields", 8)
    with pytest.raises(des.PlanError, match="no table"):
        des.plan(model, inputs, ranks=2, pins={"nothing": "row_wise"})
    with pytest.raises(des.PlanError, match="no form"):
        des.plan(model, inputs, ranks=2, pins={"*": "diagonal"})

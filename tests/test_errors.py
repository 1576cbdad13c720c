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


class Scaled(Table):
    def forward(self, x):
        return torch.nn.functional.embedding(x, self.users.weight * 2, max_norm=1.0).sum(-1)


def test_a_table_that_forward_computes_is_refused_by_its_line():
    with pytest.raises(des.DescompilerError) as refused:
        des.compile(Scaled(), IDS)
    assert "None" not in str(refused.value) and "test_errors.py:" in str(refused.value)


def with_trained(p):
    model = Table()
    model.near = nn.Parameter(p)
    return model


IDS = (torch.tensor([1, 2, 3]),)

REFUSED = {
    "a model's class": (lambda: des.compile(Table, IDS), des.InputError, "the class Table: pass an object"),
    "a trained sparse parameter": (
        lambda: des.plan(with_trained(torch.eye(3).to_sparse()), IDS, ranks=2),
        des.UnsupportedError,
        r"'near' is sparse_coo.*freeze it",
    ),
    "half a rank": (lambda: des.plan(Table(), IDS, ranks=2.5), des.PlanError, "ranks=2.5; it is a whole number"),
    "many ranks": (lambda: des.plan(Table(), IDS, ranks=10**12), des.PlanError, "ranks=1000000000000; .* to 262,144"),
    "many rows": (lambda: des.plan(Table(), IDS, ranks=2, batch=10**21), des.PlanError, "batch=1000"),
    "no batch": (lambda: des.compile(Table(), IDS, batch=0), des.PlanError, "batch=0"),
    "no timeout": (lambda: des.compile(Table(), IDS, timeout="long"), des.InputError, "timeout='long'"),
    "no cluster": (
        lambda: des.plan(Table(), IDS, ranks=2, cluster="ethernet"),
        des.PlanError,
        "no cluster 'ethernet'; the clusters are ethernet-10g",
    ),
    "no limit": (
        lambda: des.plan(Table(), IDS, ranks=2, memory_bytes="16 GB"),
        des.UnsupportedError,
        "planning failed with TypeError.*Check the arguments",
    ),
    "torch.compile's": (
        lambda: des.compile(torch.compile(Table()), IDS),
        des.UnsupportedError,
        r"write des.compile\(model",
    ),
}


@pytest.mark.long(but=1)
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_says_what_it_is_and_what_to_do(what):
    call, kind, text = REFUSED[what]
    with pytest.raises(kind, match=text):
        call()


class CrossProduct(Table):
    """A product of the batch with itself, which has no rows; a sum of it, which is no tensor of any dimension."""

    def forward(self, x):
        h = self.users(x)
        return torch.einsum("bk,bj->kj", h, h).diagonal().sum() + h.sum(-1)


def test_numbers_of_the_whole_batch_are_planned_with():
    assert des.plan(CrossProduct(), IDS, ranks=2).explain()


@pytest.mark.parametrize("bad", [-1, 5])
def test_ids_out_of_range(bad):
    module = des.compile(Table(), (torch.tensor([1, 2, 3]),))
    with pytest.raises(des.InputError, match=rf"'users.weight'.*id {bad} in row 1"):
        module(torch.tensor([1, bad]))


class TwoTables(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(5, 4), nn.Embedding(9, 4)

    def forward(self, ids):
        return self.users(ids[:, 0]) + self.items(ids[:, 1])


def test_ids_out_of_the_range_of_one_of_several_tables():
    module = des.compile(TwoTables(), (torch.tensor([[1, 8], [4, 0]]),))
    for row in ([1, 9], [5, 0], [-1, 0]):
        with pytest.raises(des.InputError, match=rf"id {next(x for x in row if x not in (0, 1))} in row 1"):
            module(torch.tensor([[4, 8], row]))
    assert module(torch.tensor([[4, 8], [0, 0]])).shape == (2, 4)


def test_inputs_that_do_not_fit():
    module = des.compile(Table(), (torch.tensor([1, 2, 3]),))
    with pytest.raises(
        des.InputError, match=r"nested as forward\(\.\.\.\), and was called as forward\(\.\.\., x=\.\.\.\)"
    ):
        module(torch.tensor([1]), x=torch.tensor([1]))
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

"""Every model, every layout, every split forced: the compiled model trains as the original, on real processes."""

import copy
import itertools

import pytest
import torch

import descompiler as des
from descompiler.check.processes import on_ranks as fresh_ranks
from examples.models import LAYOUTS, MODELS, make_inputs
from tests.harness.cases import cases
from tests.harness.plans import EVERY, FETCHED, SPLITS

ALWAYS = {
    ("lr", "bags"), ("fm", "fields"), ("fm", "offsets"), ("wide_deep", "offsets"), ("deepfm", "fields"),
    ("dcn", "fields"), ("dlrm", "offsets"),
}  # fmt: skip
"""Each layout in several models; DNN is a part of Wide&Deep, other tests have xDeepFM and two towers."""


@pytest.mark.parametrize(("name", "layout"), cases(itertools.product(MODELS, LAYOUTS), ALWAYS))
def test_two_ranks(on_ranks, name, layout):
    torch.manual_seed(0)
    report = des.verify(MODELS[name](layout), make_inputs(name, layout, 8), ranks=2, plans=SPLITS, launch=on_ranks)
    assert report.cases == len(SPLITS)


@pytest.mark.parametrize(("name", "layout"), [("deepfm", "offsets"), ("two_tower", "bags")])
def test_fetched(on_ranks, name, layout):
    torch.manual_seed(0)
    des.verify(MODELS[name](layout), make_inputs(name, layout, 8), ranks=2, plans=FETCHED, launch=on_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_fetched_by_every_model_and_optimizer(on_ranks, name, ranks):
    for layout in LAYOUTS:
        for sparse in (False, True):
            torch.manual_seed(0)
            model = MODELS[name](layout, sparse=sparse)
            optimizers = ["sparse_adam"] if sparse else ["sgd", "adagrad", "adam"]
            des.verify(
                model, make_inputs(name, layout, 8), ranks=ranks, plans=FETCHED, optimizers=optimizers, launch=on_ranks
            )


@pytest.mark.parametrize("optimizer", cases(["adagrad", "adam", "sparse_adam"], ["adam"]))
def test_optimizers(on_ranks, optimizer):
    torch.manual_seed(0)
    model = MODELS["deepfm"]("fields", sparse=optimizer == "sparse_adam", batch_norm=True)
    des.verify(model, make_inputs("deepfm", "fields", 8), ranks=2, plans=EVERY, optimizers=[optimizer], launch=on_ranks)


@pytest.mark.parametrize("name", cases(["deepfm", "two_tower", "fm"], ["fm"]))
def test_four_ranks(on_ranks, name):
    torch.manual_seed(0)
    des.verify(MODELS[name]("fields"), make_inputs(name, "fields", 8), ranks=4, plans=EVERY, launch=on_ranks)


class Selects(torch.nn.Module):
    """A layer and a table that only choose which positions are used: no gradient comes to them."""

    def __init__(self):
        super().__init__()
        self.items, self.keys = torch.nn.Embedding(30, 8), torch.nn.Embedding(30, 8)
        self.select, self.top = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)

    def forward(self, items, target):
        values, query = self.items(items).view(len(target), -1, 8), self.items(target)
        best = (self.select(self.keys(items)).view(values.shape) * query[:, None]).sum(-1).topk(2)[1]
        return self.top(values.gather(1, best[..., None].expand(-1, -1, 8)).mean(1) * query)


@pytest.mark.parametrize("ranks", cases([2, 3], [3]))
def test_parameters_without_gradients(on_ranks, ranks):
    """The reducer does not wait for them; sizes that come of a division by the batch size are known without rows."""
    torch.manual_seed(0)
    inputs = (torch.randint(30, (8, 6)), torch.randint(30, (8,)))
    report = des.verify(Selects(), inputs, ranks=ranks, plans=EVERY, launch=on_ranks)
    assert report.cases == len(EVERY)


def _other_weights(rank, ranks, function, model, *arguments):
    """What `verify` runs on a rank; the last rank's model is not the others'."""
    if rank == ranks - 1:
        model = copy.deepcopy(model)  # what ranks are given is in memory that they share
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
    return function(rank, ranks, model, *arguments)


def test_a_wrong_model_is_found():
    """The proof can fail: a rank whose weights differ from the original's is reported."""

    def launch(function, ranks, *arguments, timeout_s):
        return fresh_ranks(_other_weights, ranks, function, *arguments, timeout_s=timeout_s)

    with pytest.raises(des.EquivalenceError, match=r"initial '.*' is not the original's, bit for bit"):
        des.verify(MODELS["fm"]("fields"), make_inputs("fm", "fields", 8), plans=[{"*": "row_wise"}], launch=launch)


def _under_torch_compile(rank, ranks, in_place):
    model, (dense, ids) = MODELS["fm"]("fields").double(), make_inputs("fm", "fields", 8)
    original, rows = copy.deepcopy(model), slice(4 * rank, 4 * rank + 4)
    module = des.compile(model, (dense.double(), ids), in_place=in_place, plan={"*": "row_wise"})
    torch.compile(module, backend="eager")(dense[rows].double(), ids[rows]).pow(2).mean().backward()
    original(dense.double(), ids).pow(2).mean().backward()
    given = {n: des.local_tensor(p.grad) for n, p in module.named_parameters()}
    replicated = [n for n, p in original.named_parameters() if given[n].shape == p.shape]
    wanted = dict(original.named_parameters())
    return len(replicated), all(torch.allclose(given[n], wanted[n].grad) for n in replicated)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("in_place", [False, True])
def test_torch_compile_leaves_a_compiled_model_as_it_is(in_place, on_ranks):
    for count, equal in on_ranks(_under_torch_compile, 2, in_place):
        assert count and equal

"""The proof itself: `verify` finds what is wrong, however little and on any rank; its optimisers are gentle."""

import pytest
import torch

import descompiler as des
from descompiler.check import compare
from descompiler.check.compare import OPTIMIZERS
from descompiler.check.judge import TOLERANCE_FLOAT64
from descompiler.check.processes import on_ranks
from descompiler.runtime.runtime import Runtime
from examples.models import MODELS, make_inputs
from tests.harness.cases import cases

SMALL = 10 * TOLERANCE_FLOAT64


def tampered_output(module):
    module.register_forward_hook(lambda _module, _inputs, output: output * (1 + SMALL))


def tampered_gradient(module):
    module.get_parameter("deep.1.bias").register_hook(lambda gradient: gradient * (1 + SMALL))


def tampered_table(module):
    table = max(module.parameters(), key=torch.Tensor.numel)
    table.register_hook(lambda gradient: gradient * (1 + SMALL))


def tampered_start(module):
    """In a row that only this rank holds: both see it."""
    with torch.no_grad():
        value = des.local_tensor(module.get_parameter("embeddings.tables.0.weight"))[-1, -1]
        value.copy_(torch.nextafter(value, value.new_tensor(torch.inf)))


def tampered_buffer(module):
    """Only what is compared after the last step shows it."""

    def move(*_):
        module.get_buffer("deep.1.running_mean").mul_(1 + SMALL)

    module.register_forward_hook(move)


def tampered_bytes(_module):
    collective = Runtime.collective
    Runtime.collective = lambda self, name, sent_bytes, call: collective(self, name, sent_bytes + 1, call)


FAULTS = {
    tampered_output: "output '0' differs by",
    tampered_gradient: "gradient 'deep.1.bias' differs by",
    tampered_table: "gradient '.*weight' differs by",
    tampered_start: "initial '.*' is not the original's, bit for bit",
    tampered_buffer: "weight '.*running_mean' differs by",
    tampered_bytes: "is not what was sent",
}


def faulty(rank, ranks, fault, function, *arguments):
    """What `verify` runs on a rank, with a fault in the module that the last rank compiles."""
    space = vars(compare)
    distribute = space["distribute"]

    def broken(*args, **kwargs):
        module = distribute(*args, **kwargs)
        if rank == ranks - 1:
            fault(module)
        return module

    space["distribute"] = broken
    return function(rank, ranks, *arguments)


@pytest.mark.parametrize("fault", cases(FAULTS, [tampered_gradient, tampered_buffer, tampered_bytes]))
def test_a_fault_is_found(fault):
    torch.manual_seed(0)
    model = MODELS["deepfm"]("fields", batch_norm=True)

    def launch(function, ranks, *arguments, timeout_s):
        return on_ranks(faulty, ranks, fault, function, *arguments, timeout_s=timeout_s)

    with pytest.raises(des.EquivalenceError, match=FAULTS[fault]):
        des.verify(model, make_inputs("deepfm", "fields", 8), plans=[{"*": "row_wise"}], steps=2, launch=launch)


class Sparse(torch.nn.Module):
    """A table with sparse gradients, and one that nothing uses."""

    def __init__(self):
        super().__init__()
        self.table, self.unused = torch.nn.Embedding(9, 4, sparse=True), torch.nn.Embedding(9, 4)

    def forward(self, ids):
        return self.table(ids).sum((1, 2))


def one_row_more(module):
    """A row of zeros, which an optimiser with momentum moves."""
    row = torch.sparse_coo_tensor([[0]], torch.zeros(1, 4, dtype=torch.float64), module.table.weight.shape)
    module.table.weight.register_hook(lambda g: g + row)


def dense(module):
    module.table.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.to_dense()))


def unused_gradient(module):
    p = module.unused.weight
    module.register_forward_hook(lambda *_: setattr(p, "grad", torch.ones_like(p)))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (one_row_more, r"the gradient of 'table\.weight' has other rows than the original's"),
        (dense, r"the gradient of 'table\.weight' is not sparse any more"),
        (unused_gradient, r"'unused\.weight' has a gradient, the original has none"),
    ],
)
def test_a_gradient_that_is_none_of_the_originals_is_found(fault, said):
    def launch(function, ranks, *arguments, timeout_s):
        return on_ranks(faulty, ranks, fault, function, *arguments, timeout_s=timeout_s)

    with pytest.raises(des.EquivalenceError, match=said):
        des.verify(Sparse(), (torch.arange(8).view(8, 1) % 4,), plans=[{"*": "unique_rows"}], launch=launch)


class Steep(torch.nn.Module):
    """Its gradient moves a thousand times as far as its weights do, its output hardly."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(9, 4)

    def forward(self, ids):
        return 1 + torch.sin(1000 * self.table(ids).sum((1, 2))) / 1e6


def drifting(by):
    """Weights of the module's rows that rounding would have moved so far by the second step."""

    def fault(module):
        calls = []

        def move(*_):
            calls.append(None)
            if len(calls) == 2:
                module.get_parameter("table.weight").detach().mul_(1 + by)

        module.register_forward_pre_hook(move)

    return fault


def little_drift(module):
    drifting(3e-12)(module)


def much_drift(module):
    drifting(SMALL)(module)


def verify_steep(fault):
    def launch(function, ranks, *arguments, timeout_s):
        return on_ranks(faulty, ranks, fault, function, *arguments, timeout_s=timeout_s)

    torch.manual_seed(0)
    ids = torch.randint(9, (8, 3))
    return des.verify(Steep(), (ids,), plans=[{"*": "row_wise"}], launch=launch)


def test_a_gradient_is_judged_at_the_weights_that_it_is_of():
    report = verify_steep(little_drift)
    assert 1e-10 < report.conditioned["table.weight"] < 1e-6 and report.worst["weight"] < 1e-10
    with pytest.raises(des.EquivalenceError, match=r"weight 'table\.weight' differs by"):
        verify_steep(much_drift)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_do_not_enlarge_rounding(name):
    """A gradient that is zero but for rounding moves its weight by no more than that: the next step agrees as well."""
    noise = 1e-13
    weight = torch.nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([weight])
    for _ in range(3):
        gradient = torch.full_like(weight, noise)
        weight.grad = gradient.to_sparse(1) if name == "sparse_adam" else gradient
        before = weight.detach().clone()
        optimizer.step()
        assert float((weight.detach() - before).abs().max()) <= noise * 1.01

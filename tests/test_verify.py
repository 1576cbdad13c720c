"""The proof itself: `verify` finds what is wrong, however little and on any rank; its optimisers are gentle."""

import sys

import pytest
import torch

import descompiler as des
from descompiler.runtime import Runtime
from descompiler.verify import OPTIMIZERS, TOLERANCE_FLOAT64, on_ranks
from examples.models import MODELS, make_inputs

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
        value = module.get_parameter("embeddings.tables.0.weight").detach()[-1, -1]
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
    space = vars(sys.modules["descompiler.verify"])  # the package's `verify` is the function
    distribute = space["distribute"]

    def broken(*args, **kwargs):
        module = distribute(*args, **kwargs)
        if rank == ranks - 1:
            fault(module)
        return module

    space["distribute"] = broken
    return function(rank, ranks, *arguments)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    torch.manual_seed(0)
    model = MODELS["deepfm"]("fields", batch_norm=True)

    def launch(function, ranks, *arguments, timeout_s):
        return on_ranks(faulty, ranks, fault, function, *arguments, timeout_s=timeout_s)

    with pytest.raises(des.EquivalenceError, match=FAULTS[fault]):
        des.verify(model, make_inputs("deepfm", "fields", 8), plans=[{"*": "row"}], launch=launch)


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

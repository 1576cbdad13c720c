"""`make gpu-check`: what the other tests prove on the CPU, with tensors of a GPU. Skipped where there is none.

On one rank there are no collectives. Two gloo ranks may share one GPU, which NCCL does not allow; their tensors go
through the host (`descompiler.runtime.collectives`).
"""

import pytest
import torch

import descompiler as des
from descompiler.check.processes import on_ranks
from examples.models import MODELS, make_inputs
from tests.harness.plans import EVERY, SPLITS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine")

MODEL_LAYOUTS = [("fm", "offsets"), ("deepfm", "fields"), ("wide_deep", "bags"), ("dlrm", "fields"), ("dcn", "offsets")]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "layout"), MODEL_LAYOUTS)
def test_trains_as_the_original(name, layout, ranks):
    torch.manual_seed(0)
    plans = SPLITS if ranks > 1 else [None]
    model, inputs = MODELS[name](layout), make_inputs(name, layout, 8)
    report = des.verify(model, inputs, ranks=ranks, plans=plans, device="cuda")
    assert report.cases == len(plans)


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_optimizers_and_batch_norm(optimizer):
    torch.manual_seed(0)
    model = MODELS["deepfm"]("fields", sparse=optimizer == "sparse_adam", batch_norm=True)
    inputs = make_inputs("deepfm", "fields", 8)
    des.verify(model, inputs, ranks=2, plans=EVERY, optimizers=[optimizer], device="cuda")


def _created_on_the_device(rank, ranks):
    with torch.device("meta"):
        model = MODELS["deepfm"]("fields")
    inputs = tuple(x.cuda() for x in make_inputs("deepfm", "fields", 8))
    module = des.compile(model, inputs, plan={"*": "row_wise"}, seed=5)
    return {p.device.type for p in module.parameters()}, module(*inputs).device.type


def test_tables_of_a_meta_model_are_created_on_the_device():
    assert on_ranks(_created_on_the_device, 2) == [({"cuda"}, "cuda")] * 2


def test_a_dynamic_table_is_that_of_the_cpu():
    """Rows on the device, who is resident on the host: the same rows in float64, through growth and eviction."""
    found = []
    for device in ("cpu", "cuda"):
        table = des.DynamicEmbedding(4, evict=des.dynamic.Capacity(640), dtype=torch.float64, device=device)
        opt = torch.optim.Adagrad(table.parameters(), lr=0.1)
        for step in range(8):
            opt.zero_grad()
            ids = torch.arange(100 * step, 100 * step + 700, device=device)
            (table(ids).square().sum() + table(ids[::3]).sum()).backward()
            opt.step()
        embedding, ids = table.to_embedding()
        found.append((ids, embedding.weight.detach().cpu()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-10, atol=1e-10)

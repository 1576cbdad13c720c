"""DistributedDataParallel: every rank holds every table."""

from __future__ import annotations

from functools import partial

from torch.nn.parallel import DistributedDataParallel

from benchmarks.contestants import Build, Case, Contestant, Module, adagrad
from benchmarks.workloads import one_table


def ddp(case: Case, sparse: bool | None = None, *, as_written: bool = False) -> Contestant:
    """All fields in one table, so that gradients of tables are one or two tensors; or a table a field."""
    sparse = case.sparse if sparse is None else sparse
    model = case.workload.model(sparse)
    if not as_written:
        model = one_table(model)
    module = DistributedDataParallel(model, gradient_as_bucket_view=not sparse)
    return Module(module, case.workload.loss, [adagrad(module.parameters())])


AS_WRITTEN = "DDP, a table a field"
"""Run only where it is asked for: of many sparse gradients at once, processes with DeepFM died in its backward, in 4
runs of 6 ("malloc(): unaligned tcache chunk detected", torch 2.13 with gloo), and in none of 3 without it."""

CONTESTANTS: dict[str, Build] = {
    "DDP sparse": partial(ddp, sparse=True),
    "DDP dense": partial(ddp, sparse=False),
    AS_WRITTEN: partial(ddp, as_written=True),
}

"""The model as users write it, in one process: what a compiled module on one rank is compared with."""

from __future__ import annotations

from benchmarks.contestants import Build, Case, Contestant, Module, adagrad


def eager(case: Case) -> Contestant:
    """The model and its optimiser, both PyTorch's."""
    model = case.workload.model(case.sparse)
    return Module(model, case.workload.loss, [adagrad(model.parameters())])


CONTESTANTS: dict[str, Build] = {"eager": eager}
"""By name."""

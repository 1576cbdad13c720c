"""descompiler's compiled module: the plan by bytes, by the calibrated cluster, and every form forced."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import descompiler as des
from benchmarks.contestants import ADAGRAD, BATCHES, Build, Case, Contestant, Module, NotPossible, adagrad
from benchmarks.workloads import one_table
from descompiler.builder import Builder
from descompiler.captured import Captured
from descompiler.compiler import distribute
from descompiler.passes import FORMS
from descompiler.planning.given import GivenPlan

LOSS = "rank_mean"
BY_BYTES, BY_CLUSTER, FORCED = "by bytes", "by cluster", "form "
FUSED, PURE = ", fused optimiser", ", fused by PyTorch"
AHEAD, ROWS_AHEAD = ", fused, prefetched", ", fused, rows prefetched"
CHOSEN = (
    BY_BYTES,
    f"{BY_BYTES}{FUSED}",
    BY_CLUSTER,
    f"{BY_CLUSTER}{FUSED}",
    f"{BY_CLUSTER}{PURE}",
    f"{BY_CLUSTER}{AHEAD}",
    f"{BY_CLUSTER}{ROWS_AHEAD}",
)
"""Plans, and what updates their tables: an ordinary optimiser, or one in backward as TorchRec's and those by hand, with
FBGEMM's kernels as they have them, or with PyTorch's operators; and with the next batch's ids sent ahead, or
its rows, too."""


def compiled(
    case: Case,
    model: nn.Module,
    layout: str = "",
    *,
    fused: str | None = None,
    plan: GivenPlan = None,
    cluster: des.Cluster | str = "bytes",
    ahead: bool = False,
    rows: bool = False,
) -> Contestant:
    """What `des.compile` makes; captured once for a case and layout, since that is most of its time.

    ``fused``: tables step in backward, as FBGEMM's do, with this backend of `des.fuse_optimizer`. ``ahead``: batches
    come by `des.prefetch`; ``rows``: so do rows.
    """
    key = f"builder{layout}"
    builder = case.shared[key] = case.shared.get(key) or Builder.of(model, case.example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tables that are left whole: the plan says so
        try:
            module = distribute(
                model, lambda: builder, plan=plan, process_group=None, loss=LOSS, batch=None, seed=None, cluster=cluster
            )
            optimizers: list[torch.optim.Optimizer] = []
            if fused is not None:
                tables = [p for name, p in module.named_parameters() if name in module.plan.forms]
                optimizers.append(
                    des.fuse_optimizer(module, torch.optim.Adagrad, params=tables, backend=fused, **ADAGRAD)
                )
        except (des.PlanError, des.UnsupportedError) as error:
            raise NotPossible(str(error)) from None
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    optimizers.append(adagrad([p for p in module.parameters() if id(p) not in held]))

    def says() -> dict[str, Any]:
        forms = sorted(set(module.plan.forms.values()))
        return {"traffic": module.traffic().total, "plan": " + ".join(forms)}

    loss = case.workload.loss
    return Prefetched(module, loss, optimizers, says, case, rows) if ahead else Module(module, loss, optimizers, says)


@dataclass
class Prefetched(Module):
    """The same batches, of which ids go ahead: other tensors each time, as a loader's."""

    case: Case | None = None
    rows: bool = False

    def __post_init__(self) -> None:
        assert self.case is not None
        batches = [self.case.batch(i) for i in range(BATCHES)]
        loader = ((tuple(x.clone() for x in inputs), labels) for inputs, labels in itertools.cycle(batches))
        self.coming = iter(des.prefetch(loader, self.module, inputs=lambda batch: batch[0], rows=self.rows))

    def step(self, inputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        return super().step(*next(self.coming))


def by_bytes(case: Case, **options: Any) -> Contestant:
    """The plan that sends least, or what ``options`` say; the model as users write it."""
    return compiled(case, case.workload.model(case.sparse), **options)


def in_one_table(case: Case) -> Contestant:
    """By bytes, of the model with all fields in one table."""
    return compiled(case, one_table(case.workload.model(case.sparse)), " of one table")


def forced(case: Case, form: str) -> Contestant:
    """Every table in one form, if it can."""
    contestant = by_bytes(case, plan={"*": form})
    if form not in contestant.about()["plan"]:
        raise NotPossible(f"no table can be {form}")
    return contestant


def predicted(case: Case, cluster: des.Cluster) -> dict[str, float]:
    """Seconds of a step in each form, as the planner has them on a cluster; of those that a table can take."""
    builder, found = case.shared.get("builder"), {}
    if builder is None:  # no compiled module is among the contestants
        return {}
    captured = Captured.by(builder)
    known = captured.of_example()
    for form in FORMS:
        try:
            plan = captured.plan(
                ranks=case.ranks, batch=case.rows, pins={"*": form.name}, cluster=cluster, statistics=known
            )
        except des.PlanError:
            continue
        found[f"{FORCED}{form.name}"] = plan.price
    return found


CONTESTANTS: dict[str, Build] = {
    BY_BYTES: by_bytes,
    f"{BY_BYTES}{FUSED}": partial(by_bytes, fused="auto"),
    f"{BY_BYTES}, one table": in_one_table,
    **{f"{FORCED}{form.name}": partial(forced, form=form.name) for form in FORMS},
}

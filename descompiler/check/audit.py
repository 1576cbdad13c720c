"""`audit`: what a module's collectives were predicted to send and to take, against what they did."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from descompiler.check.calibrate import calibrate
from descompiler.errors import InputError
from descompiler.layout.traffic import Traffic
from descompiler.module.distributed import DistributedModule
from descompiler.planning.cluster import Cluster
from descompiler.runtime.collectives import Clock


@dataclass(frozen=True)
class Audited:
    """One collective of a step, by purpose.

    Attributes
    ----------
    calls : int
        Per step.
    predicted_bytes, sent_bytes : float
        Per step, of the busiest rank; the median over steps. Predicted from the step's rows; where rows are fetched by
        unique ids, with the plan's expectation of these.
    predicted_s, measured_s : float
        Per step, until the slowest rank is done; the median over steps.
    """

    name: str
    calls: int
    predicted_bytes: float
    sent_bytes: float
    predicted_s: float
    measured_s: float


@dataclass(frozen=True)
class Audit:
    """What `audit` measured.

    Attributes
    ----------
    collectives : tuple of Audited
        In the order of a step.
    exact : bool
        Whether the plan predicts traffic exactly: not for a model that was captured in part, whose own forward runs.
    mismatches : tuple of str
        Steps in which the traffic of the step's rows and unique ids is not what was counted; empty, or there is a bug.
    """

    cluster: Cluster
    steps: int
    collectives: tuple[Audited, ...]
    mismatches: tuple[str, ...]
    exact: bool = True

    @property
    def predicted_s(self) -> float:
        return sum(x.predicted_s for x in self.collectives)

    @property
    def measured_s(self) -> float:
        return sum(x.measured_s for x in self.collectives)

    @property
    def relative_error(self) -> float:
        """Of the predicted seconds of a step's collectives."""
        return self.predicted_s / self.measured_s - 1 if self.measured_s else 0.0

    def __str__(self) -> str:
        head = f"{'':<40}{'calls':>6}{'predicted B':>14}{'sent B':>14}{'predicted ms':>14}{'measured ms':>13}"
        lines = [f"{self.steps} steps on {self.cluster.ranks} ranks, cluster {self.cluster.name!r}", head]
        lines += [
            f"{x.name:<40}{x.calls:>6}{x.predicted_bytes:>14,.0f}{x.sent_bytes:>14,.0f}"
            f"{1e3 * x.predicted_s:>14.2f}{1e3 * x.measured_s:>13.2f}"
            for x in self.collectives
        ]
        lines.append(f"{'total':<74}{1e3 * self.predicted_s:>14.2f}{1e3 * self.measured_s:>13.2f}")
        lines.append(f"seconds predicted within {abs(self.relative_error):.0%} of measured")
        if not self.exact:
            lines.append("traffic is an estimate: the model was captured in part")
        else:
            lines += [f"traffic: {x}" for x in self.mismatches] or ["traffic predicted exactly, bytes and calls"]
        return "\n".join(lines)

    def to_json(self) -> str:
        """As JSON, with the cluster."""
        return json.dumps(asdict(self), indent=2) + "\n"


def audit(
    module: DistributedModule,
    batches: Iterable[Any],
    *,
    step: Callable[[Any], Any] | None = None,
    cluster: Cluster | None = None,
    warm_up: int = 2,
) -> Audit:
    """Run steps, and report predicted against measured bytes and seconds of each collective.

    Collective: every rank calls it, with as many batches. Each collective begins when all ranks have reached it and is
    waited for (`descompiler.runtime.collectives.Clock`): the seconds are what a step would wait if nothing ran beside
    it.

    Parameters
    ----------
    batches : iterable
        This rank's inputs: a tuple of arguments, a dict of them, or one tensor. The first ``warm_up`` are not counted.
    step : callable, optional
        ``step(batch)`` runs forward and backward once. By default the sum of all outputs is differentiated, and
        gradients are dropped; weights stay as they are.
    cluster : Cluster, optional
        Whose numbers predict seconds; measured by `descompiler.calibrate` first by default.

    Returns
    -------
    Audit
        The same on every rank.

    Raises
    ------
    InputError
        On one rank, or without enough batches.

    Notes
    -----
    Bytes are what the collectives were given; protocol headers come on top.
    """
    runtime = module._runtime
    if runtime.ranks == 1:
        raise InputError("audit times collectives: one rank makes none; run it under torchrun on two ranks at least")
    cluster = calibrate(runtime.group) if cluster is None else cluster
    records: list[_MeasuredStep] = []
    try:
        for number, batch in enumerate(batches):
            runtime.clock = Clock(runtime.device)
            (step or (lambda b: _train(module, b)))(batch)
            if number >= warm_up:
                backward = any(p.grad is not None for p in module.parameters()) or step is None
                exact, sent = module.predicted_traffic(backward=backward), module.traffic()
                records.append(_MeasuredStep(list(runtime.rows), exact, sent, runtime.clock.seconds, backward))
    finally:
        runtime.clock = None
    every: list[Any] = [None] * runtime.ranks
    dist.all_gather_object(every, len(records), group=runtime.group)
    if len(set(every)) > 1 or not records:
        raise InputError(f"audit needs more than warm_up={warm_up} batches, as many on every rank; counted: {every}")
    return _report(module, cluster, records)


def _train(module: DistributedModule, batch: Any) -> None:
    if isinstance(batch, dict):
        outputs = module(**batch)
    else:
        outputs = module(*batch) if isinstance(batch, tuple | list) else module(batch)
    total: Any = 0.0
    for x in pytree.tree_leaves(outputs):
        if isinstance(x, Tensor) and x.requires_grad:
            total = total + x.sum()
    total.backward()
    module.zero_grad()


@dataclass(frozen=True)
class _MeasuredStep:
    """What one rank saw of a step."""

    rows: list[int]
    exact: Traffic
    sent: Traffic
    seconds: dict[str, list[float]]
    backward: bool


def _report(module: DistributedModule, cluster: Cluster, mine: list[_MeasuredStep]) -> Audit:
    runtime, plan = module._runtime, module.plan
    every: list[Any] = [None] * runtime.ranks
    dist.all_gather_object(every, mine, group=runtime.group)
    steps: list[list[_MeasuredStep]] = [list(ranks) for ranks in zip(*every, strict=True)]
    totals: dict[str, list[tuple[float, float, float, float]]] = {}
    mismatches = []
    for number, ranks in enumerate(steps):
        predicted = []
        for r, x in enumerate(ranks):
            predicted.append(plan.traffic(r, x.rows, backward=x.backward))
            if module.predicts_traffic and x.exact != x.sent:
                mismatches.append(f"step {number}, rank {r}: predicted\n{x.exact}\ncounted\n{x.sent}")
        for name in dict.fromkeys(n for t in (*predicted, *(x.sent for x in ranks)) for n in t.bytes_by_collective):
            # a collective takes as long as on its slowest rank
            calls = zip(*(x.seconds.get(name, []) for x in ranks), strict=True)
            seconds = cluster.seconds([_only(p, name) for p in predicted])
            both = _most(predicted, name), _most([x.sent for x in ranks], name)
            totals.setdefault(name, []).append((*both, seconds, sum(max(times) for times in calls)))
    result = []
    for name, values in totals.items():
        medians = [statistics.median(x) for x in zip(*values, strict=True)]
        result.append(Audited(name, mine[0].sent.calls_by_collective.get(name, 0), *medians))
    return Audit(cluster, len(steps), tuple(result), tuple(mismatches), module.predicts_traffic)


def _most(traffics: list[Traffic], name: str) -> float:
    return max(float(t.bytes_by_collective.get(name, 0)) for t in traffics)


def _only(traffic: Traffic, name: str) -> Traffic:
    result = Traffic()
    if name in traffic.bytes_by_collective:
        result.add(name, traffic.bytes_by_collective[name], traffic.calls_by_collective[name])
    return result

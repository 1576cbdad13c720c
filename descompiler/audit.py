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

from descompiler.calibrate import calibrate, slowest
from descompiler.clock import Clock
from descompiler.cluster import Cluster
from descompiler.errors import InputError
from descompiler.module import DistributedModule
from descompiler.traffic import Traffic


@dataclass(frozen=True)
class Audited:
    """One collective of a step, by purpose.

    Attributes
    ----------
    calls : int
        Per step.
    predicted_bytes, sent_bytes : float
        Per step, of the busiest rank; the median over steps.
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
    mismatches : tuple of str
        Steps in which predicted and counted traffic differ on some rank; empty, or there is a bug.
    """

    cluster: Cluster
    steps: int
    collectives: tuple[Audited, ...]
    mismatches: tuple[str, ...]

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
    waited for (`descompiler.clock.Clock`): the seconds are what a step would wait if nothing ran beside it.

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
    records = []
    try:
        for number, batch in enumerate(batches):
            runtime.clock = Clock(runtime.device)
            (step or (lambda b: _train(module, b)))(batch)
            if number >= warm_up:
                backward = any(p.grad is not None for p in module.parameters()) or step is None
                records.append((list(runtime.rows), module.traffic(), runtime.clock.seconds, backward, module.unique()))
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


def _report(module: DistributedModule, cluster: Cluster, records: list[Any]) -> Audit:
    runtime = module._runtime
    every: list[Any] = [None] * runtime.ranks
    dist.all_gather_object(every, [(r[0], r[1], r[3], r[4]) for r in records], group=runtime.group)
    names = list(dict.fromkeys(n for _, sent, *_ in records for n in sent.bytes_by_collective))
    bytes_of: dict[str, list[tuple[float, float, float]]] = {n: [] for n in names}
    mismatches = []
    for number in range(len(records)):
        rows, _, backward, _ = every[0][number]
        predicted = [
            module.plan.traffic(r, rows, backward=backward, unique=of[number][3]) for r, of in enumerate(every)
        ]
        sent = [of[number][1] for of in every]
        mismatches += [
            f"step {number}, rank {r}: predicted\n{p}\ncounted\n{s}"
            for r, (p, s) in enumerate(zip(predicted, sent, strict=True))
            if p != s
        ]
        for n in names:
            only = [_only(p, n) for p in predicted]
            bytes_of[n].append((_most(predicted, n), _most(sent, n), cluster.seconds(only)))
    result = []
    for n in names:
        times = [sum(slowest(seconds.get(n, []), runtime.group, runtime.ranks)) for _, _, seconds, *_ in records]
        predicted_bytes, sent_bytes, seconds_ = (statistics.median(x) for x in zip(*bytes_of[n], strict=True))
        calls = records[0][1].calls_by_collective[n]
        result.append(Audited(n, calls, predicted_bytes, sent_bytes, seconds_, statistics.median(times)))
    return Audit(cluster, len(records), tuple(result), tuple(mismatches))


def _most(traffics: list[Traffic], name: str) -> float:
    return max(float(t.bytes_by_collective.get(name, 0)) for t in traffics)


def _only(traffic: Traffic, name: str) -> Traffic:
    result = Traffic()
    if name in traffic.bytes_by_collective:
        result.add(name, traffic.bytes_by_collective[name], traffic.calls_by_collective[name])
    return result

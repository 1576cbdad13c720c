"""`calibrate`: latency and bandwidth of each collective on the real process group, fitted.

For each collective and size, several timed calls (`descompiler.runtime.collectives.Clock`): a call takes as long as on
its slowest rank, and the median over calls is kept. With t the medians and x the bytes that a rank sends, the fit is

    minimise over a, b >= 0    sum of ((a + b x - t) / t)²        `fit`

relative, so that latency counts as much as bandwidth. α = a / messages(ranks), bandwidth = 1 / b. Beside the line, the
medians are kept, made monotone (`monotone`), for predictions on as many ranks.
"""

from __future__ import annotations

import datetime
import platform
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from descompiler.check.rates import measured_rates, slowest_rates
from descompiler.cost_models.collectives import BACKENDS
from descompiler.errors import PlanError
from descompiler.planning.cluster import COLLECTIVES, Cluster, Link
from descompiler.runtime.collectives import Clock, all_gather, all_reduce
from descompiler.runtime.ranks import Ranks

SIZES_BYTES = (1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
"""What a rank sends, by default."""


BUSY_S = 4e-3
"""Each call comes after so much computation, as in a training step."""


MATRIX = 512
"""Rows and columns of the matrices whose product measures floating point operations."""


MIN_BYTES_PER_S_INVERSE = 1e-13
"""Seconds a byte, at least: 10 TB/s is faster than any link; a fit of small messages may find no bandwidth at all."""


def calibrate(
    process_group: Any = None,
    *,
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    repeats: int = 15,
    seconds_per_size: float = 1.0,
    memory_bytes: int | None = None,
    name: str = "calibrated",
    path: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Cluster:
    """Measure each collective's latency and bandwidth, and rates of products, lookups and updates; fit a cluster.

    Collective: every rank calls it with the same arguments, and gets rank 0's result. Under torchrun it initialises the
    process group if there is none. A command line needs only torchrun, or its environment variables, and
    ``path``; with the defaults it takes at most (sizes x collectives) seconds, half a minute.

    Parameters
    ----------
    process_group : optional
        The ranks; all by default.
    sizes_bytes : sequence of int
        What each rank sends in a call, two sizes at least.
    repeats : int
        Calls of each size, 3 at least; fewer where they would take longer than ``seconds_per_size``.
    memory_bytes : int, optional
        Of each rank: it is not measured.
    path : path, optional
        A JSON file, which rank 0 writes.
    progress : callable
        Called with a line of text before each collective.

    Returns
    -------
    Cluster
        One class of links, as the group's flat collectives see it. ``provenance`` has hosts, backend, versions, date,
        and for each collective the sizes, medians and the fit's relative errors.

    Raises
    ------
    PlanError
        On one rank, or with too few sizes.
    """
    every = Ranks.of(process_group)
    group, rank, ranks = every.group, every.rank, every.count
    if ranks == 1:
        raise PlanError("calibrate measures collectives: start two ranks at least, with torchrun --nproc-per-node 2")
    if len(set(sizes_bytes)) < 2 or min(sizes_bytes) < 1:
        raise PlanError(f"sizes_bytes={list(sizes_bytes)}: a fit needs two different positive sizes")
    backend = str(dist.get_backend(group))
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
    hosts, flops = every.of_every(socket.gethostname()), every.of_every(_flops_per_s(device))
    progress(f"measuring lookups and updates on {ranks} ranks")
    rates = slowest_rates(every.of_every(measured_rates(device)))
    links, measured = {}, {}
    for collective in COLLECTIVES:
        progress(f"measuring {collective} on {ranks} ranks")
        sent, medians = [], []
        for size in sorted(set(sizes_bytes)):
            call, sent_bytes = _call(collective, size, ranks, rank, group, device)
            sent.append(sent_bytes)
            medians.append(_median_s(call, group, ranks, device, repeats, seconds_per_size))
        latency, per_byte = fit(sent, medians)
        messages = BACKENDS[backend][collective].messages(ranks)
        errors = [abs(latency + per_byte * x - t) / t for x, t in zip(sent, medians, strict=True)]
        measured[collective] = {
            "sent_bytes": sent,
            "median_s": medians,
            "largest_relative_error": max(errors),
            "median_relative_error": statistics.median(errors),
        }
        source = (
            f"measured; relative errors of the fit: median {statistics.median(errors):.0%}, up to {max(errors):.0%}"
        )
        curve = tuple(zip(map(float, sent), monotone(medians), strict=True))
        links[collective] = Link(latency / messages, 1 / per_byte, 0.0, source, curve)
    cluster = Cluster(
        name,
        ranks,
        max(hosts.count(h) for h in hosts),
        {"inter": links},
        memory_bytes,
        min(flops),
        backend,
        {
            "memory_bytes": "given" if memory_bytes else "unknown",
            "flops_per_s": f"measured: products of {MATRIX} x {MATRIX} float32 matrices, the slowest rank",
        },
        rates,
        {
            "hosts": len(set(hosts)),
            "backend": backend,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "repeats": repeats,
            "collectives": measured,
        },
    )
    box = [cluster]
    dist.broadcast_object_list(box, group_src=0, group=group)
    if rank == 0 and path is not None:
        cluster.save(path)
    return box[0]


def fit(sent_bytes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency in seconds and seconds a byte, neither negative, by least squares of relative errors.

    >>> latency, per_byte = fit([1e3, 1e6, 4e6], [1e-3 + 1e3 / 1e8, 1e-3 + 1e6 / 1e8, 1e-3 + 4e6 / 1e8])
    >>> round(latency, 9), round(1 / per_byte)
    (0.001, 100000000)
    """
    rows = torch.tensor([[1 / t, x / t] for x, t in zip(sent_bytes, seconds, strict=True)], dtype=torch.float64)
    scale = torch.tensor([1.0, max(sent_bytes)], dtype=torch.float64)  # columns of like size
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    latency, per_byte = (torch.linalg.lstsq(rows / scale, ones).solution[:, 0] / scale).tolist()
    if latency < 0:  # on the boundary, the other one alone
        column = rows[:, 1]
        latency, per_byte = 0.0, float(column.sum() / (column @ column))
    elif per_byte < MIN_BYTES_PER_S_INVERSE:
        column = rows[:, 0]
        latency, per_byte = float(column.sum() / (column @ column)), MIN_BYTES_PER_S_INVERSE
    return latency, per_byte


def _flops_per_s(device: torch.device) -> float:
    """Of matrix products, the median of five."""
    matrix, times = torch.ones(MATRIX, MATRIX, device=device), []
    for _ in range(6):
        begin = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return 2 * MATRIX**3 / statistics.median(times[1:])


def monotone(values: Sequence[float]) -> list[float]:
    """The non-decreasing values nearest to some, in least squares (pool adjacent violators: Ayer et al., 1955).

    >>> monotone([1.0, 3.0, 2.0, 4.0])
    [1.0, 2.5, 2.5, 4.0]
    """
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [statistics.fmean(pool) for pool in pools for _ in pool]


def _call(
    collective: str, size: int, ranks: int, rank: int, group: Any, device: torch.device
) -> tuple[Callable[[], Any], float]:
    """One call in which a rank sends about ``size`` bytes, and what it sends exactly."""

    def tensor(elements: float) -> Tensor:
        return torch.zeros(max(1, round(elements)), device=device)

    n, algorithms = ranks, BACKENDS[str(dist.get_backend(group))]
    itemsize = 4
    if collective == "all_to_all":
        part = tensor(size / itemsize / (n - 1))
        give, take = part.repeat(n), part.repeat(n)
        return lambda: dist.all_to_all_single(take, give, group=group), (n - 1) * part.numel() * itemsize
    if collective == "all_gather":
        part = tensor(size / itemsize / (n - 1))
        return lambda: all_gather(part, group), (n - 1) * part.numel() * itemsize
    if collective == "reduce_scatter":
        whole_bytes = size / algorithms[collective].sent_bytes(1.0, n)
        part = tensor(whole_bytes / itemsize / n)
        whole = part.repeat(n)
        sent = algorithms[collective].sent_bytes(whole.numel() * itemsize, n)
        return lambda: reduce_scatter(part, whole, group=group), sent
    whole = tensor(size / algorithms[collective].sent_bytes(1.0, n) / itemsize)
    sent = algorithms[collective].sent_bytes(whole.numel() * itemsize, n)
    if collective == "all_reduce":
        return lambda: all_reduce(whole, group).wait(), sent
    return lambda: dist.broadcast(whole, group_src=0, group=group), sent


reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""``reduce_scatter_tensor`` has this name since torch 2.13."""


def _median_s(
    call: Callable[[], Any], group: Any, ranks: int, device: torch.device, repeats: int, seconds: float
) -> float:
    clock, matrix = Clock(device), torch.ones(256, 256, device=device)
    clock.time("warm-up", group, call)
    clock.time("first", group, call)
    box: list[Any] = [max(3, min(repeats, int(seconds / max(clock.seconds["first"][0], 1e-6))))]
    dist.broadcast_object_list(box, group_src=0, group=group)
    for _ in range(box[0]):
        until = time.perf_counter() + BUSY_S
        while time.perf_counter() < until:
            torch.mm(matrix, matrix)
        clock.time("call", group, call)
    return statistics.median(slowest(clock.seconds["call"], group, ranks))


def slowest(seconds: Sequence[float], group: Any, ranks: int) -> list[float]:
    """Element by element, the slowest rank's seconds."""
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, list(seconds), group=group)
    return [max(times) for times in zip(*every, strict=True)]

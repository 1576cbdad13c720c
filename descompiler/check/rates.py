"""`measured_rates`: seconds of a rank's own work on this machine's kernels, fitted.

A table with sparse gradients is looked up, differentiated and updated by Adagrad, for several numbers of ids and
columns. With t the medians, n the ids and k the columns, the fit is, as for links, relative:

    minimise over c, a, e >= 0    sum of ((c + a n + e n k - t) / t)²

The others are one measurement each, large enough for what a call takes not to count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.cost_models.work import Rates

IDS, COLUMNS, ROWS = (128, 2048, 16_384), (1, 16, 64), 100_000
"""What is looked up, and in how many rows."""

ELEMENTS = 1 << 20
"""Of what is computed and swept."""

REPEATS = 3


def measured_rates(device: torch.device, ids_dtype: torch.dtype = torch.int64) -> Rates:
    """Rates of one process on a device, in a second or two on a CPU's core."""
    generator = torch.Generator().manual_seed(0)
    # frequencies of Zipf's law, near enough: a row's logarithm is uniform
    drawn = (ROWS ** torch.rand(max(IDS), generator=generator)).to(ids_dtype).clamp_max(ROWS - 1).to(device)
    points = [(float(n), float(k)) for n in IDS for k in COLUMNS]
    medians = [_median_s(_update(drawn[: int(n)], int(k)), device) for n, k in points]
    call_s, id_s, element_s = least_squares([[1.0, n, n * k] for n, k in points], medians)
    x = torch.rand(ELEMENTS, device=device, requires_grad=True)
    dense = nn.Parameter(torch.rand(ELEMENTS, device=device))
    optimizer = torch.optim.Adagrad([dense])

    def sweep() -> None:
        dense.grad = torch.zeros_like(dense)
        optimizer.step()

    return Rates(
        call_s,
        id_s,
        element_s,
        _median_s(lambda: torch.unique(drawn, return_inverse=True), device) / len(drawn),
        _median_s(sweep, device) / ELEMENTS,
        _median_s(lambda: (x * x).backward(torch.ones_like(x)), device) / ELEMENTS,
        f"measured: sparse Adagrad of {ROWS:,} rows, {min(IDS)} to {max(IDS):,} ids, {min(COLUMNS)} to {max(COLUMNS)} "
        "columns, one thread a rank",
    )


def slowest_rates(several: Sequence[Rates]) -> Rates:
    """Each rate that of the slowest rank."""
    names = [f.name for f in fields(Rates) if f.name != "source"]
    return replace(several[0], **{n: max(getattr(x, n) for x in several) for n in names})


def _update(ids: Tensor, columns: int) -> Callable[[], None]:
    """A lookup, its gradient, and the update of its rows."""
    table = nn.Embedding(ROWS, columns, sparse=True, device=ids.device)
    optimizer = torch.optim.Adagrad(table.parameters())
    gradient = torch.ones(len(ids), columns, device=ids.device)

    def step() -> None:
        table(ids).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _median_s(call: Callable[[], Any], device: torch.device) -> float:
    """Of several calls after one."""
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """The factors of the columns, none negative, with the least squares of relative errors.

    >>> [round(x, 6) for x in least_squares([[1, 1], [1, 2], [1, 4]], [3.0, 5.0, 9.0])]
    [1.0, 2.0]
    >>> [round(x, 6) for x in least_squares([[1, 1], [1, 2], [1, 4]], [1.0, 2.0, 4.0])]
    [0.0, 1.0]
    """
    every = torch.tensor(rows, dtype=torch.float64) / torch.tensor(values, dtype=torch.float64)[:, None]
    scale = every.abs().amax(0)  # columns of like size
    kept = list(range(every.shape[1]))
    while True:
        found = torch.linalg.lstsq((every / scale)[:, kept], torch.ones(len(every), 1, dtype=torch.float64)).solution
        factors = found[:, 0]
        if len(kept) == 1 or bool((factors >= 0).all()):
            break
        del kept[int(factors.argmin())]
    result = torch.zeros(every.shape[1], dtype=torch.float64)
    result[kept] = factors.clamp_min(0) / scale[kept]
    return [float(x) for x in result]

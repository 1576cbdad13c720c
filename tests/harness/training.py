"""Training a random model in ways of users that `des.verify` does not take: other losses, and histories' lengths."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import descompiler as des
from descompiler.check.judge import Judge, OriginalStep, Report, own_rows
from descompiler.check.judge import without_copying_parameters as kept
from descompiler.check.objective import batches, output_tensors
from descompiler.layout.rows import Rows
from tests.harness.pool import here

STEPS = 3


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes
    ----------
    loss : str
        As `compile`'s: what a rank's loss is of its rows.
    ignores : bool
        One output alone is in the loss: the first, then on each rank another, then the last.
    penalty : bool
        Add the squares of the gradient by the dense features ``x``.
    pads : bool
        Each rank's histories are as long as its own longest.
    """

    loss: str = "sum"
    ignores: bool = False
    penalty: bool = False
    pads: bool = False

    def used(self, step: int, rank: int, layouts: Sequence[Rows | None]) -> list[int]:
        """Outputs in a rank's loss; what is no row's is in all ranks' or in none."""
        if not self.ignores:
            return list(range(len(layouts)))
        if step % STEPS != 1:
            return [0 if step % STEPS == 0 else len(layouts) - 1]
        of_rows = [i for i, layout in enumerate(layouts) if layout is not None]
        return [of_rows[rank % len(of_rows)]]


@dataclass(frozen=True)
class Part:
    """A rank's rows of the global batch, where they are in given outputs, and the outputs in its loss."""

    first: int
    count: int
    start: int
    used: Sequence[int]


def trained(
    rank: int, ranks: int, model: nn.Module, inputs: Sequence[Tensor], plan: Mapping[str, str] | None, how: Training
) -> Report:
    """Train the compiled model on this rank, the original on the global batch, and compare. Collective.

    Raises
    ------
    EquivalenceError
        On every rank.
    """
    report = Report(ranks)
    module = des.compile(copy.deepcopy(model), inputs, plan=plan, loss=how.loss)
    judge = Judge(report, f"{how}, rank {rank}", module, model, rank)
    judge.check_start()
    optimizers = [_optimizer(net, sparse=bool(module.plan.sparse)) for net in (model, module)]
    for step in range(STEPS):
        _step(judge, inputs, how, step, rank, ranks)
        for o in optimizers:
            o.step()
            o.zero_grad()
        judge.settle()
    report.growth = judge.weights() / max(judge.start, 1.0)
    judge.settle()
    report.cases += 1
    return report


def _optimizer(net: nn.Module, *, sparse: bool) -> torch.optim.Optimizer:
    """One that tells gradients of zero from none, where gradients are dense."""
    if sparse:
        return torch.optim.SGD(net.parameters(), lr=0.01)
    return torch.optim.Adam(net.parameters(), lr=0.01, eps=0.01, weight_decay=0.1)


def _step(judge: Judge, inputs: Sequence[Tensor], how: Training, step: int, rank: int, ranks: int) -> None:
    module, reference = judge.module, judge.reference
    batch, counts = batches((tuple(inputs), {}), step, ranks)
    first, before = sum(counts[:rank]), kept(reference)
    drawn = any(note.startswith("random") for note in module.plan.notes)
    draws: Callable[[], AbstractContextManager[None]] = module.latest_draws if drawn else nullcontext
    if how.penalty:
        batch[0][0].requires_grad_()
    (whole, _), (own, _) = own_rows(batch, 0, sum(counts)), own_rows(batch, first, counts[rank])
    if how.pads:
        own = _padded(reference, own)
    got = module(*own)
    layouts = module.output_rows
    used = [how.used(step, r, layouts) for r in range(ranks)]
    parts = [Part(sum(counts[:r]), n, sum(counts[:r]), used[r]) for r, n in enumerate(counts)]

    def objective(outputs: Any, given: Any) -> Tensor:
        """Of all ranks: the sum of their losses, or the mean of their means."""
        rows, numbers = _losses(output_tensors(outputs), layouts, parts, given[0][0] if how.penalty else None)
        shares = {"sum": 1.0, "rank_mean": 1 / ranks, "row_mean": 1 / sum(counts)}
        each = [r * shares[how.loss] / (len(r) if how.loss == "rank_mean" and len(r) else 1) for r in rows]
        return torch.cat(each).sum() + numbers

    with draws():
        expected = reference(*whole)
    objective(expected, (whole, {})).backward()
    mine = [Part(first, counts[rank], 0, used[rank])]
    (rows,), numbers = _losses(output_tensors(got), layouts, mine, own[0] if how.penalty else None)
    (rows.sum() / (1 if how.loss == "sum" else max(len(rows), 1)) + numbers).backward()
    judge.outputs(got, expected, layouts, first, counts[rank])
    judge.gradients(OriginalStep(before, batch, sum(counts), objective, "__call__", draws), strict=True)


def _padded(model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Histories as long as the longest among these rows; 0 is padding."""
    at = list(inspect.signature(model.forward).parameters).index("history")
    longest = int((args[at] != 0).sum(1).max()) if len(args[at]) else 1
    return *args[:at], args[at][:, :longest], *args[at + 1 :]


def _losses(
    outputs: Sequence[Tensor], layouts: Sequence[Rows | None], parts: Sequence[Part], by: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """The loss of each row, by part, and of what is no row's; ``by``: with its gradient's squares.

    Of outputs whose rows are vectors: their gradients are bounded, as in `descompiler.check.objective`.
    """
    rows, linear = [], torch.zeros(())
    for part in parts:
        target = torch.cos(torch.arange(part.first, part.first + part.count, dtype=torch.float64))
        found = torch.zeros(part.count)
        for i in part.used:
            if layouts[i] is not None:
                x = outputs[i][part.start : part.start + part.count]
                found, linear = found + (1 + (x - target) ** 2).sqrt(), linear + x.sum()
        rows.append(found)
    numbers = sum((1 + outputs[i] ** 2).sqrt() for i in parts[0].used if layouts[i] is None)
    if by is not None and linear.requires_grad:
        (g,) = torch.autograd.grad(linear, by, create_graph=True, allow_unused=True)
        if g is not None:
            squares = [g[p.start : p.start + p.count].square().sum(1) for p in parts]
            rows = [a + b for a, b in zip(rows, squares, strict=True)]
    return rows, torch.as_tensor(numbers)


Outcome = tuple[float, float] | str
"""The largest relative error, and by how much weights grew; or the words of a refusal."""


def outcome(
    rank: int, ranks: int, text: str, plan: Mapping[str, str] | None, optimizer: str, how: Training | None
) -> Outcome:
    """On every rank: build the model of a text, and prove that it trains as the original. Collective.

    Parameters
    ----------
    how : Training or None
        None: as `des.verify` does, with this optimiser.

    Raises
    ------
    EquivalenceError
        On every rank.
    """
    if how is not None:
        torch.set_default_dtype(torch.float64)
    space: dict[str, Any] = {"__name__": "random_model"}
    exec(compile(text, "<random model>", "exec"), space)
    model, inputs = space["Model"](), space["inputs"]()
    try:
        if how is None:
            report = des.verify(model, inputs, ranks=ranks, plans=[plan], optimizers=[optimizer], launch=here)
        else:
            report = trained(rank, ranks, model, inputs, plan, how)
    except des.EquivalenceError:
        raise
    except des.DescompilerError as error:
        return f"{type(error).__name__}: {error}"
    return max(report.worst.values()), report.growth

"""Trials of a proof that is thorough: what a user's training does, and three steps on the example's rows don't."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from descompiler.check.objective import Objective, batches, drawn, kind_of_loss
from descompiler.model.inputs import flatten, knows_rows, map_tensors, split_statics, take_rows

MOST_LEAVES = 8
"""Tensors among the inputs up to which each is tried at its edges alone; more are tried together."""


ALL_OUTPUTS = Objective()


@dataclass(frozen=True)
class Trial:
    """A step, forward and backward, or an evaluation.

    Attributes
    ----------
    inputs : Any
        ``(args, kwargs)`` of the global batch.
    counts : sequence of int
        Each rank's rows.
    loss : str
        As `compile`'s: what each rank's loss is.
    optimised : bool
        Whether weights move after it.
    evaluated : bool
        In evaluation, without gradients; both are put back afterwards.
    """

    name: str
    inputs: Any
    counts: Sequence[int]
    objective: Objective = ALL_OUTPUTS
    loss: str = "sum"
    optimised: bool = False
    evaluated: bool = False

    def weights(self, rank: int | None) -> Tensor | None:
        """Of each row in a rank's loss; None: in the original's on the global batch."""
        if self.loss == "sum":
            return None
        counts = torch.tensor(self.counts, dtype=torch.float64)
        if rank is not None:
            return (1 / counts[rank]).expand(self.counts[rank])
        each = 1 / counts / len(counts) if self.loss == "rank_mean" else (1 / counts.sum()).expand(len(counts))
        return each.repeat_interleave(torch.tensor(self.counts))


def trials_of(inputs: Any, ranks: int, outputs: int, rows: Sequence[int], runs: Callable[[Any], bool]) -> list[Trial]:
    """All trials of a model.

    Parameters
    ----------
    outputs : int
        Tensors that forward returns.
    rows : sequence of int
        Of the parameters: what a last id may be.
    runs : callable
        Whether the original has a result, given inputs.
    """
    found = [*_losses(inputs, ranks, outputs), *_training(inputs, ranks)]
    if (kind := kind_of_loss(inputs)) != Trial.loss:  # no rows: forward is about parameters alone
        return [replace(t, loss=kind) for t in found if t.loss == Trial.loss]
    found += _sizes(inputs, ranks)
    if not knows_rows(inputs):  # of jagged tensors dimension 0 is not the batch
        found += [*_lengths(inputs, ranks), *_edges(inputs, ranks, rows, runs)]
    return found


def _losses(inputs: Any, ranks: int, outputs: int) -> Iterator[Trial]:
    batch, counts = batches(inputs, 0, ranks)
    yield Trial("the sum of the outputs as loss", batch, counts, Objective(plain=True))
    for loss in ("rank_mean", "row_mean"):
        yield Trial(f"loss={loss!r}", batch, counts, loss=loss)
    if outputs > 1:
        for i in range(outputs):
            yield Trial(f"output {i} alone in the loss", batch, counts, Objective(only=i))
    leaves, spec = flatten(batch)
    if any(isinstance(x, Tensor) and x.is_floating_point() for x in leaves):
        leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
        batch = pytree.tree_unflatten(leaves, spec)
        yield Trial("a gradient penalty", batch, counts, Objective(penalty=True))


def _sizes(inputs: Any, ranks: int) -> Iterator[Trial]:
    """Batches of other sizes than any that capture saw."""
    example = len(split_statics(flatten(inputs)[0])[0][0])
    last = ranks - 1
    for counts in (
        [0] * ranks,
        [0] * last + [1],
        [1] * ranks,
        [2 * example + 1] + [1] * last,
        [64 + r for r in range(ranks)],
    ):
        text = ", ".join(map(str, counts))
        yield Trial(f"{text} rows on the ranks", drawn(inputs, sum(counts), 7), counts)


def _training(inputs: Any, ranks: int) -> Iterator[Trial]:
    """Steps of Adam with weight decay, another batch each, one output left out of the loss, evaluation in between."""
    for step in range(4):
        counts = [4 + (r + step) % 3 for r in range(ranks)]
        batch = drawn(inputs, sum(counts), 20 + step)
        objective = Objective(only=0) if step % 2 else Objective()
        name = "Adam with weight decay"
        yield Trial(f"step {step} of {name}", batch, counts, objective, optimised=True)
        yield Trial(f"evaluation after step {step} of {name}", batch, counts, evaluated=True)


def _lengths(inputs: Any, ranks: int) -> Iterator[Trial]:
    """Other sizes of dimension 1, of all inputs that have the same there."""
    batch, counts = batches(inputs, 0, ranks)
    leaves, _ = split_statics(flatten(batch)[0])
    for length in sorted({x.shape[1] for x in leaves if x.dim() > 1 and x.shape[1]}):
        for other in sorted({0, 1, length - 1, length + 3} - {length}):

            def resized(x: Tensor, length: int = length, other: int = other) -> Tensor:
                if x.dim() < 2 or x.shape[1] != length:
                    return x
                return x.index_select(1, torch.arange(other, device=x.device) % length)

            yield Trial(f"length {other} in place of {length}", map_tensors(resized, batch), counts)


def _edges(inputs: Any, ranks: int, rows: Sequence[int], runs: Callable[[Any], bool]) -> Iterator[Trial]:
    """Values at the edges of what each input allows, in all rows and in one: branches that the example did not take."""
    batch, counts = batches(inputs, 0, ranks)
    same = torch.zeros(sum(counts), dtype=torch.int64)
    yield Trial("all rows equal", take_rows(batch, same), counts)
    leaves, spec = flatten(batch)
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() and not x.is_complex()]
    groups = [[i] for i in tensors] if len(tensors) <= MOST_LEAVES else [tensors]
    for group in groups:

        def changed(edge: Edge, chosen: slice, group: Sequence[int] = group) -> Any:
            result = list(leaves)
            for i in group:
                if (value := edge(leaves[i])) is not None:
                    result[i] = leaves[i].clone()
                    result[i][chosen] = value
            return pytree.tree_unflatten(result, spec)

        held = [leaves[i] for i in group]
        edges = list(_values_of(held))
        if integers := [x for x in held if x.dtype in INTEGERS and x.numel()]:
            most = max(int(x.max()) for x in integers)
            for last in sorted({n - 1 for n in rows if n - 1 > most}, reverse=True):
                if runs(changed(_integer(last), EVERY_ROW)):
                    edges.append((f"the last id, {last}", _integer(last)))
                    break
        said = f"input {group[0]}" if len(group) == 1 else "all inputs"
        for label, edge in edges:
            yield Trial(f"{said} at {label} in every row", changed(edge, EVERY_ROW), counts)
            yield Trial(f"{said} at {label} in one row", changed(edge, ONE_ROW), counts)


Edge = Callable[[Tensor], Any]
"""The value of an input at an edge; None if the input has no such edge."""


INTEGERS = (torch.int64, torch.int32)


EVERY_ROW, ONE_ROW = slice(None), slice(-1, None)


def _integer(of: int | Callable[[Tensor], Any]) -> Edge:
    return _of_kind(of, lambda x: x.dtype in INTEGERS and x.numel() > 0)


def _of_kind(value: Any, is_one: Callable[[Tensor], bool]) -> Edge:
    """Of inputs of one kind."""
    return lambda x: (value(x) if callable(value) else value) if is_one(x) else None


def _values_of(leaves: Sequence[Tensor]) -> Iterator[tuple[str, Edge]]:
    """Edges that the inputs' dtypes and the example's values have."""
    if any(x.dtype in INTEGERS for x in leaves):
        yield "0", _integer(0)
        yield "its largest values", _integer(lambda x: x.amax(0))
        yield "its smallest values", _integer(lambda x: x.amin(0))
    if any(x.dtype == torch.bool for x in leaves):
        for flag in (False, True):
            yield str(flag), _of_kind(flag, lambda x: x.dtype == torch.bool)
    if any(x.is_floating_point() for x in leaves):
        for number in (0.0, -10.0, 10.0):
            yield f"{number:g}", _of_kind(number, Tensor.is_floating_point)

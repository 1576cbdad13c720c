"""What is minimised in a proof: a loss of any outputs that is a sum over rows, and the batches that it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from descompiler.layout.rows import Rows
from descompiler.model.inputs import flatten, split_statics, take_rows
from descompiler.ops.local import differentiable, real_parts


def output_tensors(outputs: Any) -> list[Tensor]:
    return split_statics(flatten(outputs)[0])[0]


@dataclass(frozen=True)
class Objective:
    """A loss that is a sum over rows and differs between rows; what is no row's counts once, on every rank.

    Its gradient by an output is below 1 (a pseudo-Huber loss): with squares, models that multiply embeddings diverge
    within three steps, and beside weights of 1e11 any other tensor is rounding.

    Attributes
    ----------
    only : int, optional
        The one output that is in the loss, the others are ignored; by default all are.
    plain : bool
        The sum of the outputs themselves.
    penalty : bool
        Add squares of the outputs' gradients by the inputs that require one, as a gradient penalty does.
    """

    only: int | None = None
    plain: bool = False
    penalty: bool = False

    def __call__(
        self,
        outputs: Any,
        layouts: Sequence[Rows | None],
        first: int = 0,
        weights: Tensor | None = None,
        inputs: Sequence[Tensor] = (),
    ) -> Tensor:
        """``first``: the outputs' first row in the global batch; ``weights``: of each row, 1 by default."""
        total, linear = (torch.zeros((), dtype=torch.float64) for _ in range(2))
        for i, (o, layout) in enumerate(zip(output_tensors(outputs), layouts, strict=True)):
            if not differentiable(o) or self.only not in (None, i):
                continue
            o = o if layout is None else layout.lead(o)
            x = real_parts(o.reshape(1, -1) if layout is None else o.unsqueeze(-1).flatten(1)).flatten(1)
            # of what has no rows a number without dimensions: a tensor of one row would be taken for a batch's
            rows = torch.zeros((), dtype=torch.float64, device=o.device)
            if layout is not None:
                rows = first + torch.arange(x.shape[0], dtype=torch.float64, device=o.device).reshape(-1, 1)
            terms = x if self.plain else (1 + (x - torch.cos(rows)) ** 2).sqrt()
            if weights is not None and layout is not None:
                terms = terms * weights.to(x.device).reshape(-1, 1)
            total, linear = total + terms.sum().cpu(), linear + x.sum().cpu()
        by = [x for x in inputs if x.requires_grad]
        if self.penalty and by and linear.requires_grad:
            for g in torch.autograd.grad(linear, by, create_graph=True, allow_unused=True):
                total = total if g is None else total + g.square().sum().cpu()
        return total


def kind_of_loss(inputs: Any) -> str:
    """What a rank's `Objective` is: a sum over rows; of a forward that takes no tensor, the same on every rank."""
    return "sum" if split_statics(flatten(inputs)[0])[0] else "rank_mean"


def batches(inputs: Any, step: int, ranks: int) -> tuple[Any, list[int]]:
    """A global batch drawn from the example's rows, and each rank's rows: uneven, one rank empty, then even."""
    rows = [
        [5 + (r % 2) for r in range(ranks)],
        [0 if r == step % ranks else 4 + r for r in range(ranks)],
        [3] * ranks,
    ]
    counts = rows[step % 3]
    if sum(counts) < 4:  # a batch norm of two or three rows makes much of rounding
        counts = [6] * ranks
    return drawn(inputs, sum(counts), step), counts


def drawn(inputs: Any, rows: int, seed: int) -> Any:
    """So many of the example's rows, some more than once; inputs without a tensor have none, and are as they are."""
    leaves, _ = split_statics(flatten(inputs)[0])
    if not leaves:
        return inputs
    index = torch.randint(len(leaves[0]), (rows,), generator=torch.Generator().manual_seed(seed))
    if rows > 1:  # a batch of one row again and again has differences of 0, all rounding
        index[-1] = (index[0] + 1) % len(leaves[0])
    return take_rows(inputs, index)

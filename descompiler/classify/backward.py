"""The backward of opaque code: whether it makes of each row's gradient what it makes of the batch's.

An operator of torch whose result is made row by row has a gradient row by row. A module of the user's need not: a
`torch.autograd.Function` of its own, or a hook on a tensor, may combine rows (subtract the batch's mean) where forward
does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from descompiler.layout.rows import Rows
from descompiler.ops.local import differentiable, real_parts

ROW_TOLERANCE = 1e-9
"""Relative error allowed between a whole batch's value and its parts', in float64."""

ROW_ROUNDING = 64 * torch.finfo(torch.float64).eps
"""Of the largest gradient, what the others may differ by: one that is zero but for rounding (of a bias in front of a
softmax) has no relative error."""

Values = Mapping[fx.Node, Any]


def backward_mixes(
    call: Callable[[Values], Any],
    whole: Values,
    divisions: Sequence[Sequence[Values]],
    layouts: Mapping[fx.Node, Rows | None],
    results: Sequence[Rows],
) -> bool:
    """Whether gradients of a batch's parts, put together, are not those of the batch.

    Parameters
    ----------
    call : callable
        What is judged, given the values of its operands.
    whole : mapping of node to value
        Operands of the batch.
    divisions : sequence
        By division of the batch, by part of it: its operands.
    layouts : mapping of node to Rows or None
        Where rows are in operands that are cut with the batch; gradients of all others are sums over parts.
    results : sequence of Rows
        Where rows are in what is returned.
    """
    expected, rows = _gradients_of_rows(call, whole, results, 0)
    rounding = ROW_ROUNDING * max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
    for parts in divisions:
        first, found = 0, []
        for part in parts:
            gradients, count = _gradients_of_rows(call, part, results, first)
            first += count
            found.append(gradients)
        if first != rows or any(set(f) != set(expected) for f in found):
            return True
        for a, g in expected.items():
            terms = [f[a] for f in found]
            layout = layouts.get(a)
            if layout is not None:
                g, together = layout.lead(g), torch.cat([layout.lead(t) for t in terms])
            else:
                together = sum(terms[1:], terms[0])
            if g.shape != together.shape:
                return True
            size = float(g.abs().max()) if g.numel() else 0.0
            if g.numel() and not float((g - together).abs().max()) <= max(ROW_TOLERANCE * size, rounding):
                return True
    return False


def _gradients_of_rows(
    call: Callable[[Values], Any], operands: Values, results: Sequence[Rows], first: int
) -> tuple[dict[fx.Node, Tensor], int]:
    """Gradients of a sum whose rows are weighed at random (row ``first`` onwards), and the number of rows."""
    given = {a: x.detach().clone() if isinstance(x, Tensor) else x for a, x in operands.items()}
    trained = {a: x.requires_grad_() for a, x in given.items() if isinstance(x, Tensor) and differentiable(x)}
    returned = call(given)
    leading = [
        r.lead(x) for r, x in zip(results, returned if isinstance(returned, tuple | list) else [returned], strict=True)
    ]
    count = len(leading[0])
    generator = torch.Generator().manual_seed(31)
    weights = (0.5 + torch.randn(first + count, generator=generator, dtype=torch.float64))[first:]
    leading = [real_parts(x) for x in leading if x.requires_grad]
    terms = [(x * weights.to(x).reshape(-1, *[1] * (x.dim() - 1))).sum() for x in leading]
    if not terms or not trained:
        return {}, count
    found = torch.autograd.grad(sum(terms[1:], terms[0]), list(trained.values()), allow_unused=True)
    return {
        a: torch.zeros_like(x) if g is None else g.to_dense() for (a, x), g in zip(trained.items(), found, strict=True)
    }, count

"""The proof of a plan that rounds values where they cross: how far rounding takes the model, and how far it may.

Rounding to a dtype changes a value by ``unit`` = eps / 2 of it at most. A step in which values were rounded is the
original's with something like that done to its weights (a rounded row *is* a row of other weights; what else crosses is
made of them) and to the terms of which gradients are sums. So a result may differ from the original's by

    SENSITIVITY_FACTOR * (m + unit * the result's largest entry) + d

m: the most that the original's own result changes in three trials in which each weight is changed at random by about
``unit`` of it, kinks and steep places included. d: what the original's result is at the weights that the compiled
module has by then, less what it is at its own: these have drifted apart by earlier steps' rounding. A weight itself may
differ by the sum over steps of what its gradient may: the optimisers of `verify` move a weight by no more than its
gradient changes (lr / eps = 1). A fault is seen if it is larger than this; a smaller one is seen without
``wire_dtype``, or with float32, whose unit is 6e-8, on the same path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from descompiler.check.judge import SENSITIVITY_FACTOR, Judge, OriginalStep, largest, wide
from descompiler.check.objective import output_tensors
from descompiler.module.state import full_state_dict, without_extra


@dataclass
class RoundingJudge(Judge):
    """One rank's comparisons where values are rounded to ``wire_dtype`` to cross."""

    wire_dtype: torch.dtype = torch.float32
    allowed: dict[tuple[str, str], float] = field(default_factory=dict)  # by what, and its name: absolute

    @property
    def unit(self) -> float:
        """The largest share of a value that rounding changes."""
        return torch.finfo(self.wire_dtype).eps / 2

    def prepare(self, step: OriginalStep, expected: Any) -> None:
        """Measure what rounding may do to this step. Collective."""
        state = without_extra(full_state_dict(self.module))
        grads = {n: p.grad.to_dense() for n, p in self.reference.named_parameters() if p.grad is not None}
        before = _named(output_tensors(expected), grads, dict(self.reference.named_buffers()))
        drift = _changes(before, _named(*step.run(state)))
        moved = [_changes(before, _named(*step.run(weights))) for weights in step.rounded(self.unit)]
        for key, x in before.items():
            most = max(changes[key] for changes in moved) + self.unit * largest([x])
            found = SENSITIVITY_FACTOR * most + drift[key]
            if key[0] == "gradient":
                self.allowed["weight", key[1]] = self.allowed.get(("weight", key[1]), 0.0) + found
            self.allowed[key] = found

    def value(self, what: str, name: str, a: Tensor, b: Tensor, size: float, rounding: float) -> None:
        """As the judge's, within what is allowed: of what was not measured, a few roundings."""
        a, b = a.detach(), b.detach()
        if tuple(a.shape) != tuple(b.shape):
            return self.wrong(f"{what} {name!r} has shape {tuple(a.shape)}, not {tuple(b.shape)}")
        if not b.numel():
            return
        difference = largest([a.to(wide(a)) - b.to(wide(b))])
        allowed = max(self.allowed.get((what, name), SENSITIVITY_FACTOR * self.unit * size), rounding)
        self.report.see(what, difference / max(size, 1e-300))
        self.report.share = max(self.report.share, difference / max(allowed, 1e-300))
        if not difference <= allowed:
            self.wrong(
                f"{what} {name!r} differs by {difference:.1e}, and rounding to {self.wire_dtype} may do {allowed:.1e}"
            )

    def _compare(
        self,
        step: OriginalStep,
        grads: Mapping[str, Tensor],
        found: Mapping[str, tuple[Tensor, Tensor, float]],
        strict: bool,
    ) -> None:
        for name, (own, part, size) in found.items():
            self.value("gradient", name, own, part, size, 0.0)


def _named(
    outputs: Sequence[Tensor], grads: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """Results of a step, by what they are and their names as judges have them."""
    every = ("output", {str(i): x for i, x in enumerate(outputs)}), ("gradient", grads), ("weight", buffers)
    return {(what, name): x.detach() for what, named in every for name, x in named.items()}


def _changes(before: Mapping[tuple[str, str], Tensor], after: Mapping[tuple[str, str], Tensor]) -> dict[Any, float]:
    """The largest change of each result; none of one whose shape depends on the weights."""
    same = {key: (x, after[key]) for key, x in before.items() if x.shape == after[key].shape}
    return dict.fromkeys(before, 0.0) | {key: largest([x.to(wide(x)) - y.to(wide(x))]) for key, (x, y) in same.items()}

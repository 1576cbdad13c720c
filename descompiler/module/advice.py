"""Whether another plan would be cheaper, now that training has seen real ids."""

from __future__ import annotations

from dataclasses import dataclass

from descompiler.planning.plan import Plan
from descompiler.units import format_bytes, format_seconds

FIRST = 8
"""Batches of training that are kept for it, as references."""

WORTH_IT = 0.05
"""Share of a step that a plan has to save to be worth compiling again."""


@dataclass(frozen=True)
class Advice:
    """A module's plan and the best one, priced for the same ids.

    Attributes
    ----------
    present : Plan
        The module's forms, priced for the ids that training has seen.
    best : Plan
        The best for these ids; ``des.compile(model, plan=advice.best)`` follows it.
    threshold : float
        Share of a step that it has to save to be advised.
    """

    present: Plan
    best: Plan
    threshold: float = WORTH_IT

    @property
    def saving(self) -> float:
        """Share of a step's price that the best plan saves; 0 is none."""
        return max(0.0, 1 - self.best.price / self.present.price) if self.present.price else 0.0

    @property
    def advised(self) -> bool:
        """Whether it is worth compiling again."""
        return self.saving > self.threshold

    def __str__(self) -> str:
        show = format_seconds if self.best.objective == "seconds" else format_bytes
        seen = f"ids: {self.best.statistics}"
        if not self.advised:
            return (
                f"the plan is within {100 * self.threshold:g} % of the best: {show(self.present.price)} a step, "
                f"{show(self.best.price)} ({seen})"
            )
        return (
            f"another plan would take {show(self.best.price)} a step in place of {show(self.present.price)}, "
            f"{100 * self.saving:.0f} % less ({seen}); des.compile(model, plan=advice.best) follows it:\n"
            + self.present.diff(self.best)
        )

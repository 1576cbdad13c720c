"""What a step sends that no one value asks for: the header, whether leaves failed, averages of dense gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from descompiler.layout.traffic import Collective, Stage
from descompiler.layout.transfer import Sent, Step, Transfer


@dataclass(frozen=True)
class StepHeader(Transfer):
    """header: own rows, status, mode, and how many unique ids are asked --> every rank's."""

    kind = "header"
    SEND = Collective("all_to_all (header)", Stage.HEADER)
    BYTES = 5 * 8  # rows, status, mode, unique ids asked, unique ids gathered: int64 each

    def sent(self, step: Step) -> Iterator[Sent]:
        yield Sent(self.SEND, step.others * self.BYTES)


AHEAD = Collective("all_to_all (header, ahead)", Stage.HEADER)
"""Of a batch that `descompiler.prefetch` has seen: beside the header of its step, and no part of a plan."""

EARLY = Collective("all_to_all (which rows go ahead)", Stage.IDS_IN)
"""Of rows that travel before their step: a bit of each that is asked for. No part of a plan, too."""

AHEAD_BYTES = StepHeader.BYTES + 8  # and which batch it is


@dataclass(frozen=True)
class LeafStatus(Transfer):
    """status of leaves: whether an opaque leaf failed here --> whether one did anywhere.

    Attributes
    ----------
    runs : int
        Of leaves after the header, which tells of those before it: after each, ranks tell each other.
    backward : bool
        Whether gradients go through leaves: ranks tell each other when backward has ended.
    """

    kind = "status of leaves"
    RUN = Collective("all_gather (opaque leaves, status)", Stage.VALUES_OUT)
    BACKWARD = Collective("all_gather (opaque leaves, status of backward)", Stage.END_OF_BACKWARD)
    BYTES = 1

    runs: int = 0
    backward: bool = False

    def sent(self, step: Step) -> Iterator[Sent]:
        yield Sent(self.RUN, self.runs * self.BYTES, self.runs)
        if self.backward:
            yield Sent(self.BACKWARD, self.BYTES)


@dataclass(frozen=True)
class UsedOutputs(Transfer):
    """used outputs: which outputs this rank's loss comes to --> those that any rank's does.

    Attributes
    ----------
    outputs : int
        Of forward; there are none to tell where the same parameters are behind all of them.
    leaves : int
        Pairs of a result and a trained operand of opaque leaves: whether the one is made of the other.
    """

    kind = "used outputs"
    GATHER = Collective("all_gather (outputs that losses use)", Stage.GRADIENTS_BACK)

    outputs: int
    leaves: int = 0

    def sent(self, step: Step) -> Iterator[Sent]:
        yield Sent(self.GATHER, self.outputs + self.leaves)


@dataclass(frozen=True)
class DenseGradients(Transfer):
    """dense gradients: every rank's terms --> their mean on every rank.

    Attributes
    ----------
    elements : int
        Of all replicated parameters that are trained, and are of the model's dtype.
    others : tuple of (dtype, int)
        Elements of those that are of another, by dtype.
    """

    kind = "dense gradients"
    AVERAGE = Collective("all_reduce (dense gradients)", Stage.END_OF_BACKWARD)

    elements: int
    others: tuple[tuple[torch.dtype, int], ...] = ()

    def sent(self, step: Step) -> Iterator[Sent]:
        yield Sent(self.AVERAGE, sum(n * step.size_of(dtype) for dtype, n in ((None, self.elements), *self.others)))

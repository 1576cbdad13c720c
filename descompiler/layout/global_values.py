"""What crosses where every rank has a value of the global batch: rows and sums of it, batch norms, whole tables.

Between a rank's own rows and the computation that all ranks repeat (`descompiler.classify.coupling`), gather and reduce
send values in forward, slice and spread gradients in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from descompiler.layout.pieces import Pieces
from descompiler.layout.traffic import Collective, Stage
from descompiler.layout.transfer import Sent, Step, Transfer


@dataclass(frozen=True)
class GlobalValue:
    """A value between own rows and the global batch.

    Attributes
    ----------
    terms : tuple of tuple of int
        Elements: per row of the batch, where its rows cross, or in all, as a product of polynomials in the rows of the
        global batch (coefficients, constant term first).
    itemsize : int or None
        Bytes of an element; None: those of the model's parameters.
    """

    name: str
    terms: tuple[tuple[int, ...], ...] = ()
    itemsize: int | None = None

    def elements(self, rows: int) -> int:
        """Elements that cross, for a global batch of ``rows``.

        >>> GlobalValue("logits", ((0, 1), (0, 2))).elements(3)  # [b, 2b]
        18
        """
        result = 1
        for coefficients in self.terms:
            result *= sum(c * rows**power for power, c in enumerate(coefficients))
        return result


@dataclass(frozen=True)
class CoupledValues(Transfer):
    """Values of one kind that cross together between own rows and the global batch.

    Attributes
    ----------
    by_row : bool
        Whether each row crosses by itself, so that a rank sends as many as it has.
    why : str
        For people.
    """

    by_row: ClassVar[bool] = False
    why: ClassVar[str]

    values: tuple[GlobalValue, ...]

    def elements(self, rows: int) -> int:
        """Elements of all values, for a global batch of ``rows``."""
        return sum(v.elements(rows) for v in self.values)

    def size_bytes(self, step: Step) -> int:
        return sum(v.elements(step.total) * (v.itemsize or step.itemsize) for v in self.values)


@dataclass(frozen=True)
class GatherRows(CoupledValues):
    """gather: Local --> the global batch on every rank."""

    kind = "gather"
    why = "every rank's rows go to all"
    by_row = True
    GATHER = Collective("all_gather (batch-coupled values)", Stage.VALUES_OUT)

    def sent(self, step: Step) -> Iterator[Sent]:
        yield Sent(self.GATHER, step.rows * self.size_bytes(step))


@dataclass(frozen=True)
class SumTerms(CoupledValues):
    """reduce: a term of each rank's own rows --> their sum on every rank."""

    kind = "reduce"
    why = "a sum over the batch is one over ranks' terms"
    SUM = Collective("all_reduce (sums over the batch)", Stage.VALUES_OUT)

    def sent(self, step: Step) -> Iterator[Sent]:
        yield Sent(self.SUM, self.size_bytes(step))


@dataclass(frozen=True)
class SliceRows(CoupledValues):
    """slice: the global batch on every rank --> Local; gradients of every rank's rows go to all."""

    kind = "slice"
    why = "the gradient of every rank's rows goes to all"
    by_row = True
    BACK = Collective("all_gather (gradients of batch-coupled rows)", Stage.GRADIENTS_BACK)

    def sent(self, step: Step) -> Iterator[Sent]:
        yield Sent(self.BACK, step.rows * self.size_bytes(step))


@dataclass(frozen=True)
class SpreadValue(CoupledValues):
    """spread: a value that every rank has --> the same, for own rows; gradients are summed over ranks."""

    kind = "spread"
    why = "the gradient is a sum over ranks"
    BACK = Collective("all_reduce (gradients of batch-coupled values)", Stage.GRADIENTS_BACK)

    def sent(self, step: Step) -> Iterator[Sent]:
        yield Sent(self.BACK, self.size_bytes(step))


@dataclass(frozen=True)
class TableTotal(CoupledValues):
    """total: a term of each rank's piece of a table --> their sum on every rank (`descompiler.tables.totals`).

    Attributes
    ----------
    backward : bool
        Whether it gets a gradient, of which ranks take the mean.
    """

    kind = "total"
    why = "a sum over a whole table is one over the owners' terms, and its gradient a mean over ranks"
    SUM = Collective("all_reduce (sums over whole tables)", Stage.VALUES_OUT)
    BACK = Collective("all_reduce (gradients of sums over whole tables)", Stage.GRADIENTS_BACK)

    backward: bool = True

    def sent(self, step: Step) -> Iterator[Sent]:
        yield Sent(self.SUM, self.size_bytes(step))
        if self.backward:
            yield Sent(self.BACK, self.size_bytes(step))


SUMS_DTYPE = torch.float32
"""Of sums that a batch norm makes of values of fewer bits."""


@dataclass(frozen=True)
class NormOutside(Transfer):
    """batch norm: (count, mean, M2) of each rank's own rows --> every rank's; two sums of gradients, back.

    Attributes
    ----------
    channels : int
    wire_dtype : torch.dtype or None
        Of what is normalised; None: the model's. Its sums have 32 bits at least.
    """

    kind = "batch norm"
    GATHER = Collective("all_gather (batch norm, forward)", Stage.VALUES_OUT)
    BACK = Collective("all_reduce (batch norm, backward)", Stage.GRADIENTS_BACK)

    channels: int
    wire_dtype: torch.dtype | None = None

    def sent(self, step: Step) -> Iterator[Sent]:
        itemsize = max(step.size_of(self.wire_dtype), SUMS_DTYPE.itemsize)
        yield Sent(self.GATHER, (2 * self.channels + 1) * itemsize)
        yield Sent(self.BACK, 2 * self.channels * itemsize)


@dataclass(frozen=True)
class NormsInside(Transfer):
    """running statistics: those of the channels that a rank has the global batch of --> all, on every rank.

    Attributes
    ----------
    channels : tuple of tuple of int
        Of each batch norm, by rank.
    wire_dtypes : tuple of (dtype or None)
        Of each one's statistics; empty: the model's of all.
    """

    kind = "running statistics"
    SEND = Collective("all_to_all (running statistics)", Stage.VALUES_OUT)

    channels: tuple[tuple[int, ...], ...]
    wire_dtypes: tuple[torch.dtype | None, ...] = ()

    def sent(self, step: Step) -> Iterator[Sent]:
        sizes = [step.size_of(dtype) for dtype in self.wire_dtypes or (None,) * len(self.channels)]
        yield Sent(self.SEND, step.others * 2 * (np.array(sizes) @ np.array(self.channels)))


@dataclass(frozen=True)
class Whole:
    """A table that every rank gathers whole before it is used.

    Attributes
    ----------
    backward : bool
        Whether it gets a gradient.
    wire_dtype : torch.dtype or None
        None: the model's.
    """

    name: str
    pieces: Pieces
    backward: bool = True
    wire_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class WholeTables(Transfer):
    """whole tables: pieces --> all of them on every rank; every rank's terms of their gradients go to the owners."""

    kind = "whole tables"
    GATHER = Collective("all_gather (whole tables)", Stage.IDS_IN)
    BACK = Collective("all_to_all (gradients of whole tables)", Stage.GRADIENTS_BACK)

    tables: tuple[Whole, ...]

    @cached_property
    def elements(self) -> np.ndarray:
        """Elements of each table that each rank owns, ``[T, N]``."""
        return np.stack([t.pieces.elements for t in self.tables])

    def sent(self, step: Step) -> Iterator[Sent]:
        own = np.array([step.size_of(t.wire_dtype) for t in self.tables]) @ self.elements
        yield Sent(self.GATHER, own)
        if any(t.backward for t in self.tables):
            yield Sent(self.BACK, own.sum() - own)

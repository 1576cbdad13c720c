"""Products with a table whose rows are divided: rows of x to the owners, partial results back, gradients likewise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from descompiler.layout.division import Division
from descompiler.layout.traffic import Collective, Stage
from descompiler.layout.transfer import Crossed, Sent, Step, Transfer


@dataclass(frozen=True)
class Vocabulary(Transfer):
    """product: Local rows --> the owners of the table that they are multiplied with --> Local results; and back.

    The table's rows are divided among owners (`descompiler.ops.vocabulary`).

    Attributes
    ----------
    name : str
    division : Division
        Of the table's rows: one range for each owner.
    first, size : int
        The rows that are the vocabulary.
    dim : int
        Elements of a row of x.
    per_row : int
        Rows of x for each row of the batch.
    requests : tuple of (str, int)
        What is asked of the logits, and for how many of them.
    id_bytes : int
    backward : bool
        Whether anything that is trained needs gradients of the results.
    backward_x : bool
        Whether x needs gradients.
    wire_dtype : torch.dtype or None
        Of x and the results; None: the model's.
    """

    kind = "product"
    ROWS = Collective("all_to_all (vocabulary, rows to owners)", Stage.VALUES_OUT)
    PARTIAL = Collective("all_to_all (vocabulary, partial results)", Stage.VALUES_OUT)
    GRADIENTS = Collective("all_to_all (vocabulary, their gradients)", Stage.GRADIENTS_BACK)
    TERMS = Collective("all_to_all (vocabulary, gradients of rows)", Stage.GRADIENTS_BACK)

    name: str
    division: Division
    first: int
    size: int
    dim: int
    per_row: int
    requests: tuple[tuple[str, int], ...]
    id_bytes: int = 4
    backward: bool = True
    backward_x: bool = True
    wire_dtype: torch.dtype | None = None

    @cached_property
    def owners(self) -> tuple[int, ...]:
        return tuple(self.parts)

    @cached_property
    def parts(self) -> dict[int, tuple[int, int, int]]:
        """By owner, in order: start and size of its part of the vocabulary, and where it is in the owner's piece."""
        found = self.division.within(self.first, self.first + self.size)
        return {r.owner: (r.start - self.first, r.size, offset) for r, offset in found}

    def widths(self, rank: int) -> list[int]:
        """Elements per row of x of each partial result of an owner, by request."""
        size = self.parts[rank][1]
        sizes = {"top": size, "logits": size}
        return [size if kind == "logits" else min(n, sizes.get(kind, n)) for kind, n in self.requests]

    def ids_widths(self, rank: int) -> list[int]:
        """Ids per row of x that an owner sends with its best logits, by request that asks for them."""
        widths = zip(self.requests, self.widths(rank), strict=True)
        return [w for (kind, _), w in widths if kind in ("max", "top")]

    def width(self, rank: int) -> int:
        return sum(self.widths(rank)) if rank in self.parts else 0

    def ids_width(self, rank: int) -> int:
        return sum(self.ids_widths(rank)) if rank in self.parts else 0

    @cached_property
    def total_width(self) -> int:
        """Elements per row of x of all owners' partial results."""
        return sum(self.width(r) for r in self.owners)

    @cached_property
    def elements(self) -> int:
        """Elements per row of the batch that a training step sends to or from owners, over all of them."""
        values = self.total_width * (2 if self.backward else 1)
        rows = len(self.owners) * self.dim * (2 if self.backward and self.backward_x else 1)
        return self.per_row * (values + rows)

    @cached_property
    def ids(self) -> int:
        """Ids per row of the batch that are sent to or from owners, over all of them."""
        best = sum(self.ids_width(r) for r in self.owners)
        return self.per_row * (best + len(self.owners) * self.selected)

    @cached_property
    def selected(self) -> int:
        """Ids per row of x whose logits are asked for."""
        return sum(n for kind, n in self.requests if kind == "select")

    def sent(self, step: Step) -> Iterator[Sent]:
        mine, rest = self.per_row * step.rows, self.per_row * step.rest
        itemsize = step.size_of(self.wire_dtype)
        own, width, ids_width = np.zeros((3, len(step.rows)), dtype=np.int64)
        for r in self.owners:
            own[r], width[r], ids_width[r] = 1, self.width(r), self.ids_width(r)
        others = len(self.owners) - own
        yield Sent(self.ROWS, mine * others * (self.dim * itemsize + self.selected * self.id_bytes))
        yield Sent(self.PARTIAL, rest * (width * itemsize + ids_width * self.id_bytes))
        if self.backward:
            yield Sent(self.GRADIENTS, mine * itemsize * (self.total_width - width))
            if self.backward_x:
                yield Sent(self.TERMS, own * rest * self.dim * itemsize)

    def crossed(self) -> Iterator[Crossed]:
        yield Crossed("product", self.name, self.elements, self.ids, self.wire_dtype)

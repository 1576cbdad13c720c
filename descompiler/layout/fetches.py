"""Fetches: the tables of which unique rows are fetched together, and who asks whom for how many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descompiler.cost_models.table import OfTable
from descompiler.layout.id_checks import Check
from descompiler.layout.keys import ID_BYTES, KeySpace, digits_of
from descompiler.layout.pieces import ALL, Pieces
from descompiler.layout.traffic import Collective, Stage
from descompiler.layout.transfer import Counts, Sent, Step, Transfer


@dataclass(frozen=True)
class FetchTable(OfTable):
    """A table whose unique rows are fetched.

    Attributes
    ----------
    gathered : bool
        Whether gradients of shared rows are gathered by unique row, not all-reduced.
    counted : bool
        Whether its unique ids, which are those of all its fetches together, are counted here: in the first.
    wire_dtype : torch.dtype or None
        Of its rows as they cross; None: the model's.
    """

    pieces: Pieces
    gathered: bool = False
    counted: bool = True
    wire_dtype: torch.dtype | None = None

    @property
    def kind(self) -> tuple[bool, bool, bool, str, int]:
        """Tables of one kind are a class, whose rows are one tensor."""
        return (not self.trained, self.gathered, self.sparse, str(self.dtype), self.dim)

    @property
    def sizes(self) -> np.ndarray:
        """Rows that each rank owns; rows that all hold at the end."""
        return self.pieces.sizes


@dataclass(frozen=True)
class Fetch(Transfer):
    """fetch: unique rows of pieces --> the ranks that look them up; one summed gradient of each, back.

    Gradients of rows that every rank holds go to all: gathered, each unique row once, or all-reduced.

    Attributes
    ----------
    tables : tuple of FetchTable
        In order of their kind.
    lookups : tuple of int
        The table of each.
    names : tuple of str
        The node of each lookup.
    checks : tuple of Check
        What each lookup's ids have to be.
    early : bool
        Whether the ids are known before the header, which carries the counts. Else all of this is sent when they are.
    """

    kind = "fetch"
    COUNTS = Collective("all_to_all (unique ids, counts)", Stage.VALUES_OUT)
    # ids: unique and sorted, each as its distance to the one before it
    GATHERED_IDS = Collective("all_to_all (gathered gradients, ids)", Stage.IDS_IN, trained=True)
    IDS = Collective("all_to_all (unique ids)", Stage.IDS_IN)
    ROWS = Collective("all_to_all (rows of unique ids)", Stage.VALUES_OUT)
    BACK = Collective("all_to_all (gradients of unique ids)", Stage.GRADIENTS_BACK)
    GATHERED_BACK = Collective("all_to_all (gathered gradients)", Stage.GRADIENTS_BACK)
    SUM_SHARED = Collective("all_reduce (shared rows)", Stage.GRADIENTS_BACK)
    COUNTS_BYTES = 3 * 8  # status, unique ids asked, unique ids gathered: int64 each

    tables: tuple[FetchTable, ...]
    lookups: tuple[int, ...]
    names: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    early: bool = False

    @staticmethod
    def of_table(table: FetchTable, line: str = "") -> Fetch:
        """One lookup in one table, for `descompiler.runtime.fetch.pull`."""
        return Fetch((table,), (0,), (table.name,), (Check(table.name, table.rows, None, line),))

    @cached_property
    def space(self) -> KeySpace:
        return KeySpace.of([t.pieces for t in self.tables])

    @cached_property
    def _placed(self) -> dict[torch.device, tuple[KeySpace, Tensor]]:
        return {}

    def on(self, device: torch.device) -> tuple[KeySpace, Tensor]:
        """The key space and the class of each table, on a device."""
        if device not in self._placed:
            self._placed[device] = self.space.to(device), torch.tensor(self.class_of, device=device)
        return self._placed[device]

    @cached_property
    def classes(self) -> list[range]:
        """The tables of each class."""
        result, start = [], 0
        for stop in range(1, len(self.tables) + 1):
            if stop == len(self.tables) or self.tables[stop].kind != self.tables[start].kind:
                result.append(range(start, stop))
                start = stop
        return result

    @cached_property
    def class_of(self) -> list[int]:
        """The class of each table."""
        return [c for c, members in enumerate(self.classes) for _ in members]

    @cached_property
    def dims(self) -> list[int]:
        """Of each class."""
        return [self.tables[m.start].dim for m in self.classes]

    @cached_property
    def trained(self) -> list[bool]:
        """Of each class."""
        return [self.tables[m.start].trained for m in self.classes]

    @cached_property
    def dynamic(self) -> bool:
        """Whether rows come and go, so that owners alone know who has one; such tables are fetched by themselves."""
        return any(t.table.dynamic for t in self.tables)

    @cached_property
    def shares(self) -> bool:
        """Whether any rows are on every rank."""
        return any(t.sizes[ALL] for t in self.tables)

    @cached_property
    def counts_told(self) -> int:
        """Of dynamic tables: numbers in front of the keys that a rank sends, so many keys of each table."""
        each = 2 if self.shares else 1
        return 0 if len(self.tables) * each == 1 else len(self.tables) * each

    @cached_property
    def divided(self) -> bool:
        """Whether any rows have one owner, so that rows cross."""
        return any(t.sizes[:ALL].any() for t in self.tables)

    @cached_property
    def gathered_classes(self) -> list[int]:
        """Classes of which gradients of shared rows are gathered."""
        return [
            c
            for c, members in enumerate(self.classes)
            if self.trained[c]
            and self.tables[members.start].gathered
            and any(self.tables[t].sizes[ALL] for t in members)
        ]

    @cached_property
    def reduced_tables(self) -> list[int]:
        """Tables of which gradients of shared rows are all-reduced."""
        return [t for t, x in enumerate(self.tables) if x.trained and not x.gathered and x.sizes[ALL]]

    def demand(self, step: Step) -> np.ndarray:
        """Bytes, sums over tables, of every rank, ``[5, N]``: of ids that are asked for, of rows that are served, that
        come back as gradients, of ids and of gradients that are gathered."""
        result: Any = [0.0] * 5
        for t in self.tables:
            x = step.unique.get(t.name, Counts()) if t.counted else Counts()
            gathered, row = t.trained and t.gathered, t.dim * step.narrow_size_of(t.wire_dtype)
            terms = (
                x.asked_bytes,
                x.served * row,
                x.asked * row * t.trained,
                x.shared_bytes * gathered,
                x.shared * row * gathered,
            )
            result = [a + b for a, b in zip(result, terms, strict=True)]
        return np.stack([np.broadcast_to(x, len(step.rows)) for x in result])

    def sent(self, step: Step) -> Iterator[Sent]:
        others = step.others
        asked, served, asked_trained, gathered_ids, gathered = self.demand(step)
        if not self.early:
            yield Sent(self.COUNTS, others * self.COUNTS_BYTES)
        if self.dynamic:  # what is of rows that all hold goes with what is of the others
            yield Sent(self.IDS, _rounded(asked + others * (gathered_ids + ID_BYTES * self.counts_told)))
            yield Sent(self.ROWS, _rounded(served))
            if any(t.trained for t in self.tables):
                yield Sent(self.BACK, _rounded(asked_trained + others * gathered))
            return
        if self.divided:
            yield Sent(self.IDS, _rounded(asked))
            yield Sent(self.ROWS, _rounded(served))
            if any(self.trained):
                yield Sent(self.BACK, _rounded(asked_trained))
        if self.gathered_classes:
            yield Sent(self.GATHERED_IDS, _rounded(others * gathered_ids))
            yield Sent(self.GATHERED_BACK, _rounded(others * gathered))
        if self.reduced_tables:
            # one more for each row of a table with sparse gradients: who looked it up
            reduced = [self.tables[t] for t in self.reduced_tables]
            size = sum(int(x.sizes[ALL]) * (x.dim + x.sparse) * step.size_of(x.wire_dtype) for x in reduced)
            yield Sent(self.SUM_SHARED, size, len({x.wire_dtype for x in reduced}))

    @cached_property
    def digits(self) -> int:
        """Bytes of a key at most, as a distance to the one before it."""
        return digits_of(int(np.sum([t.sizes for t in self.tables], axis=0).max()))

    @cached_property
    def padding_places(self) -> list[tuple[int, int]]:
        """Rank (`ALL`) and key there of each table's padding row; (-2, 0) for none."""
        keys = [int(self.space.offsets[t]) + max(x.padding_idx, 0) for t, x in enumerate(self.tables)]
        owners, places = (x.tolist() for x in self.space.locate(torch.tensor(keys)))
        return [(o, k) if x.padding_idx >= 0 else (-2, 0) for x, o, k in zip(self.tables, owners, places, strict=True)]

    def padding_in_piece(self, table: int, rank: int) -> int:
        """The row of a rank's piece of a table that is its padding row; -1 if it has none."""
        owner, key = self.padding_places[table]
        if owner == rank:
            return key - int(self.space.own[rank][table])
        if owner == ALL:
            return key - int(self.space.shared[table]) + int(self.tables[table].sizes[rank])
        return -1


def _rounded(expected: np.ndarray) -> np.ndarray:
    return expected.round().astype(np.int64)

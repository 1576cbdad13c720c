"""Layouts: what crosses the wire in one program, known at compile time, the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

from descompiler.layout.border import Entry, Exit, IdsIn, Part, ValuesOut, parts_on
from descompiler.layout.fetches import Fetch
from descompiler.layout.global_values import CoupledValues, Whole, WholeTables
from descompiler.layout.keys import ids_bytes
from descompiler.layout.pieces import ALL
from descompiler.layout.statistics import Statistics
from descompiler.layout.step import LeafStatus
from descompiler.layout.traffic import Traffic
from descompiler.layout.transfer import Counts, Crossed, Sent, Step, Transfer
from descompiler.layout.vocabulary import Vocabulary

K = TypeVar("K", bound=Transfer)


@dataclass(frozen=True)
class Layout:
    """All that crosses, in one program.

    Attributes
    ----------
    transfers : tuple of Transfer
        Those of one kind are in the order in which a step makes them.
    id_bytes : int
        Of an id of the model's tables.
    wire_dtype : torch.dtype or None
        What wider values are rounded to where they cross to be summed or used by their receiver alone: those that leave
        the region, rows that are fetched, gradients of both. Not rounded is what a collective sums, what every rank has
        to have alike, and what is compared or subtracted: dense gradients, coupled values, whole tables, products.
    """

    ranks: int
    transfers: tuple[Transfer, ...] = ()
    id_bytes: int = 8
    wire_dtype: torch.dtype | None = None

    def of(self, kind: type[K]) -> tuple[K, ...]:
        """The transfers of a kind, in order."""
        return tuple(t for t in self.transfers if isinstance(t, kind))

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Ids that enter the region."""
        return tuple(e for t in self.of(IdsIn) for e in t.entries)

    @cached_property
    def given(self) -> tuple[int, ...]:
        """Positions of the inputs that are the global batch's on every rank."""
        return tuple(i for t in self.of(IdsIn) for i in t.given)

    @cached_property
    def _parts(self) -> dict[int, tuple[Part, ...]]:
        return {}

    def parts_on(self, rank: int) -> tuple[Part, ...]:
        """What ``rank`` gets of the ids that enter; asked in each step, and found once."""
        if rank not in self._parts:
            self._parts[rank] = parts_on(self.entries, rank)
        return self._parts[rank]

    @cached_property
    def exits(self) -> tuple[Exit, ...]:
        """Values that leave the region."""
        return tuple(e for t in self.of(ValuesOut) for e in t.exits)

    @cached_property
    def fetches(self) -> tuple[Fetch, ...]:
        """Lookups outside the region whose unique rows are fetched, or whose rows' gradients are gathered."""
        return self.of(Fetch)

    @cached_property
    def early(self) -> bool:
        """Whether the first fetch's ids are known before the header."""
        return any(f.early for f in self.fetches)

    @cached_property
    def exchanges(self) -> tuple[CoupledValues, ...]:
        """What values that mix the rows of the batch cost."""
        return tuple(t for t in self.transfers if isinstance(t, CoupledValues))

    @cached_property
    def vocabularies(self) -> tuple[Vocabulary, ...]:
        """Products with tables whose rows are divided."""
        return self.of(Vocabulary)

    @cached_property
    def wholes(self) -> tuple[Whole, ...]:
        """Tables that are gathered whole."""
        return tuple(w for t in self.of(WholeTables) for w in t.tables)

    @cached_property
    def crossed(self) -> tuple[Crossed, ...]:
        """Values that plans tell of one by one, in the order of the list."""
        return tuple(x for t in self.transfers for x in t.crossed())

    @cached_property
    def leaves_backward(self) -> bool:
        """Whether gradients go through opaque leaves: at the end of backward, ranks tell whether one failed in it."""
        return any(t.backward for t in self.of(LeafStatus))

    def expected(self, rows: Sequence[int], statistics: Statistics | None = None) -> dict[str, Counts]:
        """Expected unique ids by table, of every rank, where rank r has ``rows[r]`` rows; of assumed statistics by
        default."""
        result: dict[str, Counts] = {}
        batches = Counter(rows)
        for t in {t.name: t for f in self.fetches for t in f.tables}.values():
            stats = Statistics.assumed([t.table]) if statistics is None else statistics
            asked, served, shared, asked_bytes, shared_bytes = np.zeros((5, self.ranks))
            for batch, ranks in batches.items():
                unique, shares = stats.unique(t.name, batch), stats.shares(t.name, t.pieces, batch)
                own, here = shares[:ALL], np.equal(rows, batch)
                asked[here] = unique * (1 - own[here] - shares[ALL])
                served += (ranks - here) * unique * own
                shared[here] = unique * shares[ALL]
                sizes = ids_bytes(unique * shares, t.pieces.sizes, dynamic=t.table.dynamic)
                asked_bytes[here] = sizes[:ALL].sum() - sizes[:ALL][here]
                shared_bytes[here] = sizes[ALL]
            result[t.name] = Counts(asked, served, shared, asked_bytes, shared_bytes)
        return result

    def predict_kinds(self, rows: int, itemsize: int, statistics: Statistics | None = None) -> list[Traffic]:
        """What ranks are expected to send in a step in which each has ``rows`` rows: once for ranks that send alike."""
        return [traffic for _, traffic in self.predict_alike(rows, itemsize, statistics)]

    def predict_alike(
        self, rows: int, itemsize: int, statistics: Statistics | None = None
    ) -> list[tuple[int, Traffic]]:
        """As `predict_kinds`, with how many ranks send so."""
        every = [rows] * self.ranks
        sent = self._sent(every, itemsize, self.expected(every, statistics))
        differing = [s.size_bytes for s in sent if isinstance(s.size_bytes, np.ndarray)]
        by_rank = np.vstack([np.zeros(self.ranks, np.int64), *differing])  # if nothing differs, all are alike
        _, first, counts = np.unique(by_rank, axis=1, return_index=True, return_counts=True)
        return [(n, self._traffic(r, sent)) for r, n in sorted(zip(first.tolist(), counts.tolist(), strict=True))]

    def predict(
        self,
        rank: int,
        rows: Sequence[int],
        itemsize: int,
        *,
        backward: bool = True,
        unique: Mapping[str, Counts] | None = None,
    ) -> Traffic:
        """What ``rank`` sends in a step in which rank r has ``rows[r]`` rows: bytes and calls.

        Parameters
        ----------
        backward : bool
            Whether gradients are sent; False is a forward without gradients.
        unique : mapping of str to Counts, optional
            Unique ids of the step, by table: exact if they are those of the step
            (`descompiler.DistributedModule.unique`). `expected` by default.
        """
        sent = self._sent(rows, itemsize, self.expected(rows) if unique is None else unique)
        return self._traffic(rank, [s for s in sent if backward or not s.collective.trained])

    def sends_as(self, other: Layout, rows: int, itemsize: int) -> bool:
        """Whether another layout sends the same, whatever the ids: what people are told besides may differ."""
        options = [(x.ranks, x.id_bytes, x.wire_dtype, x.given) for x in (self, other)]
        if options[0] != options[1]:
            return False
        crossed, others = (Counter((c.kind, c.width, c.ids) for c in x.crossed) for x in (self, other))
        tables = {t.name for x in (self, other) for f in x.fetches for t in f.tables}
        ranks = np.arange(1, self.ranks + 1)
        unique = {
            n: Counts(ranks * i, ranks * (i + 7), ranks + i, ranks * (i + 3), ranks + 2 * i)
            for i, n in enumerate(sorted(tables), start=2)
        }
        every = [rows + i % 3 for i in range(self.ranks)]
        mine, its = (
            [(collective, np.asarray(size).tolist(), calls) for collective, size, calls in sent]
            for sent in (x._sent(every, itemsize, unique) for x in (self, other))
        )
        return crossed == others and mine == its

    def _sent(self, rows: Sequence[int], itemsize: int, unique: Mapping[str, Counts]) -> list[Sent]:
        """What all ranks send, in order of stage."""
        if self.ranks == 1:
            return []
        step = Step(np.asarray(rows, dtype=np.int64), itemsize, unique, self.wire_dtype)
        return sorted((s for t in self.transfers for s in t.sent(step)), key=lambda s: s.collective.stage)

    def _traffic(self, rank: int, sent: Sequence[Sent]) -> Traffic:
        result = Traffic()
        for collective, size, calls in sent:
            mine = int(size[rank]) if isinstance(size, np.ndarray) else size
            result.add(collective, collective.sent_bytes(mine, self.ranks), calls)
        return result

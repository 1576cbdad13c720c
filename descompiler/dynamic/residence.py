"""Residence: which ids have rows, and in which slots; who comes in a lookup, and who goes when a step ends."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from descompiler.dynamic.admission import Admission
from descompiler.dynamic.eviction import Eviction, Seen
from descompiler.dynamic.hashing import slice_of, slices_for
from descompiler.dynamic.id_map import IdMap
from descompiler.dynamic.rows import among
from descompiler.dynamic.storage import Growing
from descompiler.errors import TableFullError

MOST_SLOTS = 2**31 - 1
"""Slots are int32 in the map's cells."""

_CPU = torch.device("cpu")
_NONE = torch.empty(0, dtype=torch.int64)


def _different(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The words that there are, sorted, and which of them each one is: `np.unique`, which takes five times as long."""
    order = words.argsort(kind="stable")
    ordered = words[order]
    begins = np.ones(words.size, dtype=bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    which = np.empty_like(order)
    which[order] = begins.cumsum() - 1
    return ordered[begins], which


class FreeSlots:
    """Slots that nobody has: those of rows that went, the last ones first, and then all behind the highest."""

    def __init__(self) -> None:
        self.end = 1  # slot 0 is the default row's
        self._freed: list[Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self._freed))

    def take(self, count: int) -> Tensor:
        """Some slots; they are taken."""
        taken = []
        while count and self._freed:
            last = self._freed.pop()
            if len(last) > count:
                self._freed.append(last[:-count])
                last = last[-count:]
            taken.append(last)
            count -= len(last)
        if count or not taken:
            taken.append(torch.arange(self.end, self.end + count))
            self.end += count
        return taken[0] if len(taken) == 1 else torch.cat(taken)

    def give(self, slots: Tensor) -> None:
        """Slots that are free again."""
        if len(slots):
            self._freed.append(slots)

    def restore(self, taken: Tensor, end: int) -> None:
        """Begin again with these slots taken, of those below an end."""
        free = torch.ones(end, dtype=torch.bool)
        free[0] = False
        free[taken] = False
        self.end, self._freed = end, []
        self.give(free.nonzero()[:, 0])


class Residence:
    """Who has a row. Whatever decides is a function of the sets of keys that the steps of a key's slice looked up.

    Parameters
    ----------
    admit : Admission
    evict : Eviction, optional
        None: rows stay.
    max_rows : int, optional
        Rows that there are never more of.
    """

    def __init__(self, admit: Admission, evict: Eviction | None, max_rows: int | None):
        self.admit, self.evict, self.max_rows = admit, evict, max_rows
        limit = max_rows if evict is None or evict.capacity is None else evict.capacity
        self.slices = slices_for(limit)
        self.step = 0
        self.map = IdMap(self.slices)
        self.sketch = admit.sketch(self.slices)
        self.free = FreeSlots()
        self.last = None if evict is None else Growing((1,), torch.int32, _CPU)
        self.counts = Growing((1,), torch.int32, _CPU) if evict is not None and evict.counts else None
        self.sighted: list[Tensor] = []
        """Keys that this step looked up and did not admit."""

    def __len__(self) -> int:
        return len(self.map)

    def slices_of(self, keys: Tensor) -> Tensor:
        """The slice of each key."""
        return slice_of(keys, self.slices)

    def find(self, keys: Tensor) -> Tensor:
        """Slots of keys; 0, the default row's, for those without a row."""
        return self.map.find(keys)

    def look_up(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots of keys that training looks up, and the keys that got rows just now, with their slots.

        Raises
        ------
        TableFullError
            If there would be more rows than the limit; nothing has changed.
        """
        slots = self.map.find(keys)
        found = slots.numpy()  # most steps have few new ids, and calls of arrays take less than those of tensors
        missing = (found == 0).nonzero()[0]
        came = places = _NONE
        if missing.size:
            new, inverse = _different(keys.numpy()[missing])
            admitted = self.admit.admits(torch.from_numpy(new), self.step, self.sketch).numpy()
            came = torch.from_numpy(new[admitted])
            self._check_room(len(came))
            places = self.enter(came)
            of_new = np.zeros_like(new)
            of_new[admitted] = places.numpy()
            found[missing] = of_new[inverse]
            if self.sketch is not None:
                self.sighted.append(torch.from_numpy(new[~admitted]))
        self._touch(found)
        return slots, came, places

    def enter(self, keys: Tensor) -> Tensor:
        """Slots for keys that differ and have none; nothing is asked."""
        slots = self.free.take(len(keys))
        for seen in self._seen():
            seen.have(self.free.end)
        if self.last is not None:
            self.last.tensor.index_fill_(0, slots, -1)  # no step has seen it
        if self.counts is not None:
            self.counts.tensor.index_fill_(0, slots, 0)
        self.map.insert(keys, slots)
        return slots

    def end_step(self, kept: Tensor) -> Tensor:
        """End a step: the slots of rows that have gone, of which none is among those kept."""
        gone = _NONE if self.evict is None else self._evict(self.evict, kept)
        if self.sketch is not None:
            if self.sighted:
                self.sketch.add(torch.cat(self.sighted).unique())
            self.sketch.end_step(self.step)
        self.sighted.clear()
        self.step += 1
        return gone

    def resident(self) -> Tensor:
        """The slots of all rows, in no order."""
        return self.map.in_slices(torch.arange(self.slices))

    def memory_bytes(self) -> int:
        """Bytes beside the rows: map, keys and counters; not the sketch, whose size doesn't grow."""
        return self.map.memory_bytes() + sum(x.tensor.nbytes for x in self._seen())

    def _seen(self) -> Iterator[Growing]:
        return (x for x in (self.last, self.counts) if x is not None)

    def _check_room(self, coming: int) -> None:
        most = MOST_SLOTS - 1 if self.max_rows is None else self.max_rows
        if len(self) + coming > most:
            raise TableFullError(
                f"{len(self)} rows, and this lookup has {coming} new ids: with them the table would have more than "
                f"max_rows={most} (on several ranks this rank's share of it). Nothing has changed: raise max_rows, "
                "admit fewer ids (admit=AfterSightings(n)), let rows go (evict=Capacity(rows)), or look up less"
            )

    def _touch(self, slots: np.ndarray) -> None:
        """Note that this step has seen these slots."""
        if self.last is None:
            return
        last = self.last.tensor.numpy()
        if self.counts is not None:
            first, counts = slots[last[slots] != self.step], self.counts.tensor.numpy()
            counts[first] = counts[first] + 1  # a slot is there several times: written, not added
        last[slots] = self.step

    def _evict(self, evict: Eviction, kept: Tensor) -> Tensor:
        assert self.last is not None
        live = self.map.live
        visited = evict.visited(live, self.step)
        if not len(visited):
            return visited  # no slice, and so no slot
        slots = self.map.in_slices(visited)
        keys = self.map.keys.tensor[slots]
        slices = slice_of(keys, self.slices)
        counts = None if self.counts is None else self.counts.tensor[slots]
        gone = evict.gone(Seen(slices, keys, self.last.tensor[slots], counts), live, self.step, among(slots, kept))
        leaving = slots[gone]
        if len(leaving):
            changed = torch.zeros(self.slices, dtype=torch.bool).index_fill_(0, slices[gone], True)
            self.map.keep(changed.nonzero()[:, 0], slots[changed[slices].logical_and_(~gone)])
            self.free.give(leaving)
        return leaving

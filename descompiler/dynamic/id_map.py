"""The map from keys to slots: open addressing over tensors, slice by slice, without a loop or an object for each id.

Each slice of the key space has equally many cells, which hold slots (int32); the key of a slot is kept once, by slot. A
key is looked for from its home on, cell by cell, until it or an empty cell is met: all keys of a call at once, those that
are still looked for again in the next round. When cells get few, slices move to a layout of more cells, some at each
call that inserts, so that no call pays for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from descompiler.dynamic.hashing import slice_of
from descompiler.dynamic.storage import Growing

EMPTY, DELETED = 0, -1
"""What a cell holds that holds no slot; slot 0 is nobody's."""

FEWEST_CELLS = 16
FULL, CROWDED, GROWTH = 0.8, 0.6, 1.5
"""Of its cells a slice uses at most `FULL`; at `CROWDED` on average the next layout is begun, with so many times as many."""

MOVED_FOR_EACH = 5
"""Keys that move to the next layout for each key that is inserted: all have, before a quarter more is there."""


@dataclass(frozen=True)
class Layout:
    """The cells of all slices, as many for each."""

    cells: Tensor
    size: int

    @staticmethod
    def of(slices: int, size: int) -> Layout:
        return Layout(Growing((slices * size,), torch.int32, torch.device("cpu"), slices * size).tensor, size)

    @property
    def room(self) -> int:
        """Cells that a slice may use: some stay empty, where searches end."""
        return int(FULL * self.size)

    def starts(self, keys: Tensor, slices: Tensor) -> tuple[Tensor, Tensor]:
        """The first cell of each key's slice, and its home in it: by the low bits, as the top ones chose the slice."""
        return slices * self.size, (keys.bitwise_and(0xFFFFFFFF).mul_(self.size)).bitwise_right_shift_(32)

    def next(self, at: Tensor) -> Tensor:
        """The cells behind those in each slice."""
        at = at + 1
        return at.masked_fill_(at == self.size, 0)


class IdMap:
    """Slots by keys (int64 words that `hashing.mix` has made), from slot 1 on.

    Parameters
    ----------
    slices : int
        A power of two.

    Examples
    --------
    >>> ids = IdMap(64)
    >>> keys = torch.tensor([5, -7, 1 << 40])
    >>> ids.insert(keys, torch.tensor([1, 2, 3]))
    >>> ids.find(torch.tensor([-7, 6, 5])).tolist()
    [2, 0, 1]
    >>> ids.delete(torch.tensor([1]))
    >>> ids.find(keys).tolist(), len(ids)
    ([0, 2, 3], 2)
    """

    def __init__(self, slices: int):
        self.slices = slices
        self.keys = Growing((1,), torch.int64, torch.device("cpu"))
        self.live = torch.zeros(slices, dtype=torch.int64)
        self._used = torch.zeros(slices, dtype=torch.int64)  # cells that are not empty
        self._layout, self._old = Layout.of(slices, FEWEST_CELLS), None
        self._moved = torch.ones(slices, dtype=torch.bool)  # to the layout, from the old one
        self._count = 0

    _old: Layout | None

    def __len__(self) -> int:
        return self._count

    @property
    def moving(self) -> bool:
        """Whether slices are on their way to a layout of more cells."""
        return self._old is not None

    def memory_bytes(self) -> int:
        """Bytes of cells and keys."""
        cells = self._layout.cells.nbytes + (self._old.cells.nbytes if self._old is not None else 0)
        return cells + self.keys.tensor.nbytes

    def find(self, keys: Tensor) -> Tensor:
        """The slot of each key, 0 for those that have none; a key may be there several times."""
        found = torch.zeros(len(keys), dtype=torch.int64)
        for layout, part, of, slices in self._parts(keys):
            slots, _ = self._search(layout, of, slices)
            if part is None:
                return slots
            found[part] = slots
        return found

    def insert(self, keys: Tensor, slots: Tensor) -> None:
        """Enter keys that differ, and are not there, at slots that are free."""
        if not len(keys):
            return
        self.keys.grow(int(slots.max()) + 1)
        self.keys.tensor[slots] = keys
        slices = slice_of(keys, self.slices)
        added = torch.bincount(slices, minlength=self.slices)
        self._make_room(added)
        for layout, part, of, where in self._parts(keys, slices):
            self._place(layout, of, slots if part is None else slots[part], where)
        self.live += added
        self._count += len(keys)
        if self._old is not None:
            self._move_some(MOVED_FOR_EACH * len(keys))

    def delete(self, slots: Tensor) -> None:
        """Take out the keys of slots that differ and are taken."""
        keys = self.keys.tensor[slots]
        for layout, _, of, slices in self._parts(keys):
            _, cells = self._search(layout, of, slices)
            layout.cells[cells] = DELETED
            self.live -= torch.bincount(slices, minlength=self.slices)
        self._count -= len(slots)

    def in_slices(self, slices: Tensor) -> Tensor:
        """The slots that are taken in some slices, in no order."""
        moved = self._moved[slices]
        found = [_taken(self._layout, slices[moved])]
        if self._old is not None:
            found.append(_taken(self._old, slices[~moved]))
        return torch.cat(found)

    def _parts(self, keys: Tensor, slices: Tensor | None = None) -> Iterator[tuple[Layout, Tensor | None, Tensor, Tensor]]:
        """Layouts, which keys have their slices there (None: all), those keys, and their slices."""
        slices = slice_of(keys, self.slices) if slices is None else slices
        if self._old is None:
            yield self._layout, None, keys, slices
            return
        moved = self._moved[slices]
        for layout, part in ((self._layout, moved.nonzero()[:, 0]), (self._old, moved.logical_not().nonzero()[:, 0])):
            yield layout, part, keys[part], slices[part]

    def _search(self, layout: Layout, keys: Tensor, slices: Tensor) -> tuple[Tensor, Tensor]:
        """The slots of keys, 0 without, and the cells where the searches ended."""
        first, at = layout.starts(keys, slices)
        slots, ends = torch.zeros_like(keys), torch.zeros_like(keys)
        rest: Tensor | None = None
        while len(keys):
            cells = first + at
            held = layout.cells.index_select(0, cells)
            hit = (self.keys.tensor.index_select(0, held.clamp(min=0)) == keys).logical_and_(held > 0)
            now = held.masked_fill(~hit, 0).long()
            if rest is None:
                slots, ends = now, cells
            else:
                slots[rest], ends[rest] = now, cells
            further = hit.logical_or_(held == EMPTY).logical_not_().nonzero()[:, 0]
            rest = further if rest is None else rest[further]
            keys, first, at = keys[further], first[further], layout.next(at[further])
        return slots, ends

    def _place(self, layout: Layout, keys: Tensor, slots: Tensor, slices: Tensor) -> None:
        """Write slots of keys that are not there to the first cells that are free."""
        first, at = layout.starts(keys, slices)
        slots = slots.to(torch.int32)
        while len(slots):
            cells = first + at
            before = layout.cells[cells]
            free = (before <= 0).nonzero()[:, 0]
            layout.cells[cells[free]] = slots[free]
            placed = layout.cells[cells] == slots  # of several that want a cell one has it
            filled = placed.logical_and(before == EMPTY)
            self._used += torch.bincount(slices[filled], minlength=self.slices)
            rest = placed.logical_not_().nonzero()[:, 0]
            slots, slices, first, at = slots[rest], slices[rest], first[rest], layout.next(at[rest])

    def _make_room(self, added: Tensor) -> None:
        """Cells for what is added to each slice; begins the next layout when it is time."""
        most = int((self.live + added).max())
        total = self._count + int(added.sum())
        crowded = self._old is None and total > CROWDED * self.slices * self._layout.size
        if crowded or most > self._layout.room:
            if self._old is not None:
                self._move(self._moved.logical_not().nonzero()[:, 0])
            fitting = max(most / FULL, total / (CROWDED * self.slices)) + 1
            self._old, self._layout = self._layout, Layout.of(self.slices, int(max(GROWTH * self._layout.size, fitting)))
            self._moved = torch.zeros(self.slices, dtype=torch.bool)
        room = torch.full_like(self._used, self._layout.room)
        if self._old is not None:
            room.masked_fill_(~self._moved, self._old.room)
        tight = (self._used + added > room).nonzero()[:, 0]
        if len(tight):
            self._move(tight)

    def _move_some(self, keys: int) -> None:
        """Move slices that have so many keys together, or all that are left."""
        waiting = self._moved.logical_not().nonzero()[:, 0]
        before = self.live[waiting].cumsum(0) - self.live[waiting]
        self._move(waiting[before < keys])

    def _move(self, slices: Tensor) -> None:
        """Write slices anew, to the current layout: without deleted cells."""
        slots = self.in_slices(slices)
        moved = self._moved[slices]
        self._layout.cells.view(self.slices, -1)[slices[moved]] = EMPTY
        self._used[slices] = 0
        self._moved[slices] = True
        if self._old is not None and bool(self._moved.all()):
            self._old = None
        keys = self.keys.tensor[slots]
        self._place(self._layout, keys, slots, slice_of(keys, self.slices))


def _taken(layout: Layout, slices: Tensor) -> Tensor:
    """The slots in the cells of slices."""
    cells = layout.cells.view(-1, layout.size)[slices].view(-1)
    return cells[cells > 0].long()

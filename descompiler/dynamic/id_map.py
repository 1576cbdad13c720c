"""The map from keys to slots: open addressing over tensors, slice by slice, without a loop or an object for each id.

Each slice of the key space has equally many cells, which hold slots (int32); the key of a slot is kept once, by slot. A
key is looked for from its home on, in steps of its own, until it or an empty cell is met: all keys of a call at once,
those that are still looked for again in the next round. When cells get few, slices move to a layout of more cells,
some at each call that inserts, so that no call pays for all of them. A slice that loses keys is written anew, so that
searches pass no cells of keys that are gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from descompiler.dynamic.hashing import slice_of
from descompiler.dynamic.storage import Growing

EMPTY = 0
"""What a cell holds that holds no slot: slot 0 is nobody's."""

FEWEST_CELLS = 17
FULL, CROWDED, GROWTH = 0.8, 0.6, 1.4
"""Of its cells a slice uses at most `FULL`; at `CROWDED` on average the next layout is begun, larger by `GROWTH`."""

MOVED_FOR_EACH = 4
"""Keys that move to the next layout for each key that is inserted: all have, when a quarter more is there."""

FEW = 4096
"""Keys up to which numpy takes less: the last rounds are of a few keys, and cost what calls do."""

_LOW = 0xFFFFFFFF


def prime_from(size: int) -> int:
    """The first prime number from an odd or even size on.

    >>> prime_from(17), prime_from(24)
    (17, 29)
    """
    size |= 1
    while any(size % d == 0 for d in range(3, int(size**0.5) + 1, 2)):
        size += 2
    return size


@dataclass(frozen=True)
class Layout:
    """The cells of all slices: as many for each, a prime number, so that steps of any length come to every cell."""

    cells: Tensor
    size: int

    @staticmethod
    def of(slices: int, size: int) -> Layout:
        size = prime_from(size)
        return Layout(Growing((slices * size,), torch.int32, torch.device("cpu"), slices * size).tensor, size)

    @property
    def room(self) -> int:
        """Cells that a slice may use: some stay empty, where searches end."""
        return int(FULL * self.size)

    def home(self, keys: Tensor) -> Tensor:
        """Where in its slice a key is looked for first: by the low bits, as the top ones chose the slice."""
        return keys.bitwise_and(_LOW).mul_(self.size).bitwise_right_shift_(32)

    def step(self, keys: Tensor) -> Tensor:
        """How many cells further a key is looked for next, from 1 on."""
        return keys.bitwise_right_shift(16).bitwise_and_(_LOW).mul_(self.size - 1).bitwise_right_shift_(32).add_(1)

    def further(self, at: Tensor, step: Tensor) -> Tensor:
        """The next place in the slice."""
        at = at + step
        return at.sub_((at >= self.size).mul(self.size))


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
    >>> ids.keep(slice_of(keys, 64), torch.tensor([1, 3]))
    >>> ids.find(keys).tolist(), len(ids)
    ([1, 0, 3], 2)
    """

    def __init__(self, slices: int):
        self.slices = slices
        self.keys = Growing((1,), torch.int64, torch.device("cpu"))
        self.live = torch.zeros(slices, dtype=torch.int64)
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
            slots = self._search(layout, of, slices)
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
            _place(layout, of, slots if part is None else slots[part], where)
        self.live += added
        self._count += len(keys)
        if self._old is not None:
            self._move_some(MOVED_FOR_EACH * len(keys))

    def keep(self, slices: Tensor, slots: Tensor) -> None:
        """Of the keys in some slices keep those at slots, and take out the others; slices may be given twice."""
        slices = slices.unique()
        self._write(slices, slots)
        held = torch.bincount(slice_of(self.keys.tensor[slots], self.slices), minlength=self.slices)[slices]
        self._count += int(held.sum() - self.live[slices].sum())
        self.live[slices] = held

    def in_slices(self, slices: Tensor) -> Tensor:
        """The slots that are taken in some slices, in no order."""
        if self._old is None:
            return _taken(self._layout, slices)
        moved = self._moved[slices]
        return torch.cat([_taken(self._layout, slices[moved]), _taken(self._old, slices[~moved])])

    def _parts(
        self, keys: Tensor, slices: Tensor | None = None
    ) -> Iterator[tuple[Layout, Tensor | None, Tensor, Tensor]]:
        """Layouts, which keys have their slices there (None: all), those keys, and their slices."""
        slices = slice_of(keys, self.slices) if slices is None else slices
        if self._old is None:
            yield self._layout, None, keys, slices
            return
        moved = self._moved[slices]
        for layout, part in ((self._layout, moved.nonzero()[:, 0]), (self._old, moved.logical_not().nonzero()[:, 0])):
            yield layout, part, keys[part], slices[part]

    def _search(self, layout: Layout, keys: Tensor, slices: Tensor) -> Tensor:
        """The slots of keys, 0 without."""
        first, at, known = slices * layout.size, layout.home(keys), self.keys.tensor
        held = layout.cells.index_select(0, first + at)
        # of an empty cell the key is that of slot 0, whatever it is: the search ends there
        rest = _unlike(known, held, keys)
        slots = held.long()
        keys, first, at = keys[rest], first[rest], at[rest]
        step = layout.step(keys)
        while len(rest) > FEW:
            at = layout.further(at, step)
            held = layout.cells.index_select(0, first + at)
            slots[rest] = held.long()
            further = _unlike(known, held, keys)
            rest, keys, first, at, step = (x[further] for x in (rest, keys, first, at, step))
        if len(rest):
            _search_few(layout, known.numpy(), slots.numpy(), *(x.numpy() for x in (rest, keys, first, at, step)))
        return slots

    def _make_room(self, added: Tensor) -> None:
        """Cells for what is added to each slice; begins the next layout when it is time."""
        after = self.live + added
        most, total = int(after.max()), int(after.sum())
        crowded = self._old is None and total > CROWDED * self.slices * self._layout.size
        if crowded or most > self._layout.room:
            self._write(self._moved.logical_not().nonzero()[:, 0])
            fitting = int(max(GROWTH * self._layout.size, most / FULL + 1, total / (CROWDED * self.slices) + 1))
            self._old, self._layout = self._layout, Layout.of(self.slices, fitting)
            self._moved = torch.zeros(self.slices, dtype=torch.bool)
        if self._old is not None:
            self._write((after > self._old.room).logical_and_(~self._moved).nonzero()[:, 0])

    def _move_some(self, keys: int) -> None:
        """Move slices that have so many keys together, or all that are left."""
        waiting = self._moved.logical_not().nonzero()[:, 0]
        before = self.live[waiting].cumsum(0) - self.live[waiting]
        self._write(waiting[before < keys])

    def _write(self, slices: Tensor, slots: Tensor | None = None) -> None:
        """Write slices anew, in the current layout: with the slots that they have, or these."""
        if not len(slices):
            return
        slots = self.in_slices(slices) if slots is None else slots
        self._layout.cells.view(self.slices, -1)[slices[self._moved[slices]]] = EMPTY
        self._moved[slices] = True
        if self._old is not None and bool(self._moved.all()):
            self._old = None
        keys = self.keys.tensor[slots]
        _place(self._layout, keys, slots, slice_of(keys, self.slices))


def _unlike(known: Tensor, held: Tensor, keys: Tensor) -> Tensor:
    """Which of these cells hold another key."""
    ended = (known.index_select(0, held) == keys).logical_or_(held == EMPTY)
    return ended.logical_not_().nonzero()[:, 0]


def _place(layout: Layout, keys: Tensor, slots: Tensor, slices: Tensor) -> None:
    """Write slots of keys that are not there to the first cells that are free."""
    first, at, step = slices * layout.size, layout.home(keys), layout.step(keys)
    slots = slots.to(torch.int32)
    while len(slots) > FEW:
        cells = first + at
        free = (layout.cells.index_select(0, cells) == EMPTY).nonzero()[:, 0]
        layout.cells[cells[free]] = slots[free]
        # of several that want a cell one has it
        rest = (layout.cells.index_select(0, cells) != slots).nonzero()[:, 0]
        slots, first, at, step = (x[rest] for x in (slots, first, at, step))
        at = layout.further(at, step)
    if len(slots):
        _place_few(layout, *(x.numpy() for x in (slots, first, at, step)))


def _search_few(
    layout: Layout,
    known: np.ndarray,
    slots: np.ndarray,
    rest: np.ndarray,
    keys: np.ndarray,
    first: np.ndarray,
    at: np.ndarray,
    step: np.ndarray,
) -> None:
    """Go on with a search for those that are left, and write what is found."""
    cells = layout.cells.numpy()
    while rest.size:
        at = at + step
        at -= layout.size * (at >= layout.size)
        held = cells[first + at]
        slots[rest] = held
        further = ((known[held] != keys) & (held != EMPTY)).nonzero()[0]
        rest, keys, first, at, step = (x[further] for x in (rest, keys, first, at, step))


def _place_few(layout: Layout, slots: np.ndarray, first: np.ndarray, at: np.ndarray, step: np.ndarray) -> None:
    """As `_place`, of some that are left, in cells where they have not been looked for."""
    cells = layout.cells.numpy()
    while slots.size:
        where = first + at
        free = (cells[where] == EMPTY).nonzero()[0]
        cells[where[free]] = slots[free]
        rest = (cells[where] != slots).nonzero()[0]
        slots, first, at, step = (x[rest] for x in (slots, first, at, step))
        at = at + step
        at -= layout.size * (at >= layout.size)


def _taken(layout: Layout, slices: Tensor) -> Tensor:
    """The slots in the cells of slices."""
    cells = layout.cells.view(-1, layout.size)[slices].view(-1)
    return cells[cells != EMPTY].long()

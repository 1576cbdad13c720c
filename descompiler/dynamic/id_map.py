"""The map from keys to slots: open addressing over arrays, slice by slice, without a loop or an object for each id.

Each slice of the key space has equally many cells, which hold slots (int32); the key of a slot is kept once, by slot. A
key is looked for from its home on, in steps of its own, until it or an empty cell is met: all keys of a call at once,
those that are still looked for again in the next round. When cells get few, slices move to a layout of more cells,
some as keys are inserted, so that no call pays for all of them. A slice that loses keys is written anew, so that
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

MOVED_AT_ONCE = 2048
"""Keys that move together, so that an insertion of few does not pay for the calls: they are owed until then."""

FEW = 4096
"""Places up to which numpy takes less to look at: torch's calls cost more, and it is faster from there on."""

MOST_AHEAD = 8
"""Places of a key that are looked at in one round."""

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

    cells: np.ndarray
    size: int
    held: Growing

    @staticmethod
    def of(slices: int, size: int) -> Layout:
        size = prime_from(size)
        held = Growing((slices * size,), torch.int32, torch.device("cpu"), slices * size)
        return Layout(held.tensor.numpy(), size, held)

    def bytes_of(self, slices: int) -> int:
        """Of the cells of some slices."""
        return slices * self.size * self.cells.itemsize

    @property
    def room(self) -> int:
        """Cells that a slice may use: some stay empty, where searches end."""
        return int(FULL * self.size)

    def home(self, keys: np.ndarray) -> np.ndarray:
        """Where in its slice a key is looked for first: by the low bits, as the top ones chose the slice."""
        home: np.ndarray = keys & _LOW
        home *= self.size
        home >>= 32
        return home

    def step(self, keys: np.ndarray) -> np.ndarray:
        """How many cells further a key is looked for next, from 1 on."""
        step: np.ndarray = keys >> 16
        step &= _LOW
        step *= self.size - 1
        step >>= 32
        step += 1
        return step

    def ahead(self, at: np.ndarray, step: np.ndarray) -> np.ndarray:
        """The next places in the slice, a row for each key; the fewer keys, the more: a round costs what calls do."""
        width = min(max(FEW // max(at.size, 1), 1), MOST_AHEAD)
        if width == 1:
            places: np.ndarray = at + step
            places -= self.size * (places >= self.size)
            return places[:, None]
        places = at[:, None] + step[:, None] * np.arange(1, width + 1)
        places %= self.size
        return places


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
        self._live = np.zeros(slices, dtype=np.int64)
        self._layout, self._old = Layout.of(slices, FEWEST_CELLS), None
        self._moved = np.ones(slices, dtype=bool)  # to the layout, from the old one
        self._count = self._owed = 0
        self._left = 0  # cells of the old layout, from the first on, whose memory was given back

    _old: Layout | None

    def __len__(self) -> int:
        return self._count

    @property
    def live(self) -> Tensor:
        """How many keys each slice has (int64 ``[slices]``, a view)."""
        return torch.from_numpy(self._live)

    @property
    def moving(self) -> bool:
        """Whether slices are on their way to a layout of more cells."""
        return self._old is not None

    def memory_bytes(self) -> int:
        """Bytes of cells and keys; of cells that were never written, or were given back, there are none."""
        cells = self._layout.cells.nbytes
        if self._old is not None:
            if self._layout.held.is_on_demand:
                cells = self._layout.bytes_of(int(self._moved.sum()))
            cells += self._old.cells.nbytes - self._left * self._old.cells.itemsize
        return cells + self.keys.tensor.nbytes

    def find(self, keys: Tensor) -> Tensor:
        """The slot of each key, 0 for those that have none; a key may be there several times."""
        found = np.zeros(len(keys), dtype=np.int64)
        for layout, part, of, slices in self._parts(keys.numpy()):
            slots = self._search(layout, of, slices)
            if part is None:
                found = slots
            else:
                found[part] = slots
        return torch.from_numpy(found)

    def insert(self, keys: Tensor, slots: Tensor) -> None:
        """Enter keys that differ, and are not there, at slots that are free."""
        if not len(keys):
            return
        words, places = keys.numpy(), slots.numpy()
        self.keys.have(int(places.max()) + 1)
        self.keys.tensor.numpy()[places] = words
        slices = slice_of(words, self.slices)
        added = np.bincount(slices, minlength=self.slices)
        self._make_room(added)
        for layout, part, of, where in self._parts(words, slices):
            _place(layout, of, places if part is None else places[part], where)
        self._live += added
        self._count += len(keys)
        if self._old is not None:
            self._owed += MOVED_FOR_EACH * len(keys)
            if self._owed >= MOVED_AT_ONCE:
                self._move_some(self._owed)

    def keep(self, slices: Tensor, slots: Tensor) -> None:
        """Of the keys in some slices keep those at slots, and take out the others; slices may be given twice."""
        are = np.zeros(self.slices, dtype=bool)
        are[slices.numpy()] = True
        of, kept = are.nonzero()[0], slots.numpy()
        self._write(of, kept)
        held = np.bincount(slice_of(self._keys_of(kept), self.slices), minlength=self.slices)[of]
        self._count += int(held.sum() - self._live[of].sum())
        self._live[of] = held

    def in_slices(self, slices: Tensor) -> Tensor:
        """The slots that are taken in some slices, in no order."""
        return torch.from_numpy(self._taken(slices.numpy()))

    def _taken(self, slices: np.ndarray) -> np.ndarray:
        if self._old is None:
            return _taken(self._layout, slices)
        moved = self._moved[slices]
        return np.concatenate([_taken(self._layout, slices[moved]), _taken(self._old, slices[~moved])])

    def _keys_of(self, slots: np.ndarray) -> np.ndarray:
        return _at(self.keys.tensor.numpy(), slots)

    def _parts(
        self, keys: np.ndarray, slices: np.ndarray | None = None
    ) -> Iterator[tuple[Layout, np.ndarray | None, np.ndarray, np.ndarray]]:
        """Layouts, which keys have their slices there (None: all), those keys, and their slices."""
        slices = slice_of(keys, self.slices) if slices is None else slices
        if self._old is None:
            yield self._layout, None, keys, slices
            return
        moved = self._moved[slices]
        for layout, part in ((self._layout, moved.nonzero()[0]), (self._old, (~moved).nonzero()[0])):
            yield layout, part, keys[part], slices[part]

    def _search(self, layout: Layout, keys: np.ndarray, slices: np.ndarray) -> np.ndarray:
        """The slots of keys, 0 without."""
        first, at, known = slices * layout.size, layout.home(keys), self.keys.tensor.numpy()
        held = _at(layout.cells, first + at)
        slots = held.astype(np.int64)
        rest = (~_ends(known, held, keys)).nonzero()[0]
        keys, first, at = keys[rest], first[rest], at[rest]
        step = layout.step(keys)
        while rest.size:
            places = layout.ahead(at, step)
            held = _at(layout.cells, first[:, None] + places)
            ended, chosen = _first(_ends(known, held, keys[:, None]))
            slots[rest] = held[chosen]
            further = (~ended).nonzero()[0]
            at = places[:, -1]
            rest, keys, first, at, step = (x[further] for x in (rest, keys, first, at, step))
        return slots

    def _make_room(self, added: np.ndarray) -> None:
        """Cells for what is added to each slice; begins the next layout when it is time."""
        growing = added.nonzero()[0]
        after = self._live[growing] + added[growing]
        most, total = int(after.max()), self._count + int(added.sum())
        crowded = self._old is None and total > CROWDED * self.slices * self._layout.size
        if crowded or most > self._layout.room:
            self._write((~self._moved).nonzero()[0])
            fitting = int(max(GROWTH * self._layout.size, most / FULL + 1, total / (CROWDED * self.slices) + 1))
            self._old, self._layout = self._layout, Layout.of(self.slices, fitting)
            self._moved = np.zeros(self.slices, dtype=bool)
            self._owed = self._left = 0
        if self._old is not None:
            self._write(growing[(after > self._old.room) & ~self._moved[growing]])

    def _move_some(self, keys: int) -> None:
        """Move slices that have so many keys together, or all that are left."""
        self._owed = 0
        waiting = (~self._moved).nonzero()[0]
        before = self._live[waiting].cumsum() - self._live[waiting]
        self._write(waiting[before < keys])

    def _write(self, slices: np.ndarray, slots: np.ndarray | None = None) -> None:
        """Write slices anew, in the current layout: with the slots that they have, or these."""
        if not slices.size:
            return
        slots = self._taken(slices) if slots is None else slots
        self._layout.cells.reshape(self.slices, -1)[slices[self._moved[slices]]] = EMPTY
        self._moved[slices] = True
        if self._old is not None:
            first = int(self._moved.argmin())  # the first that is not moved; 0 if all are
            if first == 0 and self._moved[0]:
                self._old = None
            elif first * self._old.size > self._left:
                self._left = self._old.held.give_back(self._left, first * self._old.size)
        keys = self._keys_of(slots)
        _place(self._layout, keys, slots, slice_of(keys, self.slices))


def _at(held: np.ndarray, places: np.ndarray) -> np.ndarray:
    """What is held at places, in their shape."""
    if places.size <= FEW:
        found: np.ndarray = held[places]
        return found
    return torch.from_numpy(held).index_select(0, torch.from_numpy(places).view(-1)).numpy().reshape(places.shape)


def _ends(known: np.ndarray, held: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """In which of these cells a search ends: they hold the key, or nothing."""
    ends: np.ndarray = (_at(known, held) == keys) | (held == EMPTY)
    return ends


def _first(are: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """In which rows there is one, and where the first of each row is; without one, the row's last place."""
    column = are.argmax(1)
    row = np.arange(len(are))
    some = are[row, column]
    column[~some] = are.shape[1] - 1
    return some, (row, column)


def _place(layout: Layout, keys: np.ndarray, slots: np.ndarray, slices: np.ndarray) -> None:
    """Write slots of keys that are not there to the first cells that are free."""
    first, at, step = slices * layout.size, layout.home(keys), layout.step(keys)
    slots = slots.astype(np.int32)
    places = layout.ahead(at - step, step)  # from the home on
    while True:
        cells = first[:, None] + places
        free, chosen = _first(_at(layout.cells, cells) == EMPTY)
        cell, at = cells[chosen], places[chosen]
        layout.cells[cell[free]] = slots[free]
        # of several that want a cell one has it
        rest = (_at(layout.cells, cell) != slots).nonzero()[0]
        if not rest.size:
            return
        slots, first, at, step = (x[rest] for x in (slots, first, at, step))
        places = layout.ahead(at, step)


def _taken(layout: Layout, slices: np.ndarray) -> np.ndarray:
    """The slots in the cells of slices."""
    cells = layout.cells.reshape(-1, layout.size)[slices]
    taken: np.ndarray = cells[cells != EMPTY].astype(np.int64)
    return taken

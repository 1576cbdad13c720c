"""Tensors that grow at their end without a copy: views of address space that takes memory only where it is written."""

from __future__ import annotations

import mmap
import sys

import torch
from torch import Tensor

RESERVED_BYTES = 1 << 36
"""Address space for a tensor without a known limit: 64 GiB, of which a process has 128 TiB."""

SOME = 1024
"""Elements of which `Growing.have` has more than it needs, at most."""

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def reserve(size: int) -> mmap.mmap | None:
    """Address space of so many bytes, all zeros; None where the system has none to give without the memory."""
    if sys.platform != "linux":
        return None
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except (OSError, ValueError, OverflowError):  # strict overcommit, a limit of address space, or nothing left of it
        return None


class Growing:
    """A tensor whose first dimension grows; new elements are zeros.

    On the CPU of a Linux machine it lies in reserved address space, and growing is a wider view: nothing is copied, so
    views of before stay views of the same memory. Elsewhere, and where the space is used up, it is copied into twice
    the room. In reserved space `tensor` has a storage of its own size: what saves it writes no more than its elements.

    Parameters
    ----------
    shape : tuple of int
        Of the beginning.
    dtype : torch.dtype
    device : torch.device
    most : int, optional
        Size of dimension 0 that it will not exceed, if that is known.

    Examples
    --------
    >>> rows = Growing((1, 2), torch.float32, torch.device("cpu"))
    >>> first = rows.tensor
    >>> rows.grow(3)
    >>> first[0, 0] = 5
    >>> rows.tensor.tolist()
    [[5.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, most: int | None = None):
        self._item = dtype.itemsize
        for size in shape[1:]:
            self._item *= size
        self._most = most
        self.tensor = torch.empty((0, *shape[1:]), dtype=dtype, device=device)
        self._address = self.tensor.data_ptr()
        self._space: mmap.mmap | None = None
        self._room = 0
        self.grow(shape[0])

    @classmethod
    def holding(cls, values: Tensor, most: int | None = None) -> Growing:
        """One that begins with a copy of these values."""
        made = cls(tuple(values.shape), values.dtype, values.device, most)
        made.tensor.copy_(values)
        return made

    def have(self, size: int) -> None:
        """Let dimension 0 have at least a size: some more, so that few of many calls widen it."""
        if size > len(self.tensor):
            self.grow(size + SOME if self._most is None else max(size, min(size + SOME, self._most)))

    def grow(self, size: int) -> None:
        """Widen dimension 0 to a size; a smaller one than it has changes nothing."""
        if size <= len(self.tensor):
            return
        if size > self._room:
            self._move(size)
            return
        self.tensor = self._view(size)
        self._address = self.tensor.data_ptr()

    @property
    def is_elsewhere(self) -> bool:
        """Whether the elements lie somewhere else now, as in memory that torch shares with another process."""
        return self.tensor.data_ptr() != self._address

    @property
    def is_on_demand(self) -> bool:
        """Whether elements take memory only once they are written, and `give_back` takes it from them."""
        return self._space is not None

    def give_back(self, start: int, stop: int) -> int:
        """Let elements from start to stop be zeros, whose memory is the system's again: whole pages of them.

        Returns
        -------
        int
            From where on elements were left: ``start``, if nothing can be given back.
        """
        if self._space is None:
            return start
        first, end = (-(-start * self._item // mmap.PAGESIZE), stop * self._item // mmap.PAGESIZE)
        if end <= first:
            return start
        self._space.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE)
        return end * mmap.PAGESIZE // self._item

    def _view(self, size: int) -> Tensor:
        if self._space is None:
            return self._whole[:size]
        dtype, shape = self.tensor.dtype, (size, *self.tensor.shape[1:])
        return torch.frombuffer(self._space, dtype=dtype, count=size * self._item // dtype.itemsize).view(shape)

    def _move(self, size: int) -> None:
        """More room, for at least this size; what is there is copied, once."""
        old, room = self.tensor, max(size, 2 * self._room)
        self._space = None
        if old.device.type == "cpu":
            wanted = max(room, RESERVED_BYTES // self._item)
            wanted = wanted if self._most is None else max(size, min(wanted, self._most))
            self._space = reserve(wanted * self._item)
            room = room if self._space is None else wanted
        if self._space is None:
            self._whole = torch.zeros((room, *old.shape[1:]), dtype=old.dtype, device=old.device)
        self._room = room
        self.tensor = self._view(size)
        self.tensor[: len(old)] = old
        self._address = self.tensor.data_ptr()

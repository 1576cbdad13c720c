"""Keys: the rows of several tables as one range of integers, and where each row is.

A table's rows are owned by ranges (`descompiler.layout.pieces.Pieces`, divided along dim 0). Three numberings of rows
occur:

    key          rows of all tables, one after the other; what ids become, so that one sort finds the unique ones
    key of r     the rows that rank r owns alone, table after table: what r is asked for
    shared key   the rows that every rank holds, table after table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from descompiler.layout.pieces import Pieces

DIGIT_BITS = 7
"""Of a byte of a distance between keys (`descompiler.runtime.differences`)."""


ID_BYTES = 8
"""Of an id of a dynamic table: ids that are hashes lie too far apart for distances."""


def digits_of(rows: int) -> int:
    """Digits that the distances between keys of so many rows have at most.

    >>> digits_of(1), digits_of(128), digits_of(129), digits_of(1 << 31)
    (1, 1, 2, 5)
    """
    return max(1, -(-(rows - 1).bit_length() // DIGIT_BITS))


def expected_bytes(unique: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Bytes of so many unique keys that may be any of so many rows, as distances.

    A distance has more than n digits if none of the next 2^7n rows is one of the keys.

    >>> expected_bytes(np.array([0.0, 100.0, 1.0]), np.array([0, 100, 1 << 20])).round(2).tolist()
    [0.0, 100.0, 2.98]
    """
    missing = 1 - np.divide(unique, rows, out=np.ones_like(unique, dtype=float), where=rows > 0).clip(0, 1)
    digits = digits_of(int(rows.max(initial=1)))
    sizes: np.ndarray = unique * (1 + sum(missing ** (1 << DIGIT_BITS * n) for n in range(1, digits)))
    return sizes


def ids_bytes(unique: np.ndarray, rows: np.ndarray, *, dynamic: bool) -> np.ndarray:
    """Bytes of so many unique ids as they cross: as distances, or as they are where they are any of 64 bits."""
    return unique * ID_BYTES if dynamic else expected_bytes(unique, rows)


@dataclass(frozen=True)
class KeySpace:
    """Where the rows of ``T`` tables are, of which ``R`` ranges are owned.

    Attributes
    ----------
    offsets : Tensor
        ``[T + 1]``; first key of each table, then the number of keys.
    starts, owners, bases : Tensor
        ``[R]``; a range's first key, its rank (`ALL`: shared), and its first row's key there.
    own : Tensor
        ``[N, T + 1]``; first key of each table in the keys of each rank.
    shared : Tensor
        ``[T + 1]``; first shared key of each table.
    """

    offsets: Tensor
    starts: Tensor
    owners: Tensor
    bases: Tensor
    own: Tensor
    shared: Tensor

    @staticmethod
    def of(tables: Sequence[Pieces]) -> KeySpace:
        """The key space of tables in this order.

        >>> space = KeySpace.of([Pieces.by_sizes((5, 2), 0, [3, 2], 2), Pieces.by_sizes((4, 2), 0, [2, 2], 2)])
        >>> owner, key = space.locate(torch.tensor([0, 4, 5, 8]))
        >>> owner.tolist(), key.tolist()
        ([0, 1, 0, 1], [0, 1, 3, 3])
        """
        rows = np.zeros(tables[0].ranks + 1, np.int64)  # so far of each rank; of ALL, which is -1, at the end
        offsets, firsts = [0], [rows]
        columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for p in tables:
            sizes, owners = p.division.arrays()
            starts, held = offsets[-1] + np.cumsum(sizes) - sizes, sizes > 0
            columns.append((starts[held], owners[held], (rows[owners] + p.division.offsets())[held]))
            rows = rows + p.sizes
            offsets.append(offsets[-1] + p.shape[0])
            firsts.append(rows)
        first = torch.from_numpy(np.stack(firsts, 1))
        begins, ranks, bases = (torch.from_numpy(np.concatenate(x)) for x in zip(*columns, strict=True))
        return KeySpace(torch.tensor(offsets), begins, ranks, bases, first[:-1], first[-1])

    def locate(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Rank (`ALL` for shared rows) of each key, and its key there, or its shared key."""
        index = torch.searchsorted(self.starts, keys, right=True) - 1
        return self.owners[index], self.bases[index] + keys - self.starts[index]

    def to(self, device: torch.device) -> KeySpace:
        return KeySpace(*(getattr(self, f).to(device) for f in self.__dataclass_fields__))

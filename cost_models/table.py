"""A table in numbers: what prices, layouts and statistics know of it. Whatever is about one table wraps it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Table:
    """A parameter whose rows are looked up, or that a product is made with.

    Attributes
    ----------
    ids : int
        Per row of the batch, over all lookups; those that are the same for every batch don't count.
    vectors : int
        That lookups return per row of the batch: 1 for a bag.
    padding_idx : int
        The row that gets no gradient; -1 for none.
    sparse : bool
        Whether its gradient is sparse.
    line : str
        Of the user's code, where it is first used.
    dynamic : bool
        Whether its rows come and go, and ids are any numbers of 64 bits; ``rows`` are those that are expected.
    """

    name: str
    rows: int
    dim: int
    dtype: torch.dtype = torch.float32
    ids: int = 1
    vectors: int = 1
    padding_idx: int = -1
    sparse: bool = False
    trained: bool = True
    line: str = ""
    dynamic: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.dim)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def size_bytes(self) -> int:
        return self.rows * self.dim * self.itemsize

    @property
    def padding(self) -> int | None:
        """The padding row as `nn.EmbeddingBag` names it: None for none."""
        return self.padding_idx if self.padding_idx >= 0 else None


@dataclass(frozen=True)
class OfTable:
    """What is about one table: it has the table's numbers as if they were its own, and so it is written to files."""

    table: Table = field(metadata={"inline": True})

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def rows(self) -> int:
        return self.table.rows

    @property
    def dim(self) -> int:
        return self.table.dim

    @property
    def shape(self) -> tuple[int, int]:
        return self.table.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    @property
    def itemsize(self) -> int:
        return self.table.itemsize

    @property
    def size_bytes(self) -> int:
        return self.table.size_bytes

    @property
    def ids(self) -> int:
        return self.table.ids

    @property
    def vectors(self) -> int:
        return self.table.vectors

    @property
    def padding_idx(self) -> int:
        return self.table.padding_idx

    @property
    def padding(self) -> int | None:
        return self.table.padding

    @property
    def sparse(self) -> bool:
        return self.table.sparse

    @property
    def trained(self) -> bool:
        return self.table.trained

    @property
    def line(self) -> str:
        return self.table.line

"""How the rows of a batch lie in a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The batch is the middle of dimension ``dim``, seen as ``[outer, batch, inner]``.

    Examples
    --------
    >>> import torch
    >>> x = torch.arange(6).reshape(2, 3)  # a batch of 3 in dimension 1
    >>> Rows(1).lead(x).flatten(1).tolist()
    [[0, 3], [1, 4], [2, 5]]
    >>> Rows(1).narrow(x, 1, 2).tolist()
    [[1, 2], [4, 5]]
    >>> Rows(0, outer=2).narrow(torch.tensor([0, 1, 2, 10, 11, 12]), 0, 1).tolist()  # cat of two batches of 3
    [0, 10]
    """

    dim: int = 0
    outer: int = 1
    inner: int = 1

    @property
    def multiple(self) -> int:
        """Size of the dimension per row of the batch."""
        return self.outer * self.inner

    @property
    def leading(self) -> bool:
        """Whether a row's elements are contiguous and rows are in order, so that parts are slices of dimension 0."""
        return self.dim == 0 and self.outer == 1

    def lead(self, x: Tensor) -> Tensor:
        """``x`` with the batch in front: ``[rows, ...]``; a row's elements are in the order of ``x``."""
        if self == Rows():
            return x
        split = (self.outer, x.shape[self.dim] // self.multiple, self.inner)
        return x.reshape(*x.shape[: self.dim], *split, *x.shape[self.dim + 1 :]).movedim(self.dim + 1, 0)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `lead`."""
        if self == Rows():
            return x
        x = x.movedim(0, self.dim + 1)
        shape, size = list(x.shape), x.shape[self.dim + 1] * self.multiple
        return x.reshape(*shape[: self.dim], size, *shape[self.dim + 3 :])

    def narrow(self, x: Tensor, first: int, count: int) -> Tensor:
        """``count`` rows of ``x`` from ``first``, lying as in ``x``."""
        return self.restore(self.lead(x).narrow(0, first, count))


def share_of(rows: int, rank: int, ranks: int) -> int:
    """An even share: the first ranks have one row more.

    >>> [share_of(8, r, 3) for r in range(3)]
    [3, 3, 2]
    """
    return rows // ranks + (rank < rows % ranks)

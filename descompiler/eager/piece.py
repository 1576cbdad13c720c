"""Pieces: what a tensor says that is one rank's part of a larger one, and how checkpoints ask it.

A parameter that is cut (`descompiler.eager.parameters.ShardedParameter`) and what is cut as it is
(`descompiler.eager.held.Held`) are pieces. `torch.distributed.checkpoint` asks a tensor for its ranges of the original:
each is written once, and read by whoever holds it, in any number of ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from descompiler.errors import UnsupportedError
from descompiler.layout.pieces import Pieces
from descompiler.ops.local import plain
from descompiler.runtime.runtime import Runtime

_PLANNER, _ADAFACTOR = "torch.distributed.checkpoint.default_planner", "torch.optim._adafactor"


def local(func: Any, args: Any, kwargs: Any) -> Any:
    """A call on what this rank holds, whatever that is a piece of."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


class Piece:
    """What a tensor says that is this rank's piece of a larger one.

    Attributes
    ----------
    original : str
        The parameter's name.
    pieces : Pieces
    rank : int
        Whose piece it is; of one that was loaded from a file, the rank that saved it.
    runtime : Runtime or None
        For what is asked of all ranks; None of what was loaded from a file.
    is_moved : bool
        Whether its elements are in another shape, of which ``pieces`` says nothing.
    """

    __slots__ = ()

    original: str
    pieces: Pieces
    rank: int
    runtime: Runtime | None
    is_moved = False

    def size(self, *dim: Any) -> Any:
        """As every tensor's; to the planner of checkpoints, which compares it with what is saved, the original's."""
        if not dim and sys._getframe(1).f_globals.get("__name__") == _PLANNER:
            return torch.Size(self.pieces.shape)
        return local(Tensor.size, (self, *dim), {})

    def numel(self) -> int:
        """As every tensor's; to Adafactor, which divides norms of the whole by its root, the original's.

        Raises
        ------
        UnsupportedError
            If Adafactor asks of more than a vector: it takes means along rows and along columns.
        """
        found = local(Tensor.numel, (self,), {})
        asked = sys._getframe(1).f_globals.get("__name__") == _ADAFACTOR
        if not asked or self.runtime is None or self.runtime.ranks == 1:
            return int(found)
        if len(self.pieces.shape) > 1:
            raise UnsupportedError(
                f"Adafactor of {self.original!r}: it takes means along rows and along columns, and rank {self.rank} "
                f"holds a piece of {tuple(local(Tensor.size, (self,), {}))}, of {self.pieces.shape}. Pin a form that "
                "leaves it whole on every rank, or give it another optimiser"
            )
        return prod(self.pieces.shape)

    # ---- torch.distributed.checkpoint asks tensors that are parts of larger ones

    def _ranges(self) -> Iterable[tuple[int, int, int]]:
        """Start in the original, start here, and size of each range."""
        here = 0
        for r in [*self.pieces.own(self.rank), *self.pieces.shared()]:
            yield r.start, here, r.size
            here += r.size

    def _chunk(self, start: int, size: int) -> ChunkStorageMetadata:
        offsets, sizes = [0] * len(self.pieces.shape), list(self.pieces.shape)
        offsets[self.pieces.dim], sizes[self.pieces.dim] = start, size
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if self.is_moved:
            raise UnsupportedError(f"a piece of {self.original!r} in another shape can't be saved: which part is it?")
        return [self._chunk(start, size) for start, _, size in self._ranges() if size]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(plain(self))  # type: ignore[arg-type]
        whole = torch.Size(self.pieces.shape)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),  # that of a range that all hold is one on all: written once
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=whole),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for start, here, size in self._ranges():
            if index.offset is not None and index.offset[self.pieces.dim] == start:
                return plain(self).narrow(  # type: ignore[arg-type]
                    self.pieces.dim, here, size
                )
        raise UnsupportedError(f"{self.original!r} has no range that starts at {index.offset} on rank {self.rank}")


class Divided(Piece, torch.nn.Parameter):
    """A parameter of which this rank holds a piece, and whose uses by others it may serve."""

    position: int
    """Among the exchange's parameters (`descompiler.eager.exchange.PieceExchange`)."""

"""Messages: values that cross together, each in its own dtype.

Those of one dtype are one flat tensor of it. Those of several are one of bytes, so that none is sent wider than it is;
which of the two it is follows from the dtypes, which all ranks know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from descompiler.ops.local import real_parts

BYTES = torch.uint8
"""Of a message of several dtypes."""


def message_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Of a message of values of these dtypes."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else BYTES


def bytes_of(x: Tensor) -> Tensor:
    """Its elements, in order."""
    return real_parts(x.detach()).contiguous().reshape(-1).view(BYTES)


def packed(values: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A message of a `message_dtype`: the values, one after another."""
    if not values:
        return torch.empty(0, dtype=dtype, device=device)
    return torch.cat([bytes_of(x) if dtype == BYTES else x.reshape(-1) for x in values])


def unpacked(message: Tensor, counts: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The inverse of `packed`: flat values of so many elements, of these dtypes.

    >>> values = [torch.ones(3, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float64)]
    >>> dtypes = [x.dtype for x in values]
    >>> message = packed(values, message_dtype(dtypes), torch.device("cpu"))
    >>> len(message), [x.tolist() for x in unpacked(message, [3, 1], dtypes)]
    (14, [[1.0, 1.0, 1.0], [0.0]])
    """
    if message.dtype != BYTES:
        return list(message.split(list(counts)))
    parts = message.split([n * dtype.itemsize for n, dtype in zip(counts, dtypes, strict=True)])
    # copies: a dtype's elements can't begin at any byte
    return [part.clone().view(dtype) for part, dtype in zip(parts, dtypes, strict=True)]


def size_in(dtype: torch.dtype, counts: Iterable[int], dtypes: Iterable[torch.dtype]) -> int:
    """Elements of a message of a `message_dtype` that values of so many elements, of these dtypes, take."""
    return sum(n * (d.itemsize if dtype == BYTES else 1) for n, d in zip(counts, dtypes, strict=True))

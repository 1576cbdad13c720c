"""The format of safetensors files: length of a header, header (JSON: each tensor's dtype, shape and place), bytes.

Who reads it runs no code, in any language.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in the format; it has no others of torch's that models use."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LENGTH = 8


def header_of(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """What stands in front of the tensors, and their order: wide elements first, so that each starts at a multiple."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position, order = 0, sorted(tensors, key=lambda n: (-tensors[n][0].itemsize, n))
    for name in order:
        dtype, shape = tensors[name]
        size = prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH, "little") + text, order


def encoded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[Any]:
    """What a file of these tensors has, in parts that are like bytes.

    >>> data = b"".join(encoded({"ids": torch.tensor([5, -7])}, {"of": "user"}))
    >>> decoded(data)
    ({'ids': tensor([ 5, -7])}, {'of': 'user'})
    """
    header, order = header_of({n: (x.dtype, tuple(x.shape)) for n, x in tensors.items()}, metadata)
    yield header
    for name in order:
        if tensors[name].numel():  # a view of bytes has to have some
            yield tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data


def decoded(data: bytes | bytearray) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file.

    Raises
    ------
    ValueError
        If it is none.
    """
    start = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    try:
        entries = json.loads(data[_LENGTH:start])
        metadata = entries.pop("__metadata__", {})
        return {name: _tensor(data, start, **entry) for name, entry in entries.items()}, metadata
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is another: {type(error).__name__}: {error}") from error


def _tensor(data: bytes | bytearray, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    begin, end = data_offsets
    if not prod(shape):
        return torch.empty(shape, dtype=DTYPES[dtype])
    if (end - begin) != prod(shape) * DTYPES[dtype].itemsize or start + end > len(data):
        raise ValueError(f"a tensor of {shape} has other bytes than {begin} to {end}")
    held = bytearray(memoryview(data)[start + begin : start + end])  # begins where any element may
    return torch.frombuffer(held, dtype=DTYPES[dtype]).view(shape)

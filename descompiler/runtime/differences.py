"""Differences: sorted unique keys as bytes, each as its distance to the one before it.

A distance less one is written in digits of 7 bits, the lowest first, one byte each; all but the last have the highest
bit set. Keys that lie close, as unique ids of a batch do, take one byte or two in place of four. What a rank tells with
its counts says how many bytes come, so a message costs no collective more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from descompiler.layout.keys import DIGIT_BITS

MORE = 1 << DIGIT_BITS
"""Of a byte: another one follows."""


def differences(keys: Tensor, group: Tensor) -> Tensor:
    """Distances, less one, to the key before; the first of each group of keys is its own.

    >>> differences(torch.tensor([4, 5, 300, 2]), torch.tensor([0, 0, 0, 1])).tolist()
    [4, 0, 294, 2]
    """
    before, first = torch.full_like(keys, -1), torch.ones_like(group, dtype=torch.bool)
    first[1:] = group[1:] != group[:-1]
    before[1:] = keys[:-1].masked_fill(first[1:], -1)
    return keys - before - 1


def sizes_of(distances: Tensor, digits: int) -> Tensor:
    """Bytes of each, which has at most so many digits.

    >>> sizes_of(torch.tensor([0, 127, 128, 16384]), 3).tolist()
    [1, 1, 2, 3]
    """
    sizes = torch.ones_like(distances)
    for n in range(1, digits):
        sizes += distances >= 1 << DIGIT_BITS * n
    return sizes


def encode(distances: Tensor, sizes: Tensor, total: int) -> Tensor:
    """As ``total`` bytes, `sizes_of` of which are each one's.

    >>> distances = torch.tensor([4, 0, 294])
    >>> encode(distances, sizes_of(distances, 2), 4).tolist()
    [4, 0, 166, 2]
    """
    of = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes, output_size=total)
    place = torch.arange(total, device=sizes.device) - (sizes.cumsum(0) - sizes)[of]
    digit = distances[of] >> place * DIGIT_BITS & MORE - 1
    return (digit + MORE * (place < sizes[of] - 1)).to(torch.uint8)


def decode(message: Tensor, counts: Sequence[int], digits: int) -> Tensor:
    """The keys of groups of so many, one after another.

    >>> decode(torch.tensor([4, 0, 166, 2, 2], dtype=torch.uint8), [3, 1], 2).tolist()
    [4, 5, 300, 2]
    """
    more = message >= MORE
    last = (~more).long()
    place, run = torch.zeros_like(last), torch.ones_like(more)
    for n in range(1, digits):  # how many digits of the same number are before
        run = run[1:] & more[: len(more) - n] if n > 1 else more[:-1]
        place[n:] += run
    found = last.new_zeros(sum(counts))
    found.index_add_(0, last.cumsum(0) - last, (message & MORE - 1).long() << place * DIGIT_BITS)
    ends = (found + 1).cumsum(0)
    groups = torch.tensor(list(counts), dtype=torch.int64, device=message.device)
    starts = torch.cat([ends.new_zeros(1), ends])[groups.cumsum(0) - groups]
    return ends - 1 - torch.repeat_interleave(starts, groups, output_size=len(found))

"""Keys: a bijective mix of ids, whose top bits say in which slice of the key space an id lies.

``key = mix(id ^ salt)``, with the finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
generators, 2014) as `mix` and a salt of the table's seed and name. Everything that is drawn for an id is a hash of
its key. Tensors and arrays are int64 and wrap around, as the unsigned arithmetic that is meant does.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Words = TypeVar("Words", Tensor, np.ndarray)
"""Words of 64 bits, as int64: in a tensor, or in an array, whose calls cost less."""

FEWEST_SLICES, MOST_SLICES = 64, 4096
ROWS_OF_A_SLICE = 128
"""Rows that a slice has at least when a table has its capacity, if there are more than `FEWEST_SLICES`."""

_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST = 31
_WORD = 1 << 64


def signed(word: int) -> int:
    """A word of 64 bits as int64 holds it.

    >>> signed(2**64 - 1)
    -1
    """
    word %= _WORD
    return word - _WORD if word >> 63 else word


_FACTORS = tuple((shift, signed(factor)) for shift, factor in _ROUNDS)
_INVERSES = tuple((shift, signed(pow(factor, -1, _WORD))) for shift, factor in _ROUNDS)


def shifted(words: Words, bits: int) -> Words:
    """Words shifted to the right, with zeros from the left."""
    moved = words >> bits
    moved &= (1 << (64 - bits)) - 1
    return moved


def mix(words: Words) -> Words:
    """Words (int64) to words that look random; a bijection, whose inverse is `unmix`.

    >>> mix(torch.tensor([0, 1, 2])).tolist()
    [0, 6238072747940578789, -2606959012126976886]
    """
    for shift, factor in _FACTORS:
        mixed = shifted(words, shift)
        mixed ^= words
        mixed *= factor
        words = mixed
    mixed = shifted(words, _LAST)
    mixed ^= words
    return mixed


def unmix(words: Tensor) -> Tensor:
    """The inverse of `mix`.

    >>> unmix(mix(torch.tensor([-5, 7]))).tolist()
    [-5, 7]
    """
    words = _unshifted(words, _LAST)
    for shift, inverse in reversed(_INVERSES):
        words = _unshifted(words * inverse, shift)
    return words


def _unshifted(words: Tensor, bits: int) -> Tensor:
    """The x of ``x ^ (x >> bits)``: each turn makes as many more bits right."""
    found = words
    for _ in range(63 // bits):
        found = shifted(found, bits).bitwise_xor_(words)
    return found


def word_of(*parts: object) -> int:
    """A word of 64 bits (as int64) of anything with a text.

    >>> word_of(0, "user") == word_of(0, "user") != word_of(0, "item")
    True
    """
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def unit(words: Tensor) -> Tensor:
    """Random words as float64 in [0, 1), exact in their top 53 bits.

    >>> unit(torch.tensor([-1, 0])).tolist() == [1 - 2**-53, 0.0]
    True
    """
    return shifted(words, 11).to(torch.float64).mul_(2.0**-53)


def slices_for(rows: int | None) -> int:
    """How many slices a table of a capacity has: a power of two between 64 and 4096, of 128 rows or more if it can be.

    >>> slices_for(None), slices_for(1000), slices_for(100_000)
    (4096, 64, 512)
    """
    if rows is None:
        return MOST_SLICES
    return min(max(1 << max(rows // ROWS_OF_A_SLICE, 1).bit_length() - 1, FEWEST_SLICES), MOST_SLICES)


def slice_of(keys: Words, slices: int) -> Words:
    """The slice of each key: its top bits."""
    return shifted(keys, 65 - slices.bit_length())

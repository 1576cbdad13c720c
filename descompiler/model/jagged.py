"""TorchRec's jagged inputs, taken apart by what they are made of; torchrec itself is not needed.

TorchRec registers its classes with torch's pytrees, caches and all: offsets that a forward computed would be other
inputs than offsets that it did not. Here an instance is its values, its lengths, and its weights if it has any.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from descompiler.errors import InputError

MODULE, NAMES = "torchrec.sparse.jagged_tensor", ("JaggedTensor", "KeyedJaggedTensor")


def take_segments(values: Tensor, lengths: Tensor, segments: Tensor) -> Tensor:
    """The parts of jagged ``values`` that have the numbers ``segments``, one after another.

    Parameters
    ----------
    values : Tensor [total, ...]
    lengths : Tensor [n]
        Of each part; they add up to ``total``.
    segments : Tensor [m]
        Numbers of parts, in any order, perhaps with repetitions.

    Examples
    --------
    >>> import torch
    >>> take_segments(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 3]), torch.tensor([2, 0])).tolist()
    [2, 3, 4, 1]
    """
    starts, wanted = lengths.cumsum(0) - lengths, lengths[segments]
    before = wanted.cumsum(0) - wanted
    within = torch.arange(int(wanted.sum()), device=values.device) - before.repeat_interleave(wanted)
    return values[starts[segments].repeat_interleave(wanted) + within]


def _parts(x: Any) -> list[Tensor | None]:
    return [x.values(), x.lengths(), x.weights_or_none()]


def _keyed_parts(x: Any) -> tuple[list[Tensor | None], tuple[str, ...]]:
    if x.variable_stride_per_key() or x.inverse_indices_or_none() is not None:
        raise InputError(
            "a KeyedJaggedTensor whose keys have batches of different sizes (stride_per_key, inverse_indices) has no "
            "rows that all keys share: pass one with the same number of rows for each key"
        )
    return _parts(x), tuple(x.keys())


def _taken_parts(parts: Sequence[Tensor | None], segments: Tensor) -> list[Tensor | None]:
    values, lengths, weights = parts
    assert values is not None and lengths is not None
    weights = None if weights is None else take_segments(weights, lengths, segments)
    return [take_segments(values, lengths, segments), lengths[segments], weights]


def _put_together(cls: type, parts: Sequence[Tensor | None], keys: tuple[str, ...] | None) -> Any:
    values, lengths, weights = parts
    return cls(*([] if keys is None else [list(keys)]), values, weights=weights, lengths=lengths)


def _flatten(x: Any) -> tuple[list[Tensor | None], tuple[str, ...] | None]:
    return _keyed_parts(x) if hasattr(x, "keys") else (_parts(x), None)


def _take_rows(x: Any, index: Tensor) -> Any:
    parts, keys = _flatten(x)
    if keys is not None:  # lengths are those of the first key's rows, then of the second's
        index = (torch.arange(len(keys), device=index.device)[:, None] * x.stride() + index).reshape(-1)
    return _put_together(type(x), _taken_parts(parts, index), keys)


def adapter_of(cls: type) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]] | None:
    """Flatten, unflatten and take, as `descompiler.register_input` has them, for the classes of torchrec known here."""
    if cls.__module__ != MODULE or cls.__name__ not in NAMES:
        return None
    return _flatten, functools.partial(_put_together, cls), _take_rows

"""A batch's own number of rows among the inputs, as ``batch_size`` in a dict: of every batch another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from descompiler.errors import InputError


class BatchSize(int):
    """The number of rows of the batch that it is passed with, in ``example_inputs``.

    Of the global batch it is the global number. Most are found without that: where the example can't tell whether a
    number is the batch's size, an error asks for it. Calls of the compiled module pass ordinary numbers.

    Examples
    --------
    >>> import torch, descompiler as des
    >>> example = {"items": torch.zeros(4, 3, dtype=torch.int64), "batch_size": des.BatchSize(4)}
    """


def of_rows(statics: Sequence[Any], rows: int) -> tuple[Any, ...]:
    """Leaves that are no tensors, for a batch of so many rows."""
    return tuple(BatchSize(rows) if isinstance(x, BatchSize) else x for x in statics)


def check_is_rows(position: int, given: Any, rows: int | None) -> None:
    """Raise unless a number that is passed as the batch's size is that.

    Raises
    ------
    InputError
    """
    if type(given) is bool or not isinstance(given, int) or given != rows:
        raise InputError(
            f"input {position} was the number of rows in example_inputs; here it is {given!r}, and there are {rows} "
            "rows. If it is a number like any other, compile with example_inputs of another number of rows"
        )

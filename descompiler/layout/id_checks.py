"""Checks of ids and targets, before anything is sent: an error names the table, the id, and where it is."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from descompiler.ops.local import are_alike


@dataclass(frozen=True)
class Check:
    """What the ids of a lookup have to be: below ``rows``, or any integers (None)."""

    table: str
    rows: int | None
    starts: tuple[int, ...] | None = None  # fields of an offsets table: column f's ids lie in its own range
    line: str = ""
    ignored: int | None = None  # an id that is allowed too: a target without a loss

    @property
    def named(self) -> str:
        """The table, and where it is looked up."""
        return f"table {self.table!r}" + (f" ({self.line})" if self.line else "")

    def problem(self, ids: Tensor) -> str | None:
        """Why these ids are wrong, or None."""
        name = self.named
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            return f"{name}: ids must be integers, and are {ids.dtype}; convert them with .long()"
        if not ids.numel() or self.rows is None:
            return None
        if self.starts is None:
            low, high = torch.stack(ids.aminmax()).tolist()  # one wait for the device
            if low >= 0 and high < self.rows:
                return None
            wrong = (ids < 0) | (ids >= self.rows)
            if self.ignored is not None:
                wrong &= ids != self.ignored
            if not bool(wrong.any()):
                return None
            bad = wrong.nonzero()[0].tolist()
            limits = f"0 to {self.rows - 1}"
        else:
            starts = torch.tensor(self.starts, device=ids.device)
            stops = torch.tensor([*self.starts[1:], self.rows], device=ids.device)
            wrong = (ids < starts) | (ids >= stops)
            if not bool(wrong.any()):
                return None
            bad = wrong.nonzero()[0].tolist()
            limits = f"{int(starts[bad[1]])} to {int(stops[bad[1]]) - 1}, the range of field {bad[1]}"
        return (
            f"{name}: id {int(ids[tuple(bad)])} in row {bad[0]} of the batch (position {bad}) is not in {limits}; "
            "check the vocabulary size or the preprocessing"
        )


def are_in_range(checks: Sequence[Check], ids: Sequence[Tensor]) -> bool:
    """Whether ids of one shape and dtype, of tables without fields, are all right: one look at all of them.

    False says nothing: `Check.problem` looks at each.

    >>> checks = [Check("user", 3), Check("item", 5)]
    >>> are_in_range(checks, [torch.tensor([0, 2]), torch.tensor([4, 0])])
    True
    >>> are_in_range(checks, [torch.tensor([0, 3]), torch.tensor([4, 0])])
    False
    """
    if len(ids) < 2 or not ids[0].numel() or not are_alike(ids) or ids[0].dtype not in (torch.int64, torch.int32):
        return False
    rows = [c.rows for c in checks if c.starts is None and c.rows is not None]
    if len(rows) < len(checks):
        return False
    together = torch.stack(list(ids)).reshape(len(ids), -1)
    limits = _limits((*rows,), together.device)
    return not bool(((together < 0) | (together >= limits[:, None])).any())


@functools.lru_cache(64)
def _limits(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Rows of tables, on a device: to bring them there in each step would be to wait for it."""
    return torch.tensor(rows, device=device)

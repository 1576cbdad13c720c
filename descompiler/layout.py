"""Layouts: what crosses the wire in one program, known at compile time, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from descompiler import traffic as wire
from descompiler.traffic import Traffic


@dataclass(frozen=True)
class Check:
    """What the ids of a lookup have to be."""

    table: str
    rows: int
    starts: tuple[int, ...] | None = None  # fields of an offsets table: column f's ids lie in its own range
    line: str = ""

    def problem(self, ids: Tensor) -> str | None:
        """Why these ids are wrong, or None."""
        name = f"table {self.table!r}" + (f" ({self.line})" if self.line else "")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            return f"{name}: ids must be integers, and are {ids.dtype}; convert them with .long()"
        if not ids.numel():
            return None
        if self.starts is None:
            low, high = ids.aminmax()
            if int(low) >= 0 and int(high) < self.rows:
                return None
            bad = ((ids < 0) | (ids >= self.rows)).nonzero()[0].tolist()
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


@dataclass(frozen=True)
class Entry:
    """Ids ``[b, *tail]`` that enter the region; ``columns[r]`` of dim 1 go to rank r (None: all, (): none)."""

    name: str
    tail: tuple[int, ...]
    columns: tuple[tuple[int, ...] | None, ...]

    def tail_on(self, rank: int) -> tuple[int, ...]:
        columns = self.columns[rank]
        return self.tail if columns is None else (len(columns), *self.tail[1:])

    def width(self, rank: int) -> int:
        """Ids per row that go to ``rank``."""
        return 0 if self.columns[rank] == () else prod(self.tail_on(rank))


@dataclass(frozen=True)
class Exit:
    """A value that leaves the region: rank r sends ``[rows, *tails[r]]``, or nothing (None).

    ``segments`` are the (size, owner) of the sharded dimension ``dim``; None: the ranks' terms are summed.
    """

    name: str
    tails: tuple[tuple[int, ...] | None, ...]
    dim: int = 0
    segments: tuple[tuple[int, int], ...] | None = None

    def width(self, rank: int) -> int:
        """Elements per row that ``rank`` sends."""
        tail = self.tails[rank]
        return 0 if tail is None else prod(tail)


@dataclass(frozen=True)
class Layout:
    """All that crosses, in one program.

    Attributes
    ----------
    norm_channels : tuple of int
        Channels of each batch norm that is computed over the global batch.
    sparse_lookups : tuple of (int, int)
        (ids per row, dim) of each lookup in a replicated table with sparse gradients.
    shared_columns : tuple of int
        Elements of each slice of a co-located weight that all ranks hold.
    """

    ranks: int
    entries: tuple[Entry, ...] = ()
    exits: tuple[Exit, ...] = ()
    id_bytes: int = 8
    norm_channels: tuple[int, ...] = ()
    sparse_lookups: tuple[tuple[int, int], ...] = ()
    shared_columns: tuple[int, ...] = ()
    dense_elements: int = 0

    @cached_property
    def enter_widths(self) -> list[int]:
        """Ids per row that go to each rank."""
        widths = [0] * self.ranks
        for e in self.entries:
            for r, columns in enumerate(e.columns):
                if columns != ():
                    widths[r] += e.width(r)
        return widths

    @cached_property
    def exit_widths(self) -> list[int]:
        """Elements per row that each rank sends out of the region."""
        widths = [0] * self.ranks
        for e in self.exits:
            for r, tail in enumerate(e.tails):
                if tail is not None:
                    widths[r] += prod(tail)
        return widths

    @cached_property
    def kinds(self) -> dict[int, int]:
        """One rank of each kind, and how many there are: ranks of a kind send the same where all have as many rows."""
        kinds: dict[tuple[int, int], list[int]] = {}
        for r, widths in enumerate(zip(self.enter_widths, self.exit_widths, strict=True)):
            kinds.setdefault(widths, []).append(r)
        return {ranks[0]: len(ranks) for ranks in kinds.values()}

    def predict(self, rank: int, rows: Sequence[int], itemsize: int, *, backward: bool = True) -> Traffic:
        """What ``rank`` sends in a step in which rank r has ``rows[r]`` rows: bytes and calls."""
        n, result = self.ranks, Traffic()
        if n == 1:
            return result
        mine, most = rows[rank], max(rows)
        rest = sum(rows) - mine
        ids, values = self.enter_widths, self.exit_widths
        result.add(wire.HEADER, (n - 1) * wire.HEADER_BYTES)
        if self.entries:
            result.add(wire.ENTER, self.id_bytes * mine * (sum(ids) - ids[rank]))
            result.add(wire.EXIT, itemsize * values[rank] * rest)
        for channels in self.norm_channels:
            result.add(wire.NORM_FORWARD, (n - 1) * (2 * channels + 1) * itemsize)
        if backward:
            if self.exits:
                result.add(wire.RETURN, itemsize * mine * (sum(values) - values[rank]))
            for channels in self.norm_channels:
                result.add(wire.NORM_BACKWARD, wire.all_reduce_bytes(2 * channels * itemsize, n))
            if self.shared_columns:
                result.add(wire.SHARED_COLUMNS, wire.all_reduce_bytes(sum(self.shared_columns) * itemsize, n))
            for count, dim in self.sparse_lookups:
                # gathered with equal sizes: shorter batches are padded
                result.add(wire.SPARSE_GRADIENTS, (n - 1) * most * count * (8 + dim * itemsize), calls=2)
            if self.dense_elements:
                result.add(wire.DENSE_GRADIENTS, wire.all_reduce_bytes(self.dense_elements * itemsize, n))
        return result

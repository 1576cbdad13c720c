"""What the user's Python decides by values of a batch: whether rows would change with the decisions of other rows.

An operator is judged by its numbers (`descompiler.classify.batch_values`), a branch that the example does not take has
none: ``if (ids == 0).any()``. So every number that Python reads of the batch is answered otherwise, for the batch and
for one part of it, as another row's value would. Where the batch is not its parts then, rows depend on each other.
Branches on the number of rows are taken by batches of such sizes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from descompiler.errors import LIBRARIES

READS = {"__array__", "__bool__", "__contains__", "__float__", "__index__", "__int__", "allclose", "equal",
         "is_nonzero", "item", "numpy", "tolist"}  # fmt: skip
"""Functions that give Python a value of a tensor."""


SIZES = {"__len__", "nelement", "numel", "size"}


CHOOSING = {"argwhere", "masked_select", "nonzero", "unique", "unique_consecutive"}
"""Functions whose results have sizes that are values: as many as there are of a kind."""


FAR = 1000
"""How far above a number, or below it, another is that branches see as large, or as small."""


SIZES_BY_LEN, MOST_ROWS = (2, 33, 130), 4096
"""Rows that are tried where forward asks for them in a way that hides what they are compared with; the most ever."""


Site = tuple[str, str]
"""The user's line, and the function that reads."""


@dataclass
class Read:
    """A number that Python read; of several, the first."""

    value: Any
    compared: set[float] = field(default_factory=set)  # with which numbers

    def others(self) -> list[Any]:
        """What it might be in other batches: on either side of what it is compared with, zero, and far away."""
        v = self.value
        if isinstance(v, bool):
            return [not v]
        near = [c + d for c in self.compared for d in (-1, 0, 1)]
        found: list[Any]
        if isinstance(v, int):  # what is never negative, a count or an id, is not asked to be
            found = [int(n) for n in (0, v + 1, v + FAR, *near) if n >= min(v, 0)]
        else:
            found = [0.0, v + 1, v + FAR, v - FAR, *map(float, near)]
        return [n for n in dict.fromkeys(found) if n != v]


class Decisions(TorchFunctionMode):
    """Sees what Python reads of a batch, and may answer the first read at a place with another number.

    Attributes
    ----------
    first : dict of Site to Read
        The first read at each place.
    sizes : set of int
        Rows of batches on either side of what their number was compared with.
    """

    def __init__(self, rows: int = 0, site: Site | None = None, answer: Any = None):
        super().__init__()
        self.rows, self.site, self.answer = rows, site, answer  # rows: watched if there are any
        self.first: dict[Site, Read] = {}
        self.sizes: set[int] = set()
        self._of_batch: set[int] = set()
        self._apart: set[int] = set()  # of the model alone
        self._kept: list[Tensor] = []  # memory stays taken
        self._chosen: set[int] = set()  # tensors whose sizes are values
        self._escaped = False  # Python has numbers of the batch, and may make tensors of them

    def watch(self, tensors: Iterable[Tensor], *, apart: Iterable[Tensor] = ()) -> None:
        """These are of the batch, and what is computed from them; those ``apart`` are the model's."""
        for found, places in ((list(tensors), self._of_batch), (list(apart), self._apart)):
            self._kept += found
            places.update(map(_place, found))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **kwargs)
        if not (any(map(self._is_of_batch, given)) or (self._escaped and not given)):
            self.watch((), apart=(x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)))
            return result
        if name in READS:
            return self._read(name, result)
        if given and (name in SIZES or isinstance(result, torch.Size)):
            if id(given[0]) in self._chosen:
                return self._read(name, result)
            if self.rows and (name == "size" or isinstance(result, torch.Size)):
                return self._watched_sizes(result)
            self.sizes.update(SIZES_BY_LEN if self.rows else ())
            return result
        if name in CHOOSING or (name == "where" and len(args) == 1) or (name == "__getitem__" and _by_mask(args[1])):
            self._chosen.update(id(x) for x in pytree.tree_leaves(result))
        changed = [args[0]] if args and name.endswith("_") else []
        self.watch([x for x in (*pytree.tree_leaves((result, kwargs.get("out"))), *changed) if isinstance(x, Tensor)])
        return result

    def _is_of_batch(self, x: Tensor) -> bool:
        # torch.from_numpy and the like tell nobody that they make a tensor
        unknown = self._escaped and not isinstance(x, nn.Parameter) and _place(x) not in self._apart
        return unknown or _place(x) in self._of_batch

    def _read(self, name: str, value: Any) -> Any:
        sample = _first_of(value)
        self._escaped |= not isinstance(value, bool)
        if not isinstance(sample, bool | int | float):
            return value
        site = (_users_line(), name)
        if site in self.first:
            return value
        read = self.first[site] = Read(sample)
        if site == self.site:
            return _with_first(value, self.answer)
        if name != "item" or isinstance(value, bool):
            return value
        return (WatchedInt if isinstance(value, int) else WatchedFloat)(value, lambda _, c: read.compared.add(c))

    def _watched_sizes(self, result: Any) -> Any:
        def compared(size: float, other: float) -> None:
            if size and 0 < (rows := int(self.rows * other / size)) < MOST_ROWS:
                self.sizes.update(n for n in (rows, rows + 1) if n > 1)

        def watched(n: int) -> int:
            return WatchedInt(n, compared) if n == self.rows else n

        return torch.Size(map(watched, result)) if isinstance(result, tuple) else watched(result)


def _users_line() -> str:
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(LIBRARIES) and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _place(x: Tensor) -> int:
    found = x.untyped_storage().data_ptr() if x.layout is torch.strided else 0
    return found or id(x)


def _by_mask(index: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in pytree.tree_leaves(index))


def _first_of(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.flat[0].item() if value.size else None
    while isinstance(value, list | tuple):
        value = value[0] if value else None
    return value


def _with_first(value: Any, answer: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.copy()
        value.flat[0] = answer
        return value
    if isinstance(value, torch.Size):
        return torch.Size((answer, *value[1:]))
    if not isinstance(value, list):
        return answer
    result = inner = copy.deepcopy(value)
    while isinstance(inner[0], list):
        inner = inner[0]
    inner[0] = answer
    return result


def _watching(base: Any) -> Any:
    """A number that tells what it is compared with, and what is computed from it does, too."""

    class Watched(base):
        def __new__(cls, x: Any, tell: Callable[[float, float], None]) -> Any:
            self = super().__new__(cls, x)
            self.tell = tell
            return self

        def __bool__(self) -> bool:
            self.tell(base(self), 0)
            return bool(base(self))

        def __reduce__(self) -> Any:  # a copy that a module keeps is a plain number
            return base, (base(self),)

        __hash__ = base.__hash__

    def comparison(name: str) -> Callable[[Any, Any], Any]:
        def compare(self: Any, other: Any) -> Any:
            if isinstance(other, int | float):
                self.tell(base(self), other)
            return getattr(base, name)(self, other)

        return compare

    def arithmetic(name: str) -> Callable[[Any, Any], Any]:
        def compute(self: Any, other: Any) -> Any:
            result = getattr(base, name)(self, other)
            return Watched(result, self.tell) if type(result) is base else result

        return compute

    for name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
        setattr(Watched, name, comparison(name))
    for name in ("add", "sub", "mul", "floordiv", "mod"):
        for side in ("", "r"):
            setattr(Watched, f"__{side}{name}__", arithmetic(f"__{side}{name}__"))
    return Watched


WatchedInt, WatchedFloat = _watching(int), _watching(float)


Run = Callable[[Tensor, Decisions], Sequence[Any]]
"""The results of some rows of a batch, by their numbers, while decisions are seen."""


Reproduces = Callable[[Sequence[Any], Sequence[Sequence[Any]], Sequence[int]], bool]
"""Whether results of a batch are those of its parts, of some sizes."""


def decides_for_others(run: Run, reproduces: Reproduces, rows: int) -> str:
    """Where Python decides for all rows by the values, or the number, of some; empty if it is nowhere seen.

    Parameters
    ----------
    rows : int
        Of a batch that its parts reproduce.

    Returns
    -------
    str
        By what, with the user's file and line where they are known.
    """
    index, half = torch.arange(rows), rows // 2
    seen = Decisions(rows)
    try:
        whole = run(index, seen)
    except Exception:  # whatever forward does with sizes that are no plain numbers
        seen = Decisions()
        try:
            whole = run(index, seen)
        except Exception:  # it does not run where functions are watched: nothing is known of what it reads
            return "what is not known"
    for size in sorted(seen.sizes):
        if not _by_size(run, reproduces, size + 1, rows):
            return "the number of rows"
    alone = [Decisions() for _ in range(rows)]
    try:
        by_row = [run(index[i : i + 1], d) for i, d in enumerate(alone)]
        reproduced = reproduces(whole, by_row, (1,) * rows)
    except Exception:  # forward need not run on a row alone
        reproduced = False
    for site, read in seen.first.items():
        # what rows answer alone, and the batch does not, was judged by its numbers
        natural = {d.first[site].value for d in alone if site in d.first} if reproduced else set()
        for answer in read.others():
            if answer in natural:
                continue
            try:
                whole = run(index, Decisions(site=site, answer=answer))
            except Exception:  # it refuses such values, on every rank
                continue
            try:
                parts = [run(index[:half], Decisions(site=site, answer=answer)), run(index[half:], Decisions())]
            except Exception:  # not where a batch does
                return f"values of some at {site[0]}"
            if not reproduces(whole, parts, (half, rows - half)):
                return f"values of some at {site[0]}"
    return ""


def _by_size(run: Run, reproduces: Reproduces, size: int, rows: int) -> bool:
    """Whether a batch of some size is its parts: all but a row, and that row."""
    index = torch.arange(size) % rows
    try:
        whole = run(index, Decisions())
        return reproduces(whole, [run(index[:-1], Decisions()), run(index[-1:], Decisions())], (size - 1, 1))
    except Exception:  # it refuses such sizes, or one row alone
        return True

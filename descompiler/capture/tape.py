"""How a tensor was computed in an eager run, to compute it again: ids behind code that no tracer goes through.

The calls of a forward are written down. A recipe of a tensor holds those that it was computed by, from the arguments,
parameters and buffers. Numbers in it were numbers in that run: it is right for others only if it is the same in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class NoRecipeError(Exception):
    """A tensor was computed by writes in place, which a recipe does not follow."""


@dataclass(frozen=True)
class GivenInput:
    """A tensor that is known by a name: an argument's position, or a parameter's name."""

    key: int | str


@dataclass(frozen=True)
class TapeStep:
    """One call; ``leaves`` are its arguments, tensors among them as `GivenInput`, `TapeStep` or constants."""

    func: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    index: int | None = None  # of the result, if there are several

    def run(self, given: Mapping[int | str, Tensor]) -> Any:
        """Compute it from other tensors."""
        args, kwargs = pytree.tree_unflatten([_run(x, given) for x in self.leaves], self.spec)
        result = self.func(*args, **kwargs)
        return result if self.index is None else result[self.index]


def _run(x: Any, given: Mapping[int | str, Tensor]) -> Any:
    if isinstance(x, GivenInput):
        return given[x.key]
    return x.run(given) if isinstance(x, TapeStep) else x


def same(a: Any, b: Any) -> bool:
    """Whether two recipes compute the same.

    >>> ids = torch.arange(3)
    >>> with Tape({id(ids): 0}) as tape:
    ...     a, b, c = ids + 1, ids + 1, ids + int(ids.max())
    >>> same(tape.recipe(a), tape.recipe(b)), same(tape.recipe(a), tape.recipe(c))
    (True, False)
    """
    if isinstance(a, TapeStep) and isinstance(b, TapeStep):
        alike = (a.func, a.spec, a.index, len(a.leaves)) == (b.func, b.spec, b.index, len(b.leaves))
        return alike and all(map(same, a.leaves, b.leaves))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    return type(a) is type(b) and bool(a == b)


class Tape(TorchFunctionMode):
    """Writes down the calls in its context; ``known``: keys of tensors by their identity."""

    def __init__(self, known: Mapping[int, int | str]):
        super().__init__()
        self.known = dict(known)
        self.made: dict[int, tuple[Any, Any, Any, int | None]] = {}
        self.kept: list[Tensor] = []  # identities stay taken
        self.written: set[int] = set()  # storages that were written to in place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if (
            (name.endswith("_") and not name.endswith("__"))
            or name in WRITING
            or "out" in kwargs
            or kwargs.get("inplace")
        ):
            self.written.update(_storage(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        several = isinstance(result, tuple | list)
        taken = {id(x) for x in pytree.tree_leaves((args, kwargs))}  # ``x.to(device)`` may be x, and is no step
        for i, x in enumerate(result if several else [result]):
            if isinstance(x, Tensor) and not any(id(x) in seen for seen in (self.known, self.made, taken)):
                self.made[id(x)] = (func, args, kwargs, i if several else None)
                self.kept.append(x)
        return result

    def recipe(self, x: Any) -> Any:
        """How a tensor was computed; what is no tensor is itself.

        Raises
        ------
        NoRecipeError
            If it, or what it was computed from, was written to in place.
        """
        if not isinstance(x, Tensor):
            return x
        if _storage(x) in self.written:
            raise NoRecipeError
        if id(x) in self.known:
            return GivenInput(self.known[id(x)])
        return self.call(*self.made[id(x)]) if id(x) in self.made else x

    def call(self, func: Any, args: Any, kwargs: Any, index: int | None = None) -> TapeStep:
        """The recipe of a call's result."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return TapeStep(func, tuple(map(self.recipe, leaves)), spec, index)


WRITING = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__",
           "__iand__", "__ior__", "__ixor__"}  # fmt: skip


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else id(x)

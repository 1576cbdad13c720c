"""Eager runs of a module that is to be a leaf: what it takes, returns, looks up and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from descompiler.capture.tape import TapeStep
from descompiler.errors import CaptureError, InputError
from descompiler.graph.leaf import Size
from descompiler.graph.nodes import draws
from descompiler.model.inputs import flatten, split_statics

WHOLE_FORWARD = ""
"""The name of the leaf that is all of forward."""


@dataclass
class Seen:
    """One call of a leaf in an eager run."""

    inputs: list[Tensor]
    statics: tuple[Any, ...]
    spec: Any
    outputs: list[Tensor]
    out_statics: tuple[Any, ...]
    out_spec: Any
    # The table, the rows that it returned, and how they are computed.
    lookups: list[tuple[str, Tensor, TapeStep | None]]
    otherwise: set[str]  # parameters that are used in other ways too
    drops: bool
    trains_norm: bool
    writes: bool


class NotALeafError(CaptureError):
    """A module can't be a leaf; the module around it may, unless this is ``final``."""

    def __init__(self, name: str, why: str, *, final: bool = False):
        super().__init__(f"{title(name)} can't be an opaque leaf: {why}")
        self.name, self.final = name, final


def title(name: str) -> str:
    return f"module {name.removeprefix('model.')!r}" if name not in (WHOLE_FORWARD, "model") else "forward"


def flat_of(name: str, tree: Any) -> tuple[list[Tensor], tuple[Any, ...], Any]:
    try:
        leaves, spec = flatten(tree)
    except InputError as error:
        raise NotALeafError(name, str(error).splitlines()[0]) from error
    return *split_statics(leaves), spec


def parts_held(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def tables_of(module: nn.Module) -> dict[int, str]:
    return {id(p): n for n, p in module.named_parameters()}


def batch_dim(found: Sequence[tuple[int, Tensor]]) -> int | None:
    """The first dimension that has the size of the batch in every run."""
    dims = range(min(x.dim() for _, x in found))
    return next((d for d in dims if all(x.shape[d] == rows for rows, x in found)), None)


def sizes_of(name: str, found: Sequence[tuple[int, Tensor]]) -> tuple[Size, ...]:
    """The shape of a result as a function of the rows."""
    (n, a), (m, b) = ((rows, x.shape) for rows, x in found[:2])
    sizes = []
    for before, after in zip(a, b, strict=False):
        per_row = (after - before) // (m - n)
        sizes.append(Size(per_row, before - per_row * n))
    for rows, x in found:
        if tuple(s.of(rows) for s in sizes) != tuple(x.shape) or any(s.per_row < 0 for s in sizes):
            raise NotALeafError(name, "the shapes of its results depend on values")
    return tuple(sizes)


class DrawSeen(TorchDispatchMode):
    """Notes an operator that draws random numbers."""

    drawn = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if draws(func, args, kwargs or {}):
            self.drawn = str(func)
        return func(*args, **(kwargs or {}))

"""Forwards that no tracer of torch's looks into, but for the stages of a program: what `torch.compile` meets here.

A compiled forward talks with other ranks, and decides by what they say; a program that was traced once would do neither
in later steps. So `torch.compile` leaves it, and gets what a program computes between two exchanges
(`descompiler.emit.stages`), with its own options. What is around forward in the user's code is compiled all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from torch._C._dynamo.eval_frame import set_eval_frame

from descompiler.ops.as_python import as_python

F = TypeVar("F", bound=Callable[..., Any])

_AROUND: ContextVar[Any] = ContextVar("_AROUND", default=None)
"""The compiler that the user's call of the forward under way is in: torch's hook of frames, by which it goes on."""


def untraced(method: F) -> F:
    """The method, run as Python wherever `torch.compile` meets it."""

    def left(*args: Any, **kwargs: Any) -> Any:
        around = set_eval_frame(None)
        before = _AROUND.set(around or _AROUND.get())  # a forward that another one calls is in what that is in
        try:
            return method(*args, **kwargs)
        finally:
            _AROUND.reset(before)
            set_eval_frame(around)

    reason = "a module of descompiler exchanges values with other ranks: its stages are compiled"
    return as_python(left, method, reason, recursive=False)


def is_compiled() -> bool:
    """Whether `torch.compile` is around the forward that is under way."""
    return bool(_AROUND.get())


def traced(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function within what `torch.compile` is around the forward under way."""
    before = set_eval_frame(_AROUND.get() or None)
    try:
        return function(*args)
    finally:
        set_eval_frame(before)

"""Functions that `torch.compile` leaves to Python."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

F = TypeVar("F", bound=Callable[..., Any])


def as_python(function: Callable[..., Any], like: F, reason: str, *, recursive: bool = True) -> F:
    """A function, run as Python wherever `torch.compile` meets it.

    Parameters
    ----------
    function : callable
    like : callable
        Whose name and text it gets.
    reason : str
        What torch says where a whole graph is asked for.
    recursive : bool
        Whether what it calls is left to Python too.
    """
    plain: list[Callable[..., Any]] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if not plain:
            if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
                return function(*args, **kwargs)
            plain.append(torch.compiler.disable(function, recursive=recursive, reason=reason))
        return plain[0](*args, **kwargs)

    # a frame of its own would be compiled for each mode that it is called in
    set_code_exec_strategy(run.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))
    return functools.update_wrapper(run, like)  # type: ignore[return-value]

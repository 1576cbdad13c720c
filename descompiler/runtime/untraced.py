"""Forwards that no tracer of torch's looks into: `torch.compile` of a compiled model leaves it as it is.

A compiled forward talks with other ranks, and decides by what they say; a program that was traced once would do neither
in later steps. What is around it in the user's code is compiled all the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def untraced(method: F) -> F:
    """The method, run as Python wherever `torch.compile` meets it."""
    plain: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not plain:  # not at the import: this one takes a second, and a process that only plans needs none
            plain.append(torch.compiler.disable(method))
        return plain[0](*args, **kwargs)

    return run  # type: ignore[return-value]

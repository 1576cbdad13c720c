"""Who carries transfers out: by kind, the functions of the runtime that make its collectives.

What crosses is described below the run time (`descompiler.layout.transfer`), where plans are made without process
groups. What sends it, in autograd mostly, is marked with `carries`, and takes the names of collectives from the kind. A
file of the runtime and one of the same name in the layout are about the same kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from descompiler.layout.transfer import Transfer

F = TypeVar("F", bound=Callable[..., Any])

CARRIERS: dict[type[Transfer], list[Callable[..., Any]]] = {}
"""By kind: functions, or autograd functions, in the order in which they are defined."""


def carries(kind: type[Transfer]) -> Callable[[F], F]:
    """Mark what makes collectives of a kind."""

    def mark(function: F) -> F:
        CARRIERS.setdefault(kind, []).append(function)
        return function

    return mark

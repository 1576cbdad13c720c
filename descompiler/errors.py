"""What descompiler refuses, by name, and what it warns of.

Every error says which operator, table or argument it is about, where in the user's code if that is known, and what
to do next. Errors that one rank meets are raised on every rank (`descompiler.runtime.agreement`).
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")


LIBRARIES = tuple(f"{Path(f).parent}/" for f in (__file__, torch.__file__, np.__file__))
"""Folders of code that is not the user's."""


class DescompilerError(Exception):
    """Base of every error that descompiler raises on purpose."""


class CaptureError(DescompilerError):
    """The model could not be captured as a graph, or the captured graph does not reproduce the model.

    ``failures`` holds the rungs of the ladder that were tried (`descompiler.graph.program.Failure`).
    """

    def __init__(self, text: str, failures: tuple[Any, ...] = ()):
        super().__init__(text)
        self.failures = failures


class UnsupportedError(DescompilerError):
    """The model uses a feature whose distributed form would not be the original model."""


class PlanError(DescompilerError):
    """No plan satisfies the constraints, or a plan does not belong to this model or this world size."""


class InputError(DescompilerError, ValueError):
    """The inputs of a forward are not what the compiled model takes."""


class TableFullError(DescompilerError):
    """A dynamic table would have more rows than its ``max_rows``; nothing of it was changed."""


class OtherShapesError(CaptureError, InputError):
    """There is no graph for the sizes of the inputs, which are not those of the example."""


class RankError(DescompilerError):
    """Ranks disagree, or another rank failed; the text says which rank and why."""


class EquivalenceError(DescompilerError, AssertionError):
    """`des.verify` found a difference between the distributed module and the original model."""


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """What is not meant to be raised, raised as what says in which step, where in the user's code, and what to do."""
    try:
        yield
    except DescompilerError:
        raise
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        place = raised_at(error)
        raise UnsupportedError(
            f"{doing} failed with {type(error).__name__}: {first[:300]}{f' ({place})' if place else ''}. Check the "
            "arguments of the call; if they are right, descompiler does not know what the model does there: please "
            "report it, with the traceback and the model's forward"
        ) from error


def step_of(doing: str, step: Callable[[], T]) -> Callable[[], T]:
    """The step, whose errors are `explained`."""

    def run() -> T:
        with explained(doing):
            return step()

    return run


def warn(text: str) -> None:
    """Warn, at the line of the user's code that called this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"descompiler: {text}", stacklevel=level)


def running_at() -> str | None:
    """The user's file and line that is running; None on a thread that runs none of the user's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    return None if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def raised_at(error: BaseException) -> str | None:
    """The user's file and line that an error was raised in; None if it was raised in a library's."""
    return innermost(traceback.extract_tb(error.__traceback__))


def innermost(frames: traceback.StackSummary) -> str | None:
    """The file and line of the innermost frame that is the user's; None if none is."""
    places = [f"{f.filename}:{f.lineno}" for f in frames if not f.filename.startswith(LIBRARIES)]
    return places[-1] if places else None

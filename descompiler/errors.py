"""What descompiler refuses, by name.

Every error says which operator, table or argument it is about, where in the user's code if that is known, and what
to do next. Errors that one rank meets are raised on every rank (`descompiler.runtime.Runtime.fail_together`).
"""

from typing import Any


class DescompilerError(Exception):
    """Base of every error that descompiler raises on purpose."""


class CaptureError(DescompilerError):
    """The model could not be captured as a graph, or the captured graph does not reproduce the model.

    ``failures`` holds the rungs of the ladder that were tried (`descompiler.program.Failure`).
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


class RankError(DescompilerError):
    """Ranks disagree, or another rank failed; the text says which rank and why."""


class EquivalenceError(DescompilerError, AssertionError):
    """`des.verify` found a difference between the distributed module and the original model."""

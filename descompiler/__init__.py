"""descompiler: compile an ordinary PyTorch recommender model into an equivalent distributed module."""

from descompiler.errors import (
    CaptureError,
    DescompilerError,
    EquivalenceError,
    InputError,
    PlanError,
    RankError,
    UnsupportedError,
)

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "DescompilerError",
    "EquivalenceError",
    "InputError",
    "PlanError",
    "RankError",
    "UnsupportedError",
]

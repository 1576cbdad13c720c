"""Traces that stay: a process in which tests compile equal models traces each once.

Half of what a test of a compiled model takes is `torch.export`, and the tests of a file compile the same model again
and again. A trace is made unless a model of the same classes, attributes, parameters and inputs was traced in this
process, under the same settings; and the ladder accepts only what reproduces the model, remembered or not. ``pytest
--trace-anew``, which `make test-all` gives, remembers nothing.
"""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.capture import ladder
from descompiler.errors import CaptureError
from descompiler.graph.program import Program
from descompiler.graph.rewrite import copy_program
from descompiler.model.probe import Flat

PURE = ("export", "dynamo")
"""Rungs whose programs hold nothing of the model that was traced; a leaf holds modules."""


MOST = 200
"""Traces that are kept."""


Trace = Callable[[Flat, list[Tensor], nn.Module], Program]


def remember_traces() -> None:
    """From here on, in this process."""
    ladder.RUNGS = tuple((name, remembering(trace) if name in PURE else trace) for name, trace in ladder.RUNGS)


def remembering(trace: Trace) -> Trace:
    """A tracer that gives a copy of what it made of an equal model before, or raises the same."""
    made: dict[bytes, Program | str] = {}

    @functools.wraps(trace)
    def traced(flat: Flat, tensors: list[Tensor], template: nn.Module) -> Program:
        key = key_of(flat, tensors)
        if key is None:
            return trace(flat, tensors, template)
        if key not in made:
            if len(made) == MOST:
                made.pop(next(iter(made)))
            try:
                made[key] = trace(flat, tensors, template)
            except CaptureError as error:
                made[key] = str(error)
                raise
        found = made[key]
        if isinstance(found, str):
            raise CaptureError(found)
        parameters = {n: p.detach().requires_grad_(p.requires_grad) for n, p in template.named_parameters()}
        constants = {n: x.clone() for n, x in found.constants.items()}
        return replace(copy_program(found), sources=dict(found.sources), constants=constants, parameters=parameters)

    return traced


def key_of(flat: Flat, tensors: list[Tensor]) -> bytes | None:
    """What a trace depends on, as a digest; None if it can't be said: a model of a local class, or with a generator."""
    settings = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    code = [getattr(type(m).forward, "__code__", None) for m in flat.modules()]  # a test may put another in its place
    forwards = [(c.co_filename, c.co_firstlineno, c.co_code) for c in code if c is not None]
    written = io.BytesIO()
    try:
        _Pickler(written).dump((flat, tensors, settings, forwards))
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError, NotImplementedError):
        return None
    return hashlib.sha256(written.getvalue()).digest()


class _Pickler(pickle.Pickler):
    """Equal tensors are equal bytes; those that share memory do so in both."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self._places: dict[int, int] = {}

    def reducer_override(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return NotImplemented
        if x.layout is not torch.strided or x.is_meta:
            raise pickle.PicklingError("values that are not all there")
        place = self._places.setdefault(x.untyped_storage().data_ptr(), len(self._places))
        how = type(x), x.dtype, x.device.type, tuple(x.shape), x.stride(), x.storage_offset(), x.requires_grad, place
        flat = x.detach().contiguous().reshape(-1)
        return str, (how, flat.view(torch.uint8).numpy().tobytes() if x.numel() else b"", vars(x))

"""Traces that stay: processes in which tests compile equal models trace each once.

Half of what a test of a compiled model takes is `torch.export`, every rank makes it, and the tests of a file compile
the same model again and again. A trace is made unless a model of the same classes, attributes, parameters and inputs
was traced before, under the same settings, in this process or in one with the same folder of traces; and the ladder
accepts only what reproduces the model, remembered or not. ``pytest --trace-anew``, which `make test-all` gives,
remembers nothing.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.symbolic_shapes import ShapeEnv

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


def remember_traces(folder: Path) -> None:
    """From here on, in this process, and together with all that are given the same folder."""
    ladder.RUNGS = tuple(
        (name, remembering(trace, folder / name) if name in PURE else trace) for name, trace in ladder.RUNGS
    )


def remembering(trace: Trace, folder: Path) -> Trace:
    """A tracer that gives a copy of what it made of an equal model before, or raises the same.

    ``folder``, which may not exist yet, has what any process made.
    """
    made: dict[str, Program | str] = {}
    folder.mkdir(exist_ok=True)

    def first(flat: Flat, tensors: list[Tensor], template: nn.Module) -> Program | str:
        try:
            return trace(flat, tensors, template)
        except CaptureError as error:
            return str(error)

    @functools.wraps(trace)
    def traced(flat: Flat, tensors: list[Tensor], template: nn.Module) -> Program:
        key = key_of(flat, tensors)
        if key is None:
            return trace(flat, tensors, template)
        if key not in made:
            if len(made) == MOST:
                made.pop(next(iter(made)))
            with _alone(folder / f"{key}.lock"):
                known = _read(folder / key)
                made[key] = first(flat, tensors, template) if known is None else known
                if known is None:
                    _write(folder / key, made[key])
        found = made[key]
        if isinstance(found, str):
            raise CaptureError(found)
        parameters = {n: p.detach().requires_grad_(p.requires_grad) for n, p in template.named_parameters()}
        constants = {n: x.clone() for n, x in found.constants.items()}
        return replace(copy_program(found), sources=dict(found.sources), constants=constants, parameters=parameters)

    return traced


def key_of(flat: Flat, tensors: list[Tensor]) -> str | None:
    """What a trace depends on, as a digest; None if it can't be said: a model with a generator, or of a metaclass."""
    settings = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    code = [getattr(type(m).forward, "__code__", None) for m in flat.modules()]  # a test may put another in its place
    forwards = [(c.co_filename, c.co_firstlineno, c.co_code) for c in code if c is not None]
    written = io.BytesIO()
    try:
        _Pickler(written).dump((flat, tensors, settings, forwards))
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError, ValueError, NotImplementedError):
        return None
    return hashlib.sha256(written.getvalue()).hexdigest()


class _Pickler(pickle.Pickler):
    """Equal tensors are equal bytes; those that share memory do so in both."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self._places: dict[int, int] = {}

    def reducer_override(self, x: Any) -> Any:
        if isinstance(x, type | FunctionType) and "<locals>" in x.__qualname__:
            return str, (_contents_of(x),)
        if not isinstance(x, Tensor):
            return NotImplemented
        if x.layout is not torch.strided or x.is_meta:
            raise pickle.PicklingError("values that are not all there")
        place = self._places.setdefault(x.untyped_storage().data_ptr(), len(self._places))
        how = type(x), x.dtype, x.device.type, tuple(x.shape), x.stride(), x.storage_offset(), x.requires_grad, place
        flat = x.detach().contiguous().reshape(-1)
        return str, (how, flat.view(torch.uint8).numpy().tobytes() if x.numel() else b"", vars(x))


def _contents_of(x: type | FunctionType) -> tuple[Any, ...]:
    """What a local class or function is made of: no other process finds it by its name."""
    if isinstance(x, FunctionType):
        # a class that the function is in, and the function itself, would not end
        outer = [c for cell in x.__closure__ or () if (c := cell.cell_contents) is not x]
        closure = [c for c in outer if not x.__qualname__.startswith(getattr(c, "__qualname__", "-"))]
        return x.__qualname__, x.__code__.co_filename, x.__code__.co_firstlineno, x.__code__.co_code, closure
    held = {n: v for n, v in vars(x).items() if n not in ("__dict__", "__weakref__", "__doc__")}
    return x.__qualname__, x.__bases__, held


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """No other process is within; one that ends there lets the next in."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


KEPT = ("val", "stack_trace")
"""What a program's nodes need of a trace's notes: their values, and the user's lines."""


def _write(file: Path, made: Program | str) -> None:
    """Nothing of a program with calls that are no operators of torch: who needs it traces it."""
    if isinstance(made, Program):
        rest = {name: x for name, x in vars(made).items() if name not in ("graph", "parameters")}
        content = fx.GraphModule(nn.Module(), made.graph), rest
    else:
        content = made
    try:
        written = GraphPickler.dumps(content, Options(ops_filter=None, node_metadata_key_filter=KEPT.__contains__))
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError, NotImplementedError, AssertionError):
        return
    file.with_suffix(".part").write_bytes(written)
    os.replace(file.with_suffix(".part"), file)  # a process that ends in between leaves no half


def _read(file: Path) -> Program | str | None:
    """What another process wrote; a program has its graph, and values of a mode of its own."""
    if not file.exists():
        return None
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = False  # as in a trace
    content: Any = GraphPickler.loads(file.read_bytes(), mode)
    return content if isinstance(content, str) else Program(content[0].graph, parameters={}, **content[1])

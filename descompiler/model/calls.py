"""Calls of one forward: keyword or positional, nested in more than one way, with other numbers and strings."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descompiler.errors import InputError
from descompiler.model.attributes import Place
from descompiler.model.batch_size import BatchSize, check_is_rows
from descompiler.model.inputs import (
    ArgumentPath,
    argument_at,
    flatten,
    leaf_paths,
    no_batch,
    normalise_inputs,
    split_statics,
    unflatten_with,
)
from descompiler.model.probe import CALL, method_of


def call_text(spec: pytree.TreeSpec) -> str:
    """A call of forward, as code would have it, with ``...`` for each value.

    >>> call_text(flatten(((1, [2]), {"ids": 3}))[1])
    'forward(..., [...], ids=...)'
    """
    try:
        args, kwargs = pytree.tree_unflatten([Ellipsis] * spec.num_leaves, spec)
    except Exception:  # a class of the user's that wants its tensors
        return f"forward of {spec.num_leaves} values"
    parts = [*map(repr, args), *(f"{name}={x!r}" for name, x in kwargs.items())]
    return f"forward({', '.join(parts)})".replace("Ellipsis", "...")


def parameters_of(model: nn.Module, method: str) -> inspect.Signature | None:
    """By which keyword and positional are told to be one call; None where a hook would see which it is."""
    if method == CALL and model._forward_pre_hooks:
        return None
    try:
        return inspect.signature(method_of(model, method), follow_wrapped=False)
    except ValueError:  # no Python function
        return None


def bound(args: tuple[Any, ...], kwargs: dict[str, Any], parameters: inspect.Signature | None) -> Any:
    """``(args, kwargs)`` with every argument positional that can be.

    Raises
    ------
    TypeError
        If forward takes no such arguments.

    Examples
    --------
    >>> bound((1,), {"item": 2}, inspect.signature(lambda user, item, *, k=3: None))
    ((1, 2), {})
    """
    if parameters is None:
        return args, kwargs
    found = parameters.bind(*args, **kwargs)
    return found.args, found.kwargs


def example_call(model: nn.Module, example_inputs: Any, method: str) -> Any:
    """``(args, kwargs)`` of the example inputs, as `bound` has them."""
    args, kwargs = normalise_inputs(example_inputs, method_of(model, method))
    try:
        return bound(args, kwargs, parameters_of(model, method))
    except TypeError:  # the model says so when it is run
        return args, kwargs


@dataclass(frozen=True, eq=False)
class OtherCall:
    """A call that is nested otherwise than the example, or with other values of what is no tensor.

    Attributes
    ----------
    spec, statics : as `Signature`'s ``inputs`` and ``statics``
    paths : tuple of str
        Where each leaf is.
    told : str
        How it differs, the same on every rank.
    """

    spec: pytree.TreeSpec
    statics: tuple[Any, ...]
    paths: tuple[str, ...]
    told: str

    def is_like(self, other: OtherCall) -> bool:
        return self.spec == other.spec and all(map(_alike, self.statics, other.statics))

    def tensors_of(self, example: Any) -> list[Tensor] | None:
        """The tensors that an example has at the same places; None if it lacks one."""
        known = dict(zip(leaf_paths(example), flatten(example)[0], strict=False))
        found = [known.get(path) for path, x in zip(self.paths, self.statics, strict=False) if x is Ellipsis]
        return found if self.paths and all(isinstance(x, Tensor) for x in found) else None  # type: ignore[return-value]


def _alike(a: Any, b: Any) -> bool:
    """Whether two values that are no tensors are one to forward: 1 and True are not, nan and nan are."""
    if isinstance(a, float | complex):
        return type(a) is type(b) and repr(a) == repr(b)
    return a is b or (type(a) is type(b) and (isinstance(a, BatchSize) or bool(a == b)))


def _text(x: Any) -> str:
    if isinstance(x, BatchSize):
        return "the rows"
    return "a tensor" if x is Ellipsis else str(getattr(x, "__qualname__", repr(x)))


@dataclass(frozen=True)
class Signature:
    """How forward is called: the nesting of its inputs, and of its outputs.

    ``statics`` and ``output_statics`` hold the leaves that are no tensors, by position, `Ellipsis` where a tensor goes;
    a `BatchSize` among them is each call's own.
    ``updates`` is where forward replaces tensors of its arguments; the new ones follow the tensors that it returns.
    ``sets`` is what forward leaves on its modules, by module and name: flags, and `Stale` for what no graph computes.
    ``paths`` is where each leaf is, and ``parameters`` are forward's, if keyword and positional are one call.
    """

    inputs: pytree.TreeSpec
    outputs: pytree.TreeSpec
    statics: tuple[Any, ...]
    output_statics: tuple[Any, ...]
    updates: tuple[ArgumentPath, ...] = ()
    paths: tuple[str, ...] = ()
    parameters: inspect.Signature | None = None
    sets: tuple[tuple[Place, Any], ...] = ()

    @cached_property
    def _tensors_alone(self) -> int | None:
        """How many tensors a call is, one after another, if it is nothing else."""
        count = len(self.statics)
        alone = flatten(((torch.zeros(1),) * count, {}))[1] == self.inputs and all(x is Ellipsis for x in self.statics)
        return count if alone and count else None

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Tensor leaves of a call as the example's, in the order of the graph's inputs.

        Raises
        ------
        InputError
            As `call_of`; if it is another call.
        """
        tensors, other = self.call_of(args, kwargs)
        if other is not None:
            raise InputError(f"these inputs differ from example_inputs ({other.told}): give them as they are there")
        return tensors

    def call_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], OtherCall | None]:
        """Tensor leaves of a call, and what call it is, if it is no such as the example.

        Raises
        ------
        InputError
            If forward takes no such arguments, the tensors disagree about the batch size (dim 0), or a number is said
            to be that and is not.
        """
        if self._tensors_alone is not None and not kwargs and _are_batch(args, self._tensors_alone):
            return list(args), None
        try:
            call = bound(args, kwargs, self.parameters)
        except TypeError as error:
            spec = flatten((args, kwargs))[1]
            raise InputError(
                f"forward was compiled for inputs nested as {call_text(self.inputs)}, and was called as "
                f"{call_text(spec)}: {error}; call it as in example_inputs"
            ) from error
        leaves, spec = flatten(call)
        tensors, statics = split_statics(leaves)
        same = spec == self.inputs
        if same:
            for i, (leaf, static) in enumerate(zip(leaves, self.statics, strict=True)):
                if static is Ellipsis and leaf is not None and not isinstance(leaf, Tensor):
                    raise InputError(f"input {i} must be a tensor, as in example_inputs; it is {type(leaf).__name__}")
        sizes = [t.shape[0] if t.dim() else None for t in tensors]
        if len(set(sizes)) > 1:
            raise InputError(f"dim 0 of every input is the batch; the inputs' sizes there are {sizes}")
        rows = sizes[0] if sizes else None
        if same and all(isinstance(y, BatchSize) or _alike(x, y) for x, y in zip(statics, self.statics, strict=True)):
            for i, static in enumerate(self.statics):
                if isinstance(static, BatchSize):
                    check_is_rows(i, statics[i], rows)
            return tensors or [no_batch()], None
        return tensors or [no_batch()], self._other(leaf_paths(call), spec, statics, rows)

    def _other(
        self, paths: tuple[str, ...], spec: pytree.TreeSpec, statics: tuple[Any, ...], rows: int | None
    ) -> OtherCall:
        """Another call than the example's, of which the example tells which number is the batch's size."""
        here = paths or tuple(map(str, range(len(statics))))
        known = dict(zip(self.paths or map(str, range(len(self.statics))), self.statics, strict=False))
        found, differ = list(statics), [f"without {path}" for path in known if path not in here]
        for i, (path, x) in enumerate(zip(here, statics, strict=True)):
            if isinstance(known.get(path), BatchSize):
                check_is_rows(i, x, rows)
                found[i] = BatchSize(x)
            elif path not in known or not _alike(x, known[path]):
                if type(x) is int and x == rows:
                    raise InputError(
                        f"{path} is {x} here, which is the number of rows, and was not so when the model was compiled: "
                        "it is not known whether it is the batch's size. Compile with it in example_inputs"
                    )
                differ.append(f"{path} is {_text(x)}")
        if [path for path in known if path in here] != [path for path in here if path in known]:
            differ.append(f"in the order {', '.join(here)}")
        return OtherCall(spec, tuple(found), paths, ", ".join(differ) or f"nested as {call_text(spec)}")

    def update(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        """Replace in the caller's lists and dicts what forward replaces."""
        if self.updates:
            call = bound(args, kwargs, self.parameters)
            for path, x in zip(self.updates, tensors[-len(self.updates) :], strict=True):
                argument_at(call, path[:-1])[path[-1]] = x

    def unflatten(self, tensors: Sequence[Tensor]) -> Any:
        """What forward returns, from its tensors."""
        return unflatten_with(tensors, self.outputs, self.output_statics)


def _are_batch(args: tuple[Any, ...], count: int) -> bool:
    """Whether these are so many tensors of one batch. A loop: nothing is called for each."""
    if len(args) != count:
        return False
    rows = args[0].shape[:1] if type(args[0]) is Tensor else ()
    for x in args:
        if type(x) is not Tensor or x.shape[:1] != rows:
            return False
    return bool(rows)

"""Opaque leaves: a module's own Python forward as one node of a graph.

A tracer makes a module a leaf where it can't trace through it (`descompiler.capture.leaves`). Lookups inside are not:
their ids are traced, the graph looks them up in front of the leaf, and forward is given the rows. So tables stay
operators of the graph, in whatever form, and what crosses is predicted as for any graph.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from descompiler.errors import CaptureError, UnsupportedError, raised_at
from descompiler.model.attributes import copied, plain_attributes, set_attributes
from descompiler.model.float64 import InDouble
from descompiler.model.inputs import flatten, split_statics, unflatten_with
from descompiler.ops.functions import DROPOUTS, LOOKUPS, function_name
from descompiler.ops.local import differentiable


class LeafError(UnsupportedError, ValueError):
    """A leaf does not do on these values what it did on the example inputs."""


class Lookups(TorchFunctionMode):
    """Sees every lookup of a module's tables, and lets ``answer(name, func, args, kwargs)`` say what it returns."""

    def __init__(self, tables: Mapping[int, str], answer: Callable[..., Any]):
        super().__init__()
        self.tables, self.answer = tables, answer  # tables: name by the identity of the parameter
        self.otherwise: set[str] = set()  # what is used in another way

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        names = [self.tables[id(x)] for x in tensors if id(x) in self.tables]
        if names and func in LOOKUPS and any(x.dim() and _integer(x) for x in tensors):
            return self.answer(names[0], func, args, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Size | torch.dtype | torch.device | int | bool):
            self.otherwise.update(names)
        return result


def _integer(x: Tensor) -> bool:
    return not x.is_floating_point() and x.dtype not in (torch.bool, torch.uint8)


class Quiet(TorchFunctionMode):
    """Dropout and batch norm in training pass their input on; notes whether there were any."""

    drops = trains_norm = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            trained = kwargs.get("training", args[2] if len(args) > 2 else True)
            self.drops |= bool(rate and trained)
            return args[0].clone()
        if func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training")):
            self.trains_norm = True
            return args[0].clone()
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Size:
    """A size of a tensor: ``per_row`` for each row of the batch, and ``fixed``."""

    per_row: int
    fixed: int

    def of(self, rows: Any) -> Any:
        """For a number of rows, or a symbol of it."""
        return self.per_row * rows + self.fixed if self.per_row else self.fixed


@dataclass(frozen=True)
class Result:
    """A tensor that a leaf returns."""

    shape: tuple[Size, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int | None:
        """The dimension that is the batch; None if there is not exactly one, of one entry a row."""
        found = [d for d, s in enumerate(self.shape) if s.per_row]
        return found[0] if len(found) == 1 and self.shape[found[0]] == Size(1, 0) else None


@dataclass(frozen=True)
class LeafCall:
    """One call of a module's forward, as seen in eager runs.

    Attributes
    ----------
    spec, statics : of its arguments: their nesting, and the leaves that are no tensors
    out_spec, out_statics : of what it returns
    results : tuple of Result
        The tensors that it returns.
    rows : tuple of int or None
        The dimension of each tensor among its arguments that is the batch.
    lookups : tuple of str
        The tables that it looks up, in order.
    lookup_rows : tuple of int or None
        The dimension of what each lookup returns that is the batch.
    example : tuple of Tensor
        One row of each tensor among its arguments, on which forward runs alone if it runs on any.
    example_rows : tuple of Tensor
        What the lookups return for it.
    """

    spec: pytree.TreeSpec
    statics: tuple[Any, ...]
    out_spec: pytree.TreeSpec
    out_statics: tuple[Any, ...]
    results: tuple[Result, ...]
    rows: tuple[int | None, ...]
    lookups: tuple[str, ...]
    lookup_rows: tuple[int | None, ...]
    example: tuple[Tensor, ...]
    example_rows: tuple[Tensor, ...]
    drops: bool
    trains_norm: bool
    writes: bool

    @property
    def takes_spare(self) -> bool:
        """Whether a spare row may stand beside others: it must leave nothing behind."""
        known = None not in self.lookup_rows and all(r.rows is not None for r in self.results)
        return known and not self.writes


class Leaf:
    """The target of a graph's node that runs a module's own forward.

    ``leaf(tensors, rows, state)``: the tensors among the arguments, what its lookups return, and the values of its
    parameters and buffers (`state`, by name). Returns the tensors among the results, as a list.
    """

    def __init__(self, name: str, module: nn.Module, call: LeafCall, state: Sequence[str], *, double: bool):
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for p in module.parameters()
        }
        self.module = copy.deepcopy(module, memo | copied(module))
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):  # the graph has what they do
            getattr(self.module, hooks).clear()
        self.name, self.call, self.state, self.double = name, call, tuple(state), double
        self.__name__ = self.__qualname__ = f"leaf_{name.replace('.', '_')}"
        self.__module__ = __name__
        self.runs_empty = False
        self._attributes = plain_attributes(self.module)
        every: list[tuple[str, Tensor]] = list(self.module.named_parameters(remove_duplicate=False))
        every += list(self.module.named_buffers(remove_duplicate=False))
        held = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        self.places = {n: [other for other, x in every if x is held[n]] for n in self.state}  # tied ones have several

    def __repr__(self) -> str:
        return self.__name__

    def renew(self) -> None:
        """Begin anew: what forward counted in plain attributes while the model was captured is undone."""
        set_attributes(self.module, self._attributes)

    def judged(self, tensors: Sequence[Tensor], rows: Sequence[Tensor], state: Sequence[Tensor]) -> list[Tensor]:
        """As a call, where dropout and batch norm in training pass their input on.

        Raises
        ------
        LeafError
            Whatever forward raises.
        """
        self.renew()
        try:
            return self.anchored(self._call(tensors, rows, state, Quiet, own_rows=True), (*tensors, *rows, *state))
        except LeafError:
            raise
        except Exception as error:  # whatever the user's forward raises on a part of a batch
            raise LeafError(f"{self.name!r} can't run on a part of a batch: {type(error).__name__}: {error}") from error

    def __call__(self, tensors: Sequence[Tensor], rows: Sequence[Tensor], state: Sequence[Tensor]) -> list[Tensor]:
        """Run forward; backward reaches all operands."""
        return self.anchored(self.run(tensors, rows, state), (*tensors, *rows, *state))

    def run(
        self, tensors: Sequence[Tensor], rows: Sequence[Tensor], state: Sequence[Tensor], *, own_rows: bool = False
    ) -> list[Tensor]:
        """Run forward as it is; ``own_rows``: these are a part of the batch, which it need not run on alone."""
        return self._call(tensors, rows, state, nullcontext, own_rows=own_rows)

    @staticmethod
    def anchored(results: Sequence[Tensor], operands: Sequence[Tensor]) -> list[Tensor]:
        """The results, from which backward reaches all operands: forward may use one on one rank and not on another."""
        trained = [x for x in operands if x.requires_grad]
        if not torch.is_grad_enabled() or not trained:
            return list(results)
        nothing = [x[:0].sum() if x.dim() else x.reshape(1)[:0].sum() for x in trained]
        anchor = sum(nothing[1:], nothing[0])
        return [x + anchor.to(x) if differentiable(x) else x for x in results]

    def failure(self, error: Exception) -> str:
        """What a call that raised has to say: the leaf, the user's file and line, and the error's own text."""
        text = str(error) if isinstance(error, LeafError) else f"{type(error).__name__}: {error}"
        # it may have returned what it must not, or an operator's backward raised
        return f"{self._at(raised_at(error) or self._place)}: {text}"

    @functools.cached_property
    def said(self) -> str:
        """Its name, and where the user has written it."""
        return self._at(self._place)

    @functools.cached_property
    def _place(self) -> str:
        users = (m for m in self.module.modules() if not type(m).__module__.startswith(("torch.", "descompiler.")))
        code = getattr(inspect.unwrap(type(next(users, self.module)).forward), "__code__", None)
        return f"{code.co_filename}:{code.co_firstlineno}" if code else "line unknown"

    def _at(self, place: str) -> str:
        return f"opaque leaf {self.name!r} ({place})"

    def check_empty(self, state: Sequence[Tensor]) -> None:
        """Find out whether forward runs on a batch without rows.

        Raises
        ------
        CaptureError
            If it does not, and it is not known what a spare row would be.
        """
        none = [x if d is None else x.narrow(d, 0, 0) for x, d in zip(self.call.example, self.call.rows, strict=True)]
        rows = [x[:0] for x in self.call.example_rows]
        try:
            with torch.no_grad():
                out = self._run(none, rows, state, nullcontext)
        except Exception:  # whatever the user's forward raises
            out = []
        shapes = [tuple(s.of(0) for s in r.shape) for r in self.call.results]
        self.runs_empty = [tuple(x.shape) for x in out] == shapes
        if not self.runs_empty and any(r.rows is None for r in self.call.results):
            raise CaptureError(f"{self.name!r} does not run on a batch without rows, and returns more than rows")

    def _call(
        self,
        tensors: Sequence[Tensor],
        rows: Sequence[Tensor],
        state: Sequence[Tensor],
        context: Callable[[], AbstractContextManager[Any]],
        *,
        own_rows: bool,
    ) -> list[Tensor]:
        count = next(x.shape[d] for x, d in zip(tensors, self.call.rows, strict=True) if d is not None)
        if count or self.runs_empty:
            try:
                out = self._run(tensors, rows, state, context)
                self._check(out, count)
            except Exception as error:  # whatever forward raises: perhaps it needs a row of another kind beside these
                if not (own_rows and count and self.call.takes_spare):
                    raise
                try:
                    out = self._with_spare(count, tensors, rows, state, context)
                except Exception:  # the same, or what forward raises on the spare row
                    raise error from None
        else:
            out = self._with_spare(count, tensors, rows, state, context)
        return out

    def _with_spare(
        self,
        count: int,
        tensors: Sequence[Tensor],
        rows: Sequence[Tensor],
        state: Sequence[Tensor],
        context: Callable[[], AbstractContextManager[Any]],
    ) -> list[Tensor]:
        """Forward on these rows and a spare one, whose results are dropped."""

        def join(x: Tensor, y: Tensor, dim: int | None) -> Tensor:
            if dim is None:
                return x
            return torch.cat([x, y.to(x)], dim) if count else y.to(x)

        spare = list(map(join, tensors, self.call.example, self.call.rows))
        # of what has no one dimension of rows, only the spare row's is taken
        dims = [0 if d is None and not count else d for d in self.call.lookup_rows]
        spare_rows = list(map(join, rows, self.call.example_rows, dims))
        out = self._run(spare, spare_rows, state, context)
        self._check(out, count + 1)
        return [x.narrow(r.rows or 0, 0, count) for x, r in zip(out, self.call.results, strict=True)]

    def _run(
        self,
        tensors: Sequence[Tensor],
        rows: Sequence[Tensor],
        state: Sequence[Tensor],
        context: Callable[[], AbstractContextManager[Any]],
    ) -> list[Tensor]:
        given = list(zip(self.call.lookups, rows, strict=True))[::-1]

        def answer(name: str, func: Any, args: Any, kwargs: Any) -> Tensor:
            if not given or given[-1][0] != name:
                raise LeafError(
                    f"{self.name!r} looks up {name!r} ({function_name(func)}) where it did not on the example inputs: "
                    "which lookups it makes depends on values"
                )
            return given.pop()[1].clone()  # forward may write to it

        with ExitStack() as contexts:
            values = {place: x for n, x in zip(self.state, state, strict=True) for place in self.places[n]}
            contexts.enter_context(_Holding(self.module, values))
            tables = {id(p): n for n, p in self.module.named_parameters()}
            if self.double:
                contexts.enter_context(InDouble())
            contexts.enter_context(context())
            contexts.enter_context(Lookups(tables, answer))
            args, kwargs = unflatten_with(tensors, self.call.spec, self.call.statics)
            out = self.module(*args, **kwargs)
        if given:
            raise LeafError(
                f"{self.name!r} does not look up {given[-1][0]!r} where it did on the example inputs: which lookups it "
                "makes depends on values"
            )
        return split_statics(flatten(out)[0])[0]

    def _check(self, out: Sequence[Tensor], count: int) -> None:
        shapes = [tuple(s.of(count) for s in r.shape) for r in self.call.results]
        found = [tuple(x.shape) for x in out]
        if found != shapes:
            raise LeafError(
                f"{self.name!r} returned shapes {found} for {count} rows, and {shapes} was expected from the example "
                "inputs: shapes that depend on values can't be part of a graph"
            )


class _Holding:
    """Context in which a module's parameters and buffers are given values, those of recurrent layers too."""

    def __init__(self, module: nn.Module, values: Mapping[str, Tensor]):
        self.module, self.values = module, values

    def __enter__(self) -> None:
        self.before = {}
        for name, x in self.values.items():
            scope, leaf, kind = self._place(name)
            self.before[name] = kind[leaf]
            kind[leaf] = x
            self._flat(scope)

    def __exit__(self, *error: Any) -> None:
        for name, x in self.before.items():
            scope, leaf, kind = self._place(name)
            kind[leaf] = x
            self._flat(scope)

    def _place(self, name: str) -> tuple[nn.Module, str, dict[str, Any]]:
        path, _, leaf = name.rpartition(".")
        scope = self.module.get_submodule(path)
        return scope, leaf, scope._parameters if leaf in scope._parameters else scope._buffers

    def _flat(self, scope: nn.Module) -> None:
        if isinstance(scope, nn.RNNBase):
            scope._flat_weights = [getattr(scope, n, None) for n in scope._flat_weights_names]

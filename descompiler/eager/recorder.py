"""Runs of a model on random weights, in float64, that note how its own Python uses each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from descompiler.cost_models.table import Table
from descompiler.dynamic.stand_in import StandIn, named_stand_ins
from descompiler.errors import InputError, UnsupportedError
from descompiler.model.attributes import Place, plain_attributes, set_attributes
from descompiler.model.float64 import InDouble, is_double_meant, widen
from descompiler.model.inputs import flatten, map_tensors, split_statics
from descompiler.model.probe import call_of, materialise
from descompiler.model.random_state import seeded
from descompiler.model.sparse import equal
from descompiler.ops.functions import DROPOUTS, LOOKUPS, function_name
from descompiler.ops.local import differentiable


@dataclass
class Use:
    """How a run uses one parameter."""

    ids: int = 0  # looked up per batch
    vectors: int = 0  # that lookups return
    sparse: bool = False
    lookups: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)

    def table(self, name: str, parameter: Tensor, rows: int, batches: int = 1, *, dynamic: bool = False) -> Table:
        """The parameter as a table, of which a run with ``rows`` rows told this, and each rank looks up ``batches``."""

        def per_row(count: int) -> int:
            return -(-count * batches // max(rows, 1))

        return Table(
            name,
            len(parameter),
            parameter.shape[1:].numel(),
            parameter.dtype,
            per_row(self.ids),
            per_row(self.vectors),
            sparse=self.sparse and not self.others,  # other uses have dense gradients
            trained=parameter.requires_grad,
            dynamic=dynamic,
        )


class Recorder(TorchFunctionMode):
    """Notes uses of parameters, and random draws; batch norm in training and dropout pass their input on, if asked.

    Attributes
    ----------
    uses : dict of str to Use
        By parameter.
    ids : dict of str to list of Tensor
        What each lookup of a parameter was given.
    kept : int
        Elements of floating point that autograd keeps for backward, parameters aside; counted in a model's first run.
    random : bool
        Whether anything was drawn.
    """

    def __init__(self, model: nn.Module, *, skip_norms: bool):
        super().__init__()
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.uses: dict[str, Use] = {}
        self.ids: dict[str, list[Tensor]] = {}
        self.skip_norms = skip_norms
        self.kept = 0
        self.random = False
        self._counted = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(self, x: Tensor) -> Tensor:
        """Count what autograd keeps, each memory once."""
        if x.layout is torch.strided and differentiable(x):
            place = x.untyped_storage().data_ptr()
            if place not in self._counted:
                self._counted.add(place)
                self.kept += x.numel()
        return x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if self.skip_norms and func in DROPOUTS:
            return args[0].clone()
        if self.skip_norms and func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training")):
            return args[0].clone()
        result = func(*args, **kwargs)
        for leaf in leaves:
            name = self.names.get(id(leaf)) if isinstance(leaf, Tensor) else None
            if name is None:
                continue
            ids = [x for x in leaves if isinstance(x, Tensor) and not x.is_floating_point() and x.dtype != torch.bool]
            whole = isinstance(result, Tensor) and result.grad_fn is None and torch.is_grad_enabled()
            if whole and leaf.requires_grad:
                continue  # a size, a dtype, a detached value
            if not isinstance(result, Tensor):
                continue
            use = self.uses.setdefault(name, Use())
            if func in LOOKUPS and ids:
                use.lookups.add(function_name(func))
                use.ids += ids[0].numel()
                use.vectors += result.numel() // max(leaf.shape[1:].numel(), 1)
                use.sparse |= bool(kwargs.get("sparse", func is torch.embedding and len(args) > 4 and args[4]))
                self.ids.setdefault(name, []).append(ids[0].detach())
            else:
                use.others.add(function_name(func))
        return result


class Runs:
    """Runs of a model, each from the same buffers and random numbers.

    Parameters
    ----------
    inputs
        Of the first run, as ``(args, kwargs)``: it tells whether float32 that forward makes is meant as float64.

    Raises
    ------
    InputError
        If the model can't run them.
    """

    def __init__(self, template: nn.Module, inputs: Any, method: str):
        self.method = method
        self._watched: list[str] = []
        self.counters: list[Place] = []  # numbers of modules that are ``as_if`` when a run begins
        self.as_if: int | float = 0
        tensors, _ = split_statics(flatten(inputs)[0])
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self._double_meant = is_double_meant()
        try:
            try:
                self.first = self._begin(template, inputs)
            except RuntimeError:  # perhaps float32, which its forward makes (and may have kept), meets float64
                self._double_meant = True
                self.first = self._begin(template, inputs)
        except UnsupportedError:
            raise
        except Exception as error:
            raise InputError(
                f"the model can't run example_inputs ({type(error).__name__}: {error}); pass what its forward takes"
            ) from error

    def _begin(self, template: nn.Module, inputs: Any) -> Recorder:
        self.model = materialise(template, self.device, double=True)
        self._state: Mapping[str, Tensor] = {n: b.clone() for n, b in self.model.named_buffers()}
        self._numbers = plain_attributes(self.model)
        recorder = Recorder(self.model, skip_norms=False)
        try:
            with saved_tensors_hooks(recorder.keep, lambda x: x):
                self._run(inputs, recorder)
        except RuntimeError:  # transforms of torch.func let nobody watch what is kept
            _, recorder = self(inputs)
        return recorder

    def __call__(self, inputs: Any, *, skip_norms: bool = False) -> tuple[list[Tensor], Recorder]:
        """The outputs, behind them the buffers that are watched, and what was noted."""
        recorder = Recorder(self.model, skip_norms=skip_norms)
        outputs = self._run(inputs, recorder)
        left = dict(self.model.named_buffers())
        return [*outputs, *(left[n].clone() for n in self._watched)], recorder

    def told(self, inputs: Any) -> list[Tensor | frozenset[int]]:
        """What a run without norms and dropout gives, and last, by dynamic table in training, what it looked up."""
        found, recorder = self(inputs, skip_norms=True)
        return [*found, *(_looked_up(m, recorder.ids.get(n, ())) for n, m in self.sighting())]

    def sighting(self) -> list[tuple[str, StandIn]]:
        """What stands for dynamic tables in which lookups leave a trace, by names."""
        return [(n, m) for n, m in named_stand_ins(self.model) if m.training]

    def changed_numbers(self) -> list[Place]:
        """Numbers of modules that the latest run changed."""
        now = plain_attributes(self.model)
        return [at for at, x in now.items() if _counts(x, self._numbers.get(at)) and x != self._numbers[at]]

    def watch_buffers(self) -> list[str]:
        """Watch the buffers that the latest run left otherwise than it found them; their names."""
        self._watched = [n for n, b in self.model.named_buffers() if not equal(b, self._state[n])]
        return self._watched

    def _run(self, inputs: Any, recorder: Recorder) -> list[Tensor]:
        for n, b in self.model.named_buffers():
            b.copy_(self._state[n])
        before = self._numbers | dict.fromkeys(self.counters, self.as_if)
        # every rank counts alike; None may be tensors by now, and those are of its rows
        set_attributes(
            self.model, {at: before[at] for at, x in plain_attributes(self.model).items() if _counts(x, before.get(at))}
        )
        inputs = map_tensors(torch.clone, inputs)  # forward may change them in place, or what holds them
        arithmetic: AbstractContextManager[Any] = InDouble() if self._double_meant else nullcontext()
        with seeded(11, self.device) as has_drawn, arithmetic, recorder:
            out = call_of(self.model, self.method)(*inputs[0], **inputs[1])
            recorder.random = has_drawn()
        return split_statics(flatten(out)[0])[0]


def _looked_up(table: StandIn, ids: Sequence[Tensor]) -> frozenset[int]:
    """The rows of a stand-in that were looked up, but for padding."""
    return frozenset(row for rows in ids for row in rows.reshape(-1).tolist()) - table.padding_rows()


def _counts(x: Any, before: Any) -> bool:
    return isinstance(x, int | float) and isinstance(before, int | float)


def in_float64(inputs: Any) -> Any:
    """Inputs, floats among them as float64."""
    return map_tensors(widen, inputs)

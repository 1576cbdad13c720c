"""The distributed module of a model captured in part: the user's own forward runs on this rank's rows."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from descompiler.eager.functions import total
from descompiler.eager.norms import SynchroniseNorms
from descompiler.eager.survey import MEAN, ROWS, SAME, SUM
from descompiler.emit.emit import Emitted
from descompiler.errors import InputError, UnsupportedError, warn
from descompiler.layout.rows import Rows
from descompiler.layout.traffic import Traffic
from descompiler.model.attributes import Place, copied, set_attributes
from descompiler.model.batch_size import BatchSize, check_is_rows
from descompiler.model.calls import call_text
from descompiler.model.float64 import InDouble, is_double_meant
from descompiler.model.inputs import flatten, split_statics, unflatten_with
from descompiler.model.kinds import Kinds
from descompiler.model.random_state import drawn_by_python
from descompiler.module.distributed import DistributedModule
from descompiler.module.parts import Parts
from descompiler.ops.local import plain, scale_grad, widest
from descompiler.runtime.agreement import Kind
from descompiler.runtime.backward import Used
from descompiler.runtime.guard import Guard
from descompiler.runtime.untraced import is_compiled, untraced


class PartialModule(DistributedModule):
    """A model whose own Python forward runs on this rank's rows; see `descompiler.eager.survey`."""

    predicts_traffic = False
    _coupled: bool
    _drawing: bool
    _means_double: bool
    _outputs: tuple[str, ...]
    _spare: tuple[tuple[Any, ...], dict[str, Any]]
    _followed: dict[Place, Any]

    def __init__(
        self,
        parts: Parts,
        call: Callable[..., Any],
        outputs: Sequence[str],
        spare: tuple[tuple[Any, ...], dict[str, Any]],
        *,
        coupled: bool = False,
        draws: bool = False,
    ):
        super().__init__(parts)
        # not by name: the model may have attributes of these names. draws: each rank its own, which users were told of
        vars(self).update(_coupled=coupled, _drawing=draws, _outputs=tuple(outputs), _means_double=is_double_meant())
        vars(self).update(_spare=spare, _followed={})  # rows of inputs; what another module's attributes were
        vars(self)["_call"] = call  # perhaps the host itself, which is no submodule
        if not self._in_place:
            self._watch()

    @untraced
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward on this rank's rows: outputs for them."""
        runtime = self._runtime
        if is_compiled():
            warn("torch.compile: the model is captured in part, so its own forward runs, uncompiled")
        runtime.traffic = Traffic()
        self._gradients.begin()
        self._same_flags()
        self._used = Used(len(self._outputs) > 1 and runtime.ranks > 1 and torch.is_grad_enabled())
        reference = next(self.parameters(), torch.zeros(()))
        runtime.device, runtime.wire_dtype = reference.device, widest(self.parameters())
        try:
            self._refuse_changed()
            flags = "".join(str(int(f)) for f in self._training_flags())
            trained = "".join(str(int(f)) for f in self._trained())
            mode = f"training flags {flags}, trained parameters {trained}, {self._gradients_mode()}"
            if self._coupled and runtime.ranks > 1:
                return self._run_global_batch(args, kwargs, mode)
            self._with_rows(args, kwargs)
            guard, before = self._guard(), drawn_by_python()
            out, spare = self._run_host(*self._cut(guard, args, kwargs))
            if runtime.ranks > 1 and not self._drawing and before != drawn_by_python():
                raise UnsupportedError(
                    "forward draws random numbers of NumPy's or Python's here, which it did not on example_inputs: "
                    "this rank's are not those of one process on the global batch. Pass example_inputs on which it "
                    "draws, and every rank draws the same for the global batch"
                )
            leaves, spec = flatten(out)
            tensors, statics = split_statics(leaves)
            self._check_outputs(tensors)
            self._used.ends = () if guard is None else tensors
            tensors = tensors if guard is None else guard.leave(tensors)
            rows = 0 if spare else _batch_rows(tensors, self._outputs, (args, kwargs))
            if spare:
                drop = {ROWS: lambda x: x[:0], MEAN: lambda x: x * 0, SUM: lambda x: x * 0, SAME: lambda x: x}
                tensors = [drop[kind](x) for x, kind in zip(tensors, self._outputs, strict=True)]
            self._exchange.agree(f"the end of forward, {mode}", Kind.END, rows=rows)
        except Exception as error:
            if not runtime.failed:  # the other ranks wait at their next agreement: tell them, then everyone raises
                runtime.header(0, str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}")
            raise
        tensors = [self._output(x, kind) for x, kind in zip(tensors, self._outputs, strict=True)]
        return unflatten_with(self._noticing(self._finishing(tensors), self.output_rows), spec, statics)

    def _refuse_changed(self) -> None:
        """Raise if there are other parameters than were compiled; hooks and parts are called as they are."""
        self._structure.check_tensors(self, self._now())

    def _copied(self, memo: dict[int, Any]) -> PartialModule:
        host, call = vars(self)["_host"], vars(self)["_call"]
        other = copy.deepcopy(host, memo | copied(host))
        values = {n: p.data for n, p in other.named_parameters()}
        buffers = dict(other.named_buffers(remove_duplicate=False))
        parts = Parts(
            other,
            self.plan,
            self._runtime.anew(),
            values,
            buffers,
            self._coverage,
            other,
            original=vars(self)["_original"],
        )
        calls = other if call is host else getattr(other, call.__name__)
        result = PartialModule(parts, calls, self._outputs, self._spare, coupled=self._coupled, draws=self._drawing)
        vars(result)["_means_double"] = self._means_double
        return result

    def follow(self, owner: DistributedModule, args: Any, kwargs: Any) -> Any:
        """A forward with the parameters and buffers that another module has now, which counts its traffic."""
        for name, p in self.named_parameters():
            if p is not (now := owner.get_parameter(name)):  # dynamic tables are the owner's own
                p.data = plain(now).detach()
        for name, b in owner.named_buffers(remove_duplicate=False):
            path, _, leaf = name.rpartition(".")
            self.get_submodule(path)._buffers[leaf] = b
        set_here, before = owner._attributes.values(), self._followed
        new = {at: x for at, x in set_here.items() if at not in before or before[at] is not x}
        set_attributes(vars(self)["_host"], new)
        vars(self)["_followed"] = set_here  # what forward counts there goes on
        result = self(*args, **kwargs)
        owner._runtime.traffic = self._runtime.traffic
        return result

    def _check_outputs(self, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != len(self._outputs):
            raise InputError(f"forward returned {len(tensors)} tensors, and {len(self._outputs)} on example_inputs")

    def _run_global_batch(self, args: Any, kwargs: Any, mode: str) -> Any:
        """The user's forward on the batch of all ranks, because its rows depend on each other.

        It is one computation that every rank repeats: random numbers are the same, and so are the gradients, which are
        a share of the ranks' each, so that their sum over ranks, divided as every parameter's, is the original's.
        """
        runtime = self._runtime
        leaves, spec = flatten((args, kwargs))
        tensors, _ = split_statics(leaves)
        sizes = {x.shape[0] if x.dim() else None for x in tensors}
        problem = None if len(sizes) == 1 and None not in sizes else f"the inputs' sizes of dim 0 are {sizes}, not one"
        rows = tensors[0].shape[0] if problem is None else 0
        self._with_rows(args, kwargs)
        inner = Kinds.of(tensors).sizes
        digest = zlib.crc32(repr(inner).encode())
        told = runtime.meet(f"the start of forward, {mode}", rows=rows, problem=problem, tell=[digest] * runtime.ranks)
        if len(set(told)) > 1:
            title = "forward mixes the rows of all ranks, and no tracer captured it: pad to one length on all ranks"
            runtime.raise_everywhere(f"inputs have the sizes {inner} for each row", InputError, title)
        guard = self._guard()
        self._used.watch_hooks(tensors)
        statics = self._with_rows(args, kwargs, sum(runtime.rows))
        args, kwargs = self._cut(guard, *unflatten_with(self._gathered(tensors), spec, statics))
        arithmetic = InDouble if self._means_double else nullcontext
        with arithmetic():
            held = flatten((args, kwargs))[0]
            with self._inside():
                out = runtime.draw(vars(self)["_call"], *args, **kwargs)
        if any(x is not y for x, y in zip(held, flatten((args, kwargs))[0], strict=False)):
            warn(
                "forward replaces what is in a list or dict that it is given, here the rows of all ranks; the compiled "
                "model leaves the caller's as it was. Return the new values from forward"
            )
        leaves, spec = flatten(out)
        tensors, statics = split_statics(leaves)
        self._check_outputs(tensors)
        self._used.ends = () if guard is None else tensors
        tensors = tensors if guard is None else guard.leave(tensors)
        self._exchange.agree("the end of forward", Kind.END, rows=rows)
        outputs = []
        for x, kind in zip(tensors, self._outputs, strict=True):
            if x.requires_grad:
                x = scale_grad(x, 1 / runtime.ranks)
            outputs.append(runtime.output(runtime.slice_rows(x, 0, 1, 1)) if kind == ROWS else runtime.spread(x))
        return unflatten_with(self._noticing(self._finishing(outputs), self.output_rows), spec, statics)

    def _with_rows(self, args: Any, kwargs: Any, rows: int | None = None) -> tuple[Any, ...]:
        """The leaves of a call that are no tensors; the batch's own size among them becomes ``rows``, if given."""
        leaves, spec = flatten((args, kwargs))
        tensors, statics = split_statics(leaves)
        known, like = flatten(self._spare)
        sized = [i for i, x in enumerate(known) if isinstance(x, BatchSize)]
        if not sized:
            return statics
        if like != spec:
            raise InputError(
                f"forward was compiled for inputs nested as {call_text(like)}, and was called as {call_text(spec)}"
            )
        sizes = {x.shape[0] if x.dim() else None for x in tensors}
        for i in sized if len(sizes) == 1 else ():  # rows of jagged tensors are not seen
            check_is_rows(i, statics[i], next(iter(sizes)))
        return tuple(rows if i in sized and rows is not None else x for i, x in enumerate(statics))

    @contextmanager
    def _inside(self, *, spare: bool = False) -> Iterator[None]:
        """What forward uses weighs as its outputs do, and not once more; what it differentiates is its own."""
        self._exchange.inside = self._gradients.caught.forward = True
        try:
            with self._exchange.looking_up(spare=spare):
                yield
        finally:
            self._exchange.inside = self._gradients.caught.forward = False

    def _guard(self) -> Guard | None:
        return self._gradients.guard() if self._runtime.ranks > 1 and torch.is_grad_enabled() else None

    def _cut(self, guard: Guard | None, args: Any, kwargs: Any) -> Any:
        """Arguments whose gradients, if they get any, come from the guard."""
        leaves, spec = flatten((args, kwargs))
        tensors, statics = split_statics(leaves)
        if guard is None or not any(x.requires_grad for x in tensors):
            return args, kwargs
        self._used.watch_hooks(tensors)
        return unflatten_with(guard.enter(self._runtime.inputs(tensors)), spec, statics)

    def _gathered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All ranks' rows of each tensor; one collective for each dtype."""
        result = list(tensors)
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            chosen = [i for i, x in enumerate(tensors) if x.dtype == dtype]
            # gradients of inputs are, as those of own rows, a rank's and not a share of it
            mine = [scale_grad(x, self._runtime.ranks) if x.requires_grad else x for x in (tensors[i] for i in chosen)]
            wholes = self._runtime.gather_rows(mine, [(0, 1, 1)] * len(chosen))
            result = [wholes[chosen.index(i)] if i in chosen else x for i, x in enumerate(result)]
        return result

    def _output(self, x: Tensor, kind: str) -> Tensor:
        """An output, so that its gradient follows the convention; a scalar of the batch is that of the global one."""
        runtime = self._runtime
        if kind == ROWS:
            return runtime.output(x)
        if runtime.ranks == 1:
            return x
        share = {MEAN: runtime.rows[runtime.rank] / max(sum(runtime.rows), 1), SUM: 1.0, SAME: 1 / runtime.ranks}
        # the mean over no rows is nan; backward still has to go through it
        own = x * share[kind] if share[kind] else x.nan_to_num() * 0
        return runtime.spread(total(runtime, own, "a scalar output"))

    def _run_host(self, args: Any, kwargs: Any) -> tuple[Any, bool]:
        """The user's forward; where it can't run without rows, on spare rows, whose results are dropped (then True).

        All that spare rows reach has gradient zero.
        """
        call = vars(self)["_call"]
        arithmetic = InDouble if self._means_double else nullcontext
        try:
            with arithmetic(), self._inside(), SynchroniseNorms(self._exchange):
                return call(*args, **kwargs), False
        except Exception:
            empty = any(x.dim() and not x.shape[0] for x in split_statics(flatten((args, kwargs))[0])[0])
            if not empty or self._runtime.failed or self._runtime.ranks == 1:
                raise
        leaves, spec = flatten(self._spare)
        tensors, statics = split_statics(leaves)
        given = split_statics(flatten((args, kwargs))[0])[0]
        spare = unflatten_with([x.to(y.dtype) for x, y in zip(tensors, given, strict=True)], spec, statics)
        with arithmetic(), self._inside(spare=True), SynchroniseNorms(self._exchange, spare=True):
            return call(*spare[0], **spare[1]), True

    @property
    def output_rows(self) -> tuple[Rows | None, ...]:
        """Where a rank's own rows are in each output tensor; None: it is the global batch's, equal on all ranks."""
        return tuple(Rows() if kind == ROWS else None for kind in self._outputs)

    def _program(self, sample: Sequence[Tensor] | None = None) -> Emitted:
        raise InputError("the model was captured in part: its own forward runs, and there is no program to print")


def _batch_rows(tensors: Sequence[Tensor], kinds: Sequence[str], inputs: Any) -> int:
    for x, kind in zip(tensors, kinds, strict=True):
        if kind == ROWS:
            return x.shape[0]
    return next((x.shape[0] for x in split_statics(flatten(inputs)[0])[0] if x.dim()), 0)

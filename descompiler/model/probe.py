"""Probes: copies of a model, without weights (`blueprint`) or with random ones, and batches to run them on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descompiler.dynamic.stand_in import stand_ins
from descompiler.errors import CaptureError, InputError, UnsupportedError, warn
from descompiler.model.attributes import copied, held_values, plain_attributes
from descompiler.model.batch_size import BatchSize
from descompiler.model.float64 import InDouble, is_double_meant, widen, widen_attributes
from descompiler.model.folded import Folded, probe_parameters
from descompiler.model.inputs import ArgumentPath, argument_at, by_path, flatten, split_statics, unflatten_with
from descompiler.model.kept import check_memory, copies_of, is_kept, keep_as_buffers, with_attributes
from descompiler.model.random_state import seed_torch


def check_model(model: nn.Module) -> None:
    """Raise unless it is a model whose parameters can be trained.

    Raises
    ------
    InputError, UnsupportedError
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InputError(f"the model is {kind}: pass an object of a torch.nn.Module")
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise UnsupportedError(
            "the model is torch.compile's, whose program is for one process: write des.compile(model, ...), of the "
            "model itself"
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"{f'module {name!r}' if name else 'the model'} is TorchScript's, whose parameters can't be replaced "
                "by pieces: compile with the Python module that was scripted or traced (functions may be scripted)"
            )
    check_memory(model)
    for name, p in model.named_parameters():
        if p.layout is not torch.strided and p.requires_grad:
            kind = str(p.layout).removeprefix("torch.")
            raise UnsupportedError(
                f"parameter {name!r} is {kind}, and gradients of sparse matrices are not "
                "averaged over ranks: freeze it (requires_grad=False), or train a vector of its values"
            )


def blueprint(model: nn.Module) -> nn.Module:
    """A copy of the module whose parameters are on the meta device; buffers keep their values.

    Raises
    ------
    UnsupportedError
        If the values of buffers or attributes are not known because they are on the meta device, batch statistics
        aside.
    """
    check_model(model)
    memo: dict[int, Any] = {
        id(p): p.detach().clone()
        if is_kept(p)
        else with_attributes(nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad), p)
        for p in model.parameters()
    }
    result = copy.deepcopy(model, copied(model) | memo | stand_ins(model, torch.device("meta")))
    keep_as_buffers(result)
    lost = []
    for prefix, module in result.named_modules():
        buffers = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
        if buffers and isinstance(module, nn.modules.batchnorm._NormBase):
            for name, b in buffers.items():
                module._buffers[name] = torch.empty_like(b, device="cpu")
            module.reset_running_stats()
        else:
            lost += [f"{prefix}.{name}".lstrip(".") for name in buffers]
    registered = {id(p) for p in result.parameters()}
    prefixes = {id(m): f"{n}." if n else "" for n, m in result.named_modules()}
    lost += [
        f"{prefixes[id(module)]}{name}"
        for module, name, nested in held_values(result)
        if any(isinstance(x, Tensor) and x.is_meta and id(x) not in registered for x in pytree.tree_leaves(nested))
    ]
    if lost:
        raise UnsupportedError(
            f"{', '.join(map(repr, lost))} of the model {'are' if len(lost) > 1 else 'is'} on the meta device, where "
            "there are no values: create such tensors with device='cpu'; it is only the parameters that may be on meta"
        )
    return result


def materialise(template: nn.Module, device: torch.device, *, double: bool) -> nn.Module:
    """A blueprint with random parameters, to trace and to probe."""
    generator = torch.Generator().manual_seed(20190904)
    memo: dict[int, Any] = probe_parameters(template.parameters(), device, generator, double=double)
    if not double:  # tracers want ordinary tensors, and look at no values
        memo = {i: p.unfolded() if isinstance(p, Folded) else p for i, p in memo.items()}
    for p in template.parameters():
        with_attributes(memo[id(p)], p)
    result = copy.deepcopy(template, copied(template) | memo)
    buffers = dict(result.named_buffers(remove_duplicate=False))
    for name, b in copies_of(buffers, lambda b: (widen(b) if double else b).to(device)).items():
        path, _, leaf = name.rpartition(".")
        result.get_submodule(path)._buffers[leaf] = b
    if double:
        widen_attributes(result)
    return result


CALL = "__call__"
"""The method that stands for calling the module: its forward, and its hooks."""


def method_of(model: nn.Module, method: str) -> Callable[..., Any]:
    """The method of a model that is compiled; forward itself, without hooks, for `CALL`.

    Raises
    ------
    InputError
        If the model has none of that name.
    """
    found = getattr(model, "forward" if method == CALL else method, None)
    if not callable(found):
        raise InputError(f"{type(model).__name__} has no method {method!r} to compile")
    return found


def call_of(model: nn.Module, method: str) -> Callable[..., Any]:
    """What calls a model's method; with its hooks for `CALL`."""
    return model if method == CALL else method_of(model, method)


@contextmanager
def assignments_written(model: nn.Module) -> Iterator[None]:
    """Buffers that forward assigns anew (``self.mean = 0.9 * self.mean + ...``) are written to when it ends.

    So a tracer sees what it would not: another tensor under the name.

    Raises
    ------
    UnsupportedError
        If one gets another shape or dtype: ranks' buffers, and checkpoints, have those of the model.
    """
    before = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    yield
    for module, name, buffer in before:
        now = module._buffers.get(name)
        if now is buffer or now is None:
            continue
        if (now.shape, now.dtype) != (buffer.shape, buffer.dtype):
            raise UnsupportedError(
                f"forward gives buffer {name!r} of {type(module).__name__} another shape or dtype "
                f"({list(now.shape)}, {now.dtype}; it was {list(buffer.shape)}, {buffer.dtype}): ranks would hold "
                "different state. Keep its shape, or return the value from forward"
            )
        buffer.copy_(now.detach())
        module._buffers[name] = buffer


class Flat(nn.Module):
    """Calls the user's module from a flat list of tensors and flattens what it returns."""

    def __init__(self, model: nn.Module, spec: pytree.TreeSpec, statics: Sequence[Any], method: str = CALL):
        super().__init__()
        self.model, self.spec, self.statics, self.method = model, spec, statics, method
        self.sized = tuple(i for i, x in enumerate(statics) if isinstance(x, BatchSize))
        self.out_spec: pytree.TreeSpec | None = None
        self.out_statics: tuple[Any, ...] = ()
        self.means_double = is_double_meant()
        self.arithmetic: Callable[[], AbstractContextManager[Any]] = nullcontext  # or InDouble, for a probe in float64
        self.attributes = plain_attributes(model)  # as they are before the first run
        self.updates: tuple[ArgumentPath, ...] = ()  # what forward replaces in its arguments: outputs too

    def __deepcopy__(self, memo: dict[int, Any]) -> Flat:
        result = Flat(copy.deepcopy(self.model, memo | copied(self.model)), self.spec, self.statics, self.method)
        result.training, result.means_double = self.training, self.means_double
        result.arithmetic, result.updates = self.arithmetic, self.updates
        return result

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        args, kwargs = self.arguments(tensors)
        if torch.compiler.is_dynamo_compiling():  # it replays assignments itself, and reads no more than it has to
            returned = self.call(args, kwargs)
        else:
            with assignments_written(self.model):
                returned = self.call(args, kwargs)
        leaves, self.out_spec = flatten(returned, returned=True)
        out, self.out_statics = split_statics(leaves)
        if self.updates:
            out = [*out, *(argument_at((args, kwargs), path) for path in self.updates)]
        return out

    def arguments(self, tensors: Sequence[Tensor]) -> Any:
        """``(args, kwargs)`` of these tensors; the batch's own size is theirs, and follows them in a trace."""
        rows = tensors[0].shape[0] if self.sized else 0
        statics = [rows if i in self.sized else x for i, x in enumerate(self.statics)] if self.sized else self.statics
        return unflatten_with(tensors, self.spec, statics)

    def call(self, args: Any, kwargs: Any) -> Any:
        call = self.model if self.method == CALL else getattr(self.model, self.method)
        if not self.means_double:  # Dynamo reads this code: as few contexts as can be
            return call(*args, **kwargs)
        with InDouble():
            return call(*args, **kwargs)


def at_least_two_rows(tensors: list[Tensor]) -> list[Tensor]:
    if not tensors:
        raise InputError("example_inputs holds no tensor")
    sizes = [t.shape[0] if t.dim() else 0 for t in tensors]
    if not all(sizes):
        raise InputError(f"dim 0 of every example input is the batch, at least 1; the sizes there are {sizes}")
    if len(set(sizes)) != 1:
        raise CaptureError(f"dim 0 of the example inputs is not one batch: its sizes are {sizes}")
    return [torch.cat([t, t]) for t in tensors] if sizes[0] == 1 else list(tensors)


def double_all(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [widen(t.detach()) for t in tensors]


def other_batch(tensors: list[Tensor], accepts: Callable[[int], bool] = lambda rows: True) -> list[Tensor]:
    """Another size and other values: rows drawn from the example's, each input on its own.

    Raises
    ------
    CaptureError
        If no other size near is accepted.
    """
    rows = tensors[0].shape[0]
    generator = torch.Generator().manual_seed(7)
    size = 2 * rows + 1 if rows < 64 else rows // 2 + 1
    near = sorted(range(2, 2 * rows + 16), key=lambda n: abs(n - rows))
    size = next((n for n in (size, *near) if n != rows and accepts(n)), 0)
    if not size:
        raise CaptureError(f"forward is another for every batch size but {rows}")
    return [t[torch.randint(rows, (size,), generator=generator).to(t.device)] for t in tensors]


def move_parameters(probe: Flat) -> None:
    """Give every parameter other values: an expression of parameters that was baked as a constant shows."""
    with torch.no_grad():
        for p in probe.model.parameters():
            size = p.untyped_storage().nbytes() // p.element_size() if p.numel() else 0
            p.detach().as_strided((size,), (1,), 0).mul_(0.875)  # the storage: a large table is an overlapping view


def run_eager(probe: Flat, tensors: list[Tensor]) -> list[Tensor]:
    seed_torch(11)
    with probe.arithmetic():
        return probe(*(t.clone() for t in tensors))  # forward may change them in place


def updated_arguments(probe: Flat, tensors: list[Tensor]) -> tuple[ArgumentPath, ...]:
    """Where forward replaces a tensor in a list or dict that it is given (``H[0] = cell(x, H[0])``).

    Warns if it changes more of them: the caller's stay as they were.
    """
    given = probe.arguments([t.clone() for t in tensors])
    before = by_path(given)
    with probe.arithmetic():
        probe.call(*given)
    after = by_path(given)
    changed = [path for path in before.keys() | after.keys() if before.get(path) is not after.get(path)]
    found = [path for path in before if path in changed and _are_tensors(before[path], after.get(path))]
    if len(found) < len(changed):
        warn(
            "forward adds to a list or dict that it is given, takes from it, or changes what is no tensor in it: the "
            "compiled model leaves the caller's as it was. Return the new values from forward"
        )
    return tuple(found)


def _are_tensors(*values: Any) -> bool:
    return all(isinstance(x, Tensor) for x in values)

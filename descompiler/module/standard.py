"""Standard calls of PyTorch on a compiled module that would be silently different: made exact, or refused by name.

load_state_dict                     this rank's pieces of what is whole; no other rank's pieces
DistributedDataParallel, FSDP       refused: they would synchronise, or divide, what is synchronised and divided
no_sync                             gradients of each backward are averaged, and their sum is the same
join                                refused: a rank without rows calls the module with none
an optimiser of the original's      refused where it steps and nothing has a gradient: it trains nothing
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import register_optimizer_step_pre_hook

from descompiler.eager.held import Held
from descompiler.errors import InputError, UnsupportedError
from descompiler.ops.local import plain
from descompiler.planning.plan import Plan
from descompiler.runtime.runtime import Runtime


class Compiled(Protocol):
    """What is asked of a `descompiler.DistributedModule` here."""

    plan: Plan
    _runtime: Runtime

    def named_parameters(self, *, remove_duplicate: bool = ...) -> Iterator[tuple[str, nn.Parameter]]: ...


def has_its_own(model: nn.Module, method: str) -> bool:
    """Whether a model's class has another method than ``torch.nn.Module``, of that name."""
    return getattr(type(model), method) is not getattr(nn.Module, method)


class _WithExtraState:
    """What the original's root keeps beside tensors: ``state_dict`` asks the class whether there is any."""

    def get_extra_state(self) -> Any:
        return vars(self)["_face"].get_extra_state()

    def set_extra_state(self, state: Any) -> None:
        vars(self)["_face"].set_extra_state(state)


_WITH_EXTRA_STATE: dict[type, Any] = {}


def with_extra_state(cls: type) -> Any:
    """The class of a compiled module whose original has a ``get_extra_state``."""
    if issubclass(cls, _WithExtraState):  # the original was compiled
        return cls
    if cls not in _WITH_EXTRA_STATE:
        own = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _WITH_EXTRA_STATE[cls] = type(cls.__name__, (_WithExtraState, cls), own)
    return _WITH_EXTRA_STATE[cls]


def watch_loading(loaded: nn.Module, module: Compiled) -> None:
    """Let a module, or the host of one that was compiled in place, load no state that is not its own."""
    reference = weakref.ref(module)

    def hook(_: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *__: Any) -> None:
        if (compiled := reference()) is not None:
            _take_pieces(compiled, state, prefix, metadata)

    loaded.register_load_state_dict_pre_hook(hook)


def _take_pieces(module: Compiled, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    """Put this rank's pieces in the place of what a state has.

    Raises
    ------
    InputError, UnsupportedError
    """
    if metadata.get("assign_to_params_buffers"):
        raise UnsupportedError(
            "load_state_dict(assign=True) of a compiled module would put other tensors in the place of its pieces: "
            "leave assign out"
        )
    rank, names = module._runtime.rank, {id(p): n for n, p in module.named_parameters()}
    for name, p in module.named_parameters(remove_duplicate=False):
        if names[id(p)] in module._runtime.tables:  # it looks itself whether the rows are its own
            continue
        value, pieces = state.get(prefix + name), module.plan.pieces[names[id(p)]]
        if not isinstance(value, Tensor) or pieces.is_replicated:
            continue
        if isinstance(value, Held):
            if (value.pieces, value.rank) != (pieces, rank):
                raise InputError(
                    f"this state_dict holds the piece of {value.original!r} that rank {value.rank} of "
                    f"{value.pieces.ranks} had, and rank {rank} of {pieces.ranks} holds another in {name!r}: let each "
                    "rank load what it has saved, or all des.full_state_dict(module) or a torch.distributed.checkpoint"
                )
            state[prefix + name] = plain(value)
        elif tuple(value.shape) == pieces.shape:
            state[prefix + name] = pieces.cut(value, rank)
        else:
            raise InputError(
                f"{name!r} has shape {tuple(value.shape)} in this state_dict and {pieces.shape} in the model, of which "
                f"rank {rank} holds a piece of {pieces.piece_shape(rank)}: it does not say which piece it is. Load the "
                "original's state_dict, or what module.state_dict() has returned on this rank"
            )


class NotWrapped:
    """What a wrapper that would synchronise a compiled module finds when it looks which parameters to leave alone."""

    def __iter__(self) -> Any:
        raise UnsupportedError(
            "DistributedDataParallel (a trainer's ddp strategy, Accelerator.prepare) around a compiled module would "
            "put rank 0's pieces in the place of the others': the module synchronises itself. Train it as it is; with "
            "Lightning, strategy='auto' and devices=1 on each rank"
        )


class StandardCalls:
    """What `descompiler.DistributedModule` answers to calls that users of DistributedDataParallel make."""

    _runtime: Runtime

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Any:
        if self._runtime.ranks == 1:
            raise AttributeError
        return iter(NotWrapped())

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """As DistributedDataParallel's, for accumulating gradients.

        Every backward averages its gradients, which gives the sum that averaging the sum would: nothing is left to do.
        """
        yield

    def join(self, *_: Any, **__: Any) -> Any:
        """As DistributedDataParallel's, which this module has no need of.

        Raises
        ------
        UnsupportedError
        """
        raise UnsupportedError(
            "join: a rank that has run out of rows calls the compiled module with none (x[:0]), and the step is exact: "
            "let every rank make as many steps as the longest"
        )

    def _refuse_wrapped(self) -> None:
        if isinstance(self, FSDPModule):
            raise UnsupportedError(
                "fully_shard of a compiled module would divide what is divided already: train it as it is; plan= pins "
                "tables to a form that gathers them where they are used (docs/forms.md)"
            )


_ORIGINALS: dict[int, weakref.ref[nn.Parameter]] = {}
"""Parameters of models that were compiled, and not in place, by id."""


_CHECKED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimisers that hold none of them, or train them."""


def watch_optimizers(parameters: Iterable[nn.Parameter]) -> None:
    """Raise where an optimiser of a compiled model's original parameters steps, and none has a gradient."""
    _hook_optimizers()
    for p in parameters:
        _ORIGINALS[id(p)] = weakref.ref(p, functools.partial(_forget, id(p)))
    _CHECKED.clear()


@functools.cache
def _hook_optimizers() -> None:
    """Once in a process."""
    register_optimizer_step_pre_hook(_check_optimizer)


def _forget(key: int, _: Any) -> None:
    _ORIGINALS.pop(key, None)


def _check_optimizer(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if optimizer in _CHECKED:
        return
    held = [p for group in optimizer.param_groups for p in group["params"]]
    originals = [p for p in held if (known := _ORIGINALS.get(id(p))) is not None and known() is p]
    if originals and all(p.grad is None for p in held):
        raise UnsupportedError(
            "this optimiser holds the parameters of the model that was compiled, and none has a gradient: nothing "
            "would be trained. Make it of the compiled module's parameters, or compile with in_place=True"
        )
    _CHECKED.add(optimizer)

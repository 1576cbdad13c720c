"""A model that was compiled in place: the user's own object, of which one method is the compiled one."""

from __future__ import annotations

from torch import nn

from descompiler.errors import InputError
from descompiler.module.distributed import DistributedModule
from descompiler.module.standard import NotWrapped
from descompiler.runtime.ranks import Ranks


def install(model: nn.Module, module: DistributedModule, method: str) -> nn.Module:
    """Let ``model.method`` call the compiled module, whose host the model is."""
    vars(model)[method] = module.forward
    vars(model)["_descompiler"] = module  # no submodule
    if module._runtime.ranks > 1:
        vars(model)["_ddp_params_and_buffers_to_ignore"] = NotWrapped()  # DistributedDataParallel looks for it
    module._attributes.set([(("", method), module.forward)])  # which other methods may read
    return model


def module_of(model: nn.Module) -> DistributedModule:
    """The `DistributedModule` of a model that was compiled in place: its plan, traffic, coverage.

    Raises
    ------
    InputError
        If the model was not compiled.
    """
    found = model if isinstance(model, DistributedModule) else vars(model).get("_descompiler")
    if found is None:
        raise InputError(
            f"this {type(model).__name__} was not compiled in place: des.compile(model, in_place=True, ...)"
        )
    return found


def ranks_for(module: DistributedModule, what: str) -> Ranks:
    """The ranks of a module, for a collective call between its steps, of that name."""
    runtime = module._runtime
    runtime.meet_between_steps(what)
    ranks = Ranks(runtime.group, runtime.rank, runtime.ranks, runtime.channels)
    ranks.name_next(what)
    return ranks

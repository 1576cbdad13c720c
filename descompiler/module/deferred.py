"""A module that its first forward compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from descompiler.errors import InputError
from descompiler.module.distributed import DistributedModule
from descompiler.runtime.untraced import untraced


class DeferredModule(DistributedModule):
    """A module that its first forward compiles; it then is a `DistributedModule`."""

    def __init__(self, model: nn.Module, compile_for: Callable[[Any], DistributedModule]):
        nn.Module.__init__(self)
        self.training, self._compile_for = model.training, compile_for
        vars(self)["_model"] = vars(self)["_face"] = model  # not a submodule; what users set is the model's

    @untraced
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        compiled = self._compile_for((args, kwargs))
        # users', which this call runs, and what module.compile() has made
        kept = dict(vars(self)["_modules"])  # a loss, say, that is no part of the model
        hooks = {name: x for name, x in vars(self).items() if "_hook" in name or name == "_compiled_call_impl"}
        for name, x in hooks.items():
            if isinstance(x, dict):
                x.update(vars(compiled)[name])
        self.__dict__.clear()
        self.__dict__.update(compiled.__dict__ | hooks)
        self.__class__ = type(compiled)  # type: ignore[assignment]
        for name, module in kept.items():
            setattr(self, name, module)
        return self.forward(*args, **kwargs)

    def _is_users(self, name: str, value: Any) -> bool:
        """Whatever is set is the model's, but for modules that it does not have: they are no part of it."""
        own = vars(self)
        if "_face" not in own or name in own or hasattr(type(self), name):
            return False
        return not isinstance(value, nn.Module) or name in vars(own["_face"])["_modules"]

    def _asks(self, name: str) -> bool:
        return False  # nothing is known of forward

    def train(self, mode: bool = True) -> DeferredModule:
        """As ``torch.nn.Module.train``, for the model that is to be compiled."""
        model = vars(self)["_model"]
        nn.Module.train(self, mode)
        self.training = model.train(mode).training
        return self

    def eval(self) -> DeferredModule:
        """As ``torch.nn.Module.eval``, for the model that is to be compiled."""
        nn.Module.train(self, False)
        self.training = vars(self)["_model"].eval().training
        return self

    def _not_yet(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError(
            "the module is compiled by its first forward, and has no parameters or plan before that: pass "
            "example_inputs to des.compile, or call the module once first"
        )

    named_parameters = named_buffers = state_dict = load_state_dict = _apply = _not_yet
    traffic = print_readable = pieces = coverage = __deepcopy__ = __reduce_ex__ = _not_yet
    plan = property(_not_yet)

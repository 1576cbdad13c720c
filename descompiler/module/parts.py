"""What a distributed module is made from, and how it comes by its submodules and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from descompiler.layout.rows import Rows
from descompiler.model.kept import keep_as_buffers, with_attributes
from descompiler.planning.coverage import Coverage
from descompiler.planning.plan import Plan
from descompiler.runtime.runtime import Runtime


class UsersForward(Protocol):
    """What runs the user's own forward with another module's parameters (`descompiler.module.partial`)."""

    @property
    def output_rows(self) -> tuple[Rows | None, ...]: ...

    def follow(self, owner: Any, args: Any, kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Parts:
    """What a module of either kind is made from: one that runs programs, or the user's forward.

    Attributes
    ----------
    template : nn.Module
        The model, for its names, flags, and which parameters are trained.
    values, buffers : mapping of str to Tensor
        This rank's, by the original's names.
    host : nn.Module, optional
        Its submodules and parameters become the module's own, and stay the same objects.
    in_place : bool
        Whether the host is the user's own object.
    """

    template: nn.Module
    plan: Plan
    runtime: Runtime
    values: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    coverage: Coverage
    host: nn.Module | None = None
    in_place: bool = False

    def fill(self, module: nn.Module) -> None:
        """Give a module its submodules, parameters and buffers."""
        if self.host is None:
            self._mirror(module)
        else:
            self._adopt(module, self.host)

    def _mirror(self, module: nn.Module) -> None:
        """Bare modules with the original's names."""
        made: dict[int, nn.Parameter] = {}
        mirrored: dict[int, nn.Module] = {id(self.template): module}  # a module of two names stays one
        scopes: dict[str, nn.Module] = {}
        for name, source in self.template.named_modules(remove_duplicate=False):
            scope = scopes[name] = mirrored.setdefault(id(source), nn.Module())
            scope.training = source.training
            if name:
                parent, _, leaf = name.rpartition(".")
                scopes[parent].add_module(leaf, scope)
            for leaf, p in source._parameters.items():
                if p is None:
                    scope.register_parameter(leaf, None)
                    continue
                full = f"{name}.{leaf}".lstrip(".")
                if id(p) not in made:
                    made[id(p)] = with_attributes(nn.Parameter(self.values[full], requires_grad=p.requires_grad), p)
                scope.register_parameter(leaf, made[id(p)])
            for leaf, b in source._buffers.items():
                full = f"{name}.{leaf}".lstrip(".")
                persistent = leaf not in source._non_persistent_buffers_set
                scope.register_buffer(leaf, None if b is None else self.buffers[full], persistent=persistent)

    def _adopt(self, module: nn.Module, host: nn.Module) -> None:
        """The modules and parameters of a host, which get these values."""
        recurrent = [m for m in host.modules() if isinstance(m, nn.RNNBase)]
        for m in recurrent:
            m._flat_weight_refs = []  # a tensor that has weak references can't be swapped
        keep_as_buffers(host)
        for name, p in host.named_parameters():
            if p.is_meta:
                torch.utils.swap_tensors(p, nn.Parameter(self.values[name], requires_grad=p.requires_grad))
            else:
                p.data = self.values[name]
        for m in recurrent:
            m._init_flat_weights()
        for name, inner in host.named_modules():
            for leaf, b in inner._buffers.items():
                if b is not None:
                    inner._buffers[leaf] = self.buffers[f"{name}.{leaf}".lstrip(".")]
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(module)[kind] = vars(host)[kind]
        module.training = host.training

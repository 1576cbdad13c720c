"""What a distributed module is made from, and how it comes by its submodules and parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from descompiler.dynamic.embedding import DynamicTable
from descompiler.errors import UnsupportedError
from descompiler.layout.rows import Rows
from descompiler.model.inside import holds_numbers, numbers_inside
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
    original : nn.Module, optional
        The model without its weights, of its own class; the template by default.
    advise : callable, optional
        From batches (rank 0's) the plan priced for their ids, and the best one. Collective.
    tables : mapping of str to DynamicTable
        This rank's part of each dynamic table, by the name of its weight.
    """

    template: nn.Module
    plan: Plan
    runtime: Runtime
    values: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    coverage: Coverage
    host: nn.Module | None = None
    in_place: bool = False
    original: nn.Module | None = None
    advise: Callable[[Sequence[Any]], tuple[Plan, Plan]] | None = None
    tables: Mapping[str, DynamicTable] = field(default_factory=dict)
    _copies: dict[int, Any] = field(default_factory=dict)  # of what modules keep numbers in, which they may share

    def fill(self, module: nn.Module) -> None:
        """Give a module its submodules, parameters and buffers."""
        if self.host is None:
            self._mirror(module)
        else:
            self._adopt(module, self.host)

    def face(self, module: nn.Module) -> nn.Module:
        """The original's root, as far as attributes go: users read and set them on the module that was filled."""
        if self.host is not None:
            return self.host
        # of a compiled module for its copy
        result = _shell_of(vars(self.template).get("_face", self.template), self._copies)
        for kind in ("_parameters", "_buffers", "_modules"):
            vars(result)[kind] = vars(module)[kind]
        return result

    def _mirror(self, module: nn.Module) -> None:
        """Modules of the original's names and classes, which hold this rank's pieces."""
        made: dict[int, nn.Parameter] = {}
        mirrored: dict[int, nn.Module] = {id(self.template): module}  # a module of two names stays one
        scopes: dict[str, nn.Module] = {}
        for name, source in self.template.named_modules(remove_duplicate=False):
            table = self.tables.get(f"{name}.weight".lstrip("."))
            if id(source) not in mirrored:
                mirrored[id(source)] = _shell_of(source, self._copies) if table is None else table
            scope = scopes[name] = mirrored[id(source)]
            scope.training = source.training
            if name:
                parent, _, leaf = name.rpartition(".")
                scopes[parent]._modules[leaf] = scope
            if isinstance(scope, DynamicTable):
                continue
            for leaf, p in source._parameters.items():
                if p is None:
                    scope._parameters[leaf] = None
                    continue
                full = f"{name}.{leaf}".lstrip(".")
                if id(p) not in made:
                    made[id(p)] = with_attributes(nn.Parameter(self.values[full], requires_grad=p.requires_grad), p)
                scope._parameters[leaf] = made[id(p)]
            for leaf, b in source._buffers.items():
                full = f"{name}.{leaf}".lstrip(".")
                scope._buffers[leaf] = None if b is None else self.buffers[full]
            scope._non_persistent_buffers_set = set(source._non_persistent_buffers_set)

    def _adopt(self, module: nn.Module, host: nn.Module) -> None:
        """The modules and parameters of a host, which get these values."""
        recurrent = [m for m in host.modules() if isinstance(m, nn.RNNBase)]
        for m in recurrent:
            m._flat_weight_refs = []  # a tensor that has weak references can't be swapped
        keep_as_buffers(host)
        for name, p in host.named_parameters():
            if name in self.tables:
                continue
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


def _shell_of(source: nn.Module, copies: dict[int, Any]) -> nn.Module:
    """A module of the same class, with the same plain attributes, that holds nothing yet.

    It is found by its class, indexed and printed as the original; the compiled forward does not call it.
    """
    result = source.__class__.__new__(source.__class__)
    nn.Module.__init__(result)
    own = vars(result)
    of_torch = {*own, "_flat_weights", "_flat_weight_refs"}  # of recurrent modules, which take them from parameters
    for name, x in vars(source).items():
        if name not in of_torch:
            own[name] = copy.deepcopy(x, copies) if numbers_inside(name, x) and holds_numbers(x) else x
    result.register_forward_pre_hook(_not_in_training)
    return result


def _not_in_training(module: nn.Module, _: Any) -> None:
    if torch.is_grad_enabled():
        raise UnsupportedError(
            f"a {type(module).__name__} of the compiled module is called outside of its forward: nobody would average "
            "the gradients. Compile with in_place=True, or call it within torch.no_grad()"
        )

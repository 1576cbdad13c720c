"""What no program follows: hooks, classes and forwards of a module's parts, and which parts there are.

A compiled forward runs a graph of what these did when the model was compiled, and calls none of them. Users go on
working with the module, as PyTorch lets them: they put a hook on a layer, prune it, put another in its place. Where
the graph would be another one, the next forward raises and says what has changed. Plain attributes that forward reads
(``dropout.p``) are followed (`descompiler.model.attributes`), and so are parameters that are assigned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain, repeat
from typing import Any

import torch.nn.modules.module as torch_module
from torch import nn

from descompiler.errors import UnsupportedError

HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
"""What modules keep hooks in that their call runs."""


OF_ALL_MODULES: tuple[Mapping[int, Callable[..., Any]], ...] = tuple(
    getattr(torch_module, f"_global{kind}") for kind in HOOKS
)


class Structure:
    """The parts of a module as they are now, to be compared with later.

    Parameters
    ----------
    module : nn.Module
        It is no part itself: its own hooks are called.
    kept : collection of str
        Parameters that have to stay the same objects: others would be no pieces, or nobody would average their
        gradients.

    Examples
    --------
    >>> module = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    >>> structure = Structure(module)
    >>> structure.check(module)
    >>> module[1] = nn.Tanh()
    >>> structure.check(module)
    Traceback (most recent call last):
    descompiler.errors.UnsupportedError: submodule '1' is of class Tanh now, and was of ReLU when...
    """

    def __init__(self, module: nn.Module, kept: Collection[str] = ()):
        self._children = [*module._modules]  # the root may get others, as a loss that is kept there
        self._parts = _parts_of(module, self._children)
        parts = [*self._parts.values()]
        self._modules, self._vars = parts, [*map(vars, parts)]
        self._then = self._now(module)
        self._names = _names(module)
        self._kept = {name: p for name, p in module.named_parameters() if name in kept}
        self._checked: Any = None

    def _now(self, module: nn.Module) -> tuple[list[int], list[type], list[Any], list[int]]:
        """Ids of hooks, classes, forwards that objects have of their own, ids of submodules: loops are C's."""
        hooks = chain.from_iterable(self._of_every(kind) for kind in HOOKS)
        inside = map(dict.values, self._of_every("_modules"))
        return (
            [*chain.from_iterable(hooks)],
            [*map(type, self._modules)],
            [*self._of_every("forward")],
            [*map(id, map(module._modules.get, self._children)), *map(id, chain.from_iterable(inside))],
        )

    def _of_every(self, attribute: str) -> Iterator[Any]:
        return map(dict.get, self._vars, repeat(attribute))

    def check(self, module: nn.Module) -> None:
        """Raise if a graph of the module would be another one now.

        ``module``: the one of which this is the structure.

        Raises
        ------
        UnsupportedError
            It names the part and what has changed.
        """
        if any(OF_ALL_MODULES):
            _check_hooks_of_all()
        if self._then != self._now(module):
            raise UnsupportedError(next(self._differences(module)))

    def check_tensors(self, module: nn.Module, contents: Any) -> None:
        """Raise if parameters or buffers are gone, or others are in the place of those that have to stay.

        Parameters
        ----------
        contents
            It is another object whenever the module holds other ones.

        Raises
        ------
        UnsupportedError
        """
        if contents is self._checked:
            return
        names, parameters = _names(module), dict(module.named_parameters())
        if added := sorted(parameters.keys() - self._names):
            raise UnsupportedError(
                f"{', '.join(map(repr, added))}: not among the parameters when the model was compiled, so that nobody "
                f"would average gradients.{_AGAIN}"
            )
        if lost := sorted(self._names - names):
            raise UnsupportedError(
                f"{', '.join(map(repr, lost))}: among the parameters and buffers when the model was compiled, and not "
                f"there now.{_AGAIN}"
            )
        for name, p in self._kept.items():
            if parameters.get(name) is not p:
                raise UnsupportedError(
                    f"another parameter was put in the place of {name!r}, which the compiled module divides or "
                    "averages. Give it other values: des.load_full_state_dict, or copy_ of this rank's under no_grad"
                )
        self._checked = contents

    def _differences(self, module: nn.Module) -> Iterator[str]:
        now = _parts_of(module, self._children)
        hooked, classes, forwards, _ = self._then
        for (name, part), cls in zip(self._parts.items(), classes, strict=True):
            other = now.get(name)
            if other is None:
                yield f"submodule {name!r} was there when the model was compiled, and is not there now.{_AGAIN}"
            elif type(other) is not cls:
                yield (
                    f"submodule {name!r} is of class {type(other).__name__} now, and was of {cls.__name__} when the "
                    f"model was compiled.{_AGAIN}"
                )
            elif other is not part:
                yield (
                    f"submodule {name!r} is another object than when the model was compiled. Assign its parameters "
                    f"and attributes instead, or compile the model again: the compiled forward runs a graph of it"
                )
        for name in now:
            if name not in self._parts:
                yield f"submodule {name!r} was not there when the model was compiled.{_AGAIN}"
        before = set(hooked)
        for name, part in self._parts.items():
            for kind, told in HOOKS.items():
                for key, hook in vars(part)[kind].items():
                    if key not in before:
                        yield (
                            f"a {told} ({_told(hook)}) was put on submodule {name!r} after the model was compiled: the "
                            "compiled forward runs a graph, and would not call it. Hooks of the compiled module itself "
                            "and of its parameters are called; put one of a part on the model before it is compiled, "
                            "or return what it looks at from forward"
                        )
        for (name, part), forward in zip(self._parts.items(), forwards, strict=True):
            if vars(part).get("forward") != forward:
                yield f"submodule {name!r} has another forward than when the model was compiled.{_AGAIN}"
        yield f"a hook that a submodule had when the model was compiled is not there any more.{_AGAIN}"


_AGAIN = " The compiled forward runs a graph of the model as it was: change the model and compile it again"


def _parts_of(module: nn.Module, children: Collection[str]) -> dict[str, nn.Module]:
    every = module.named_modules(remove_duplicate=False)
    return {name: m for name, m in every if m is not module and name.partition(".")[0] in children}


def _names(module: nn.Module) -> set[str]:
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return {name for name, _ in (*parameters, *buffers)}


def _told(hook: Any) -> str:
    """A function, and where it is.

    >>> _told(print)
    'print'
    """
    code = getattr(hook, "__code__", None)
    name = getattr(hook, "__qualname__", type(hook).__name__)
    return name if code is None else f"{name}, {code.co_filename}:{code.co_firstlineno}"


def _check_hooks_of_all() -> None:
    """Torch's own, of flop counters and the like, look on; users' may do anything."""
    for hook in [hook for hooks in OF_ALL_MODULES for hook in hooks.values()]:
        if not (getattr(hook, "__module__", None) or "").startswith("torch."):
            raise UnsupportedError(
                f"a hook of all modules ({_told(hook)}) is registered: a compiled forward runs a graph and calls none "
                "of the model's parts, so that it would be called for the compiled module alone. Remove it, or "
                "register it on the compiled module"
            )

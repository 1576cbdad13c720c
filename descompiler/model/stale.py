"""What forward leaves on its modules: flags, caches, counters; a graph computes what forward returns, and none of them.

In a model that is compiled in place its other methods look at them. A flag that every call sets to the same is set; in
the place of the rest stands a `Stale`, which raises when it is used: what was there before is of another call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descompiler.errors import UnsupportedError
from descompiler.model.attributes import BARE, Place, dotted
from descompiler.model.inside import PLAIN

CONTAINERS = (list, dict, set, tuple)


class Stale:
    """Stands for an attribute that the compiled method sets in the original, and its graph does not compute.

    >>> Stale("cache")
    <cache: not set by the compiled method>
    >>> Stale("cache").mean()
    Traceback (most recent call last):
        ...
    descompiler.errors.UnsupportedError: 'cache' is set by the method that was compiled...
    """

    def __init__(self, name: str):
        self._name = name

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(
            f"{self._name!r} is set by the method that was compiled, and its graph does not compute it: return the "
            "value from that method and keep what it returns, let it be a buffer, or set it in the method that reads it"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Stale))._refuse()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python looks for itself, to copy it
            raise AttributeError(name)
        self._refuse()

    def __repr__(self) -> str:
        return f"<{self._name}: not set by the compiled method>"

    __bool__ = __len__ = __iter__ = __getitem__ = __setitem__ = __contains__ = __call__ = __float__ = __int__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = _refuse
    __rmatmul__ = __pow__ = __rpow__ = __mod__ = __floordiv__ = __neg__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __iadd__ = __isub__ = __imul__ = __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__


def set_by_forward(before: nn.Module, after: nn.Module) -> dict[Place, Any]:
    """Plain attributes that a copy's forward has set: numbers, flags, tensors and lists that are new, or others now.

    >>> module, run = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> module.cache, run.cache, run.seen, run.losses = None, torch.zeros(1), True, [1.0]
    >>> list(set_by_forward(module, run))
    [('', 'cache'), ('', 'seen'), ('', 'losses')]
    """
    found: dict[Place, Any] = {}
    modules = dict(before.named_modules())
    for path, module in after.named_modules():
        held = vars(modules[path]) if path in modules else {}
        for name, x in vars(module).items():
            if name not in BARE and isinstance(x, (*PLAIN, *CONTAINERS, Tensor)) and not _same(held.get(name, BARE), x):
                found[path, name] = x
    return found


def _same(was: Any, x: Any) -> bool:
    if isinstance(x, Tensor):
        if not isinstance(was, Tensor):
            return False
        return x.shape == was.shape and (was.is_meta or x.layout is not torch.strided or torch.equal(x.to(was), was))
    if not isinstance(x, CONTAINERS):
        return type(x) is type(was) and bool(x == was)
    # a copy's modules and objects are others; numbers and tensors tell, and how many there are
    (old, spec), (new, now) = pytree.tree_flatten(was), pytree.tree_flatten(x)
    return (
        type(x) is type(was)
        and spec == now
        and all(_same(a, b) for a, b in zip(old, new, strict=True) if isinstance(b, (*PLAIN, Tensor)))
    )


def left_by(first: Mapping[Place, Any], second: Mapping[Place, Any]) -> tuple[tuple[Place, Any], ...]:
    """What to leave on a model in place of its forward, which left this in two calls, of models that were not alike.

    >>> left_by({("", "fresh"): True, ("", "calls"): 1}, {("", "fresh"): True, ("", "calls"): 1002})
    ((('', 'fresh'), True), (('', 'calls'), <calls: not set by the compiled method>))
    """
    return tuple(
        (at, x if isinstance(x, PLAIN) and at in second and _same(second[at], x) else Stale(dotted(at)))
        for at, x in first.items()
    )

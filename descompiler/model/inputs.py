"""How forward is called: the nesting of its inputs and outputs, flattened to tensors and put together again.

Nesting is torch's pytree (tuples, lists, dicts, named tuples, and every class registered there), plus dataclasses,
subclasses of dict, and the classes that users register with `register_input`. What is no tensor is static: a number, a
string or None inside is part of what was compiled.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from descompiler.errors import InputError, UnsupportedError
from descompiler.model.batch_size import BatchSize
from descompiler.model.jagged import adapter_of as torchrec_adapter

STATIC = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, range, slice, type,
    torch.dtype, torch.device, torch.Size,
)  # fmt: skip
"""Types of leaves that are no tensors and may be part of a call."""


@dataclass(frozen=True)
class Adapter:
    """How a class of inputs is taken apart; see `register_input`."""

    flatten: Callable[[Any], tuple[Sequence[Any], Any]]
    unflatten: Callable[[Sequence[Any], Any], Any]


_ADAPTERS: dict[type, Adapter] = {}


_TAKE: dict[type, Callable[[Any, Tensor], Any]] = {}


def register_input(
    cls: type,
    flatten: Callable[[Any], tuple[Sequence[Any], Any]],
    unflatten: Callable[[Sequence[Any], Any], Any],
    *,
    take: Callable[[Any, Tensor], Any] | None = None,
) -> None:
    """Say how instances of a class, passed to forward or returned by it, are taken apart and put together.

    Torch's own pytree registration does the same, and is used where there is one.

    Parameters
    ----------
    cls : type
        Exactly this class; its subclasses are registered on their own.
    flatten : callable
        ``flatten(x) -> (children, context)``: what holds tensors (nested as you like), and the rest, comparable by
        ``==``. A compiled module accepts calls whose context is that of the example.
    unflatten : callable
        ``unflatten(children, context) -> x``. While the model is captured, children are traced tensors.
    take : callable, optional
        ``take(x, index) -> x``: the rows of the batch at ``index`` (int64, 1-D). Needed by `des.verify` where dim 0 of
        a tensor inside is not the batch (values of jagged sequences).

    Raises
    ------
    InputError
        If the class is registered already.

    Examples
    --------
    >>> import torch, descompiler as des
    >>> class Interaction:
    ...     def __init__(self, columns):
    ...         self.columns = columns
    ...     def __getitem__(self, name):
    ...         return self.columns[name]
    >>> des.register_input(Interaction, lambda x: ([x.columns], None), lambda children, _: Interaction(*children))
    """
    if cls in _ADAPTERS or cls in pytree.SUPPORTED_NODES:
        raise InputError(f"{_name(cls)} is registered already")
    _ADAPTERS[cls] = Adapter(flatten, unflatten)
    if take is not None:
        _TAKE[cls] = take


def _is_adapted(x: Any) -> bool:
    """Whether the class has an adapter, which goes before torch's own registration of it."""
    cls = type(x)
    if cls not in _ADAPTERS and (known := torchrec_adapter(cls)) is not None:
        flatten, unflatten, take = known
        _ADAPTERS[cls], _TAKE[cls] = Adapter(flatten, unflatten), take
    return cls in _ADAPTERS


def _has_take(x: Any) -> bool:
    return _is_adapted(x) and type(x) in _TAKE


class _Adapted:
    """A pytree node that stands for an instance of an adapted class; unflattening makes that instance."""

    def __init__(self, adapter: Adapter, cls: type, children: list[Any], context: Any):
        self.adapter, self.cls, self.children, self.context = adapter, cls, children, context


pytree.register_pytree_node(
    _Adapted,
    lambda x: (x.children, (x.cls, x.context, x.adapter)),
    lambda children, rest: rest[2].unflatten(list(children), rest[1]),
    flatten_with_keys_fn=lambda x: (list(zip(_keys_of(x), x.children, strict=True)), (x.cls, x.context, x.adapter)),
)


def _keys_of(x: _Adapted) -> list[Any]:
    names = x.context[1] if x.adapter in (_DICT, _DATACLASS) else range(len(x.children))
    return [pytree.MappingKey(name) for name in names]


def _adapter_of(x: Any) -> Adapter | None:
    if _is_adapted(x):
        return _ADAPTERS[type(x)]
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return _DATACLASS
    return _DICT if isinstance(x, dict) else None


def _flatten_dataclass(x: Any) -> tuple[list[Any], Any]:
    names = [f.name for f in dataclasses.fields(x) if hasattr(x, f.name)]
    return [getattr(x, n) for n in names], (type(x), tuple(names))


def _unflatten_dataclass(children: Sequence[Any], context: Any) -> Any:
    cls, names = context
    x = object.__new__(cls)  # not __init__: __post_init__ may look at values, which a tracer has none of
    for name, value in zip(names, children, strict=True):
        object.__setattr__(x, name, value)  # frozen ones too
    return x


def _unflatten_dict(children: Sequence[Any], context: Any) -> Any:
    cls, keys = context
    x = cls.__new__(cls)
    dict.update(x, zip(keys, children, strict=True))
    return x


_DATACLASS = Adapter(_flatten_dataclass, _unflatten_dataclass)


_DICT = Adapter(lambda x: (list(x.values()), (type(x), tuple(x))), _unflatten_dict)


def adapt(leaf: Any) -> Any:
    """An instance of a known class as a pytree node, other leaves as they are."""
    adapter = _adapter_of(leaf)
    if adapter is None:
        return leaf
    children, context = adapter.flatten(leaf)
    return _Adapted(adapter, type(leaf), [pytree.tree_map(adapt, c, is_leaf=_is_adapted) for c in children], context)


def flatten(tree: Any, *, returned: bool = False) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and nesting; ``torch.utils._pytree.tree_unflatten`` puts them together again.

    Raises
    ------
    InputError
        For an object that is no tensor, no static value and of no known class.
    UnsupportedError
        For one that forward ``returned``.
    """
    leaves, spec = pytree.tree_flatten(pytree.tree_map(adapt, tree, is_leaf=_is_adapted))
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, (Tensor, *STATIC)) and not inspect.isroutine(leaf):
            if returned:
                place = next(iter(leaf_paths(tree)[i : i + 1]), f" {i}")
                raise UnsupportedError(_how_to_register(f"output{place}", leaf))
            raise InputError(_how_to_register(f"input {i}", leaf))
    return leaves, spec


def leaf_paths(tree: Any) -> tuple[str, ...]:
    """Where each leaf is, in the order of `flatten`; nothing if a class inside was registered without names."""
    try:
        found, _ = pytree.tree_flatten_with_path(pytree.tree_map(adapt, tree, is_leaf=_is_adapted))
    except ValueError:
        return ()
    return tuple(pytree.keystr(path) for path, _ in found)


def _how_to_register(place: str, leaf: Any) -> str:
    cls = type(leaf)
    if cls.__module__ == "numpy":
        verb = "pass" if place.startswith("input") else "return"
        return f"{place} is a {_name(cls)}: {verb} a tensor (torch.from_numpy)"
    held = [n for n, v in getattr(leaf, "__dict__", {}).items() if isinstance(v, Tensor | dict | list | tuple)]
    parts = ", ".join(f"x.{n}" for n in held) or "x.first, x.second"
    return (
        f"{place} is a {_name(cls)}, and it is not known which tensors are in it. Register the class once, "
        "beside its definition:\n"
        "    des.register_input(\n"
        f"        {cls.__name__},\n"
        f"        lambda x: ([{parts}], None),  # what holds its tensors, and what else it is made of\n"
        f"        lambda children, context: {cls.__name__}(*children),\n"
        "    )"
    )


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def normalise_inputs(example_inputs: Any, forward: Callable[..., Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as ``(args, kwargs)`` of forward.

    A tuple or list holds the positional arguments, ``(args, kwargs)`` both kinds. A dict that forward's signature takes
    as keyword arguments is that (``**kwargs`` aside, which would take any); every other dict, named tuple or object is
    the one positional argument.

    Examples
    --------
    >>> normalise_inputs({"user": 1, "item": 2}, lambda user, item: None)
    ((), {'user': 1, 'item': 2})
    >>> normalise_inputs({"user": 1, "item": 2}, lambda batch: None)
    (({'user': 1, 'item': 2},), {})
    """
    plain = type(example_inputs) in (tuple, list)
    if plain and len(example_inputs) == 2:
        args, kwargs = example_inputs
        if type(args) is tuple and isinstance(kwargs, dict):
            return args, kwargs
    if plain:
        return tuple(example_inputs), {}
    if isinstance(example_inputs, dict) and _are_keywords(example_inputs, forward):
        return (), dict(example_inputs)
    return (example_inputs,), {}


def _are_keywords(inputs: dict[Any, Any], forward: Callable[..., Any]) -> bool:
    if not inputs or not all(isinstance(k, str) for k in inputs):
        return False
    parameters = inspect.signature(forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return required <= set(inputs) <= named


def take_rows(inputs: Any, index: Tensor) -> Any:
    """The rows of every tensor inside (dim 0) at ``index``; classes registered with ``take`` are asked for theirs.

    A `BatchSize` becomes their number.
    """

    def take(x: Any) -> Any:
        if _has_take(x):
            return _TAKE[type(x)](x, index)
        if isinstance(x, BatchSize):
            return BatchSize(len(index))
        return x[index] if isinstance(x, Tensor) and x.dim() else x

    leaves, spec = pytree.tree_flatten(inputs, is_leaf=_has_take)
    taken = [take(x) if _has_take(x) or _adapter_of(x) is None else _take_adapted(x, index) for x in leaves]
    return pytree.tree_unflatten(taken, spec)


def knows_rows(inputs: Any) -> bool:
    """Whether a class inside was registered with ``take``, so that `take_rows` knows rows that dim 0 does not show."""
    return any(_has_take(x) for x in pytree.tree_leaves(inputs, is_leaf=_has_take))


def _take_adapted(x: Any, index: Tensor) -> Any:
    adapter = _adapter_of(x)
    assert adapter is not None
    children, context = adapter.flatten(x)
    return adapter.unflatten([take_rows(c, index) for c in children], context)


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """``inputs`` with a function applied to every tensor inside."""
    leaves, spec = flatten(inputs)
    return pytree.tree_unflatten([function(x) if isinstance(x, Tensor) else x for x in leaves], spec)


def apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, each an object of its own: a tracer takes one that is given twice for one input.

    >>> x = torch.zeros(3)
    >>> a, b = apart([x, x])
    >>> a is x, b is x, bool((a == b).all())
    (True, False, True)
    """
    seen: set[int] = set()
    result = []
    for x in tensors:
        result.append(x.detach().clone().requires_grad_(x.requires_grad) if id(x) in seen else x)
        seen.add(id(x))
    return result


ArgumentPath = tuple[Any, ...]
"""Indices and keys of tuples, lists and dicts that lead to something in ``(args, kwargs)``."""


def by_path(given: Any, path: ArgumentPath = ()) -> dict[ArgumentPath, Any]:
    """What is in tuples, lists and dicts, and is none of them.

    >>> by_path(([1, 2], {"x": 3}))
    {(0, 0): 1, (0, 1): 2, (1, 'x'): 3}
    """
    if isinstance(given, tuple | list):
        items: Any = enumerate(given)
    elif isinstance(given, dict):
        items = given.items()
    else:
        return {path: given}
    return {p: x for key, inner in items for p, x in by_path(inner, (*path, key)).items()}


def argument_at(given: Any, path: ArgumentPath) -> Any:
    """What is at a path in ``(args, kwargs)``."""
    for key in path:
        given = given[key]
    return given


def no_batch() -> Tensor:
    """What stands for the batch of a forward that takes no tensor (of a whole graph): a row, which nothing reads."""
    return torch.zeros(1)


def split_statics(leaves: Sequence[Any]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The tensors among leaves, and the other leaves by position (`Ellipsis` where a tensor goes)."""
    return [x for x in leaves if isinstance(x, Tensor)], tuple(Ellipsis if isinstance(x, Tensor) else x for x in leaves)


def unflatten_with(tensors: Sequence[Tensor], spec: pytree.TreeSpec, statics: Sequence[Any]) -> Any:
    queue = iter(tensors)
    return pytree.tree_unflatten([next(queue) if s is Ellipsis else s for s in statics], spec)

"""Numbers inside of plain attributes: of dicts, lists, tuples, dataclasses and namespaces that modules keep.

A number has a name, as the user would write it, which knows its way: ``config['alpha']``, ``options.weights[1]``.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from types import SimpleNamespace
from typing import Any

PLAIN = (bool, int, float, str, type(None))


MOST_INSIDE = 64
"""Numbers of one attribute that are watched; what has more is data, not options."""


DEEPEST = 4


KEYS = (int, str, float, bytes, tuple, frozenset, Enum, type, type(None))
"""Of dicts: those that are equal in a copy of the model."""


class Inside(str):
    """The name of a number inside of an attribute."""

    steps: tuple[Any, ...]  # the attribute, and keys, positions and names of fields in turn

    @classmethod
    def of(cls, steps: Sequence[Any], name: str) -> Inside:
        result = cls(name)
        result.steps = tuple(steps)
        return result


MISSING = object()


def numbers_inside(attribute: str, x: Any) -> dict[Inside, Any]:
    """Numbers, flags and text inside of an attribute's value; none if it is no container, or has too many.

    >>> numbers_inside("config", {"alpha": 0.5, "weights": [1.0, 2.0]})
    {"config['alpha']": 0.5, "config['weights'][0]": 1.0, "config['weights'][1]": 2.0}
    """
    found: dict[Inside, Any] = {}
    for steps, name, value in _walk((attribute,), attribute, x):
        if len(found) == MOST_INSIDE:
            return {}
        found[Inside.of(steps, name)] = value
    return found


def holds_numbers(x: Any) -> bool:
    """Whether a container has numbers, flags and text, in others perhaps, and nothing else.

    >>> holds_numbers({"a": [1, 2]}), holds_numbers({"a": object()})
    (True, False)
    """
    return isinstance(x, PLAIN) or (bool(_children(x)) and all(holds_numbers(inner) for _, inner in _children(x)))


def _walk(steps: tuple[Any, ...], name: str, x: Any) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    if len(steps) > DEEPEST:
        return
    fields = _has_fields(x)
    for key, value in _children(x):
        inner = f"{name}.{key}" if fields else f"{name}[{key!r}]"
        if isinstance(value, PLAIN):
            yield (*steps, key), inner, value
        else:
            yield from _walk((*steps, key), inner, value)


def _has_fields(x: Any) -> bool:
    return isinstance(x, SimpleNamespace | Namespace) or (dataclasses.is_dataclass(x) and hasattr(x, "__dict__"))


def _children(x: Any) -> list[tuple[Any, Any]]:
    if isinstance(x, dict):
        return [(k, v) for k, v in x.items() if isinstance(k, KEYS)] if len(x) <= MOST_INSIDE else []
    if type(x) in (list, tuple):
        return list(enumerate(x)) if len(x) <= MOST_INSIDE else []
    return list(vars(x).items()) if _has_fields(x) else []


def _child(x: Any, key: Any) -> Any:
    if isinstance(x, dict):
        return x.get(key, MISSING)
    if type(x) in (list, tuple):
        return x[key] if isinstance(key, int) and key < len(x) else MISSING
    return vars(x).get(key, MISSING) if _has_fields(x) else MISSING


def value_at(attributes: dict[str, Any], name: str) -> Any:
    """Of an attribute, or of what is inside of one; `MISSING` if it is not there."""
    if not isinstance(name, Inside):
        return attributes.get(name, MISSING)
    x: Any = attributes.get(name.steps[0], MISSING)
    for key in name.steps[1:]:
        x = _child(x, key)
    return x


def put_inside(x: Any, keys: Sequence[Any], value: Any) -> Any:
    """The container with another number inside: the same object, but for tuples."""
    if not keys:
        return value
    inner = put_inside(_child(x, keys[0]), keys[1:], value)
    if type(x) is tuple:
        return (*x[: keys[0]], inner, *x[keys[0] + 1 :])
    if _has_fields(x):
        object.__setattr__(x, keys[0], inner)  # it may be frozen
    else:
        x[keys[0]] = inner
    return x


class Reading(dict[Any, Any]):
    """A dict in whose place it is while forward runs; tells which keys are read, None: all of them."""

    tell: Callable[[Any], None]

    def __getitem__(self, key: Any) -> Any:
        self.tell(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.tell(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.tell(key)
        return super().__contains__(key)

    def __len__(self) -> int:
        self.tell(None)
        return super().__len__()

    def __iter__(self) -> Iterator[Any]:
        self.tell(None)
        return super().__iter__()

    def keys(self) -> Any:
        self.tell(None)
        return super().keys()

    def values(self) -> Any:
        self.tell(None)
        return super().values()

    def items(self) -> Any:
        self.tell(None)
        return super().items()

    def copy(self) -> Any:
        self.tell(None)
        return super().copy()

    def pop(self, *key: Any) -> Any:
        self.tell(None)
        return super().pop(*key)

    def setdefault(self, *key: Any) -> Any:
        self.tell(None)
        return super().setdefault(*key)

    def __eq__(self, other: object) -> bool:
        self.tell(None)
        return super().__eq__(other)

    def __or__(self, other: Any) -> Any:
        self.tell(None)
        return super().__or__(other)

    __hash__ = None

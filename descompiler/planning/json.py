"""Dataclasses to JSON and back, by their type hints, without loss.

What a plan holds is made of frozen dataclasses, tuples, mappings with string keys, numbers and text; a field that one
of them gains is written and read without a word here. An object of an abstract class's kinds has the name of its own
class in front, as ``is``: a kind that is added is written and read, too. What a field marked `INLINE` holds is written
among the other fields.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import isabstract
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

INLINE = "inline"
"""In the metadata of such a field."""


def encode(x: Any) -> Any:
    """What ``json.dumps`` takes.

    >>> from descompiler.layout.pieces import Pieces
    >>> encode(Pieces.whole((3, 2), 1, 2))
    {'shape': [3, 2], 'dim': 0, 'division': {'runs': [[3, 1, 1]]}, 'ranks': 2}
    """
    if is_dataclass(x) and not isinstance(x, type):
        named: dict[str, Any] = {}
        for f in fields(x):
            value = encode(getattr(x, f.name))
            named.update(value if f.metadata.get(INLINE) else {f.name: value})
        if _of_a_kind(type(x)):
            return {"is": type(x).__name__, **named}
        return list(named.values()) if _compact(type(x)) else named
    if isinstance(x, Mapping):
        return {str(k): encode(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [encode(v) for v in x]
    if isinstance(x, torch.dtype):
        return str(x).removeprefix("torch.")
    if x is None or isinstance(x, str | int | float):
        return x
    raise TypeError(f"{type(x).__name__} has no JSON form here")


def decode(kind: Any, data: Any) -> Any:
    """The object of type ``kind`` that `encode` made ``data`` from.

    >>> from descompiler.layout.pieces import Pieces
    >>> p = Pieces.by_sizes((5, 2), 0, [3, 2], 2)
    >>> decode(Pieces, encode(p)) == p
    True

    Raises
    ------
    TypeError, ValueError, KeyError
        If the data is not of that type.
    """
    if isinstance(kind, type) and isabstract(kind):
        name, kinds = data["is"], _classes_of(kind)
        if name not in kinds:
            raise ValueError(f"no {kind.__name__} is named {name!r}")
        return decode(kinds[name], data)
    if is_dataclass(kind) and isinstance(kind, type):
        if _compact(kind):
            data = dict(zip((f.name for f in fields(kind)), data, strict=True))
        hints, given = _hints(kind), dict[str, Any]()
        for f in fields(kind):
            if f.metadata.get(INLINE):
                given[f.name] = decode(hints[f.name], data)
            elif f.name in data:
                given[f.name] = decode(hints[f.name], data[f.name])
        return kind(**given)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if data is None:
            return None
        (only,) = [a for a in arguments if a is not type(None)]
        return decode(only, data)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            if arguments[0] is int:  # a layout for a thousand ranks holds millions
                return tuple(data)
            return tuple(decode(arguments[0], x) for x in data)
        return tuple(decode(a, x) for a, x in zip(arguments, data, strict=True))
    if origin is list or origin is Sequence:
        return [decode(arguments[0], x) for x in data]
    if origin in (dict, Mapping):
        return {decode(arguments[0], k): decode(arguments[1], v) for k, v in data.items()}
    if kind is torch.dtype:
        return getattr(torch, data)
    if kind in (int, float, str, bool):
        return kind(data)
    if kind is Any:
        return data
    raise TypeError(f"{kind} can't be read from JSON")


@cache
def _of_a_kind(kind: type) -> bool:
    """Whether a class is one of an abstract class's kinds."""
    return any(isabstract(base) for base in kind.__mro__)


def _classes_of(base: type) -> dict[str, type]:
    """The classes of an abstract class that are not abstract, by name."""
    result: dict[str, type] = {} if isabstract(base) else {base.__name__: base}
    below: list[type] = base.__subclasses__()
    for kind in below:
        result.update(_classes_of(kind))
    return result


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def _compact(kind: type) -> bool:
    """Whether objects are written as lists: those of nothing but a few numbers, of which there are many."""
    return len(fields(kind)) <= 3 and all(h in (int, float) for h in _hints(kind).values())

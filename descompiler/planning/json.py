"""Dataclasses to JSON and back, by their type hints, without loss.

What a plan holds is made of frozen dataclasses, tuples, mappings with string keys, numbers and text; a field that one
of them gains is written and read without a word here. An object of an abstract class's kinds has the name of its own
class in front, as ``is``: a kind that is added is written and read, too. What a field marked `INLINE` holds is written
among the other fields.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import isabstract
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

INLINE = "inline"
"""In the metadata of such a field."""


LARGEST = 1 << 62
"""Of whole numbers: what is counted with them fits 64 bits, or says that it does not."""


DEEPEST = 32
"""How deep what may be anything is nested at most."""


BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError)
"""What reading a file raises that is not what it should be."""


_DTYPES = {str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.dtype)}


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
        If the data is not of that type. Nothing is taken for something near it: 2.5 and "2" are no whole numbers.
    """
    if isinstance(kind, type) and isabstract(kind):
        name, kinds = _of(dict, data).get("is"), _classes_of(kind)
        if name not in kinds:
            raise ValueError(f"no {kind.__name__} is named {name!r}")
        return decode(kinds[name], data)
    if is_dataclass(kind) and isinstance(kind, type):
        if _compact(kind):
            data = dict(zip((f.name for f in fields(kind)), _of(list, data), strict=True))
        _of(dict, data)
        hints, given = _hints(kind), dict[str, Any]()
        for f in fields(kind):
            if f.metadata.get(INLINE):
                given[f.name] = decode(hints[f.name], data)
            elif f.name in data:
                given[f.name] = _named(f.name, hints[f.name], data[f.name])
        return kind(**given)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if data is None:
            return None
        (only,) = [a for a in arguments if a is not type(None)]
        return decode(only, data)
    if origin in (tuple, list, Sequence):
        _of(list, data)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            if arguments[0] is int:  # a layout for a thousand ranks holds millions
                if not set(map(type, data)) <= {int} or not all(-LARGEST < x < LARGEST for x in data):
                    raise ValueError("these are no whole numbers")
                return tuple(data)
            return tuple(decode(arguments[0], x) for x in data)
        return tuple(decode(a, x) for a, x in zip(arguments, data, strict=True))
    if origin is list or origin is Sequence:
        return [decode(arguments[0], x) for x in data]
    if origin in (dict, Mapping):
        return {decode(arguments[0], k): _named(k, arguments[1], v) for k, v in _of(dict, data).items()}
    if kind is torch.dtype:
        if _of(str, data) not in _DTYPES:
            raise ValueError(f"no dtype is named {data!r}")
        return _DTYPES[data]
    if kind is float:
        number = float(data) if type(data) is int else _of(float, data)
        if math.isnan(number):
            raise ValueError("NaN is no number")
        return number
    if kind in (int, str, bool):
        if type(_of(kind, data)) is int and not -LARGEST < data < LARGEST:
            raise ValueError(f"{data} is too large")
        return data
    if kind is Any:
        return _anything(data)
    raise TypeError(f"{kind} can't be read from JSON")


def decode_fields(kinds: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The objects under some names, all of which have to be there."""
    if missing := [name for name in kinds if name not in data]:
        raise ValueError(f"it has no {', '.join(missing)}")
    return {name: _named(name, kind, data[name]) for name, kind in kinds.items()}


def _named(name: str, kind: Any, data: Any) -> Any:
    """What is under a name; errors say the name."""
    try:
        return decode(kind, data)
    except BROKEN as error:
        raise ValueError(f"{name}: {error}") from None


def _of(kind: type, data: Any) -> Any:
    """The data, if it is of exactly that type: True is no 1."""
    if type(data) is not kind:
        raise TypeError(f"{_short(data)} is no {kind.__name__}")
    return data


def _short(data: Any, most: int = 60) -> str:
    text = repr(data) if isinstance(data, str | int | float | None) else f"a {type(data).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def _anything(data: Any, depth: int = 0) -> Any:
    """The data, unless it is nested so deep that nothing can be done with it."""
    if depth > DEEPEST:
        raise ValueError(f"it is nested deeper than {DEEPEST}")
    for x in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        _anything(x, depth + 1)
    return data


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

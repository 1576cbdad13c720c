"""What a part of a chain has of its tables, as a safetensors file: states by id, or updates, and values beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from descompiler.dynamic.by_id import ById, Kept
from descompiler.dynamic.changes import Update
from descompiler.errors import InputError
from descompiler.tensor_file import decoded, encoded

_META = "descompiler"
_FIELDS = ("slices", "ids", "rows", "last", "counts", "sketch", "sighted")


def packed(tables: Mapping[str, ById | Update], values: Mapping[str, Any]) -> Iterator[Any]:
    """The bytes of a part, by parts of them.

    Raises
    ------
    InputError
        If a value is no number, string or tensor.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor | int | float | str | None):
            raise InputError(
                f"{name} is a {type(value).__name__}: numbers, strings and tensors are saved beside tables"
            )
    tensors = {f"values.{n}": x.detach().cpu() for n, x in values.items() if isinstance(x, Tensor)}
    meta: dict[str, Any] = {"values": {n: x for n, x in values.items() if not isinstance(x, Tensor)}, "tables": {}}
    for name, held in tables.items():
        own_meta, own = _of_update(held) if isinstance(held, Update) else _of_state(held)
        meta["tables"][name] = own_meta | {"fields": list(own)}
        tensors |= {f"tables.{name}.{n}": x for n, x in own.items()}
    return encoded(tensors, {_META: json.dumps(meta)})


def unpacked(data: bytes, name: str) -> tuple[dict[str, ById | Update], dict[str, Any]]:
    """What `packed` was given.

    Raises
    ------
    InputError
        If this is no part.
    """
    try:
        tensors, metadata = decoded(data)
        meta = json.loads(metadata[_META])
        tables = {
            n: _read(own, {field: tensors[f"tables.{n}.{field}"] for field in own["fields"]})
            for n, own in meta["tables"].items()
        }
        return tables, meta["values"] | _beginning("values.", tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name} is no part of a table: {type(error).__name__}: {error}") from error


def _of_state(state: ById) -> tuple[dict[str, Any], dict[str, Tensor]]:
    meta: dict[str, Any] = {"made": dict(state.made), "step": state.step}
    tensors = {n: x for n in _FIELDS if (x := getattr(state, n)) is not None}
    if (kept := state.kept) is not None:
        meta |= {"optimizer": kept.optimizer, "initial": dict(kept.initial)}
        meta["scalars"] = {n: x for n, x in kept.scalars.items() if not isinstance(x, Tensor)}
        tensors |= {f"scalar.{n}": x for n, x in kept.scalars.items() if isinstance(x, Tensor)}
        tensors |= {f"kept.{n}": x for n, x in kept.rows.items()}
    return meta, tensors


def _of_update(update: Update) -> tuple[dict[str, Any], dict[str, Tensor]]:
    meta, tensors = _of_state(replace(update.now, sketch=update.sketch))
    del tensors["slices"]  # those of what it follows
    return meta | {"halved": update.halved}, tensors | {"gone": update.gone, "lines": update.lines}


def _read(meta: Mapping[str, Any], own: Mapping[str, Tensor]) -> ById | Update:
    kept = None
    if "optimizer" in meta:
        scalars = {**meta["scalars"], **_beginning("scalar.", own)}
        kept = Kept(meta["optimizer"], meta["initial"], _beginning("kept.", own), scalars)
    fields: dict[str, Any] = {n: own.get(n) for n in _FIELDS}
    if "halved" not in meta:
        return ById(made=meta["made"], step=meta["step"], kept=kept, **fields)
    fields |= {"slices": torch.empty(0, dtype=torch.int64), "sketch": None}
    now = ById(made=meta["made"], step=meta["step"], kept=kept, **fields)
    return Update(now, own["gone"], meta["halved"], own["lines"], own.get("sketch"))


def _beginning(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names begin so, by the rest."""
    return {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}

"""Which of the numbers among the inputs is the batch's own size: the model is run on a batch of another size."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descompiler.errors import InputError
from descompiler.model.batch_size import BatchSize
from descompiler.model.float64 import InDouble
from descompiler.model.inputs import by_path, flatten, normalise_inputs, split_statics
from descompiler.model.probe import Flat, at_least_two_rows, double_all, materialise, method_of, other_batch, run_eager

NAMES = ("batch_size", "bsz")
"""Names of arguments and keys whose number is the batch's size where runs can't tell."""


MOST_UNSURE = 3
"""Numbers equal to the rows up to which each combination of them is tried; more are no batch's size."""


def with_batch_size(model: nn.Module, template: Callable[[], nn.Module], example_inputs: Any, method: str) -> Any:
    """The example inputs, in which the batch's own number of rows is a `BatchSize`.

    An int that equals the rows is, if forward runs on another batch with that one's number, and not with this; if both
    run, if more outputs have that many rows then; if no output depends on it; if it is called so (`NAMES`).

    Parameters
    ----------
    template : callable
        The model's `descompiler.model.probe.blueprint`, asked for where something has to run.

    Raises
    ------
    InputError
        If it is not known, or a `BatchSize` is not the number of rows.
    """
    given = normalise_inputs(example_inputs, method_of(model, method))
    leaves, spec = flatten(given)
    tensors, _ = split_statics(leaves)
    sizes = {x.shape[0] if x.dim() else None for x in tensors}
    rows = sizes.pop() if len(sizes) == 1 else None
    for x in leaves:
        if isinstance(x, BatchSize) and rows is not None and x != rows:
            raise InputError(f"example_inputs hold BatchSize({x}), and their tensors have {rows} rows")
    unsure = [i for i, x in enumerate(leaves) if type(x) is int and x == rows]
    if not rows or not 0 < len(unsure) <= MOST_UNSURE:
        return example_inputs
    titles = [_title(given, i, model, method) for i in unsure]
    named = tuple(i for i, title in zip(unsure, titles, strict=True) if title in NAMES)
    chosen = _chosen(template(), method, leaves, spec, unsure, named)
    if chosen is None:
        raise InputError(
            f"{', '.join(titles)} of the inputs is {rows}, and example_inputs have {rows} rows: it is not known "
            f"whether that is the batch's size. If it is, pass des.BatchSize({rows}) in its place; if it is a number "
            "like any other, pass example_inputs of another number of rows"
        )
    return pytree.tree_unflatten([BatchSize(x) if i in chosen else x for i, x in enumerate(leaves)], spec)


def _title(given: Any, position: int, model: nn.Module, method: str) -> str:
    """What users call an input: its name, or its key."""
    leaves, spec = flatten(given)
    paths = by_path(pytree.tree_unflatten(list(range(len(leaves))), spec))
    path = next((path for path, leaf in paths.items() if leaf == position), (0, position))
    names = list(inspect.signature(method_of(model, method)).parameters)
    if len(path) == 2 and path[0] == 0 and path[1] < len(names):
        return names[path[1]]
    return str(path[-1]) if isinstance(path[-1], str) else f"input {position}"


def _chosen(
    template: nn.Module,
    method: str,
    leaves: Sequence[Any],
    spec: pytree.TreeSpec,
    unsure: Sequence[int],
    named: tuple[int, ...],
) -> Collection[int] | None:
    """Positions of the batch's size among those of which it is unsure; None if it is not known."""
    tensors, statics = split_statics(leaves)
    batch = double_all(other_batch(at_least_two_rows(tensors)))
    found: dict[tuple[int, ...], list[Tensor]] = {}
    for count in range(len(unsure) + 1):
        for chosen in combinations(unsure, count):
            marked = [BatchSize(x) if i in chosen else x for i, x in enumerate(statics)]
            if (outputs := _outputs(template, method, marked, spec, batch)) is not None:
                found[chosen] = outputs
    if not found:
        return ()  # capture meets the error, and says so
    by_rows = {c: sum(x.dim() > 0 and len(x) == len(batch[0]) for x in outputs) for c, outputs in found.items()}
    found = {c: outputs for c, outputs in found.items() if by_rows[c] == max(by_rows.values())}
    first, *others = found.values()
    if all(_same(first, other) for other in others):
        return max(found, key=len)
    if named and named in found:
        return named
    return () if len(tensors[0]) == 1 and () in found else None  # of one row, numbers that equal it are many


def _outputs(
    template: nn.Module, method: str, statics: Sequence[Any], spec: pytree.TreeSpec, batch: list[Tensor]
) -> list[Tensor] | None:
    """What a probe returns; None if it can't run."""
    for arithmetic in (nullcontext, InDouble):  # forward may make float32 tensors
        probe = Flat(materialise(template, batch[0].device, double=True), spec, statics, method)
        probe.arithmetic = arithmetic
        try:
            with torch.no_grad():
                return run_eager(probe, batch)
        except Exception:  # whatever the user's forward raises
            continue
    return None


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(x.shape == y.shape and torch.allclose(x, y, equal_nan=True) for x, y in pairs)

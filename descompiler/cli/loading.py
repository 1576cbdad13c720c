"""Models named on the command line, and their plans."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import typer

import descompiler as des
from descompiler import examples
from descompiler.captured import Captured
from descompiler.cli.output import working
from descompiler.planning.assumed import BYTES
from descompiler.planning.cluster import Cluster
from descompiler.planning.plan import Plan


def load(spec: str, *, train: bool = False) -> tuple[Any, Any]:
    """The model and inputs of ``FILE.py:factory``, ``package.module:factory`` or an example's name.

    Parameters
    ----------
    train : bool
        For an example: a small one with weights, in place of a large one without.

    Raises
    ------
    InputError
        If the factory raises, or returns something else than two things.
    """
    if spec in examples.CTR_MODELS:
        return (examples.MODELS[spec](), examples.make_inputs(spec)) if train else examples.example(spec)
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise typer.BadParameter(
            f"{spec!r}: give FILE.py:factory, package.module:factory, or one of {', '.join(examples.CTR_MODELS)}"
        )
    factory = getattr(_imported_module(where), name, None)
    if not callable(factory):
        raise typer.BadParameter(f"{where} has no function {name!r}")
    try:
        made = factory()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{spec} raised {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        raise des.InputError(text) from error
    if not isinstance(made, tuple) or len(made) != 2:
        raise des.InputError(f"{spec} must return (model, example_inputs); it returned {type(made).__name__}")
    if not isinstance(made[0], torch.nn.Module):
        raise des.InputError(f"{spec} must return (model, example_inputs); the first is a {type(made[0]).__name__}")
    return made


def _imported_module(where: str) -> Any:
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ImportError as error:
            raise typer.BadParameter(f"can't import {where!r}: {error}") from None
    path = Path(where)
    if not path.is_file():
        raise typer.BadParameter(f"{where}: there is no such file")
    # As if the file were run: its folder comes first, so that it finds its neighbours; `verify` starts processes that
    # import it by name.
    folder, name = str(path.resolve().parent), path.stem
    if folder not in sys.path:
        sys.path.insert(0, folder)
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise des.InputError(f"{where} can't be run: {type(error).__name__}: {error}") from error
    return module


def plans_for(
    captured: Captured,
    ranks: Iterable[int],
    batches: Iterable[int | None],
    cluster: Cluster | None = None,
    **options: Any,
) -> list[Plan]:
    """A plan for every number of ranks and rows, with progress."""
    points = [(n, rows) for rows in batches for n in ranks]
    result = []
    with working("planning", len(points)) as next_is:
        for n, rows in points:
            next_is(f"planning for {n} ranks")
            where = BYTES if cluster is None else cluster.with_ranks(n)
            result.append(captured.plan(ranks=n, batch=rows, cluster=where, **options))
    return result


def captured_from(spec: str) -> Captured:
    """Load and capture a model, with progress."""
    with working(f"capturing {spec}"):
        return Captured.of(*load(spec))

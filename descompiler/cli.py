"""The command line: ``descompiler explain FILE.py:factory --ranks 8``.

A factory takes no argument and returns ``(model, example_inputs)``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

import descompiler as des

app = typer.Typer(help="Cost and equivalence of distributed recommender models.", no_args_is_help=True)

Factory = Annotated[str, typer.Argument(help="FILE.py:factory; the factory returns (model, example_inputs)")]


def load_factory(spec: str) -> tuple[Any, Any]:
    """The model and inputs of ``FILE.py:factory``."""
    path, _, name = spec.rpartition(":")
    if not path or not Path(path).is_file():
        raise typer.BadParameter(f"{spec!r}: give FILE.py:factory, and the file has to exist")
    found = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not hasattr(module, name):
        raise typer.BadParameter(f"{path} has no {name!r}")
    return getattr(module, name)()


@app.command()
def explain(spec: Factory, ranks: int = 2, batch: int | None = None) -> None:
    """What is split, what crosses the wire, and what was rejected, at what price."""
    model, inputs = load_factory(spec)
    typer.echo(des.plan(model, inputs, ranks=ranks, batch=batch).explain())


@app.command()
def verify(spec: Factory, ranks: int = 2, steps: int = 3) -> None:
    """Prove on local processes that the compiled model trains as the original."""
    model, inputs = load_factory(spec)
    typer.echo(str(des.verify(model, inputs, ranks=ranks, steps=steps)))


@app.command()
def version() -> None:
    """The version of descompiler."""
    typer.echo(des.__version__)


def main() -> None:
    """Run the command line; errors that descompiler raises on purpose are one line and status 1."""
    try:
        app()
    except des.DescompilerError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None

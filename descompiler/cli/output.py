"""What commands print: tables in the format that is asked for, and progress on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from descompiler.cli.options import Style
from descompiler.report import render
from descompiler.sheet import Sheet


def show(tables: Sequence[Sheet], style: Style, **more: Any) -> None:
    """Print tables in the format that the options ask for."""
    if style.json + style.markdown + style.latex > 1:
        raise typer.BadParameter("give one of --json, --markdown and --latex")
    if style.json:
        typer.echo(render.to_json(tables, **more))
    elif style.markdown:
        typer.echo("\n\n".join(map(render.to_markdown, tables)))
    elif style.latex:
        typer.echo("\n\n".join(map(render.to_latex, tables)))
    else:
        console = Console()
        if not console.is_terminal:  # a pipe or a file: no wrapping at 80 columns
            console = Console(width=200)
        render.print_rich(tables, console)


@contextmanager
def working(text: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Progress on stderr, where that is a terminal; call with what is done next."""
    console = Console(stderr=True)
    columns = [SpinnerColumn(), TextColumn("{task.description}")]
    columns += [BarColumn(), MofNCompleteColumn()] if total else []
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal) as p:
        task = p.add_task(text, total=total)
        started = False

        def next_is(what: str) -> None:
            nonlocal started
            p.update(task, description=what, advance=1 if started else 0)
            started = True

        yield next_is

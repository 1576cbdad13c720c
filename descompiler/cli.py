"""The command line: ``descompiler cost deepfm --ranks 2:64``; see docs/cli.md.

Exit status: 0 fine, 1 an error that descompiler raises on purpose (one line), 2 wrong usage.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

import descompiler as des
from descompiler import examples, paper, render, sheets, units
from descompiler import report as pages
from descompiler.calibrate import SIZES_BYTES
from descompiler.captured import Captured
from descompiler.cluster import BUILTIN, COLLECTIVES, Cluster, Link
from descompiler.cost_models.memory import STATE
from descompiler.plan import Plan
from descompiler.render import Sheet

T = TypeVar("T")


class _Commands(TyperGroup):
    """Errors that descompiler raises on purpose are one line on stderr, and status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except des.DescompilerError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    help="Cost, plan and equivalence of distributed recommender models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


# --- arguments


def _usage(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser whose errors are those of wrong usage."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except des.InputError as error:
            raise typer.BadParameter(str(error)) from None

    parsed.__name__ = parse.__name__.removeprefix("parse_").upper()  # what --help shows as the value's type
    return parsed


def _batches(text: str) -> tuple[int, ...]:
    return units.parse_counts(text, "rows")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(units.parse_size(x) for x in text.split(","))


def _ranks(text: str) -> tuple[int, ...]:
    return units.parse_counts(text, "ranks")


SPEC_HELP = (
    "`FILE.py:factory` or `package.module:factory` (the factory returns `(model, example_inputs)`), or an example: "
    f"{', '.join(examples.CTR_MODELS)}"
)
Spec = Annotated[str, typer.Argument(metavar="MODEL", help=SPEC_HELP)]
OptionalSpec = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=SPEC_HELP)]
Ranks = Annotated[Any, typer.Option("--ranks", parser=_usage(_ranks), metavar="N", help="8, 2,4,6 or 2:256 (doubling)")]
Batch = Annotated[
    Any,
    typer.Option("--batch", parser=_usage(_batches), metavar="ROWS", help="rows per rank; the example's by default"),
]
Bandwidth = Annotated[
    Any, typer.Option(parser=_usage(units.parse_bandwidth), metavar="RATE", help="of one rank's link: 25Gbit, 3GB/s")
]
Latency = Annotated[
    Any, typer.Option(parser=_usage(units.parse_time), metavar="TIME", help="of one message: 20us; 0 by default")
]
ClusterOption = Annotated[
    str | None, typer.Option("--cluster", metavar="FILE|NAME", help=f"a cluster file, or one of {', '.join(BUILTIN)}")
]
PerNode = Annotated[int | None, typer.Option("--ranks-per-node", min=1, help="with --cluster: ranks that share a node")]
Pins = Annotated[
    list[str] | None, typer.Option("--pin", metavar="TABLE=FORM", help="fix the form of tables; TABLE may be a pattern")
]
Forbid = Annotated[
    list[str] | None, typer.Option("--forbid", metavar="TABLE=FORM", help="a form that tables must not take")
]
Memory = Annotated[
    Any, typer.Option("--memory", parser=_usage(units.parse_size), metavar="SIZE", help="limit of each rank: 16GB")
]
Optimizer = Annotated[str, typer.Option(help=f"for memory: {', '.join(STATE)}")]
Json = Annotated[bool, typer.Option("--json", help="print JSON, in SI units")]
Markdown = Annotated[bool, typer.Option("--markdown", help="print Markdown tables")]
Latex = Annotated[bool, typer.Option("--latex", help="print LaTeX tables (booktabs)")]


OneRanks = Annotated[int, typer.Option(min=1)]
OneBatch = Annotated[int | None, typer.Option(min=1, help="rows per rank; the example's by default")]


# --- groups of options: a command's parameter that is one of these stands for its fields


@dataclass(frozen=True)
class Style:
    """The format of tables."""

    json: Json = False
    markdown: Markdown = False
    latex: Latex = False

    @property
    def chosen(self) -> bool:
        return self.json or self.markdown or self.latex


@dataclass(frozen=True)
class Place:
    """A cluster, or links in numbers."""

    bandwidth: Bandwidth = None
    latency: Latency = None
    cluster: ClusterOption = None
    ranks_per_node: PerNode = None

    def cluster_of(self, ranks: int) -> Cluster | None:
        """The cluster that the options describe; None if they describe none."""
        if self.cluster is not None:
            if self.bandwidth is not None or self.latency is not None:
                raise typer.BadParameter("give --cluster, or --bandwidth and --latency, not both")
            if self.cluster in BUILTIN:
                return Cluster.builtin(self.cluster, ranks, self.ranks_per_node)
            if not Path(self.cluster).is_file():
                names = ", ".join(BUILTIN)
                raise typer.BadParameter(f"--cluster {self.cluster}: no such file, and the names are {names}")
            return Cluster.load(self.cluster).with_ranks(ranks, self.ranks_per_node)
        if self.bandwidth is None:
            if self.latency is not None:
                raise typer.BadParameter("--latency needs --bandwidth")
            return None
        link = Link(self.latency or 0.0, self.bandwidth, source="command line")
        name = f"{units.format_bandwidth(self.bandwidth)}, {units.format_seconds(self.latency or 0.0)}"
        return Cluster(name, ranks, self.ranks_per_node or 1, {"inter": dict.fromkeys(COLLECTIVES, link)})


@dataclass(frozen=True)
class PlanTerms:
    """What a plan has to satisfy."""

    memory: Memory = None
    optimizer: Optimizer = "adagrad"
    pin: Pins = None
    forbid: Forbid = None

    def options(self) -> dict[str, Any]:
        """As `Captured.plan` takes them."""
        forbid: dict[str, list[str]] = {}
        for text in self.forbid or ():
            table, form = _table_and_form("--forbid", text, "*=replicate")
            forbid.setdefault(table, []).append(form)
        pins = dict(_table_and_form("--pin", text, "user.*=row") for text in self.pin or ())
        return {"pins": pins, "forbid": forbid, "memory_bytes": self.memory, "optimizer": self.optimizer}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its groups of options spelt out, as typer wants them."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {n: hint for n, hint in hints.items() if is_dataclass(hint)}
    names = {n: [f.name for f in fields(hint)] for n, hint in groups.items()}
    parameters: list[inspect.Parameter] = []
    for p in inspect.signature(command).parameters.values():
        if p.name not in groups:
            parameters.append(p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY))
            continue
        of = get_type_hints(groups[p.name], include_extras=True)
        parameters += [
            inspect.Parameter(f.name, p.KEYWORD_ONLY, default=f.default, annotation=of[f.name])
            for f in fields(groups[p.name])
        ]

    @functools.wraps(command)
    def call(**options: Any) -> None:
        made = {n: hint(**{f: options.pop(f) for f in names[n]}) for n, hint in groups.items()}
        command(**options, **made)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    del call.__wrapped__
    return call


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
    factory = getattr(_module(where), name, None)
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
    return made


def _module(where: str) -> Any:
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


def _table_and_form(option: str, text: str, example: str) -> tuple[str, str]:
    """The parts of a ``TABLE=FORM`` option."""
    table, equals, form = text.rpartition("=")
    if not equals or not table or not form:
        raise typer.BadParameter(f"{option} {text!r}: give TABLE=FORM, such as {example!r}")
    return table, form


# --- output


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
            where = None if cluster is None else cluster.with_ranks(n)
            result.append(captured.plan(ranks=n, batch=rows, cluster=where, **options))
    return result


def captured_from(spec: str) -> Captured:
    """Load and capture a model, with progress."""
    with working(f"capturing {spec}"):
        return Captured.of(*load(spec))


# --- commands


@app.command()
@grouped
def cost(
    spec: OptionalSpec = None,
    ranks: Ranks = "8",
    batch: Batch = None,
    of_paper: Annotated[
        bool, typer.Option("--paper", help="no MODEL: the table of arXiv 1909.04823, at stated industrial sizes")
    ] = False,
    place: Place = Place(),
    terms: PlanTerms = PlanTerms(),
    style: Style = Style(),
) -> None:
    """What a model sends per step: every operator's candidates, the winner, and the strategies that users know.

    Needs no process group and no weights. Bytes are per rank and step, ids included. With a cluster, the plan is the
    fastest on it; without, the one that sends least.

    Examples:

    \b
        descompiler cost lr --ranks 8 --batch 4096
        descompiler cost fm --ranks 2:64 --bandwidth 25Gbit --latency 20us
        descompiler cost train.py:model --cluster ethernet-100g --markdown
        descompiler cost --paper --ranks 8 --batch 1024
    """
    if of_paper == (spec is not None):
        raise typer.BadParameter("give MODEL, or --paper without one")
    if spec is None:
        if len(ranks) > 1 or (batch is not None and len(batch) > 1):
            raise typer.BadParameter("--paper takes one number of ranks and of rows; its last table goes over ranks")
        paper_table(ranks[0], 1024 if batch is None else batch[0], style)
        return
    batches = (None,) if batch is None else batch
    where = place.cluster_of(ranks[0])
    plans = plans_for(captured_from(spec), ranks, batches, where, **terms.options())
    if len(plans) > 1:
        tables = sheets.sweep(plans, where)
    else:
        (only,) = plans
        tables = sheets.all_of(only, where)
    show(tables, style, model=spec)


def paper_table(ranks: int, batch: int, style: Style) -> None:
    """Print the paper's table; as Markdown, the whole page docs/paper.md."""
    setting = paper.Setting()
    with working("the paper's models", len(paper.MODELS)) as next_is:
        rows = paper.rows_of(setting, sorted({2, 4, 8, 16, 32, 64, ranks}), batch, next_is)
    if style == Style(markdown=True):
        command = f"descompiler cost --paper --ranks {ranks} --batch {batch} --markdown"
        typer.echo(paper.markdown(setting, rows, ranks, command), nl=False)
        return
    notes = paper.words(setting, rows, ranks)
    show(paper.tables(rows, ranks), style, notes=notes)
    if not style.json and not style.latex:
        for note in notes:
            typer.echo(f"- {note}")


@app.command()
@grouped
def explain(
    spec: Spec,
    operator: Annotated[str | None, typer.Argument(help="one operator, by name; all by default")] = None,
    ranks: OneRanks = 8,
    batch: OneBatch = None,
    terms: PlanTerms = PlanTerms(),
    style: Style = Style(),
) -> None:
    """Why a model is divided as it is: of all operators in words, or of one with every form, formula and price.

    Examples:

    \b
        descompiler explain lr --ranks 4
        descompiler explain fm embeddings.tables.2.weight --ranks 16
    """
    (plan,) = plans_for(captured_from(spec), (ranks,), (batch,), **terms.options())
    if operator is None:
        if style.chosen:
            show([sheets.candidates(plan)], style, model=spec)
        else:
            typer.echo(plan.explain())
        return
    if operator not in plan.splits:
        raise des.PlanError(f"no table {operator!r} in {spec}; there are {_some(plan.splits)}")
    tables = [sheets.candidates(plan, only=operator), sheets.thresholds(plan, only=operator), sheets.crossings(plan)]
    show(tables, style, model=spec, operator=operator)


def _some(names: Iterable[str], most: int = 6) -> str:
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


plan_app = typer.Typer(no_args_is_help=True, help="Write a plan to a file, show one, compare two.")
app.add_typer(plan_app, name="plan")

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="a file that `plan write` wrote")]


@plan_app.command("write")
@grouped
def plan_write(
    spec: Spec,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="the JSON file to write")],
    ranks: OneRanks = 8,
    batch: OneBatch = None,
    cluster: ClusterOption = None,
    terms: PlanTerms = PlanTerms(),
) -> None:
    """Plan on this machine for any number of ranks; `des.compile(model, plan=FILE)` follows it there.

    Examples:

    \b
        descompiler plan write fm --ranks 64 --batch 1024 --out fm-64.json
    """
    where = Place(cluster=cluster).cluster_of(ranks)
    (plan,) = plans_for(captured_from(spec), (ranks,), (batch,), where, **terms.options())
    plan.save(out)
    typer.echo(f"wrote {out}: {sheets.summary_of(plan)}; {units.format_bytes(plan.price_bytes)} for the busiest rank")


@plan_app.command("show")
@grouped
def plan_show(
    file: PlanFile,
    place: Place = Place(),
    style: Style = Style(),
) -> None:
    """Show a plan as `cost` does, without the model.

    Examples:

    \b
        descompiler plan show fm-64.json --cluster ethernet-100g
    """
    plan = Plan.load(file)
    where = place.cluster_of(plan.ranks)
    show(sheets.all_of(plan, where), style, plan=str(file))


@plan_app.command("diff")
def plan_diff(file: PlanFile, other: PlanFile) -> None:
    """What is different in a second plan, in words.

    Examples:

    \b
        descompiler plan diff fm-64.json fm-64-edited.json
    """
    typer.echo(Plan.load(file).diff(Plan.load(other)) or "the plans are equal")


@app.command()
@grouped
def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="the cluster file to write")],
    name: Annotated[str, typer.Option(help="the cluster's name")] = "calibrated",
    memory: Annotated[
        Any, typer.Option(parser=_usage(units.parse_size), metavar="SIZE", help="of each rank: 16GB; not measured")
    ] = None,
    sizes: Annotated[
        Any, typer.Option(parser=_usage(_sizes), metavar="SIZES", help="what a rank sends in a call: 1kB,64kB,4MB")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="calls of each size")] = 15,
    style: Style = Style(),
) -> None:
    """Measure latency and bandwidth of every collective on the real network; run it under torchrun.

    Examples:

    \b
        torchrun --nproc-per-node 4 -m descompiler calibrate --out cluster.json
        descompiler cost fm --ranks 4 --cluster cluster.json
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        with working("starting") if first else nullcontext(lambda what: None) as next_is:
            found = des.calibrate(
                name=name,
                memory_bytes=memory,
                sizes_bytes=sizes or SIZES_BYTES,
                repeats=repeats,
                path=out,
                progress=next_is,
            )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if first:
        show([sheets.links(found)], style, cluster=str(out))


@app.command()
@grouped
def audit(
    spec: Spec,
    steps: Annotated[int, typer.Option(min=1)] = 8,
    cluster: Annotated[
        Path | None, typer.Option("--cluster", metavar="FILE", help="whose numbers predict; measured first by default")
    ] = None,
    style: Style = Style(),
) -> None:
    """Train a few steps and compare predicted with measured bytes and seconds; run it under torchrun.

    Examples:

    \b
        torchrun --nproc-per-node 2 -m descompiler audit train.py:small_model --cluster cluster.json
    """
    model, inputs = load(spec, train=True)
    first = os.environ.get("RANK", "0") == "0"
    try:
        with working("training") if first else nullcontext(lambda what: None):
            module = des.compile(model, inputs)
            found = des.audit(
                module, [inputs] * (steps + 2), cluster=None if cluster is None else Cluster.load(cluster), warm_up=2
            )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if first:
        show([sheets.audited(found)], style, model=spec)


@app.command()
def verify(
    spec: Spec,
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    steps: Annotated[int, typer.Option(min=1)] = 3,
    rows: Annotated[
        int | None, typer.Option(min=1, help="cut tables to so many rows, ids modulo: for models that don't fit here")
    ] = None,
) -> None:
    """Prove on local processes that the compiled model trains as the original.

    Examples:

    \b
        descompiler verify fm --ranks 3
        descompiler verify train.py:small_model --steps 5
        descompiler verify train.py:model --rows 1000
    """
    model, inputs = load(spec, train=True)
    with working(f"training {spec} on {ranks} local ranks and on one"):
        report = des.verify(model, inputs, ranks=ranks, steps=steps, rows=rows)
    typer.echo(str(report))


@app.command()
@grouped
def report(
    spec: Spec,
    html: Annotated[Path, typer.Option("--html", metavar="FILE", help="the page to write")] = Path("report.html"),
    ranks: Annotated[int, typer.Option(min=2)] = 8,
    batch: OneBatch = None,
    place: Place = Place(),
    terms: PlanTerms = PlanTerms(),
) -> None:
    """Write one self-contained HTML page: graphs with bytes, curves with crossovers, formulas, what was rejected.

    Without a cluster, times are those of 25 Gbit Ethernet.

    Examples:

    \b
        descompiler report fm --html fm.html --ranks 16 --batch 4096
    """
    where = place.cluster_of(ranks) or Cluster.builtin("ethernet-25g", ranks)
    captured, options = captured_from(spec), terms.options()
    fixed = {name: options[name] for name in ("pins", "forbid")}
    (plan,) = plans_for(captured, (ranks,), (batch,), **options)
    over_ranks = plans_for(captured, pages.sweep_ranks(plan), (plan.rows,), **fixed)
    over_rows = plans_for(captured, (ranks,), pages.sweep_rows(plan), **fixed)
    html.write_text(pages.page(captured, plan, over_ranks, over_rows, title=spec, cluster=where), encoding="utf-8")
    typer.echo(f"wrote {html} ({units.format_bytes(html.stat().st_size)})")


@app.command()
def version() -> None:
    """The version of descompiler."""
    typer.echo(des.__version__)


def main() -> None:
    """Run the command line."""
    app()

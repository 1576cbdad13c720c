"""The command line: ``descompiler cost deepfm --ranks 2:64``; see docs/cli.md.

Exit status: 0 fine, 1 an error that descompiler raises on purpose (one line), 2 wrong usage.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

import descompiler as des
from descompiler import examples, paper, render, sheets, units
from descompiler import report as pages
from descompiler.calibrate import SIZES_BYTES
from descompiler.cluster import BUILTIN, COLLECTIVES, Cluster, Link
from descompiler.compiler import Captured
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


def cluster_from(
    cluster: str | None, bandwidth: float | None, latency: float | None, ranks: int, ranks_per_node: int | None = None
) -> Cluster | None:
    """The cluster that the options describe; None if they describe none."""
    if cluster is not None:
        if bandwidth is not None or latency is not None:
            raise typer.BadParameter("give --cluster, or --bandwidth and --latency, not both")
        if cluster in BUILTIN:
            return Cluster.builtin(cluster, ranks, ranks_per_node)
        if not Path(cluster).is_file():
            raise typer.BadParameter(f"--cluster {cluster}: no such file, and the names are {', '.join(BUILTIN)}")
        return Cluster.load(cluster).with_ranks(ranks, ranks_per_node)
    if bandwidth is None:
        if latency is not None:
            raise typer.BadParameter("--latency needs --bandwidth")
        return None
    link = Link(latency or 0.0, bandwidth, source="command line")
    name = f"{units.format_bandwidth(bandwidth)}, {units.format_seconds(latency or 0.0)}"
    return Cluster(name, ranks, ranks_per_node or 1, {"inter": dict.fromkeys(COLLECTIVES, link)})


def pins_from(pins: Sequence[str] | None) -> Mapping[str, str]:
    """``TABLE=FORM`` options as a mapping."""
    result = {}
    for pin in pins or ():
        table, equals, form = pin.rpartition("=")
        if not equals or not table or not form:
            raise typer.BadParameter(f"--pin {pin!r}: give TABLE=FORM, such as 'user.*=row'")
        result[table] = form
    return result


def forbidden_from(forbidden: Sequence[str] | None) -> Mapping[str, list[str]]:
    """``TABLE=FORM`` options as lists of forms by table."""
    result: dict[str, list[str]] = {}
    for text in forbidden or ():
        table, equals, form = text.rpartition("=")
        if not equals or not table or not form:
            raise typer.BadParameter(f"--forbid {text!r}: give TABLE=FORM, such as '*=replicate'")
        result.setdefault(table, []).append(form)
    return result


# --- output


def show(tables: Sequence[Sheet], *, json: bool, markdown: bool, latex: bool, **more: Any) -> None:
    """Print tables in the format that the options ask for."""
    if json + markdown + latex > 1:
        raise typer.BadParameter("give one of --json, --markdown and --latex")
    if json:
        typer.echo(render.to_json(tables, **more))
    elif markdown:
        typer.echo("\n\n".join(map(render.to_markdown, tables)))
    elif latex:
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
        return Captured(*load(spec))


# --- commands


@app.command()
def cost(
    spec: OptionalSpec = None,
    ranks: Ranks = "8",
    batch: Batch = None,
    of_paper: Annotated[
        bool, typer.Option("--paper", help="no MODEL: the table of arXiv 1909.04823, at stated industrial sizes")
    ] = False,
    bandwidth: Bandwidth = None,
    latency: Latency = None,
    cluster: ClusterOption = None,
    ranks_per_node: PerNode = None,
    memory: Memory = None,
    optimizer: Optimizer = "adagrad",
    pin: Pins = None,
    forbid: Forbid = None,
    json: Json = False,
    markdown: Markdown = False,
    latex: Latex = False,
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
        paper_table(ranks[0], 1024 if batch is None else batch[0], json=json, markdown=markdown, latex=latex)
        return
    batches = (None,) if batch is None else batch
    where = cluster_from(cluster, bandwidth, latency, ranks[0], ranks_per_node)
    captured = captured_from(spec)
    plans = plans_for(
        captured,
        ranks,
        batches,
        where,
        pins=pins_from(pin),
        forbid=forbidden_from(forbid),
        memory_bytes=memory,
        optimizer=optimizer,
    )
    if len(plans) > 1:
        tables = sheets.sweep(plans, where)
    else:
        (only,) = plans
        tables = sheets.all_of(only, where)
    show(tables, json=json, markdown=markdown, latex=latex, model=spec)


def paper_table(ranks: int, batch: int, *, json: bool, markdown: bool, latex: bool) -> None:
    """Print the paper's table; as Markdown, the whole page docs/paper.md."""
    setting = paper.Setting()
    with working("the paper's models", len(paper.MODELS)) as next_is:
        rows = paper.rows_of(setting, sorted({2, 4, 8, 16, 32, 64, ranks}), batch, next_is)
    if markdown and not json and not latex:
        command = f"descompiler cost --paper --ranks {ranks} --batch {batch} --markdown"
        typer.echo(paper.markdown(setting, rows, ranks, command), nl=False)
        return
    notes = paper.words(setting, rows, ranks)
    show(paper.tables(rows, ranks), json=json, markdown=markdown, latex=latex, notes=notes)
    if not json and not latex:
        for note in notes:
            typer.echo(f"- {note}")


@app.command()
def explain(
    spec: Spec,
    operator: Annotated[str | None, typer.Argument(help="one operator, by name; all by default")] = None,
    ranks: Annotated[int, typer.Option(min=1)] = 8,
    batch: Annotated[int | None, typer.Option(min=1, help="rows per rank; the example's by default")] = None,
    memory: Memory = None,
    optimizer: Optimizer = "adagrad",
    pin: Pins = None,
    forbid: Forbid = None,
    json: Json = False,
    markdown: Markdown = False,
    latex: Latex = False,
) -> None:
    """Why a model is divided as it is: of all operators in words, or of one with every form, formula and price.

    Examples:

    \b
        descompiler explain lr --ranks 4
        descompiler explain fm embeddings.tables.2.weight --ranks 16
    """
    captured = captured_from(spec)
    terms = {"forbid": forbidden_from(forbid), "memory_bytes": memory, "optimizer": optimizer}
    (plan,) = plans_for(captured, (ranks,), (batch,), pins=pins_from(pin), **terms)
    if operator is None:
        if json or markdown or latex:
            show([sheets.candidates(plan)], json=json, markdown=markdown, latex=latex, model=spec)
        else:
            typer.echo(plan.explain())
        return
    if operator not in plan.splits:
        raise des.PlanError(f"no table {operator!r} in {spec}; there are {_some(plan.splits)}")
    tables = [sheets.candidates(plan, only=operator), sheets.thresholds(plan, only=operator), sheets.crossings(plan)]
    show(tables, json=json, markdown=markdown, latex=latex, model=spec, operator=operator)


def _some(names: Iterable[str], most: int = 6) -> str:
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


plan_app = typer.Typer(no_args_is_help=True, help="Write a plan to a file, show one, compare two.")
app.add_typer(plan_app, name="plan")

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="a file that `plan write` wrote")]


@plan_app.command("write")
def plan_write(
    spec: Spec,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="the JSON file to write")],
    ranks: Annotated[int, typer.Option(min=1)] = 8,
    batch: Annotated[int | None, typer.Option(min=1, help="rows per rank; the example's by default")] = None,
    cluster: ClusterOption = None,
    memory: Memory = None,
    optimizer: Optimizer = "adagrad",
    pin: Pins = None,
    forbid: Forbid = None,
) -> None:
    """Plan on this machine for any number of ranks; `des.compile(model, plan=FILE)` follows it there.

    Examples:

    \b
        descompiler plan write fm --ranks 64 --batch 1024 --out fm-64.json
    """
    where = None if cluster is None else cluster_from(cluster, None, None, ranks)
    captured = captured_from(spec)
    terms = {"forbid": forbidden_from(forbid), "memory_bytes": memory, "optimizer": optimizer}
    (plan,) = plans_for(captured, (ranks,), (batch,), where, pins=pins_from(pin), **terms)
    plan.save(out)
    typer.echo(f"wrote {out}: {sheets.summary_of(plan)}; {units.format_bytes(plan.price_bytes)} for the busiest rank")


@plan_app.command("show")
def plan_show(
    file: PlanFile,
    bandwidth: Bandwidth = None,
    latency: Latency = None,
    cluster: ClusterOption = None,
    ranks_per_node: PerNode = None,
    json: Json = False,
    markdown: Markdown = False,
    latex: Latex = False,
) -> None:
    """Show a plan as `cost` does, without the model.

    Examples:

    \b
        descompiler plan show fm-64.json --cluster ethernet-100g
    """
    plan = Plan.load(file)
    where = cluster_from(cluster, bandwidth, latency, plan.ranks, ranks_per_node)
    show(sheets.all_of(plan, where), json=json, markdown=markdown, latex=latex, plan=str(file))


@plan_app.command("diff")
def plan_diff(file: PlanFile, other: PlanFile) -> None:
    """What is different in a second plan, in words.

    Examples:

    \b
        descompiler plan diff fm-64.json fm-64-edited.json
    """
    typer.echo(Plan.load(file).diff(Plan.load(other)) or "the plans are equal")


@app.command()
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
    json: Json = False,
    markdown: Markdown = False,
    latex: Latex = False,
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
        show([sheets.links(found)], json=json, markdown=markdown, latex=latex, cluster=str(out))


@app.command()
def audit(
    spec: Spec,
    steps: Annotated[int, typer.Option(min=1)] = 8,
    cluster: Annotated[
        Path | None, typer.Option("--cluster", metavar="FILE", help="whose numbers predict; measured first by default")
    ] = None,
    json: Json = False,
    markdown: Markdown = False,
    latex: Latex = False,
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
        show([sheets.audited(found)], json=json, markdown=markdown, latex=latex, model=spec)


@app.command()
def verify(
    spec: Spec,
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    steps: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Prove on local processes that the compiled model trains as the original.

    Examples:

    \b
        descompiler verify fm --ranks 3
        descompiler verify train.py:small_model --steps 5
    """
    model, inputs = load(spec, train=True)
    with working(f"training {spec} on {ranks} local ranks and on one"):
        report = des.verify(model, inputs, ranks=ranks, steps=steps)
    typer.echo(str(report))


@app.command()
def report(
    spec: Spec,
    html: Annotated[Path, typer.Option("--html", metavar="FILE", help="the page to write")] = Path("report.html"),
    ranks: Annotated[int, typer.Option(min=2)] = 8,
    batch: Annotated[int | None, typer.Option(min=1, help="rows per rank; the example's by default")] = None,
    bandwidth: Bandwidth = None,
    latency: Latency = None,
    cluster: ClusterOption = None,
    ranks_per_node: PerNode = None,
    memory: Memory = None,
    optimizer: Optimizer = "adagrad",
    pin: Pins = None,
) -> None:
    """Write one self-contained HTML page: graphs with bytes, curves with crossovers, formulas, what was rejected.

    Without a cluster, times are those of 25 Gbit Ethernet.

    Examples:

    \b
        descompiler report fm --html fm.html --ranks 16 --batch 4096
    """
    where = cluster_from(cluster, bandwidth, latency, ranks, ranks_per_node) or Cluster.builtin("ethernet-25g", ranks)
    captured, pins = captured_from(spec), pins_from(pin)
    terms = {"pins": pins, "memory_bytes": memory, "optimizer": optimizer}
    (plan,) = plans_for(captured, (ranks,), (batch,), **terms)
    over_ranks = plans_for(captured, pages.sweep_ranks(plan), (plan.rows,), pins=pins)
    over_rows = plans_for(captured, (ranks,), pages.sweep_rows(plan), pins=pins)
    html.write_text(pages.page(captured, plan, over_ranks, over_rows, title=spec, cluster=where), encoding="utf-8")
    typer.echo(f"wrote {html} ({units.format_bytes(html.stat().st_size)})")


@app.command()
def version() -> None:
    """The version of descompiler."""
    typer.echo(des.__version__)


def main() -> None:
    """Run the command line."""
    app()

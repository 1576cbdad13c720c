"""The command line: ``descompiler cost deepfm --ranks 2:64``; see docs/cli.md.

Exit status: 0 fine, 1 an error that descompiler raises on purpose (one line), 2 wrong usage.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from typer.core import TyperGroup

import descompiler as des
from descompiler.check.calibrate import SIZES_BYTES
from descompiler.cli.loading import captured_from, load, plans_for
from descompiler.cli.options import (
    Batch,
    ClusterOption,
    OneBatch,
    OneRanks,
    OptionalSpec,
    PlaceOptions,
    PlanFile,
    PlanTerms,
    RanksOption,
    Spec,
    Style,
    WireDtype,
    grouped,
    sizes,
    usage,
)
from descompiler.cli.output import show, working
from descompiler.planning.assumed import ASSUMED, BYTES
from descompiler.planning.cluster import Cluster
from descompiler.planning.explain import costs, of_table, whole
from descompiler.planning.plan import Plan
from descompiler.planning.summary import summary_of
from descompiler.report import measured, paper
from descompiler.report import page as pages
from descompiler.report.sweep import sweep
from descompiler.sheet import printable
from descompiler.units import MOST_RANKS, format_bytes, parse_size


class _Commands(TyperGroup):
    """Errors that descompiler raises on purpose are one line on stderr, and status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except des.DescompilerError as error:
            typer.echo(printable(f"error: {error}"), err=True)
            raise typer.Exit(1) from None
        except OSError as error:
            if error.filename is None:
                raise
            text = f"error: {error.filename}: {error.strerror}; give a path that can be read or written"
            typer.echo(printable(text), err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    help="Cost, plan and equivalence of distributed recommender models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
@grouped
def cost(
    spec: OptionalSpec = None,
    ranks: RanksOption = "8",
    batch: Batch = None,
    of_paper: Annotated[
        bool, typer.Option("--paper", help="no MODEL: the table of arXiv 1909.04823, at stated industrial sizes")
    ] = False,
    place: PlaceOptions = PlaceOptions(),
    terms: PlanTerms = PlanTerms(),
    style: Style = Style(),
) -> None:
    """What a model sends per step: every operator's candidates, the winner, and the strategies that users know.

    Needs no process group and no weights. Bytes are per rank and step, ids included. The plan is the fastest on the
    cluster, 10 Gbit/s Ethernet by default, or the one that sends least.

    Examples:

    \b
        descompiler cost lr --ranks 8 --batch 4096
        descompiler cost fm --ranks 2:64 --bandwidth 25Gbit --latency 20us
        descompiler cost train.py:model --cluster ethernet-100g --markdown
        descompiler cost deepfm --cluster bytes
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
        tables = sweep(plans, where)
    else:
        (only,) = plans
        tables = costs(only, where)
    show(tables, style, model=spec)


def paper_table(ranks: int, batch: int, style: Style) -> None:
    """Print the paper's table; as Markdown, the whole page docs/paper.md."""
    setting = paper.Setting()
    with working("the paper's models", len(paper.PAPER_MODELS)) as next_is:
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


@app.command("explain")
@grouped
def explain_command(
    spec: Spec,
    operator: Annotated[str | None, typer.Argument(help="one operator, by name; all by default")] = None,
    ranks: OneRanks = 8,
    batch: OneBatch = None,
    terms: PlanTerms = PlanTerms(),
    style: Style = Style(),
) -> None:
    """Why a model is divided as it is, as `Plan.explain` says it: every form, formula and price, of all or of one.

    Examples:

    \b
        descompiler explain lr --ranks 4
        descompiler explain fm embeddings.tables.2.weight --ranks 16
    """
    (plan,) = plans_for(captured_from(spec), (ranks,), (batch,), **terms.options())
    show(whole(plan) if operator is None else of_table(plan, operator), style, model=spec, operator=operator)


plan_app = typer.Typer(no_args_is_help=True, help="Write a plan to a file, show one, compare two.")


app.add_typer(plan_app, name="plan")


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
    where = PlaceOptions(cluster=cluster).cluster_of(ranks)
    (plan,) = plans_for(captured_from(spec), (ranks,), (batch,), where, **terms.options())
    plan.save(out)
    typer.echo(printable(f"wrote {out}: {summary_of(plan)}; {format_bytes(plan.price_bytes)} for the busiest rank"))


@plan_app.command("show")
@grouped
def plan_show(
    file: PlanFile,
    place: PlaceOptions = PlaceOptions(),
    style: Style = Style(),
) -> None:
    """Show a plan as `cost` does, without the model.

    Examples:

    \b
        descompiler plan show fm-64.json --cluster ethernet-100g
    """
    plan = Plan.load(file)
    where = place.cluster_of(plan.ranks, BYTES)
    show(costs(plan, where), style, plan=str(file))


@plan_app.command("diff")
def plan_diff(file: PlanFile, other: PlanFile) -> None:
    """What is different in a second plan, in words.

    Examples:

    \b
        descompiler plan diff fm-64.json fm-64-edited.json
    """
    typer.echo(printable(Plan.load(file).diff(Plan.load(other)) or "the plans are equal"))


@app.command("calibrate")
@grouped
def calibrate_command(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="the cluster file to write")],
    name: Annotated[str, typer.Option(help="the cluster's name")] = "calibrated",
    memory: Annotated[
        Any, typer.Option(parser=usage(parse_size), metavar="SIZE", help="of each rank: 16GB; not measured")
    ] = None,
    sizes: Annotated[
        Any, typer.Option(parser=usage(sizes), metavar="SIZES", help="what a rank sends in a call: 1kB,64kB,4MB")
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
        show([measured.links(found)], style, cluster=str(out))


@app.command("audit")
@grouped
def audit_command(
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
        show([measured.audited(found)], style, model=spec)


@app.command("verify")
def verify_command(
    spec: Spec,
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    steps: Annotated[int, typer.Option(min=1)] = 3,
    rows: Annotated[
        int | None, typer.Option(min=1, help="cut tables to so many rows, ids modulo: for models that don't fit here")
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="try edges of the inputs, other sizes, losses, dtypes: some minutes")
    ] = False,
    wire_dtype: WireDtype = None,
) -> None:
    """Prove on local processes that the compiled model trains as the original.

    Examples:

    \b
        descompiler verify fm --ranks 3
        descompiler verify train.py:small_model --steps 5
        descompiler verify train.py:model --rows 1000
        descompiler verify fm --wire-dtype bfloat16
    """
    model, inputs = load(spec, train=True)
    with working(f"training {spec} on {ranks} local ranks and on one"):
        report = des.verify(
            model, inputs, ranks=ranks, steps=steps, rows=rows, thorough=thorough, wire_dtype=wire_dtype
        )
    typer.echo(printable(str(report)))


@app.command()
@grouped
def report(
    spec: Spec,
    html: Annotated[Path, typer.Option("--html", metavar="FILE", help="the page to write")] = Path("report.html"),
    ranks: Annotated[int, typer.Option(min=2, max=MOST_RANKS)] = 8,
    batch: OneBatch = None,
    place: PlaceOptions = PlaceOptions(),
    terms: PlanTerms = PlanTerms(),
) -> None:
    """Write one self-contained HTML page: graphs with bytes, curves with crossovers, formulas, what was rejected.

    Plans are for the cluster, as those of `cost`; with `--cluster bytes` they send least, and times are those of
    10 Gbit/s Ethernet.

    Examples:

    \b
        descompiler report fm --html fm.html --ranks 16 --batch 4096
    """
    by = place.cluster_of(ranks)
    where = by or Cluster.builtin(ASSUMED["cpu"], ranks)
    captured, options = captured_from(spec), terms.options()
    fixed = {name: options[name] for name in ("pins", "forbid")}
    (plan,) = plans_for(captured, (ranks,), (batch,), by, **options)
    over_ranks = plans_for(captured, pages.sweep_ranks(plan), (plan.rows,), by, **fixed)
    over_rows = plans_for(captured, (ranks,), pages.sweep_rows(plan), by, **fixed)
    html.write_text(pages.page(captured, plan, over_ranks, over_rows, title=spec, cluster=where), encoding="utf-8")
    typer.echo(f"wrote {html} ({format_bytes(html.stat().st_size)})")


@app.command()
def version() -> None:
    """The version of descompiler."""
    typer.echo(des.__version__)


def main() -> None:
    """Run the command line."""
    app()

"""Options of the command line, read and grouped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import torch
import typer

import descompiler as des
from descompiler import examples, units
from descompiler.cost_models.memory import STATE
from descompiler.planning.assumed import BYTES, GivenCluster, cluster_of
from descompiler.planning.cluster import CLUSTERS, COLLECTIVES, Cluster, Link
from descompiler.planning.objective import WIRE_DTYPES
from descompiler.tables.form import fallback

T = TypeVar("T")


def usage(parse: Callable[[str], T]) -> Callable[[str], T]:
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


def sizes(text: str) -> tuple[int, ...]:
    return tuple(units.parse_size(x) for x in text.split(","))


def _ranks(text: str) -> tuple[int, ...]:
    return units.parse_counts(text, "ranks")


SPEC_HELP = (
    "`FILE.py:factory` or `package.module:factory` (the factory returns `(model, example_inputs)`), or an example: "
    f"{', '.join(examples.CTR_MODELS)}"
)


Spec = Annotated[str, typer.Argument(metavar="MODEL", help=SPEC_HELP)]


OptionalSpec = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=SPEC_HELP)]


RanksOption = Annotated[
    Any, typer.Option("--ranks", parser=usage(_ranks), metavar="N", help="8, 2,4,6 or 2:256 (doubling)")
]


Batch = Annotated[
    Any,
    typer.Option("--batch", parser=usage(_batches), metavar="ROWS", help="rows per rank; the example's by default"),
]


Bandwidth = Annotated[
    Any, typer.Option(parser=usage(units.parse_bandwidth), metavar="RATE", help="of one rank's link: 25Gbit, 3GB/s")
]


Latency = Annotated[
    Any, typer.Option(parser=usage(units.parse_time), metavar="TIME", help="of one message: 20us; 0 by default")
]


ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="FILE|NAME",
        help=f"a cluster file, or one of {', '.join(CLUSTERS.names)}; {BYTES}: send least, whatever it takes",
    ),
]


PerNode = Annotated[int | None, typer.Option("--ranks-per-node", min=1, help="with --cluster: ranks that share a node")]


Pins = Annotated[
    list[str] | None, typer.Option("--pin", metavar="TABLE=FORM", help="fix the form of tables; TABLE may be a pattern")
]


Forbid = Annotated[
    list[str] | None, typer.Option("--forbid", metavar="TABLE=FORM", help="a form that tables must not take")
]


MemoryOption = Annotated[
    Any, typer.Option("--memory", parser=usage(units.parse_size), metavar="SIZE", help="limit of each rank: 16GB")
]


Optimizer = Annotated[str, typer.Option(help=f"for memory: {', '.join(STATE)}")]


def _wire_dtype(text: str) -> torch.dtype:
    names = {str(x).removeprefix("torch."): x for x in WIRE_DTYPES}
    if text not in names:
        raise des.InputError(f"{text!r} is none of {', '.join(names)}")
    return names[text]


WireDtype = Annotated[
    Any,
    typer.Option(
        "--wire-dtype", parser=usage(_wire_dtype), metavar="DTYPE", help="round what crosses to bfloat16, or float16"
    ),
]


Json = Annotated[bool, typer.Option("--json", help="print JSON, in SI units")]


Markdown = Annotated[bool, typer.Option("--markdown", help="print Markdown tables")]


Latex = Annotated[bool, typer.Option("--latex", help="print LaTeX tables (booktabs)")]


OneRanks = Annotated[int, typer.Option(min=1, max=units.MOST_RANKS)]


OneBatch = Annotated[
    int | None, typer.Option(min=1, max=units.MOST_ROWS, help="rows per rank; the example's by default")
]


@dataclass(frozen=True)
class Style:
    """The format of tables."""

    json: Json = False
    markdown: Markdown = False
    latex: Latex = False


@dataclass(frozen=True)
class PlaceOptions:
    """A cluster, or links in numbers."""

    bandwidth: Bandwidth = None
    latency: Latency = None
    cluster: ClusterOption = None
    ranks_per_node: PerNode = None

    def cluster_of(self, ranks: int, otherwise: GivenCluster = None) -> Cluster | None:
        """The cluster that the options describe, or what is meant where they describe none; None if bytes count."""
        if self.cluster is not None:
            if self.bandwidth is not None or self.latency is not None:
                raise typer.BadParameter("give --cluster, or --bandwidth and --latency, not both")
            if self.cluster in CLUSTERS.names:
                return Cluster.builtin(self.cluster, ranks, self.ranks_per_node)
            if self.cluster == BYTES:
                return None
            if not Path(self.cluster).is_file():
                names = ", ".join((*CLUSTERS.names, BYTES))
                raise typer.BadParameter(f"--cluster {self.cluster}: no such file, and the names are {names}")
            return Cluster.load(self.cluster).with_ranks(ranks, self.ranks_per_node)
        if self.bandwidth is None:
            if self.latency is not None:
                raise typer.BadParameter("--latency needs --bandwidth")
            return cluster_of(otherwise, ranks)
        link = Link(self.latency or 0.0, self.bandwidth, source="command line")
        name = f"{units.format_bandwidth(self.bandwidth)}, {units.format_seconds(self.latency or 0.0)}"
        return Cluster(name, ranks, self.ranks_per_node or 1, {"inter": dict.fromkeys(COLLECTIVES, link)})


@dataclass(frozen=True)
class PlanTerms:
    """What a plan has to satisfy."""

    memory: MemoryOption = None
    optimizer: Optimizer = "adagrad"
    wire_dtype: WireDtype = None
    pin: Pins = None
    forbid: Forbid = None

    def options(self) -> dict[str, Any]:
        """As `Captured.plan` takes them."""
        forbid: dict[str, list[str]] = {}
        for text in self.forbid or ():
            table, form = _table_and_form("--forbid", text, f"*={fallback().name}")
            forbid.setdefault(table, []).append(form)
        pins = dict(_table_and_form("--pin", text, f"user.*={fallback().name}") for text in self.pin or ())
        terms = {"memory_bytes": self.memory, "optimizer": self.optimizer, "wire_dtype": self.wire_dtype}
        return {"pins": pins, "forbid": forbid, **terms}


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


def _table_and_form(option: str, text: str, example: str) -> tuple[str, str]:
    """The parts of a ``TABLE=FORM`` option."""
    table, equals, form = text.rpartition("=")
    if not equals or not table or not form:
        raise typer.BadParameter(f"{option} {text!r}: give TABLE=FORM, such as {example!r}")
    return table, form


PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="a file that `plan write` wrote")]

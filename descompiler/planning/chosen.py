"""What a compilation chose: how each weight is divided, what crosses the wire, what it costs, what else was possible.

`descompiler.planning.plan.Plan` adds what a user does with it: read, write, edit, compare, explain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import sympy
import torch

from descompiler.cost_models import baselines
from descompiler.cost_models.baselines import ExpectedUse, Priced
from descompiler.cost_models.exchange import IDS_IN
from descompiler.cost_models.forms import rounded
from descompiler.cost_models.symbols import N, b, i, s
from descompiler.cost_models.table import OfTable
from descompiler.errors import PlanError
from descompiler.layout.fetches import Counts
from descompiler.layout.keys import ids_bytes
from descompiler.layout.layout import Layout
from descompiler.layout.pieces import Pieces
from descompiler.layout.spans import Spans, at
from descompiler.layout.statistics import Statistics
from descompiler.layout.traffic import Traffic
from descompiler.layout.transfer import Crossed, narrow_size
from descompiler.planning.cluster import Cluster
from descompiler.planning.memory import Memory
from descompiler.tables.form import Split, form_named

NO_OPERATORS = "the model has no weights-rich operator (nn.Embedding, nn.EmbeddingBag): it runs as plain data parallel"


@dataclass(frozen=True)
class PlannedTable(OfTable):
    """A table of a plan, and what people are told of it.

    Attributes
    ----------
    uses : tuple of str
        Operators that take its rows.
    refusals : dict of str to str
        Forms that it can't take, and why.
    outputs : tuple of str
        What is asked of each product with it.
    whole : bool
        Whether every row is used in a step: products, graph propagation, anything else but lookups.
    """

    uses: tuple[str, ...]
    refusals: Mapping[str, str]
    outputs: tuple[str, ...] = ()
    whole: bool = False


@dataclass(frozen=True)
class Label:
    """What people are told of a value that crosses, besides what its transfer says.

    Attributes
    ----------
    name : str
        Of the operator that makes it, or of the ids, or what is asked of a product.
    tables : tuple of str
        Which tables read the ids, or are in the values.
    """

    name: str
    placement: str
    tables: tuple[str, ...]
    line: str


@dataclass(frozen=True)
class Crossing(Label, Crossed):
    """One value that crosses the wire: what its transfer says of it, and its label."""

    @property
    def sums(self) -> bool:
        """Whether ranks send terms of it, which their receiver adds."""
        return self.placement.startswith(("Partial", "Disjoint"))


@dataclass
class Chosen:
    """What a compilation chose.

    Attributes
    ----------
    ranks : int
    rows : int
        Rows per rank that it was priced for.
    tables : list of PlannedTable
        The weights-rich operators.
    splits : dict of str to Split
        By table.
    pieces : dict of str to Pieces
        By parameter, co-located and replicated ones included.
    labels : list of Label
        Of what crosses, in the order of ``layout.crossed``.
    price_bytes : int
        Bytes that the busiest rank sends in a training step.
    prices : dict of str to dict of str to int
        By table and form: `price_bytes` if the tables like it took that form and nothing else changed.
    objective : {"bytes", "seconds"}
        What was minimised: bytes that the busiest rank sends in a training step, or seconds on ``cluster``: of the
        collectives and, if its rates are known, of what the busiest rank does itself.
    work_s : float
        The latter's part of ``price``.
    seconds : dict of str to dict of str to float
        By table and form, as ``prices``, where seconds were minimised.
    price, bound : float
        In units of the objective: the plan's, and what no plan can be below (see `descompiler.planning.search`).
    exact : bool
        Whether no choice of forms is cheaper.
    trials : int
        Choices of forms that were priced.
    aggregate : {"cut", "lookups"}
        Aggregation points: of the minimum cut, or the lookups themselves.
    unique : dict of str to float
        Expected unique ids of one rank's batch, by table.
    memories : tuple of (int, int, Memory)
        By spans of ranks (`descompiler.layout.spans`), for ``optimizer``; empty if it was not estimated.
    limit_bytes : int or None
        Of memory, of each rank.
    missing : dict of str to dict of str to int
        By table and form: bytes above the limit if the tables like it took that form.
    notes : list of str
        What mixes the rows of the batch and crosses for it, and what is drawn at random.
    changes : dict of str to str
        Forms that were edited in a file and are not priced yet: `des.compile` and `des.plan` do that.
    """

    ranks: int
    rows: int
    itemsize: int
    tables: list[PlannedTable]
    splits: dict[str, Split]
    pieces: dict[str, Pieces]
    layout: Layout
    labels: list[Label]
    price_bytes: int
    prices: dict[str, dict[str, int]] = field(default_factory=dict)
    fingerprint: str = ""
    objective: str = "bytes"
    price: float = 0.0
    work_s: float = 0.0
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    bound: float = 0.0
    exact: bool = False
    trials: int = 0
    aggregate: str = "cut"
    cluster: Cluster | None = None
    statistics: str = ""
    unique: dict[str, float] = field(default_factory=dict)
    memories: Spans[Memory] = ()
    optimizer: str = "adagrad"
    limit_bytes: int | None = None
    missing: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changes: dict[str, str] = field(default_factory=dict)

    @property
    def wire_dtype(self) -> torch.dtype | None:
        """What wider values are rounded to where they cross (see `Layout.wire_dtype`); None: nothing is rounded."""
        return self.layout.wire_dtype

    @property
    def sparse(self) -> set[str]:
        """Tables with sparse gradients."""
        return {t.name for t in self.tables if t.sparse}

    @property
    def forms(self) -> dict[str, str]:
        """The form of each table."""
        return {name: split.form for name, split in self.splits.items()}

    @property
    def crossings(self) -> list[Crossing]:
        """What crosses the border of the region, or for a product with a divided table: the layout's list, labelled."""
        pairs = zip(self.layout.crossed, self.labels, strict=True)
        return [Crossing(**vars(self._narrowed(crossed)), **vars(label)) for crossed, label in pairs]

    def costs(self, t: PlannedTable, form: str) -> Mapping[str, sympy.Expr]:
        """What a table would send in a form: formulas, by what is sent."""
        formulas, itemsize = form_named(form).costs(t.table), narrow_size(t.itemsize, None, self.wire_dtype)
        cross = {x: f for x, f in formulas.items() if f != IDS_IN or not self.layout.given}
        return {x: f if itemsize == t.itemsize else rounded(f, itemsize) for x, f in cross.items()}

    def _narrowed(self, crossed: Crossed) -> Crossed:
        """What crosses, in the dtype that it is rounded to."""
        size = narrow_size(self.itemsize, crossed.wire_dtype, self.wire_dtype)
        narrower = crossed.kind == "values" and self.wire_dtype is not None and size == self.wire_dtype.itemsize
        return replace(crossed, wire_dtype=self.wire_dtype) if narrower else crossed

    @property
    def exits(self) -> list[str]:
        """The aggregation points: operator and placement."""
        return [f"{c.name} {c.placement}" for c in self.crossings if c.kind == "values"]

    @property
    def gap(self) -> float:
        """How far the price may be above the best, as a share of it: 0 is none."""
        return 0.0 if self.price <= self.bound else self.price / self.bound - 1 if self.bound else float("inf")

    def memory(self, rank: int) -> Memory:
        """What a rank keeps in a training step, estimated (see `descompiler.planning.memory`).

        Raises
        ------
        PlanError
            If the plan has no estimate for it.
        """
        found = at(self.memories, rank, None)
        if found is None:
            raise PlanError(f"the plan does not say what rank {rank} of {self.ranks} keeps")
        return found

    def traffic(
        self,
        rank: int,
        rows: Sequence[int] | int | None = None,
        *,
        backward: bool = True,
        unique: Mapping[str, Counts] | None = None,
    ) -> Traffic:
        """Bytes and calls of a rank in a step; ``rows`` of every rank, or the same for all.

        Exact, but for tables that are fetched by unique ids: for these with the ``unique`` ids of the step
        (`DistributedModule.unique`), else as expected.
        """
        rows = self.rows if rows is None else rows
        every = [rows] * self.ranks if isinstance(rows, int) else list(rows)
        return self.layout.predict(rank, every, self.itemsize, backward=backward, unique=unique)

    def baselines(self, rows: int | None = None, statistics: Statistics | None = None) -> dict[str, int]:
        """Bytes that each rank would send in a step with other strategies, for ``rows`` rows a rank.

        Beside bytes that were counted in a step stand those of its own ids: `Captured.measure` of the ranks' batches,
        and of them together.
        """
        return {x.name: x.sent_bytes for x in self.priced(rows, statistics=statistics)}

    def priced(
        self,
        rows: int | None = None,
        cluster: Cluster | None = None,
        *,
        id_bytes: int | None = None,
        statistics: Statistics | None = None,
    ) -> list[Priced]:
        """Other strategies with this model's numbers: bytes, memory, and seconds on a cluster.

        Ids are as wide as this plan's (or ``id_bytes``), and as many of them unique as the statistics say: of Zipf's
        ids by default.
        """
        each = self.rows if rows is None else rows
        ids = statistics or Statistics.assumed(t.table for t in self.tables)
        tables = [
            ExpectedUse(t.table, ids.unique(t.name, each), ids.unique(t.name, each * self.ranks))
            for t in self.tables
            if not t.whole
        ]
        dense = sum(prod(p.shape) for n, p in self.pieces.items() if n not in self.splits)
        dense += sum(t.rows * t.dim for t in self.tables if t.whole)
        return baselines.price(
            tables,
            dense,
            ranks=self.ranks,
            rows=each,
            itemsize=self.itemsize,
            id_bytes=self.layout.id_bytes if id_bytes is None else id_bytes,
            ranks_per_node=None if cluster is None else cluster.ranks_per_node,
            backend="nccl" if cluster is None else cluster.backend,
            seconds_of=None if cluster is None else cluster.seconds_of,
        )

    def bytes_of(self, formula: sympy.Expr, **values: float) -> int:
        """A formula of `descompiler.cost_models` with this plan's ranks, rows and sizes, rounded."""
        known: dict[Any, float] = {N: self.ranks, b: self.rows, s: self.itemsize, i: self.layout.id_bytes}
        known.update({x: values[x.name] for x in formula.free_symbols if x.name in values})
        return int(formula.subs(known).round())

    def numbers_of(self, t: PlannedTable) -> dict[str, float]:
        """The symbols of a formula that are a table's own, of those that don't depend on other tables."""
        pieces, statistics = self.splits[t.name].pieces, Statistics.assumed([t.table])
        unique = self.unique.get(t.name, statistics.unique(t.name, self.rows))
        hot = unique * statistics.shares(t.name, pieces, self.rows)[-1]
        of = np.array([unique]), np.array([t.rows])
        id_bytes = float(ids_bytes(*of, dynamic=t.table.dynamic)[0]) / max(unique, 1e-300)
        return {"V": t.rows, "k": t.dim, "U": unique, "d": id_bytes, "H": pieces.shared_size(), "U_H": hot}

    def sends(self, t: PlannedTable) -> dict[str, tuple[sympy.Expr, int]]:
        """What a table sends by itself, outside the region: formula and bytes, by what is sent.

        A replicated table does, wherever its vectors go, one that is divided if its rows are fetched.
        """
        split, known = self.splits[t.name], {N, b, s, i}
        fetched = any(t.name == x.name for f in self.layout.fetches for x in f.tables)
        if not split.at_hand and not fetched:
            return {}
        values = self.numbers_of(t)
        return {
            what: (formula, self.bytes_of(formula, **values))
            for what, formula in self.costs(t, split.form).items()
            if {x.name for x in formula.free_symbols - known} <= set(values)
        }

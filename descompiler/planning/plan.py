"""Plans: how each weight is divided, what crosses the wire, what it costs, and what else was possible."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import sympy

from descompiler.cost_models import baselines
from descompiler.cost_models.baselines import Priced, TableUse
from descompiler.cost_models.crossovers import crossovers
from descompiler.cost_models.exchange import IDS_IN, OUTPUTS, VALUES_OUT_AND_BACK
from descompiler.cost_models.symbols import N, U, V, b, i, k, s
from descompiler.errors import PlanError
from descompiler.layout.fetches import Counts
from descompiler.layout.layout import Layout
from descompiler.layout.pieces import Pieces
from descompiler.layout.spans import Spans, at
from descompiler.layout.statistics import Statistics
from descompiler.layout.traffic import Traffic
from descompiler.planning.cluster import Cluster
from descompiler.planning.json import decode, encode
from descompiler.planning.memory import Memory
from descompiler.planning.older import VERSION, as_of_now
from descompiler.tables.form import Split, form_named

NO_OPERATORS = "the model has no weights-rich operator (nn.Embedding, nn.EmbeddingBag): it runs as plain data parallel"


@dataclass(frozen=True)
class Table:
    """A weights-rich operator, for people and for prices.

    Attributes
    ----------
    ids : int
        Per row of the batch, over all lookups.
    vectors : int
        That lookups return per row of the batch: 1 for a bag.
    uses : tuple of str
        Operators that take its rows.
    refusals : dict of str to str
        Forms that it can't take, and why.
    outputs : tuple of str
        What is asked of each product with it.
    whole : bool
        Whether every row is used in a step: products, graph propagation, anything else but lookups.
    """

    name: str
    rows: int
    dim: int
    itemsize: int
    ids: int
    vectors: int
    sparse: bool
    uses: tuple[str, ...]
    refusals: Mapping[str, str]
    line: str
    outputs: tuple[str, ...] = ()
    whole: bool = False

    @property
    def size_bytes(self) -> int:
        return self.rows * self.dim * self.itemsize


@dataclass(frozen=True)
class Crossing:
    """One thing that crosses the wire.

    Attributes
    ----------
    kind : {"ids", "values", "product"}
        Ids into the region; values out of it, whose gradients come back; rows to the owners of a table that they are
        multiplied with, and results back.
    width : int
        Ids, or elements, per row of the batch, over all ranks that receive, or send, them.
    tables : tuple of str
        Which tables read the ids, or are in the values.
    ids : int
        Ids per row of the batch that a product sends, besides the elements.
    """

    kind: str
    name: str
    placement: str
    width: int
    tables: tuple[str, ...]
    line: str
    ids: int = 0

    @property
    def formula(self) -> sympy.Expr:
        """Bytes per rank and step, the mean over ranks."""
        return {"ids": IDS_IN, "values": VALUES_OUT_AND_BACK, "product": OUTPUTS}[self.kind]

    @property
    def symbols(self) -> dict[str, int]:
        """The formula's symbols that are this crossing's own."""
        return {"ids": {"L": self.width}, "values": {"w": self.width}, "product": {"w": self.width, "L": self.ids}}[
            self.kind
        ]


@dataclass
class Plan:
    """What a compilation chose.

    Attributes
    ----------
    ranks : int
    rows : int
        Rows per rank that it was priced for.
    tables : list of Table
        The weights-rich operators.
    splits : dict of str to Split
        By table.
    pieces : dict of str to Pieces
        By parameter, co-located and replicated ones included.
    price_bytes : int
        Bytes that the busiest rank sends in a training step.
    prices : dict of str to dict of str to int
        By table and form: `price_bytes` if the tables like it took that form and nothing else changed.
    objective : {"bytes", "seconds"}
        What was minimised: bytes that the busiest rank sends in a training step, or seconds of the collectives on
        ``cluster``.
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
    tables: list[Table]
    splits: dict[str, Split]
    pieces: dict[str, Pieces]
    layout: Layout
    crossings: list[Crossing]
    price_bytes: int
    prices: dict[str, dict[str, int]] = field(default_factory=dict)
    fingerprint: str = ""
    objective: str = "bytes"
    price: float = 0.0
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
    replan: Callable[[Mapping[str, str]], Plan] | None = field(default=None, repr=False, compare=False)

    @property
    def sparse(self) -> set[str]:
        """Tables with sparse gradients."""
        return {t.name for t in self.tables if t.sparse}

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

    def baselines(self, rows: int | None = None) -> dict[str, int]:
        """Bytes that each rank would send in a step with other strategies, for ``rows`` rows a rank."""
        return {x.name: x.sent_bytes for x in self.priced(rows)}

    def priced(
        self, rows: int | None = None, cluster: Cluster | None = None, *, id_bytes: int | None = None
    ) -> list[Priced]:
        """Other strategies with this model's numbers: bytes, memory, and seconds on a cluster.

        Ids are as wide as this plan's (or ``id_bytes``), and as many of them unique as its statistics say.
        """
        each = self.rows if rows is None else rows
        ids = Statistics.assumed(self.tables)
        tables = [
            TableUse(t.rows, t.dim, t.ids, t.vectors, ids.unique(t.name, each), ids.unique(t.name, each * self.ranks))
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

    def sends(self, t: Table) -> dict[str, tuple[sympy.Expr, int]]:
        """What a table that is outside the region sends by itself: formula and bytes, by what is sent."""
        if any(t.name in c.tables for c in self.crossings):
            return {}
        split, statistics = self.splits[t.name], Statistics.assumed([t])
        unique = self.unique.get(t.name, statistics.unique(t.name, self.rows))
        hot = unique * statistics.shares(t.name, split.pieces, self.rows)[-1]
        values = {"V": t.rows, "k": t.dim, "U": unique, "H": split.pieces.shared_size(), "U_H": hot}
        return {n: (f, self.bytes_of(f, **values)) for n, f in form_named(split.form).costs(t.sparse).items()}

    # ---- files

    @property
    def forms(self) -> dict[str, str]:
        """The form of each table."""
        return {name: split.form for name, split in self.splits.items()}

    def to_json(self) -> str:
        """As JSON, without loss. ``forms`` comes first: edit a form there, and `des.compile` re-prices the plan."""
        data = {"version": VERSION, "forms": {**self.forms, **self.changes}}
        data.update({name: encode(getattr(self, name)) for name in _FIELDS})
        return json.dumps(data, indent=None if self.ranks > 64 else 1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from JSON.

        Raises
        ------
        PlanError
            If the text is no plan, or one of another version.
        """
        try:
            data = as_of_now(json.loads(text))
            if data["version"] != VERSION:
                raise PlanError(f"the plan file has version {data['version']}, this is version {VERSION}: plan again")
            plan = cls(**{name: decode(kind, data[name]) for name, kind in _FIELDS.items()})
            return replace(plan, changes={n: f for n, f in data["forms"].items() if plan.forms.get(n) != f})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(
                f"this is no plan file ({type(error).__name__}: {error}); Plan.save(path) writes one"
            ) from None

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a JSON file.

        Raises
        ------
        PlanError
            If there is none, or it is no plan.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"no plan in {str(path)!r}: {error}") from None

    def digest(self) -> str:
        """Equal on two ranks exactly if they have the same plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def edit(self, changes: Mapping[str, str]) -> Plan:
        """The plan with other forms for some tables, placed and priced anew; the other tables keep theirs.

        Parameters
        ----------
        changes : mapping of str to str
            As the pins of `des.plan`.

        Raises
        ------
        PlanError
            If a name or form is wrong, or the plan is from a file, which has no model to price it with.
        """
        if self.replan is None:
            raise PlanError(
                "the plan is from a file and does not know its model: pass it with the changes in it to "
                "des.plan(model, inputs, plan=...), which prices it"
            )
        return self.replan({**self.forms, **changes})

    def diff(self, other: Plan) -> str:
        """What is different in another plan, in words; empty if nothing is."""
        lines = []
        for what in ("fingerprint", "ranks", "rows", "objective", "statistics"):
            a, b_ = getattr(self, what), getattr(other, what)
            if a != b_:
                lines.append(f"{what}: {a} -> {b_}")
        for name in dict.fromkeys((*self.splits, *other.splits)):
            x, y = self.splits.get(name), other.splits.get(name)
            if x is None or y is None:
                lines.append(f"{name}: only in the {'second' if x is None else 'first'} plan")
            elif x != y:
                lines.append(f"{name}: {x} -> {y}")
        for name in dict.fromkeys((*self.pieces, *other.pieces)):
            if name not in self.splits and name not in other.splits and self.pieces.get(name) != other.pieces.get(name):
                before, after = (_held(p.get(name)) for p in (self.pieces, other.pieces))
                lines.append(f"{name}: {before} -> {after}")
        mine, others = ({(c.kind, c.name, c.placement, c.width) for c in p.crossings} for p in (self, other))
        lines += [f"no longer crosses: {k} {n} {at}, {w_} a row" for k, n, at, w_ in sorted(mine - others)]
        lines += [f"now crosses: {k} {n} {at}, {w_} a row" for k, n, at, w_ in sorted(others - mine)]
        if self.price_bytes != other.price_bytes:
            change = other.price_bytes - self.price_bytes
            lines.append(f"busiest rank: {self.price_bytes:,} B -> {other.price_bytes:,} B a step ({change:+,} B)")
        return "\n".join(lines)

    def explain(self, table: str | None = None) -> str:
        """The plan in words: every table, its split and why; what crosses the wire; formulas and bytes.

        Bytes are per rank and step, the mean over ranks, unless a line says otherwise.

        Parameters
        ----------
        table : str, optional
            Only this one, by its parameter's or its module's name, with where one form overtakes another.

        Raises
        ------
        PlanError
            If there is no such table.
        """
        if table is not None:
            found = [t for t in self.tables if t.name in (table, f"{table}.weight")]
            if not found:
                raise PlanError(f"no table {table!r}; there are {_some([t.name for t in self.tables])}")
            lines = [f"{t.name}  [{t.rows:,} x {t.dim}]  {t.line}".rstrip() for t in found]
            return "\n".join(
                [*lines, *(f"  {text}" for t in found for text in (*self._reasons(t), *self._overtakes(t)))]
            )
        lines = [f"plan for {self.ranks} ranks, {self.rows} rows a rank, fingerprint {self.fingerprint}"]
        lines += self._result()
        if not self.tables:
            lines.append(NO_OPERATORS)
        for t in self.tables:
            lines.append(
                f"{t.name}  [{t.rows:,} x {t.dim}]  {t.size_bytes:,} B, {t.ids} ids a row, {t.line}".rstrip(", ")
            )
            if t.uses:
                lines.append(f"  used by {', '.join(t.uses)}")
            lines += [f"  multiplied with, for {output}" for output in t.outputs]
            lines += [f"  {text}" for text in self._reasons(t)]
        for name, p in self.pieces.items():
            if name not in self.splits and not p.is_replicated:
                lines.append(f"{name}: co-located, dim {p.dim} follows its input; no all-reduce")
        lines.append("what crosses the wire:" if self.crossings else "nothing enters or leaves a region")
        for number, c in enumerate(self.crossings, 1):
            lines.append(f"  [{number}] {c.kind} {c.name}  {c.placement}  {c.line}".rstrip())
            size = self.bytes_of(c.formula, **c.symbols)
            values = ", ".join(f"{name}={value}" for name, value in c.symbols.items())
            lines.append(f"      {c.formula} = {size:,} B with {values}; for {_some(c.tables)}")
            if c.kind == "product" and "logits" in c.name:
                lines.append(
                    "      the full logits cross: compute the loss, or topk, in forward to leave them with the owners"
                )
        if self.notes:
            lines.append("across the batch, and at random:")
            lines += [f"  {note}" for note in self.notes]
        lines.append("bytes sent by rank 0 per step:")
        lines.append(str(self.traffic(0)))
        return "\n".join(lines)

    def _reasons(self, t: Table) -> list[str]:
        """Why a table is split as it is: the split, what it sends, and what the other forms would have cost."""
        split = self.splits[t.name]
        lines = [str(split)]
        numbers = [f"[{n}]" for n, c in enumerate(self.crossings, 1) if t.name in c.tables]
        if numbers:
            lines.append(f"sends {', '.join(numbers)} below")
        if not numbers or any(t.name == x.name for f in self.layout.fetches for x in f.tables):
            for name, (formula, size) in self.sends(t).items():
                lines.append(f"sends {name}: {formula} = {size:,} B")
        others = sorted((price, form) for form, price in self.prices.get(t.name, {}).items() if form != split.form)
        for position, (price, form) in enumerate(others):
            what = "runner-up" if position == 0 else "not"
            text = f"{what} {form}: {price:,} B a step for the busiest rank, against {self.price_bytes:,} B"
            for formula in self._alone(t, form):
                text += f"; by itself it sends {formula} = {self._bytes_alone(t, formula):,} B"
            if above := self.missing.get(t.name, {}).get(form):
                text += f"; {above:,} B above the limit of memory"
            lines.append(text)
        return lines + [f"not {form}: {reason}" for form, reason in t.refusals.items()]

    def _result(self) -> list[str]:
        """What was minimised, how far it is from the best, by which statistics, and the memory."""
        amount = f"{self.price_bytes:,} B" if self.objective == "bytes" else f"{self.price:.3g} s"
        best = "no choice of forms is better" if self.exact else f"at most {self.gap:.1%} above the best"
        lines = [f"{self.objective} of the busiest rank: {amount}, {best} ({self.trials} choices priced)"]
        if self.statistics:
            lines.append(f"ids: {self.statistics}")
        if self.memories:
            rank, _, most = max(self.memories, key=lambda span: span[2].total)
            limit = "" if self.limit_bytes is None else f", of {self.limit_bytes:,} B"
            lines.append(f"memory with {self.optimizer}, most on rank {rank}: {most}{limit}")
        return lines

    def _alone(self, t: Table, form: str) -> list[sympy.Expr]:
        """Formulas of what a form sends that depend on this table alone."""
        known = {N, b, s, i, V, k, U}
        return [f for f in form_named(form).costs(t.sparse).values() if f.free_symbols <= known]

    def _bytes_alone(self, t: Table, formula: sympy.Expr) -> int:
        return self.bytes_of(formula, V=t.rows, k=t.dim, U=self.unique.get(t.name, 0.0))

    def _overtakes(self, t: Table) -> list[str]:
        """Where the forms that depend on this table alone overtake one another, against ranks and rows."""
        unique = self.unique.get(t.name, 0.0)
        numbers = {N: self.ranks, V: t.rows, k: t.dim, U: unique, s: self.itemsize, i: self.layout.id_bytes}
        curves = [(f, x) for f in self.prices.get(t.name, {}) for x in self._alone(t, f)]
        lines = []
        for symbol in (N, V):
            rest = {x: n for x, n in numbers.items() if x != symbol}
            for a, c in itertools.combinations(curves, 2):
                lines += [str(x) for x in crossovers(a, c, symbol, rest)]
        return lines


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _held(pieces: Pieces | None) -> str:
    if pieces is None:
        return "absent"
    return "replicated" if pieces.is_replicated else f"cut along dim {pieces.dim} among {len(pieces.owners)} ranks"


_FIELDS: dict[str, Any] = {
    "ranks": int,
    "rows": int,
    "itemsize": int,
    "fingerprint": str,
    "objective": str,
    "price": float,
    "bound": float,
    "exact": bool,
    "trials": int,
    "aggregate": str,
    "price_bytes": int,
    "statistics": str,
    "unique": dict[str, float],
    "optimizer": str,
    "limit_bytes": int | None,
    "cluster": Cluster | None,
    "tables": list[Table],
    "splits": dict[str, Split],
    "pieces": dict[str, Pieces],
    "layout": Layout,
    "crossings": list[Crossing],
    "notes": list[str],
    "prices": dict[str, dict[str, int]],
    "missing": dict[str, dict[str, int]],
    "memories": Spans[Memory],
}
"""What a plan file holds."""

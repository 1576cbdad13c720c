"""Plans as users have them: read, written, edited, compared, explained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import networkx as nx

from descompiler.errors import PlanError
from descompiler.layout.layout import Layout
from descompiler.layout.pieces import Pieces
from descompiler.layout.spans import Spans
from descompiler.planning.checked import check_file, shortened
from descompiler.planning.chosen import Chosen, Label, PlannedTable
from descompiler.planning.cluster import Cluster
from descompiler.planning.explain import explain
from descompiler.planning.json import BROKEN, decode, decode_fields, encode
from descompiler.planning.memory import Memory
from descompiler.planning.older import VERSION, as_of_now
from descompiler.tables.form import Split


@dataclass
class Plan(Chosen):
    """What a compilation chose, and what a user does with it; `descompiler.planning.chosen.Chosen` has the attributes.

    ``print`` shows what `explain` says.
    """

    replan: Callable[[Mapping[str, str]], Plan] | None = field(default=None, repr=False, compare=False)
    graph_of_cut: Callable[[], nx.DiGraph] | None = field(default=None, repr=False, compare=False)

    def cut_graph(self) -> nx.DiGraph:
        """The graph whose minimum cut between "source" and "sink" says where values are aggregated.

        A value that a rule can place is a node, named as in canonical graph text ("%3"); "%3 out" is the value as it
        leaves the region. ``networkx.minimum_cut(graph, "source", "sink")`` gives the cost, and on the source's side
        the region. See docs/planner.md.

        Returns
        -------
        networkx.DiGraph
            Of nodes: ``kind`` ("source", "sink", "value", "out"), ``inside`` (the plan's choice), and of values
            ``text``, ``placement``, ``rule`` ("lookup" for a table's) and ``line`` of the user's code. Of edges:
            ``purpose`` ("lookup", "saved", "work", "leaves", "used", "needed") and ``capacity``, bytes over all ranks
            and both directions; an edge without is unlimited. Of the graph: ``cost``, of the plan's choice. That is
            the least, unless `aggregate` is "lookups": then the busiest rank sends less with more bytes in all.

        Raises
        ------
        PlanError
            If the plan is from a file, or for a model that is captured in part, of which there is no graph.
        """
        if self.graph_of_cut is None and self.replan is None:
            raise PlanError(
                "the plan is from a file and does not know its model: des.plan(model, inputs, plan=...) has the graph"
            )
        if self.graph_of_cut is None:
            raise PlanError("the model is captured in part: there is no graph to cut")
        return self.graph_of_cut()

    def __str__(self) -> str:
        return self.explain()

    def to_json(self) -> str:
        """As JSON, without loss. ``forms`` comes first: edit a form there, and `des.compile` re-prices the plan."""
        data = {"version": VERSION, "forms": {**self.forms, **self.changes}}
        data.update({name: encode(getattr(self, name)) for name in _FIELDS}, crossings=encode(self.crossings))
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
            data = as_of_now(_object(text))
            if data["version"] != VERSION:
                its = repr(data["version"])[:40]
                raise PlanError(f"the plan file has version {its}, this is version {VERSION}: plan again")
            labels = decode(list[Label], data["crossings"])
            plan = cls(labels=labels, **decode_fields(_FIELDS, data))
            if len(labels) != len(plan.layout.crossed):
                raise PlanError(f"the plan file has {len(labels)} crossings, its layout {len(plan.layout.crossed)}")
            forms = decode(dict[str, str], data["forms"])
            check_file(plan, forms)
            return replace(plan, changes={n: f for n, f in forms.items() if plan.forms.get(n) != f})
        except BROKEN as error:
            raise PlanError(
                f"this is no plan file ({type(error).__name__}: {shortened(str(error))}); Plan.save(path) writes one"
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
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PlanError(f"no plan in {str(path)!r}: {error}") from None
        return cls.from_json(text)

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
        for what in ("fingerprint", "ranks", "rows", "objective", "statistics", "wire_dtype"):
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
                before, after = (_pieces_text(p.get(name)) for p in (self.pieces, other.pieces))
                lines.append(f"{name}: {before} -> {after}")
        mine, others = ({(c.kind, c.name, c.placement, c.width) for c in p.crossings} for p in (self, other))
        lines += [f"no longer crosses: {k} {n} {at}, {w_} a row" for k, n, at, w_ in sorted(mine - others)]
        lines += [f"now crosses: {k} {n} {at}, {w_} a row" for k, n, at, w_ in sorted(others - mine)]
        if self.price_bytes != other.price_bytes:
            change = other.price_bytes - self.price_bytes
            lines.append(f"busiest rank: {self.price_bytes:,} B -> {other.price_bytes:,} B a step ({change:+,} B)")
        return "\n".join(lines)

    def explain(self, table: str | None = None) -> str:
        """The plan as text, in the tables of the command line: how each table is divided and why, what else was
        possible and at which price, where another form would win, what crosses the wire, other strategies, memory.

        Bytes are per rank and step, the mean over ranks, unless a table says otherwise.

        Parameters
        ----------
        table : str, optional
            Only this one, by its parameter's or its module's name, with where any form overtakes any other.

        Raises
        ------
        PlanError
            If there is no such table.
        """
        return explain(self, table)


def _object(text: str) -> dict[str, Any]:
    data = json.loads(text)
    if not isinstance(data, dict):
        raise TypeError(f"it is a {type(data).__name__}, not an object")
    return data


def _pieces_text(pieces: Pieces | None) -> str:
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
    "work_s": float,
    "seconds": dict[str, dict[str, float]],
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
    "tables": list[PlannedTable],
    "splits": dict[str, Split],
    "pieces": dict[str, Pieces],
    "layout": Layout,
    "notes": list[str],
    "prices": dict[str, dict[str, int]],
    "missing": dict[str, dict[str, int]],
    "memories": Spans[Memory],
}
"""What a plan file holds."""

"""A model captured once: what every plan for it, and every rank's part of it, starts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from descompiler.builder import Builder, partition_of
from descompiler.eager.measure import measure_in_part
from descompiler.eager.planning import plan_partial
from descompiler.eager.survey import survey
from descompiler.errors import CaptureError, PlanError, explained
from descompiler.graph.program import Program
from descompiler.layout.statistics import Statistics
from descompiler.model.calls import Signature
from descompiler.model.probe import CALL
from descompiler.planning.assumed import BYTES, GivenCluster, cluster_of
from descompiler.planning.given import as_planned, check_counts, setting_of
from descompiler.planning.objective import Terms
from descompiler.planning.pins import Forbidden
from descompiler.planning.plan import Plan
from descompiler.planning.planner import choose
from descompiler.plugins import Kit
from descompiler.region.cut import Weights
from descompiler.region.flow import DEFAULT
from descompiler.region.partition import Partition
from descompiler.region.rule import Rule
from descompiler.tables.form import Form, find_tables
from descompiler.tables.tables import Operator

REAL_ROWS = 256
"""Of an example that is taken for a batch of real ids; smaller ones are made up."""


@dataclass(frozen=True)
class Captured:
    """A program of a model, and its tables.

    Attributes
    ----------
    build : Builder
    program : Program
        Not to be edited.
    signature : Signature
    operators : list of Operator
    """

    build: Builder
    program: Program
    signature: Signature
    operators: list[Operator]

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, method: str = CALL, kit: Kit | None = None) -> Captured:
        """Capture a model in its training flags."""
        return cls.by(Builder.of(model, example_inputs, method, kit))

    @classmethod
    def by(cls, build: Builder) -> Captured:
        program, signature = build.capture(None)
        return cls(build, program, signature, find_tables(program, build.kit.forms))

    @property
    def rows(self) -> int:
        """Of the example inputs."""
        return self.build.rows

    def plan(
        self,
        *,
        ranks: int | None = None,
        batch: int | None = None,
        pins: Mapping[str, str] | None = None,
        plan: Plan | str | Path | None = None,
        samples: Iterable[Any] | None = None,
        cluster: GivenCluster = BYTES,
        **terms: Any,
    ) -> Plan:
        """As `descompiler.plan`, without the capture and, unless ``cluster`` says otherwise, by bytes.

        ``terms`` are the others of `descompiler.planning.objective.Terms`.
        """
        ranks, batch, pins = setting_of(ranks, batch, pins, plan, cluster)
        terms["cluster"] = cluster_of(cluster, ranks, self.build.device.type)
        if samples is not None:
            terms["statistics"] = self.measure(samples)
        w = self.weights(ranks, batch or self.rows)
        return choose(
            self.program, self.operators, self.build.kit.rules, w, pins, terms=as_planned(plan, Terms(**terms))
        )

    def weights(self, ranks: int, rows: int) -> Weights:
        """What the cut weighs with; an element is of the dtype that holds all of the model's numbers."""
        return Weights(ranks, rows, self.program.dtype.itemsize)

    def measure(self, samples: Iterable[Any]) -> Statistics:
        """Statistics of the ids of sample batches."""
        return self.build.measure(self.program, self.signature, self.operators, samples)

    def of_example(self) -> Statistics | None:
        """Statistics of the example's ids, if it is as large as a real batch; of tables of which it has several ids.

        None if it says nothing: small, without values, or all ids the same.
        """
        if self.rows < REAL_ROWS or self.build.device.type == "meta":
            return None
        found = self.measure([self.build.example_inputs])
        several = {name: m for name, m in found.measured.items() if len(m.ids) > 1}
        if not several:
            return None
        others = "" if len(several) == len(found.tables) else f"; assumed Zipf({found.zipf}) for the others"
        return replace(found, measured=several, source=f"measured on the example's {self.rows:,} rows{others}")

    def partition(self, plan: Plan) -> Partition:
        """What a plan makes of the program: what the rules can place, and what the plan keeps inside the region."""
        return partition_of(self.program, self.operators, plan, self.build.kit.rules)


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    ranks: int | None = None,
    cluster: GivenCluster = None,
    batch: int | None = None,
    pins: Mapping[str, str] | None = None,
    plan: Plan | str | Path | None = None,
    forbid: Forbidden | None = None,
    memory_bytes: int | None = None,
    optimizer: str = "adagrad",
    samples: Iterable[Any] | None = None,
    method: str = CALL,
    rules: Sequence[Rule] = (),
    forms: Sequence[Form] = (),
    solver: str = DEFAULT,
    wire_dtype: torch.dtype | None = None,
    ids: str = "own",
) -> Plan:
    """Plan for any number of ranks, without a process group and without weights.

    Parameters
    ----------
    ranks : int
        The cluster's by default.
    batch : int, optional
        Rows per rank; the example's by default.
    pins : mapping of str to str, optional
        As `compile`'s ``plan``.
    plan : Plan or path, optional
        Follow it: price it for this model, with forms that were edited in its file.
    cluster, forbid, memory_bytes, optimizer, samples, method, rules, forms, solver, wire_dtype, ids
        As `compile`'s.

    Raises
    ------
    PlanError
        If nothing satisfies the constraints: which rank lacks how much memory, and what would fit.
    """
    if isinstance(plan, Mapping):
        raise PlanError(f"plan={plan!r}: forms of tables are given as pins= here; plan= is a Plan, or the file of one")
    kit = Kit.of(rules, forms)
    terms: dict[str, Any] = {"forbid": forbid or {}}
    terms |= {"memory_bytes": memory_bytes, "optimizer": optimizer, "solver": solver}
    terms |= {"wire_dtype": wire_dtype, "ids": ids}
    check_counts(ranks, batch)
    cluster_of(cluster, setting_of(ranks, batch, pins, plan, cluster)[0])  # refused before the long capture
    try:
        with explained("capturing the model"):
            captured = Captured.of(model, example_inputs, method, kit)
    except CaptureError:  # in part, as `compile` does
        with explained("planning for the user's own forward"):
            build = Builder.of(model, example_inputs, method, kit)
            seen = survey(build.template, build.example_inputs, method)
            ranks, batch, pins = setting_of(ranks, batch, pins, plan, cluster)
            if samples is not None:
                terms["statistics"] = measure_in_part(build.template, seen, samples, ranks, method)
            terms["cluster"] = cluster_of(cluster, ranks, build.device.type)
            return plan_partial(
                build.template, seen, ranks, batch or build.rows, pins, as_planned(plan, Terms(**terms))
            )
    with explained("planning"):
        if samples is None:
            terms["statistics"] = captured.of_example()
        return captured.plan(ranks=ranks, batch=batch, pins=pins, plan=plan, samples=samples, cluster=cluster, **terms)

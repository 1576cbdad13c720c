"""The last rung of the ladder: every rank runs the user's own forward, and what it uses of split parameters is sent."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.builder import Builder
from descompiler.dynamic.embedding import DynamicTable
from descompiler.dynamic.table import EVERY_RANK
from descompiler.eager.measure import measure_in_part
from descompiler.eager.planning import asked_in_part, coverage_partial
from descompiler.eager.survey import Survey, survey
from descompiler.errors import UnsupportedError
from descompiler.graph.program import Failure
from descompiler.layout.statistics import Statistics
from descompiler.model.attributes import copied, copy_with
from descompiler.model.inputs import normalise_inputs, take_rows
from descompiler.model.probe import call_of, method_of
from descompiler.model.random_state import own_generators
from descompiler.module.dynamic import dynamic_tables, in_their_places
from descompiler.module.initial import initial_values
from descompiler.module.partial import PartialModule
from descompiler.module.parts import Parts
from descompiler.planning.coverage import Coverage
from descompiler.planning.given import GivenPlan, agreed
from descompiler.planning.objective import Terms
from descompiler.planning.plan import Plan
from descompiler.runtime.ranks import Ranks
from descompiler.runtime.runtime import Runtime


def distribute_in_part(
    model: nn.Module,
    build: Builder,
    failures: tuple[Failure, ...],
    ranks: Ranks,
    rows: int,
    *,
    plan: GivenPlan,
    loss: str,
    seed: int | None,
    host: nn.Module | None,
    terms: Terms,
    samples: Iterable[Any] | None,
) -> PartialModule:
    """As `descompiler.compiler.distribute`, of a model that not every rank could capture."""

    # how often a table is used may depend on the values of a rank's own example: the first rank's counts
    seen = ranks.of_first(ranks.everywhere(lambda: survey(build.template, build.example_inputs, build.method)))
    if samples is not None:

        def measured() -> Statistics | None:
            if ranks.rank:  # the first rank's samples count
                return None
            return measure_in_part(build.template, seen, samples, ranks.count, build.method)

        terms = replace(terms, statistics=ranks.of_first(ranks.everywhere(measured)))
    chosen = agreed(asked_in_part(build.template, seen, ranks.count), plan, rows, terms, ranks)
    coverage = coverage_partial(build.template, seen, chosen, failures)
    if text := coverage.warning():
        ranks.warn(text)
    if seen.unchecked:
        ranks.warn(f"rows of a batch were not checked for independence: {seen.unchecked}")
    if seen.coupled:  # each rank draws with its own, and the draws have to be one
        ranks.same("generator state (seed alike what the model keeps)", repr(own_generators(model)))
    tables = dynamic_tables(model, build.template, chosen.pieces, ranks)
    of = model, build.template, chosen.pieces, seed, build.device, ranks
    values, buffers = initial_values(*of, in_place=host is not None, without=tables)
    held = values, buffers, tables
    return _partial_module(build, build.template, seen, chosen, ranks.runtime(loss), *held, coverage, host)


def in_other_flags(
    build: Builder,
    chosen: Plan,
    coverage: Coverage,
    runtime: Runtime,
    tables: Mapping[str, DynamicTable],
    training: Mapping[str, bool],
    values: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> PartialModule:
    """A captured model in training flags in which it is not captured, with the pieces that it has now."""
    for name, table in tables.items():
        owners = table._table.owners
        if owners is not None and bool((owners == EVERY_RANK).any()):
            raise UnsupportedError(
                f"dynamic table {name.removesuffix('.weight')!r} has slices that every rank holds, and the model is "
                "not captured whole in these training flags, where nothing tells the others what one looks up there: "
                "pin another form"
            )
    template = copy.deepcopy(build.template, copied(build.template))
    for name, m in template.named_modules():
        m.training = training[name]
    seen = survey(template, build.example_inputs, build.method)
    return _partial_module(build, template, seen, chosen, runtime, values, buffers, tables, coverage, None)


def _partial_module(
    build: Builder,
    template: nn.Module,
    seen: Survey,
    chosen: Plan,
    runtime: Runtime,
    values: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    tables: Mapping[str, DynamicTable],
    coverage: Coverage,
    host: nn.Module | None,
) -> PartialModule:
    if host is None:
        places = in_their_places(template, {n.rpartition(".")[0]: table for n, table in tables.items()})
        rows = {n: table._table.rows.tensor for n, table in tables.items()}
        runs = copy_with(template, {**values, **rows}, places)
    else:
        runs = host
    inputs = normalise_inputs(build.example_inputs, method_of(template, build.method))
    # two rows: forwards that squeeze can't run on one
    spare = inputs if seen.unchecked else take_rows(inputs, torch.zeros(2, dtype=torch.int64, device=build.device))
    in_place = host is not None
    parts = Parts(template, chosen, runtime, values, buffers, coverage, runs, in_place=in_place, tables=tables)
    calls = call_of(runs, build.method)
    return PartialModule(parts, calls, seen.outputs, spare, coupled=bool(seen.coupled), draws=seen.random)

"""Programs of one model: captured as the training flags of its modules are, emitted as a plan says."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.capture.checks import asks_for
from descompiler.capture.ladder import capture
from descompiler.emit.emit import Emitted, emit
from descompiler.errors import CaptureError, PlanError
from descompiler.graph.fits import Fits
from descompiler.graph.program import Program
from descompiler.layout.statistics import Statistics
from descompiler.model.attributes import Place, copied
from descompiler.model.inputs import Signature, flatten, normalise_inputs, split_statics, unflatten_with
from descompiler.model.probe import CALL, method_of
from descompiler.planning.plan import Plan
from descompiler.plugins import Kit
from descompiler.region.cut import Weights, at_lookups, minimum_cut
from descompiler.region.flow import DEFAULT
from descompiler.region.partition import Partition
from descompiler.region.place import place
from descompiler.region.rule import Rule
from descompiler.tables.form import Split, fallback, find_tables, split_as
from descompiler.tables.measure import measure
from descompiler.tables.products import bias_pieces, outputs_in_order
from descompiler.tables.tables import Operator


class Builder:
    """Programs of one model, by the training flags of its modules."""

    def __init__(self, template: nn.Module, example_inputs: Any, method: str = CALL, kit: Kit | None = None):
        self.template, self.example_inputs, self.method = template, example_inputs, method
        self.kit = Kit.of() if kit is None else kit
        leaves, _ = split_statics(flatten(normalise_inputs(example_inputs, method_of(template, method)))[0])
        self.rows = max((x.shape[0] for x in leaves if x.dim()), default=1)
        self.device = leaves[0].device if leaves else torch.device("cpu")
        self._others: dict[tuple[object, ...], Builder] = {}
        self._captured: dict[tuple[tuple[str, bool], ...], tuple[Program, Signature]] = {}
        self._failed: dict[tuple[tuple[str, bool], ...], CaptureError] = {}

    def capture(self, training: dict[str, bool] | None) -> tuple[Program, Signature]:
        """The program for given flags, those of the model by default; captured once, and not to be edited."""
        flags = {n: m.training for n, m in self.template.named_modules()} if training is None else training
        key = tuple(flags.items())
        if key in self._failed:
            raise CaptureError(str(self._failed[key]), self._failed[key].failures)
        if key not in self._captured:
            # an evaluation program is first wanted where the user has gradients off; the checks need them, and random
            # weights may give NaN, which is compared, and which the user's anomaly detection must not stop
            with torch.inference_mode(False), torch.enable_grad(), torch.autograd.set_detect_anomaly(False):
                try:
                    self._captured[key] = capture(
                        self.template, self.example_inputs, training=flags, passes=self.kit.passes, method=self.method
                    )
                except CaptureError as error:
                    self._failed[key] = error
                    raise
        return self._captured[key]

    def of_now(
        self,
        training: dict[str, bool],
        held: Mapping[str, torch.dtype],
        thawed: Collection[str],
        changes: Sequence[tuple[Place, Any]],
        given: Sequence[torch.dtype] | None,
    ) -> Builder:
        """Of the model as it is now: cast, or given inputs in other dtypes (a graph has no casts that did nothing).

        It is this one if only the model was cast, inputs with it, and its graph asks for no dtype.

        Parameters
        ----------
        held : mapping of str to torch.dtype
            By parameter and buffer.
        thawed : collection of str
            Parameters that require a gradient now, and did not: the graph's programs send none to them.
        changes : sequence of ((str, str), value)
            Plain attributes that have another value now, by path and name.
        given : sequence of torch.dtype, optional
            By input; as the model was cast if not given. Of inputs that are no floats the example's are taken.
        """
        before = {n: x.dtype for n, x in _parameters_and_buffers(self.template)}
        cast = {before[n]: d for n, d in held.items() if before[n] != d}
        leaves, spec = flatten(normalise_inputs(self.example_inputs, method_of(self.template, self.method)))
        tensors, statics = split_statics(leaves)
        expected = [cast.get(x.dtype, x.dtype) for x in tensors]
        wanted = [g if x.is_floating_point() else x.dtype for g, x in zip(given or expected, tensors, strict=True)]
        if not thawed and not changes and wanted == expected and not asks_for(self.capture(training)[0], cast):
            return self
        key = (*held.values(), *wanted, *thawed, *changes)
        if key not in self._others:
            template = copy.deepcopy(self.template, copied(self.template))
            for name, x in _parameters_and_buffers(template):
                x.data = x.data.to(held[name])
                if name in thawed:
                    x.requires_grad_()
            for (path, name), x in changes:
                setattr(template.get_submodule(path), name, x)
            tensors = [x.to(d) for x, d in zip(tensors, wanted, strict=True)]
            self._others[key] = Builder(template, unflatten_with(tensors, spec, statics), self.method, self.kit)
        return self._others[key]

    def measure(
        self, program: Program, signature: Signature, operators: list[Operator], samples: Iterable[Any]
    ) -> Statistics:
        """Statistics of the ids of sample batches."""
        called = method_of(self.template, self.method)
        batches = (signature.flatten(*normalise_inputs(x, called)) for x in samples)
        return measure(program, operators, batches)

    def emit(self, plan: Plan, training: dict[str, bool], rank: int, solver: str = DEFAULT) -> Emitted:
        program, signature = self.capture(training)
        operators = find_tables(program, self.kit.forms)
        emitted = emit(partition_of(program, operators, plan, self.kit.rules, solver), rank)
        return replace(emitted, signature=signature, fits=Fits(program))


def _parameters_and_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def partition_of(
    program: Program, operators: list[Operator], plan: Plan, rules: Sequence[Rule], solver: str = DEFAULT
) -> Partition:
    """What a plan makes of a graph of the planned model, which need not be the one that was planned."""
    w = Weights(plan.ranks, plan.rows, plan.itemsize).worth(
        plan.cluster.flops_per_byte if plan.cluster is not None else None
    )
    splits = _splits_of(operators, plan)
    biases = bias_pieces(program, outputs_in_order(program, operators, splits), splits)
    used = {program.parameter(n) for n in program.graph.nodes if n.users}
    cut_weights = {n: p for n, p in plan.pieces.items() if n not in plan.splits and not p.is_replicated and n in used}
    colocated = {n: p for n, p in cut_weights.items() if biases.get(n) != p}
    candidates = place(program, operators, splits, rules, plan.ranks, colocated)
    if plan.aggregate == "lookups":
        cut = at_lookups(candidates)
    else:
        cut = minimum_cut(program, candidates, w, colocated, solver)
    inside = {n for node in cut.inside for n in candidates.placed[node].pieces}
    if lost := set(colocated) - inside:
        raise PlanError(f"weights {sorted(lost)} were cut for another graph (training flags differ); plan again")
    return Partition(program, operators, splits, candidates, cut, plan.ranks, plan.pieces)


def _splits_of(operators: list[Operator], plan: Plan) -> dict[str, Split]:
    """The plan's splits, for the tables of a graph that need not be the one that was planned."""
    result = dict(plan.splits)
    for o in operators:
        if o.name not in result:  # only here a table: its weight is what the plan made of it
            result[o.name] = split_as(o, fallback().name, plan.ranks)
            if not plan.pieces[o.name].is_replicated:
                raise PlanError(f"weight {o.name!r} was cut for another graph (training flags differ); plan again")
        elif reason := o.refusals.get(result[o.name].form):
            raise PlanError(
                f"table {o.name!r} was split by {result[o.name].form} for another graph (training flags differ), and "
                f"in this one {reason}: pin it to another form"
            )
    return result

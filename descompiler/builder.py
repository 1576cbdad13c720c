"""Programs of one model: captured as the training flags of its modules are, emitted as a plan says."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.capture.batch_size import with_batch_size
from descompiler.capture.checks import asks_for
from descompiler.capture.ladder import capture
from descompiler.emit.by_size import mixed_sizes
from descompiler.emit.emit import Emitted, emit
from descompiler.errors import CaptureError, InputError, OtherShapesError, PlanError
from descompiler.graph.program import Program
from descompiler.layout.statistics import Statistics
from descompiler.model.attributes import Place, copied, same_classes, set_attributes
from descompiler.model.batch_size import of_rows
from descompiler.model.calls import OtherCall, Signature, example_call
from descompiler.model.inputs import flatten, no_batch, normalise_inputs, split_statics, unflatten_with
from descompiler.model.kinds import MOST_KEPT, Kinds, shapes_text
from descompiler.model.probe import CALL, blueprint, method_of
from descompiler.planning.checked import EDITED, check_pieces
from descompiler.planning.exchanges import layout_of
from descompiler.planning.plan import Plan
from descompiler.planning.planner import labels_of
from descompiler.plugins import Kit
from descompiler.region.cut import Weights, at_lookups, cut_as, minimum_cut
from descompiler.region.flow import DEFAULT
from descompiler.region.partition import Partition
from descompiler.region.place import place
from descompiler.region.rule import Rule
from descompiler.tables.form import Split, fallback, find_tables, split_as
from descompiler.tables.made import made_by_its_form
from descompiler.tables.measure import measure
from descompiler.tables.products import bias_pieces, outputs_in_order
from descompiler.tables.tables import Operator, sparse_lookups


class Builder:
    """Programs of one model, by the training flags of its modules."""

    def __init__(
        self,
        template: nn.Module,
        example_inputs: Any,
        method: str = CALL,
        kit: Kit | None = None,
        resized_of: Builder | None = None,
        called: OtherCall | None = None,
        trained: tuple[int, ...] = (),
    ):
        self.template, self.method = template, method
        self.example_inputs = example_call(template, example_inputs, method)
        self.resized_of = resized_of  # the same model, with inputs of other sizes
        self.called = called  # otherwise than the example
        self.trained = trained  # inputs that require a gradient
        self.kit = Kit.of() if kit is None else kit
        leaves, _ = split_statics(flatten(self.example_inputs)[0])
        self.has_rows = bool(leaves)
        leaves = leaves or [no_batch()]
        self.rows = max((x.shape[0] for x in leaves if x.dim()), default=1)
        self.sizes = Kinds.of(leaves).sizes
        self.device = leaves[0].device if leaves else torch.device("cpu")
        self._others: dict[tuple[object, ...], Builder] = {}
        self._captured: dict[tuple[tuple[str, bool], ...], tuple[Program, Signature]] = {}
        self._failed: dict[tuple[tuple[str, bool], ...], CaptureError] = {}

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, method: str = CALL, kit: Kit | None = None) -> Builder:
        """Of a user's model and inputs."""
        template = blueprint(model)
        return cls(template, with_batch_size(template, lambda: template, example_inputs, method), method, kit)

    def capture(self, training: dict[str, bool] | None) -> tuple[Program, Signature]:
        """The program for given flags, those of the model by default; captured once, and not to be edited."""
        flags = {n: m.training for n, m in self.template.named_modules()} if training is None else training
        key = tuple(flags.items())
        if key in self._failed:
            raise type(self._failed[key])(str(self._failed[key]), self._failed[key].failures)
        if key not in self._captured:
            # an evaluation program is first wanted where the user has gradients off; the checks need them, and random
            # weights may give NaN, which is compared, and which the user's anomaly detection must not stop
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autograd.set_detect_anomaly(False),
                same_classes(self.template),
            ):
                try:
                    self._captured[key] = capture(
                        self.template,
                        self.example_inputs,
                        training=flags,
                        passes=self.kit.passes,
                        method=self.method,
                        trained=self.trained,
                    )
                except CaptureError as error:
                    self._failed[key] = self._named(error)
                    raise self._failed[key] from error
                except InputError as error:
                    if self.called is not None:
                        raise InputError(
                            "forward was compiled for inputs that are nested as in example_inputs, with the values "
                            f"there, and can't be for these ({self.called.told}): {error}"
                        ) from error
                    if self.resized_of is None:
                        raise
                    raise InputError(self._other_shapes(error)) from error
        return self._captured[key]

    def _named(self, error: CaptureError) -> CaptureError:
        """The error, which says so if it is for the sizes of inputs that there is no program."""
        return error if self.resized_of is None else OtherShapesError(self._other_shapes(error), error.failures)

    def _other_shapes(self, error: Exception) -> str:
        assert self.resized_of is not None
        given, compiled = shapes_text(self.sizes), shapes_text(self.resized_of.sizes)
        return f"inputs of shapes {given} don't fit the model, which was compiled for {compiled}: {error}"

    def of_now(
        self,
        training: dict[str, bool],
        held: Mapping[str, torch.dtype],
        thawed: Collection[str],
        changes: Sequence[tuple[Place, Any]],
        given: Kinds | None,
        sample: Sequence[Tensor] | None = None,
    ) -> Builder:
        """Of the model as it is now: cast, or given inputs in other dtypes (a graph has no casts that did nothing).

        It is this one if only the model was cast, inputs with it, all of it was and is of one dtype, and its graph asks
        for none.

        Parameters
        ----------
        held : mapping of str to torch.dtype
            By parameter and buffer.
        thawed : collection of str
            Parameters that require a gradient now, and did not: the graph's programs send none to them.
        changes : sequence of ((str, str), value)
            Plain attributes that have another value now, by path and name.
        given : Kinds, optional
            Of the inputs; as the model was cast if not given. Of inputs that are no floats the example's dtypes are
            taken.
        sample : sequence of Tensor, optional
            Inputs of those kinds, if the example's can't be made so.
        """
        if given is not None and given.called is not None:
            other = self._of_call(given.called, sample)
            return other.of_now(training, held, thawed, changes, replace(given, called=None), sample)
        before = {n: x.dtype for n, x in _parameters_and_buffers(self.template)}
        held = {n: d for n, d in held.items() if n in before}  # users keep other buffers on modules
        cast = {before[n]: d for n, d in held.items() if before[n] != d}
        leaves, spec = flatten(self.example_inputs)
        tensors, statics = split_statics(leaves)
        tensors = tensors or [no_batch()]
        expected = [cast.get(x.dtype, x.dtype) for x in tensors]
        given = given or Kinds(tuple(expected), self.sizes)
        wanted = [g if x.is_floating_point() else x.dtype for g, x in zip(given.dtypes, tensors, strict=True)]
        same = given.rows is None and given.sizes == self.sizes and not thawed and not changes and wanted == expected
        same = same and given.trained == self.trained
        if same and not (cast and _depends_on_dtypes(self.capture(training)[0], cast, held)):
            return self
        key = (*held.values(), *wanted, *thawed, *changes, given.sizes, given.rows, given.trained)
        if key not in self._others or sample is not None:
            template = copy.deepcopy(self.template, copied(self.template))
            for name, x in _parameters_and_buffers(template):
                x.data = x.data.to(held[name])
                if name in thawed:
                    x.requires_grad_()
            set_attributes(template, dict(changes))
            if sample is not None:
                tensors = [x.to(self.device) for x in sample]
            tensors = replace(given, dtypes=tuple(wanted)).of_example(tensors)
            inputs = unflatten_with(tensors, spec, of_rows(statics, len(tensors[0])))
            resized_of = None if given.sizes == self.sizes else self
            if len(self._others) == MOST_KEPT:
                self._others.pop(next(iter(self._others)))
            self._others[key] = Builder(template, inputs, self.method, self.kit, resized_of, self.called, given.trained)
        return self._others[key]

    def _of_call(self, called: OtherCall, sample: Sequence[Tensor] | None) -> Builder:
        """Of the model as it is called otherwise, with the example's tensors, or with a sample of those it lacks."""
        if (called,) not in self._others:
            tensors = called.tensors_of(self.example_inputs)
            if tensors is None:
                if sample is None:
                    raise InputError(f"example_inputs lack tensors of this call ({called.told})")
                tensors = [x.to(self.device) for x in sample]
            inputs = unflatten_with(tensors, called.spec, of_rows(called.statics, len(tensors[0]) if tensors else 0))
            if len(self._others) == MOST_KEPT:
                self._others.pop(next(iter(self._others)))
            self._others[(called,)] = Builder(self.template, inputs, self.method, self.kit, called=called)
        return self._others[(called,)]

    def measure(
        self, program: Program, signature: Signature, operators: list[Operator], samples: Iterable[Any]
    ) -> Statistics:
        """Statistics of the ids of sample batches."""
        called = method_of(self.template, self.method)
        batches = (signature.flatten(*normalise_inputs(x, called)) for x in samples)
        return measure(program, operators, batches)

    def follow(self, plan: Plan, solver: str = DEFAULT) -> Plan:
        """The plan, if it is one of this model: its pieces, splits and layout are those that the model's programs have.

        A plan does not say in which training flags it was made: it has to be right in some.

        Raises
        ------
        PlanError
            If a file's plan was edited beside its forms, or a plan in memory.
        """
        every = [n for n, _ in self.template.named_modules()]
        first: PlanError | None = None
        for training in (None, dict.fromkeys(every, True), dict.fromkeys(every, False)):
            try:
                program, _ = self.capture(training)
                self._check(plan, program, solver)
                return plan
            except PlanError as error:
                first = first or error
            except CaptureError:  # in these flags there is no program that it could be for
                continue
        assert first is not None
        raise first

    def _check(self, plan: Plan, program: Program, solver: str) -> None:
        operators = find_tables(program, self.kit.forms)
        check_pieces(plan, {n: tuple(p.shape) for n, p in program.parameters.items()})
        for o in operators:
            if o.name in plan.splits and not made_by_its_form(o, plan.splits[o.name]):
                raise PlanError(
                    f"the plan's split of table {o.name!r} is none that form {plan.splits[o.name].form!r} makes "
                    f"({plan.splits[o.name]}): {EDITED}"
                )
        partition = partition_of(program, operators, plan, self.kit.rules, solver)
        for name, pieces in bias_pieces(program, partition.products, partition.splits).items():
            if plan.pieces[name] != pieces:
                raise PlanError(
                    f"the plan's pieces of {name!r} are not those of the table that it is added to: {EDITED}"
                )
        if not layout_of(partition).sends_as(plan.layout, plan.rows, plan.itemsize):
            raise PlanError(f"the plan's layout is not what the model's programs send: {EDITED}")

    def emit(
        self,
        plan: Plan,
        training: dict[str, bool],
        rank: int,
        solver: str = DEFAULT,
        sparse: Collection[str] = (),
    ) -> Emitted:
        """A rank's program; ``sparse``: tables whose gradients are to be sparse, though the model's are dense."""
        program, signature = self.capture(training)
        like = None if self.resized_of is None else self.resized_of.inside(plan, training, solver)
        with sparse_lookups(program, sparse):
            operators = find_tables(program, self.kit.forms)
            partition = partition_of(program, operators, plan, self.kit.rules, solver, like)
            emitted = emit(partition, rank)
            labels = labels_of(partition, emitted.layout)
        if program.guards:
            emitted = replace(emitted, accepts=program.accepts)
        return replace(emitted, labels=labels, signature=signature, mixed=mixed_sizes(program))

    def inside(self, plan: Plan, training: dict[str, bool], solver: str) -> frozenset[str]:
        """Names of the nodes that the plan keeps inside the region."""
        program, _ = self.capture(training)
        partition = partition_of(program, find_tables(program, self.kit.forms), plan, self.kit.rules, solver)
        return frozenset(n.name for n in partition.inside)


def _depends_on_dtypes(program: Program, cast: Collection[torch.dtype], held: Mapping[str, torch.dtype]) -> bool:
    """Whether a graph is another one for a model that was cast: what crosses in which dtype is known from the graph."""
    kinds = {dtype for dtype in held.values() if dtype.is_floating_point or dtype.is_complex}
    return asks_for(program, cast) or bool(program.other_dtypes()) or len(kinds) > 1


def _parameters_and_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def partition_of(
    program: Program,
    operators: list[Operator],
    plan: Plan,
    rules: Sequence[Rule],
    solver: str = DEFAULT,
    like: frozenset[str] | None = None,
) -> Partition:
    """What a plan makes of a graph of the planned model, which need not be the one that was planned.

    ``like``: names of what is inside in the graph for inputs of other sizes; weights are cut as they are there.
    """
    w = Weights(plan.ranks, plan.rows, plan.itemsize, wire_dtype=plan.wire_dtype).worth(
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
    elif like is None or (found := cut_as(candidates, like)) is None:
        cut = minimum_cut(program, candidates, w, colocated, solver)
    else:
        cut = found
    inside = {n for node in cut.inside for n in candidates.placed[node].pieces}
    if lost := set(colocated) - inside:
        raise PlanError(f"weights {sorted(lost)} were cut for another graph (training flags differ); plan again")
    return Partition(
        program, operators, splits, candidates, cut, plan.ranks, plan.pieces, plan.wire_dtype, bool(plan.layout.given)
    )


def _splits_of(operators: list[Operator], plan: Plan) -> dict[str, Split]:
    """The plan's splits, for the tables of a graph that need not be the one that was planned."""
    result = dict(plan.splits)
    for o in operators:
        if o.name not in result:  # only here a table: its weight is what the plan made of it
            result[o.name] = split_as(o, fallback().name, plan.ranks)
            if not plan.pieces[o.name].is_replicated:
                raise PlanError(f"weight {o.name!r} was cut for another graph (training flags differ); plan again")
        elif plan.ranks > 1 and (reason := o.refusals.get(result[o.name].form)):
            raise PlanError(
                f"table {o.name!r} was split by {result[o.name].form} for another graph (training flags differ), and "
                f"in this one {reason}: pin it to another form"
            )
    return result

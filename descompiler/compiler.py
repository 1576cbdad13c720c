"""`compile` and `plan`: the whole pipeline on one screen."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from descompiler.aggregate import Candidates, Cut, Weights, at_lookups, minimum_cut, place
from descompiler.capture import capture
from descompiler.cluster import Cluster
from descompiler.coverage import Coverage, coverage_of
from descompiler.double import unregistered
from descompiler.emit import Emitted, emit
from descompiler.errors import CaptureError, InputError, PlanError, RankError
from descompiler.form import Split, split_as
from descompiler.inputs import Signature, flatten, normalise_inputs, split_statics, take_rows
from descompiler.module import DeferredModule, DistributedModule, PartialModule, install
from descompiler.objective import Terms
from descompiler.operators import Operator, find_operators
from descompiler.outputs import bias_pieces
from descompiler.partial import Survey, coverage_partial, plan_partial, survey
from descompiler.passes import NORMALISE, RULES
from descompiler.pins import Forbidden
from descompiler.plan import NO_OPERATORS, Plan
from descompiler.planner import choose
from descompiler.probe import CALL, blueprint, call_of, method_of
from descompiler.program import Failure, Program
from descompiler.runtime import Runtime
from descompiler.sparse import copied
from descompiler.state import reset_pieces, send_buffers, send_from_first
from descompiler.statistics import Statistics, measure

T = TypeVar("T")

LOSSES = ("rank_mean", "row_mean", "sum")


def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    plan: Plan | str | Path | Mapping[str, str] | None = None,
    process_group: Any = None,
    loss: str = "rank_mean",
    batch: int | None = None,
    seed: int | None = None,
    forbid: Forbidden | None = None,
    cluster: Cluster | None = None,
    memory_bytes: int | None = None,
    optimizer: str = "adagrad",
    samples: Iterable[Any] | None = None,
    method: str = CALL,
    in_place: bool = False,
) -> Any:
    """Compile a model into this rank's part of an equivalent distributed module.

    Collective: every rank calls it with the same model. Under torchrun it initialises the process group if there is
    none; without one it is one rank.

    Parameters
    ----------
    model : torch.nn.Module
        Weights are taken from rank 0; those that are on the meta device there, from their module's
        ``reset_parameters``.
    example_inputs : tuple, dict or object, optional
        Inputs of one forward; dim 0 of every tensor is the batch. A tuple or list holds the positional arguments,
        ``(args, kwargs)`` both kinds; a dict that names forward's parameters holds keyword arguments; every other dict
        or object is the one positional argument. See `register_input` for classes of your own. Without, the first
        forward compiles.
    plan : Plan, path or mapping of str to str, optional
        A plan to follow, the file of one, or forms to pin: a table's name (its parameter's, its module's, or their
        end) or a pattern to the name of one of `descompiler.passes.FORMS`. A pattern pins where it is possible.
    process_group : optional
        The ranks; all by default.
    loss : {"rank_mean", "row_mean", "sum"}
        What each rank's loss is, so that gradients are the original's on the global batch. "rank_mean": a mean over the
        rank's rows, ranks are averaged (as DistributedDataParallel). "row_mean": the same mean, weighted by each rank's
        rows: the mean over the global batch also where ranks have different batch sizes. "sum": a sum over rows.
        Outputs without rows (a loss computed in the model) are the global batch's on every rank, and count once.
    batch : int, optional
        Rows per rank to plan for; the example's by default.
    seed : int, optional
        For weights on the meta device; rank 0's ``torch.initial_seed()`` by default.
    forbid : mapping of str to str or sequence of str, optional
        Forms that tables must not take, by name or pattern: ``{"*": ["replicate"]}``.
    cluster : Cluster, optional
        Minimise the seconds of a step's collectives on it; bytes of the busiest rank by default. Its memory is the
        limit.
    memory_bytes : int, optional
        Limit of each rank for weights, gradients, optimiser state and activations.
    optimizer : str
        Whose state counts: "sgd", "momentum", "adagrad", "rowwise_adagrad", "adam" or "sparse_adam".
    samples : iterable, optional
        Batches, each as ``example_inputs``, of which statistics of the ids are measured; rank 0's count. Without,
        Zipf-distributed ids are assumed.
    method : str
        What is compiled: by default a call of the model (its forward), or a method of it such as "calculate_loss".
    in_place : bool
        Return the user's own object: of its class, with its other methods, with this rank's pieces in its parameters
        and ``method`` (by default "forward") replaced by the compiled one. `module_of` gives its `DistributedModule`.

    Returns
    -------
    DistributedModule, or the model itself if ``in_place``

    Raises
    ------
    CaptureError, UnsupportedError, PlanError, InputError, RankError
    """
    options = {"plan": plan, "process_group": process_group, "loss": loss, "batch": batch, "seed": seed}
    options.update(terms=Terms(forbid or {}, cluster, memory_bytes, optimizer), samples=samples)
    if in_place:
        if example_inputs is None:
            raise InputError("in_place=True needs example_inputs: optimisers have to see the pieces from the start")
        method = "forward" if method == CALL else method  # calls of the model still run its hooks
        module = distribute(model, lambda: Builder(blueprint(model), example_inputs, method), host=model, **options)
        return install(model, module, method)
    if example_inputs is None:
        return DeferredModule(
            model, lambda inputs: distribute(model, lambda: Builder(blueprint(model), inputs, method), **options)
        )
    return distribute(model, lambda: Builder(blueprint(model), example_inputs, method), **options)


def distribute(
    model: nn.Module,
    builder: Callable[[], Builder],
    *,
    plan: Any,
    process_group: Any,
    loss: str,
    batch: Any,
    seed: Any,
    terms: Terms | None = None,
    samples: Iterable[Any] | None = None,
    host: nn.Module | None = None,
) -> DistributedModule:
    """`compile`, given what captures the model: one builder serves many compilations of one architecture.

    ``host``: the model whose parameters become pieces, in place.
    """
    if loss not in LOSSES:
        raise PlanError(f"loss={loss!r}; it is one of {', '.join(LOSSES)}")
    group, rank, ranks = _process_group(process_group)
    if rank == 0 and (names := unregistered(model)):
        warnings.warn(
            f"descompiler: {', '.join(names)} hold tensors that require gradients and are not among parameters(): they "
            "are constants of the compiled model. Use nn.ParameterList, or register them, if they are to be trained",
            stacklevel=4,
        )

    if rank == 0 and host is None and (names := [n for n, p in model.named_parameters() if _has_hooks(p)]):
        warnings.warn(
            f"descompiler: gradient hooks on {', '.join(names)} are the original's and are not called: register them "
            "on the parameters of the compiled module, or compile with in_place=True",
            stacklevel=4,
        )

    def capture_and_find() -> Found:
        build = builder()
        try:
            program, signature = build.capture(None)
        except CaptureError as error:
            return Found(build, None, None, [], error.failures)
        return Found(build, program, signature, find_operators(program), program.failures)

    found = _everywhere(capture_and_find, group, ranks)
    build, program, signature, operators = found.build, found.program, found.signature, found.operators
    rows = _broadcast(batch or build.rows, group, ranks)  # ranks may have examples of different sizes
    if not _all(program is not None, group, ranks):
        return _distribute_in_part(model, found, group, rank, ranks, plan, loss, rows, seed, host, terms, samples)
    assert program is not None and signature is not None
    w = Weights(ranks, rows, _itemsize(operators, program))
    if samples is not None:
        local = _everywhere(
            lambda: None if rank else build.measure(program, signature, operators, samples), group, ranks
        )
        terms = replace(terms or Terms(), statistics=_broadcast(local, group, ranks))
    chosen = _everywhere(lambda: _follow_or_choose(program, operators, w, plan, terms), group, ranks)
    _agree(chosen, group, ranks)
    if not operators and rank == 0:
        warnings.warn(f"descompiler: {NO_OPERATORS}", stacklevel=2)
    coverage = coverage_of(program, operators, chosen)
    _warn(coverage, rank)
    values, buffers = _weights(model, build, chosen, seed, group, rank, ranks)

    def program_for(training: dict[str, bool]) -> Emitted:
        return build.emit(chosen, training, rank)

    def forward_for(training: dict[str, bool], now: dict[str, Tensor], buffers: dict[str, Tensor]) -> PartialModule:
        template = copy.deepcopy(build.template, copied(build.template))
        for name, m in template.named_modules():
            m.training = training[name]
        seen = survey(template, build.example_inputs, build.method)
        runtime = Runtime(group, rank, ranks, loss)
        return _partial_module(build, template, seen, chosen, runtime, now, buffers, coverage, None)

    return DistributedModule(
        build.template,
        chosen,
        signature,
        Runtime(group, rank, ranks, loss),
        program_for,
        values,
        buffers,
        coverage,
        host,
        forward_for=forward_for,
    )


def _itemsize(operators: list[Operator], program: Program) -> int:
    """Bytes of an element: of the tables; of the model without any."""
    dtypes = [o.dtype for o in operators] or [p.dtype for p in program.parameters.values()]
    return max((dtype.itemsize for dtype in dtypes), default=4)


def _has_hooks(p: nn.Parameter) -> bool:
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)


@dataclass
class Found:
    """What a rank captured; no program if no tracer did."""

    build: Builder
    program: Program | None
    signature: Signature | None
    operators: list[Operator]
    failures: tuple[Failure, ...]


def _distribute_in_part(
    model: nn.Module,
    found: Found,
    group: Any,
    rank: int,
    ranks: int,
    plan: Any,
    loss: str,
    rows: int,
    seed: Any,
    host: nn.Module | None,
    terms: Terms | None,
    samples: Iterable[Any] | None,
) -> PartialModule:
    """The last rung of the ladder: the user's own forward runs on every rank."""
    build = found.build

    def plan_of() -> tuple[Survey, Plan]:
        seen = survey(build.template, build.example_inputs, build.method)
        return seen, _follow_or_choose_in_part(build.template, seen, ranks, rows, plan)

    seen, chosen = _everywhere(plan_of, group, ranks)
    if rank == 0:
        _warn_of_terms(terms or Terms(), samples)
    _agree(chosen, group, ranks)
    coverage = coverage_partial(build.template, seen, chosen, found.failures)
    _warn(coverage, rank)
    if seen.unchecked and rank == 0:
        warnings.warn(f"descompiler: rows of a batch were not checked for independence: {seen.unchecked}", stacklevel=4)
    values, buffers = _weights(model, build, chosen, seed, group, rank, ranks)
    runtime = Runtime(group, rank, ranks, loss)
    return _partial_module(build, build.template, seen, chosen, runtime, values, buffers, coverage, host)


def _partial_module(
    build: Builder,
    template: nn.Module,
    seen: Survey,
    chosen: Plan,
    runtime: Runtime,
    values: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    coverage: Coverage,
    host: nn.Module | None,
) -> PartialModule:
    runs = _copy_with(template, values) if host is None else host
    inputs = normalise_inputs(build.example_inputs, method_of(template, build.method))
    spare = inputs if seen.unchecked else take_rows(inputs, torch.zeros(1, dtype=torch.int64, device=build.device))
    call = call_of(runs, build.method)
    return PartialModule(
        template,
        chosen,
        runtime,
        values,
        buffers,
        coverage,
        runs,
        call,
        seen.outputs,
        spare,
        in_place=host is not None,
        coupled=bool(seen.coupled),
    )


def _copy_with(template: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with these values as parameters, wherever it keeps them."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(values[n], requires_grad=p.requires_grad) for n, p in template.named_parameters()
    }
    return copy.deepcopy(template, memo | copied(template))


def _weights(
    model: nn.Module, build: Builder, chosen: Plan, seed: Any, group: Any, rank: int, ranks: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's pieces, from rank 0's model or from ``reset_parameters``; and rank 0's buffers."""
    values = {}
    if meta := _broadcast([n for n, p in model.named_parameters() if p.is_meta], group, ranks):
        seed = _broadcast(torch.initial_seed() if seed is None else seed, group, ranks)
        values = _everywhere(
            lambda: reset_pieces(build.template, chosen.pieces, seed, rank, build.device, meta), group, ranks
        )
    values |= send_from_first(build.template, model, chosen.pieces, group, rank, ranks, without=meta)
    return values, send_buffers(model, build.template, group, rank, ranks)


def _warn(coverage: Coverage, rank: int) -> None:
    text = coverage.warning()
    if text is not None and rank == 0:
        warnings.warn(f"descompiler: {text}", stacklevel=4)


def _follow_or_choose(
    program: Program,
    operators: list[Operator],
    w: Weights,
    plan: Plan | str | Path | Mapping[str, str] | None,
    terms: Terms | None,
) -> Plan:
    if isinstance(plan, str | Path):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        return choose(program, operators, RULES, w, plan, terms=terms)
    _same_ranks(plan, w.ranks)
    if plan.fingerprint != program.fingerprint():
        raise PlanError(
            f"the plan is for another model ({plan.fingerprint}, this one is {program.fingerprint()}): "
            f"{_what_differs(plan, operators)}; plan again with des.plan(model, inputs, ranks={plan.ranks})"
        )
    if plan.changes:  # edited in the file: the other tables keep their forms
        w = replace(w, rows=plan.rows)
        return choose(program, operators, RULES, w, {**plan.forms, **plan.changes}, terms=terms)
    return plan


def _follow_or_choose_in_part(
    template: nn.Module,
    seen: Survey,
    ranks: int,
    rows: int,
    plan: Plan | str | Path | Mapping[str, str] | None,
) -> Plan:
    """As `_follow_or_choose`, for a model of which the user's forward runs."""
    if isinstance(plan, str | Path):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        return plan_partial(template, seen, ranks, rows, plan)
    _same_ranks(plan, ranks)
    fingerprint = plan_partial(template, seen, ranks, rows, None).fingerprint
    if plan.fingerprint != fingerprint:
        raise PlanError(
            f"the plan is for another model ({plan.fingerprint}), or for a graph of this one; it is captured in part "
            f"({fingerprint}): plan again with des.plan(model, inputs, ranks={plan.ranks})"
        )
    if plan.changes:
        return plan_partial(template, seen, ranks, plan.rows, {**plan.forms, **plan.changes})
    return plan


def _warn_of_terms(terms: Terms, samples: Iterable[Any] | None) -> None:
    given = {"forbid": terms.forbid, "cluster": terms.cluster, "memory_bytes": terms.memory_bytes, "samples": samples}
    if names := [n for n, x in given.items() if x]:
        warnings.warn(
            f"descompiler: the model is captured in part, where {', '.join(names)} can't be considered: pin forms by "
            "table",
            stacklevel=4,
        )


def _same_ranks(plan: Plan, ranks: int) -> None:
    if plan.ranks != ranks:
        raise PlanError(
            f"the plan is for {plan.ranks} ranks, and this is {ranks} ranks: plan again with des.plan(model, inputs, "
            f"ranks={ranks}), or start {plan.ranks} processes"
        )


def _what_differs(plan: Plan, operators: list[Operator]) -> str:
    """How the tables of a model are not a plan's."""
    mine, its = {o.name: o.shape for o in operators}, {t.name: (t.rows, t.dim) for t in plan.tables}
    for name in dict.fromkeys((*its, *mine)):
        if name not in mine:
            return f"this model has no table {name!r}"
        if name not in its:
            return f"the plan has no table {name!r}"
        if mine[name] != its[name]:
            return f"table {name!r} is {list(its[name])} in the plan, {list(mine[name])} in the model"
    itemsizes = {o.name: o.dtype.itemsize for o in operators}
    for t in plan.tables:
        if t.itemsize != itemsizes[t.name]:
            return f"table {t.name!r} has {t.itemsize} bytes an element in the plan, {itemsizes[t.name]} in the model"
    return "the tables are the same, what is computed from them (in these training flags), or another parameter, is not"


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    ranks: int | None = None,
    cluster: Cluster | None = None,
    batch: int | None = None,
    pins: Mapping[str, str] | None = None,
    plan: Plan | str | Path | None = None,
    forbid: Forbidden | None = None,
    memory_bytes: int | None = None,
    optimizer: str = "adagrad",
    samples: Iterable[Any] | None = None,
    method: str = CALL,
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
    cluster, forbid, memory_bytes, optimizer, samples, method
        As `compile`'s.

    Raises
    ------
    PlanError
        If nothing satisfies the constraints: which rank lacks how much memory, and what would fit.
    """
    terms: dict[str, Any] = {"forbid": forbid or {}, "cluster": cluster}
    terms |= {"memory_bytes": memory_bytes, "optimizer": optimizer}
    try:
        captured = Captured(model, example_inputs, method)
    except CaptureError:  # in part, as `compile` does
        build = Builder(blueprint(model), example_inputs, method)
        seen = survey(build.template, example_inputs, method)
        _warn_of_terms(Terms(**terms), samples)
        ranks, batch, pins = _setting(ranks, batch, pins, plan, cluster)
        return plan_partial(build.template, seen, ranks, batch or build.rows, pins)
    return captured.plan(ranks=ranks, batch=batch, pins=pins, plan=plan, samples=samples, **terms)


def _setting(
    ranks: int | None,
    batch: int | None,
    pins: Mapping[str, str] | None,
    plan: Plan | str | Path | None,
    cluster: Cluster | None,
) -> tuple[int, int | None, Mapping[str, str] | None]:
    """Ranks, rows and pins to plan for; those of a plan where there is one."""
    if isinstance(plan, str | Path):
        plan = Plan.load(plan)
    if ranks is None:
        if cluster is None and plan is None:
            raise PlanError("des.plan needs ranks=, or cluster= with them")
        ranks = cluster.ranks if cluster is not None else plan.ranks  # type: ignore[union-attr]
    if plan is not None:
        batch, pins = batch or plan.rows, {**plan.forms, **plan.changes, **(pins or {})}
    return ranks, batch, pins


class Captured:
    """A model captured once, to be planned for many settings: `plan` without the capture.

    Attributes
    ----------
    program : Program
    operators : list of Operator
    rows : int
        Of the example inputs.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, method: str = CALL):
        self._build = Builder(blueprint(model), example_inputs, method)
        self.program, self._signature = self._build.capture(None)
        self.operators = find_operators(self.program)
        self.rows = self._build.rows

    def plan(
        self,
        *,
        ranks: int | None = None,
        batch: int | None = None,
        pins: Mapping[str, str] | None = None,
        plan: Plan | str | Path | None = None,
        samples: Iterable[Any] | None = None,
        **terms: Any,
    ) -> Plan:
        """As `descompiler.plan`; ``terms`` are those of `descompiler.objective.Terms`."""
        ranks, batch, pins = _setting(ranks, batch, pins, plan, terms.get("cluster"))
        w = Weights(ranks, batch or self.rows, _itemsize(self.operators, self.program))
        if samples is not None:
            terms["statistics"] = self._build.measure(self.program, self._signature, self.operators, samples)
        return choose(self.program, self.operators, RULES, w, pins, terms=Terms(**terms))

    def region(self, plan: Plan) -> tuple[Candidates, Cut]:
        """What the rules can place, and what the plan keeps inside the region."""
        return _region(self.program, self.operators, plan)


def _region(program: Program, operators: list[Operator], plan: Plan) -> tuple[Candidates, Cut]:
    w = Weights(plan.ranks, plan.rows, plan.itemsize).on(plan.cluster)
    splits = _splits(operators, plan)
    biases = bias_pieces(program, operators, splits)
    used = {program.parameter(n) for n in program.graph.nodes if n.users}
    cut_weights = {n: p for n, p in plan.pieces.items() if n not in plan.splits and not p.is_replicated and n in used}
    colocated = {n: p for n, p in cut_weights.items() if biases.get(n) != p}
    candidates = place(program, operators, splits, RULES, plan.ranks, colocated)
    cut = at_lookups(candidates) if plan.aggregate == "lookups" else minimum_cut(program, candidates, w, colocated)
    inside = {n for node in cut.inside for n in candidates.placed[node].pieces}
    if lost := set(colocated) - inside:
        raise PlanError(f"weights {sorted(lost)} were cut for another graph (training flags differ); plan again")
    return candidates, cut


def _splits(operators: list[Operator], plan: Plan) -> dict[str, Split]:
    """The plan's splits, for the tables of a graph that need not be the one that was planned."""
    result = dict(plan.splits)
    for o in operators:
        if o.name not in result:  # only here a table: its weight is what the plan made of it
            result[o.name] = split_as(o, "replicate", plan.ranks)
            if not plan.pieces[o.name].is_replicated:
                raise PlanError(f"weight {o.name!r} was cut for another graph (training flags differ); plan again")
        elif reason := o.refusals.get(result[o.name].form):
            raise PlanError(
                f"table {o.name!r} was split by {result[o.name].form} for another graph (training flags differ), and "
                f"in this one {reason}: pin it to another form"
            )
    return result


class Builder:
    """Programs of one model, by the training flags of its modules."""

    def __init__(self, template: nn.Module, example_inputs: Any, method: str = CALL):
        self.template, self.example_inputs, self.method = template, example_inputs, method
        leaves, _ = split_statics(flatten(normalise_inputs(example_inputs, method_of(template, method)))[0])
        self.rows = max((x.shape[0] for x in leaves if x.dim()), default=1)
        self.device = leaves[0].device if leaves else torch.device("cpu")
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
                        self.template, self.example_inputs, training=flags, passes=NORMALISE, method=self.method
                    )
                except CaptureError as error:
                    self._failed[key] = error
                    raise
        return self._captured[key]

    def measure(
        self, program: Program, signature: Signature, operators: list[Operator], samples: Iterable[Any]
    ) -> Statistics:
        """Statistics of the ids of sample batches."""
        called = method_of(self.template, self.method)
        batches = (signature.flatten(*normalise_inputs(x, called)) for x in samples)
        return measure(program, operators, batches)

    def emit(self, plan: Plan, training: dict[str, bool], rank: int) -> Emitted:
        program, _ = self.capture(training)
        operators = find_operators(program)
        candidates, cut = _region(program, operators, plan)
        splits = _splits(operators, plan)
        return emit(program, operators, splits, plan.pieces, candidates, cut, rank, plan.ranks)


def _process_group(group: Any) -> tuple[Any, int, int]:
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
            if torch.cuda.is_available():  # collectives of Python objects use the current device
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        else:
            return None, 0, 1
    group = dist.group.WORLD if group is None else group
    return group, dist.get_rank(group), dist.get_world_size(group)


def _broadcast(value: Any, group: Any, ranks: int) -> Any:
    if ranks == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


def _all(mine: bool, group: Any, ranks: int) -> bool:
    """Whether it is so on every rank."""
    if ranks == 1:
        return mine
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, mine, group=group)
    return all(every)


def _everywhere(step: Callable[[], T], group: Any, ranks: int) -> T:
    """What ``step()`` returns; if it raises on any rank, every rank raises, and none waits for it in a collective."""
    result: T | None = None
    error: Exception | None = None
    try:
        result = step()
    except Exception as e:  # raised below, once the other ranks know
        error = e
    texts: list[Any] = [None] * ranks
    if ranks > 1:
        dist.all_gather_object(texts, None if error is None else f"{type(error).__name__}: {error}", group=group)
    if error is not None:
        raise error
    if any(texts):
        raise RankError("\n".join(f"rank {r} could not compile: {t}" for r, t in enumerate(texts) if t))
    return cast(T, result)


def _agree(plan: Plan, group: Any, ranks: int) -> None:
    """Every rank raises if any rank has another model or plan."""
    if ranks == 1:
        return
    mine = (plan.fingerprint, plan.digest(), str(dict(sorted(plan.forms.items()))))
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, mine, group=group)
    for what, i, text in (("model", 0, 0), ("plan", 1, 2)):
        if len({e[i] for e in every}) > 1:
            lines = "\n".join(f"rank {r}: {e[i]} {e[text] if text != i else ''}".rstrip() for r, e in enumerate(every))
            raise RankError(f"ranks compile different {what}s:\n{lines}")

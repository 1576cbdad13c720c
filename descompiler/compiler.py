"""`compile`, and the whole pipeline on one screen: `distribute`."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.builder import Builder
from descompiler.captured import Captured
from descompiler.dynamic.embedding import DynamicTable
from descompiler.dynamic.static import with_dynamic
from descompiler.emit.emit import Emitted
from descompiler.errors import CaptureError, InputError, PlanError, UnsupportedError, step_of
from descompiler.graph.program import Failure
from descompiler.in_part import distribute_in_part, in_other_flags
from descompiler.layout.statistics import Statistics
from descompiler.model.attributes import dotted, unregistered
from descompiler.model.inputs import map_tensors
from descompiler.model.probe import CALL, check_model
from descompiler.model.stale import Stale
from descompiler.module.deferred import DeferredModule
from descompiler.module.distributed import DistributedModule
from descompiler.module.dynamic import dynamic_tables
from descompiler.module.initial import initial_values
from descompiler.module.installed import install
from descompiler.module.parts import Parts
from descompiler.module.standard import has_its_own, watch_optimizers
from descompiler.planning.assumed import GivenCluster, cluster_of
from descompiler.planning.chosen import NO_OPERATORS
from descompiler.planning.coverage import coverage_of
from descompiler.planning.given import GivenPlan, agreed, as_planned, asked_of, check_counts
from descompiler.planning.objective import Terms
from descompiler.planning.pins import Forbidden
from descompiler.planning.plan import Plan
from descompiler.plugins import Kit
from descompiler.region.flow import DEFAULT
from descompiler.region.rule import Rule
from descompiler.runtime.channels import TIMEOUT_S
from descompiler.runtime.ranks import Ranks
from descompiler.tables.form import Form
from descompiler.version import VERSION

LOSSES = ("rank_mean", "row_mean", "sum")


def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    plan: GivenPlan = None,
    process_group: Any = None,
    loss: str = "rank_mean",
    batch: int | None = None,
    seed: int | None = None,
    forbid: Forbidden | None = None,
    cluster: GivenCluster = None,
    memory_bytes: int | None = None,
    optimizer: str = "adagrad",
    samples: Iterable[Any] | None = None,
    method: str = CALL,
    in_place: bool = False,
    rules: Sequence[Rule] = (),
    forms: Sequence[Form] = (),
    solver: str = DEFAULT,
    wire_dtype: torch.dtype | None = None,
    ids: str = "own",
    dynamic: Mapping[str, Mapping[str, Any] | None] | None = None,
    timeout: float = TIMEOUT_S,
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
        A forward that takes no tensor has no rows: "rank_mean".
        Outputs without rows (a loss computed in the model) are the global batch's on every rank, and count once.
        Inputs that require a gradient get that of the losses as ranks compute them, in units of their own rank's.
    batch : int, optional
        Rows per rank to plan for; the example's by default.
    seed : int, optional
        For weights on the meta device; rank 0's ``torch.initial_seed()`` by default.
    forbid : mapping of str to str or sequence of str, optional
        Forms that tables must not take, by name or pattern: ``{"*": ["replicate"]}``.
    cluster : Cluster or str, optional
        Whose seconds of a step are minimised: of the collectives, and of what ranks look up, update and compute. Its
        memory is the limit. The name of a class ("ethernet-100g"), or one that `calibrate` has measured; "bytes": what
        the busiest rank sends is minimised. By default a class is assumed, which `Plan.explain` names: 10 Gbit/s
        Ethernet, and NVLink for models on GPUs.
    memory_bytes : int, optional
        Limit of each rank for weights, gradients, optimiser state and activations.
    optimizer : str
        Whose state counts: "sgd", "momentum", "adagrad", "rowwise_adagrad", "adam", "sparse_adam" or "ftrl".
        With the row-wise one no trained table is divided by columns.
    samples : iterable, optional
        Batches, each as ``example_inputs``, of which statistics of the ids are measured; rank 0's count. Without,
        the example's are, if it has at least 256 rows; else Zipf-distributed ids are assumed.
    method : str
        What is compiled: by default a call of the model (its forward), or a method of it such as "calculate_loss".
    in_place : bool
        Return the user's own object: of its class, with its other methods, with this rank's pieces in its parameters
        and ``method`` (by default "forward") replaced by the compiled one. `module_of` gives its `DistributedModule`.

    rules : sequence of Rule, optional
        Placement rules beside those that are built in or installed, asked after them; see `descompiler.region.rule`.
    forms : sequence of Form, optional
        Forms that tables may take beside those; see `descompiler.tables.form`.
    solver : {"dinic", "networkx"}
        Who finds the minimum cuts that decide where values are aggregated. Both find the same; networkx takes longer.
    wire_dtype : torch.dtype, optional
        Round values to it that cross to one receiver: those that leave the region, rows that are fetched, gradients of
        both. They are summed in their own dtype. ``torch.bfloat16`` halves the bytes of a float32 model's, and training
        is no longer the original's but for this rounding: `verify` with the same ``wire_dtype`` says how far it is.
        float16 has more digits and ends at 65,504 and 6e-8: scale losses, as with autocast. What all ranks have to have
        alike, or a collective sums, is not rounded: dense gradients, values that mix rows, whole tables, products.
    ids : {"own", "global"}
        Whose rows the ids are that a rank is given. "global": what lookups alone read is the *global batch's* on every
        rank, in the order of the ranks, and everything else this rank's own rows. Then no ids cross, and tables take
        forms that are computed for the global batch. For data that is read by columns: a rank needs the ids of its own
        tables, and other columns may hold any valid id. A model of ids alone has an even share of the rows on each
        rank, the first ranks one more. Batches of other sizes, or other ids where all ranks need all, raise on every
        rank. That ranks have the same ids where some of them need them is yours to see to: a table that is on one rank
        is looked up with the ids that this rank was given, whatever the others have.
    dynamic : mapping of str to mapping or None, optional
        Static tables that become dynamic ones, with the rows that they have: paths of ``nn.Embedding`` and
        ``nn.EmbeddingBag`` modules, or their ends, to options of `DynamicEmbedding` (``{"user": {"evict": ...}}``).
    timeout : float
        Seconds that a rank waits for the others, in this call and in every step, before it raises `RankError` with the
        step, the collective and the ranks that did not come (under gloo; NCCL's watchdog has the same time). It has to
        be longer than what one rank does alone, such as to write a checkpoint: five minutes by default. Ranks that wait
        for each other, or for one that has raised, don't wait for it: they raise within seconds.

    Returns
    -------
    DistributedModule, or the model itself if ``in_place``

    Raises
    ------
    CaptureError, UnsupportedError, PlanError, InputError, RankError
    """

    if dynamic:
        if in_place:
            raise InputError(
                "dynamic= puts other modules in the place of the model's tables, and in_place=True leaves "
                "the user's own: give one of them"
            )
        check_model(model)
        watch_optimizers(model.parameters())
        model = with_dynamic(model, dynamic)
    check_model(model)
    terms = Terms(forbid or {}, None, memory_bytes, optimizer, solver=solver, wire_dtype=wire_dtype, ids=ids)

    def compile_for(inputs: Any) -> DistributedModule:
        return distribute(
            model,
            lambda: Builder.of(model, inputs, method, Kit.of(rules, forms)),
            plan=plan,
            process_group=process_group,
            loss=loss,
            batch=batch,
            seed=seed,
            terms=terms,
            cluster=cluster,
            samples=samples,
            host=model if in_place else None,
            timeout=timeout,
        )

    if not in_place:
        watch_optimizers(model.parameters())
        return DeferredModule(model, compile_for) if example_inputs is None else compile_for(example_inputs)
    if example_inputs is None:
        raise InputError("in_place=True needs example_inputs: optimisers have to see the pieces from the start")
    method = "forward" if method == CALL else method  # calls of the model still run its hooks
    return install(model, compile_for(example_inputs), method)


def distribute(
    model: nn.Module,
    builder: Callable[[], Builder],
    *,
    plan: GivenPlan,
    process_group: Any,
    loss: str,
    batch: int | None,
    seed: int | None,
    terms: Terms | None = None,
    cluster: GivenCluster = None,
    samples: Iterable[Any] | None = None,
    host: nn.Module | None = None,
    timeout: float = TIMEOUT_S,
) -> DistributedModule:
    """The pipeline of `compile`, given what captures the model: one builder serves many compilations of a model.

    ``cluster``: in place of the terms' own. ``host``: the model whose parameters become pieces, in place.
    """
    check_counts(None, batch)
    if loss not in LOSSES:
        raise PlanError(f"loss={loss!r}; it is one of {', '.join(LOSSES)}")
    if not isinstance(timeout, int | float) or not timeout > 0:
        raise InputError(f"timeout={timeout!r}; it is a number of seconds")
    ranks, terms = Ranks.of(process_group, timeout), terms or Terms()
    ranks.name_next("des.compile")
    ranks.same("option", f"loss={loss!r}, in_place={host is not None}, timeout={timeout:g}")
    versions = f"descompiler {VERSION}, torch {torch.__version__}, Python {platform.python_version()}"
    ranks.same("version", versions)
    _warn_of_what_is_lost(model, host, ranks)
    if host is not None and (names := [n for n, m in model.named_modules() if isinstance(m, DynamicTable)]):
        raise UnsupportedError(
            f"in_place=True of a model with dynamic tables ({', '.join(sorted(names))}): this rank's rows would have "
            "to leave the user's object. Compile it without, and use the module"
        )
    # capture, classify (what mixes rows), normalise, find tables
    build, captured, failures = ranks.everywhere(
        step_of("capturing the model", lambda: _capture(_for_loss(builder(), loss, ranks.count)))
    )
    if len(set(ranks.of_every(build.sizes))) > 1:  # ranks pad their examples differently: one plan, for the first's
        first = ranks.of_first(map_tensors(Tensor.cpu, build.example_inputs))
        example = map_tensors(lambda x: x.to(build.device), first)
        same = Builder(build.template, example, build.method, build.kit)
        build, captured, failures = ranks.everywhere(lambda: _capture(same))
    rows = ranks.of_first(batch or build.rows)  # ranks may have examples of different sizes
    where = ranks.everywhere(lambda: cluster_of(cluster, ranks.count, build.device.type))
    terms = replace(terms, cluster=where)
    everywhere = all(ranks.of_every(captured is not None))
    if captured is None or not everywhere:
        return distribute_in_part(
            model,
            build,
            failures,
            ranks,
            rows,
            plan=plan,
            loss=loss,
            seed=seed,
            host=host,
            terms=terms,
            samples=samples,
        )
    measure = captured.of_example if samples is None else partial(captured.measure, samples)
    measured = ranks.everywhere(lambda: measure() if ranks.rank == 0 else None)
    terms = replace(terms, statistics=ranks.of_first(measured))
    # propose splits, price them, choose with a cut
    program, operators, w = captured.program, captured.operators, captured.weights(ranks.count, rows)
    follow = partial(build.follow, solver=terms.solver)
    chosen = agreed(asked_of(program, operators, build.kit.rules, w, follow), plan, rows, terms, ranks)
    coverage = coverage_of(program, operators, chosen)
    for text in (None if operators else NO_OPERATORS, coverage.warning()):
        if text:
            ranks.warn(text)
    if host is not None and (names := [dotted(at) for at, x in captured.signature.sets if isinstance(x, Stale)]):
        ranks.warn(
            f"{', '.join(names)}: the method that is compiled sets what its graph does not compute, so who reads it "
            "afterwards gets an error. Return the value from the method, let it be a buffer, or set it where it is read"
        )
    tables = dynamic_tables(model, build.template, chosen.pieces, ranks)
    of = model, build.template, chosen.pieces, seed, build.device, ranks
    values, buffers = initial_values(*of, in_place=host is not None, without=tables)
    runtime, in_place = ranks.runtime(loss), host is not None

    def advise(batches: Sequence[Any]) -> tuple[Plan, Plan]:
        measured = ranks.of_first(ranks.by_first(lambda: _measured(captured, batches)))
        of = replace(as_planned(chosen, terms), statistics=measured)
        asked = asked_of(program, operators, build.kit.rules, w, follow)
        kept = plan if isinstance(plan, Mapping) else None
        return agreed(asked, chosen.forms, rows, of, ranks), agreed(asked, kept, rows, of, ranks)

    held = values, buffers, coverage, host, in_place
    parts = Parts(build.template, chosen, runtime, *held, advise=advise, tables=tables)

    def program_for(training: dict[str, bool], sparse: frozenset[str], *now: Any) -> Emitted:
        current = build.of_now(training, *now)
        emitted = current.emit(chosen, training, ranks.rank, terms.solver, sparse)
        return replace(emitted, planned=current is build)

    return DistributedModule(
        parts,
        captured.signature,
        program_for,
        lambda *now: in_other_flags(build, chosen, coverage, ranks.runtime(loss), tables, *now),
    )


def _measured(captured: Captured, batches: Sequence[Any]) -> Statistics:
    """Statistics of the ids of training's first batches."""
    if not batches:
        raise InputError("module.advise() is about the ids of training, and no step of training has run yet")
    return captured.measure(batches)


def _for_loss(build: Builder, loss: str, ranks: int) -> Builder:
    """Refuse a kind of loss that is about rows where forward takes none: which of the user's tensors have them?"""
    if ranks > 1 and not build.has_rows and loss != "rank_mean":
        raise UnsupportedError(
            f"loss={loss!r}, and forward takes no tensor, so that nothing says how many rows a rank has: make each "
            "rank's loss a mean over equal shares of the rows, and compile with loss='rank_mean'. With losses that are "
            f"sums, or shares that differ, multiply each rank's sum by {ranks}, the number of ranks (and divide it by "
            "the rows of all, for their mean)"
        )
    return build


def _capture(build: Builder) -> tuple[Builder, Captured | None, tuple[Failure, ...]]:
    """What a rank captured, and why not by the tracers before."""
    try:
        captured = Captured.by(build)
    except CaptureError as error:
        return build, None, error.failures
    return build, captured, captured.program.failures


def _warn_of_what_is_lost(model: nn.Module, host: nn.Module | None, ranks: Ranks) -> None:
    """Tensors that are trained by nobody, and hooks that nobody calls."""
    if names := unregistered(model):
        ranks.warn(
            f"{', '.join(names)} hold tensors that require gradients and are not among parameters(): they are "
            "constants of the compiled model. Use nn.ParameterList, or register them, if they are to be trained"
        )
    own = {id(m.weight) for m in model.modules() if isinstance(m, DynamicTable)}  # its own hooks, in every copy
    every = [(n, p) for n, p in model.named_parameters() if id(p) not in own]
    hooked = [n for n, p in every if p._backward_hooks or p._post_accumulate_grad_hooks]
    if hooked and host is None:
        ranks.warn(
            f"gradient hooks on {', '.join(hooked)} are the original's and are not called: register them on the "
            "parameters of the compiled module, or compile with in_place=True"
        )
    if host is None and (names := _changing_states(model)):
        ranks.warn(
            f"{', '.join(names)} change states by hooks or methods of their own, which the compiled module does not "
            "call: its state_dict has parameters and buffers under their names, and loads these. "
            "des.to_single(module).state_dict() is the original's"
        )


STATE_HOOKS = [
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
]


def _changing_states(model: nn.Module) -> list[str]:
    """Modules with hooks on their states, torch's own and those of dynamic tables aside, and a root with methods."""
    found = [name for name in ("state_dict", "load_state_dict") if has_its_own(model, name)]
    for name, m in model.named_modules():
        hooks = [getattr(h, "hook", h) for kind in STATE_HOOKS for h in vars(m)[kind].values()]
        if not all((getattr(h, "__module__", None) or "").startswith(("torch.", "descompiler.")) for h in hooks):
            found.append(name or type(m).__name__)
    return found

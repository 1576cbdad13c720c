"""Capture: from a user's module to a `Program`, accepted only after it reproduces the module.

The model is copied without its weights (`blueprint`), so that tables of any size can be captured anywhere. The tracers
of `RUNGS` are tried in turn. A graph is accepted if it gives the module's outputs and gradients in
float64, on the example batch and on a batch of another size with other values and other weights. Last, every node is
told from own rows or mixing rows (`descompiler.classify.classify`), since each rank is given its own rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descompiler.capture.carried import carried_over, kept_by_leaves
from descompiler.capture.checks import CannotRunError, check_reproduces, probe_values, program_in_float64, renew_leaves
from descompiler.capture.leaves import WHOLE_MODEL, trace_leaves, trace_whole
from descompiler.capture.tracers import trace_dynamo, trace_export
from descompiler.classify.classify import JUDGED, classify
from descompiler.classify.scope import OWN_ROWS, scope_of
from descompiler.errors import CaptureError, DescompilerError, InputError, UnsupportedError, raised_at
from descompiler.graph.leaf import Leaf, LeafError
from descompiler.graph.program import Failure, Program
from descompiler.graph.rewrite import Pass, run_passes
from descompiler.model.attributes import (
    Place,
    attributes_inside,
    left_behind,
    plain_attributes,
    reads_of,
    set_attributes,
)
from descompiler.model.calls import Signature, example_call, parameters_of
from descompiler.model.float64 import InDouble
from descompiler.model.inputs import ArgumentPath, apart, flatten, leaf_paths, no_batch, split_statics
from descompiler.model.probe import (
    CALL,
    Flat,
    at_least_two_rows,
    double_all,
    materialise,
    move_parameters,
    other_batch,
    run_eager,
    updated_arguments,
)
from descompiler.model.stale import set_by_forward

RUNGS: tuple[tuple[str, Callable[[Flat, list[Tensor], nn.Module], Program]], ...] = (
    ("export", trace_export),
    ("dynamo", trace_dynamo),
    ("fx", trace_leaves),
    ("leaf", trace_whole),
)
"""The ladder, in the order in which it is climbed."""


def _try_probe(make: Callable[[], Flat], tensors: list[Tensor]) -> tuple[Flat, frozenset[Place]]:
    """A probe that runs, and the plain attributes that it reads.

    A model that makes float32 tensors in forward may not run, unless it makes float64 ones there.
    """
    probe = make()
    try:
        with reads_of(probe.model) as reads:
            run_eager(probe, tensors)
    except Exception:
        probe = _in_double(make())  # forward may have kept a float32 tensor, or wants a dict that is nothing else
        with reads_of(probe.model, by_key=False) as reads:
            run_eager(probe, tensors)
    return probe, frozenset(reads)


def _runs(probe: Flat, tensors: list[Tensor]) -> bool:
    try:
        run_eager(probe, tensors)
    except Exception:  # whatever the user's forward raises
        return False
    return True


def _in_double(probe: Flat) -> Flat:
    probe.arithmetic = InDouble
    return probe


def _check_program(program: Program, probe: Flat, batches: Sequence[list[Tensor]]) -> None:
    """Raise unless the program reproduces the model."""
    set_attributes(probe.model, probe.attributes)
    renew_leaves(program)
    for batch in batches:
        check_reproduces(program, probe, batch)
        move_parameters(probe)


def _check_leaves(program: Program) -> None:
    """A leaf that writes to buffers runs once, for the global batch, or not at all.

    Batch norm in a leaf would make it mix rows, at the price of gathering them; partial capture exchanges statistics.
    Rows of a dynamic table are no leaf's argument: it may look some up that the trace has not shown.
    """
    for n in program.graph.nodes:
        if isinstance(n.target, Leaf) and any(program.parameter(x) in program.dynamic for x in n.all_input_nodes):
            raise LeafError(f"{n.target.name!r} may look up rows of a dynamic table by itself")
        if isinstance(n.target, Leaf) and n.target.call.writes and scope_of(n).kind == OWN_ROWS:
            what = "trains a batch norm" if n.target.call.trains_norm else "writes to its buffers"
            raise LeafError(f"{n.target.name!r} {what}, and its rows are independent otherwise")


def _read_by_leaves(program: Program, model: nn.Module) -> set[Place]:
    """Numbers of modules that run as they are: which of them they read depends on what they are given."""
    paths = {n.target.name for n in program.graph.nodes if isinstance(n.target, Leaf)}
    every = {*plain_attributes(model), *attributes_inside(model)}
    if WHOLE_MODEL in paths:
        return every
    return {at for at in every if any(at[0] == path or at[0].startswith(f"{path}.") for path in paths)}


def _refuse_numbers(signature: Signature, probe: Flat, batch: list[Tensor]) -> None:
    """Refuse outputs that are no tensors and depend on the batch: a graph, and a rank's own forward, have others.

    Raises
    ------
    UnsupportedError
        With the place of the output.
    """
    move_parameters(probe)
    try:
        run_eager(probe, batch)
    except Exception:  # whatever forward raises on another batch: the rungs meet it again, and say so
        return
    if probe.out_spec != signature.outputs:
        one, two = signature.outputs.num_leaves, len(probe.out_statics)
        raise UnsupportedError(
            f"forward returns {one} values for one batch and {two} for another, or nests them otherwise: return the "
            "same names, as many tensors, for every batch"
        )
    for i, (first, second) in enumerate(zip(signature.output_statics, probe.out_statics, strict=True)):
        if repr(first) != repr(second):
            raise UnsupportedError(
                f"forward returns a number that depends on the batch: output{_place_of(signature, i)} is {first!r} for "
                f"one and {second!r} for another, and of a rank's rows it would be another still. Return the tensor "
                "(loss.detach() in place of loss.item()), and take the number of what the compiled module returns"
            )


def _refuse_rows_elsewhere(probe: Flat, tensors: list[Tensor]) -> None:
    """Refuse inputs of which forward takes a few rows by their number, and no others: ``[3, B]``, the batch in dim 1.

    Raises
    ------
    InputError
        With the line that takes them.
    """
    try:
        run_eager(probe, [t[:1] for t in tensors])
        return
    except (IndexError, ValueError) as found:
        if not isinstance(found, IndexError) and "to unpack" not in str(found):
            return
        error = found
    except Exception:  # whatever forward raises on one row says nothing of where rows lie
        return
    try:
        expected = run_eager(probe, tensors)
        more = run_eager(probe, [torch.cat(both) for both in zip(tensors, other_batch(tensors), strict=True)])
        if any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(expected, more, strict=True)):
            return
    except Exception:  # more rows are too many
        pass
    raise InputError(
        f"dim 0 of every input is the batch, and forward takes {len(tensors[0])} rows by their number "
        f"({type(error).__name__}: {error} at {raised_at(error)}): the batch seems to lie in another dimension. Pass "
        "the batch first (x.T of an x [3, B], of which forward takes columns, x[:, 0]), or one tensor for each row"
    ) from error


def _place_of(signature: Signature, position: int) -> str:
    """Where a leaf is in what forward returns, as code would have it: ``[1]['loss']``."""
    leaves: list[Any] = list(range(len(signature.output_statics)))
    paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(leaves, signature.outputs))[0]
    return next((pytree.keystr(path) for path, leaf in paths if leaf == position), f" number {position}")


NOT_CAPTURED = (
    "no tracer captured the model whole: a graph needs ids that are computed by operators of torch alone, and shapes "
    "that depend on the batch's size, not on values"
)


def capture(
    template: nn.Module,
    example_inputs: Any,
    *,
    training: dict[str, bool] | None = None,
    passes: tuple[Pass, ...] = (),
    method: str = CALL,
    trained: Collection[int] = (),
) -> tuple[Program, Signature]:
    """Capture a module (a `blueprint`) as a program.

    Parameters
    ----------
    template : torch.nn.Module
        From `blueprint`.
    example_inputs : tuple or dict
        Inputs of one forward; at least one row.
    training : dict of str to bool, optional
        The ``training`` flag of each module by name; the template's own if not given.
    passes : tuple of Pass, optional
        Applied to the graph before it has to reproduce the module.
    method : str
        What is called; by default the module itself.
    trained : collection of int
        Positions of the tensors among the inputs that require a gradient.

    Returns
    -------
    Program, Signature

    Raises
    ------
    CaptureError
        If no tracer makes a graph that reproduces the module; the text says why of each.
    UnsupportedError
        For an output that is no tensor, or an operator whose distributed form would not be the original.
    InputError
        If the example inputs can't be run.
    """
    call = example_call(template, example_inputs, method)
    leaves, spec = flatten(call)
    tensors, statics = split_statics(leaves)
    tensors = apart(at_least_two_rows(tensors or [no_batch()]))
    device = tensors[0].device

    updates: tuple[ArgumentPath, ...] = ()

    def flat(double: bool) -> Flat:
        model = materialise(template, device, double=double)
        for name, module in model.named_modules():
            module.training = module.training if training is None else training[name]
        result = Flat(model, spec, statics, method)
        result.training, result.updates = model.training, updates
        return result

    try:
        probe, reads = _try_probe(lambda: flat(double=True), double_all(tensors))
    except UnsupportedError:
        raise
    except Exception as error:
        place = raised_at(error)
        where = f" at {place}" if place else ""
        if _runs(flat(double=False), tensors):
            raise UnsupportedError(
                "forward runs in its own dtypes, and not in float64, in which a graph is compared with it "
                f"({type(error).__name__}: {error}{where}): write that operator with others, that have float64 too"
            ) from error
        raise InputError(
            f"the model can't run example_inputs ({type(error).__name__}: {error}{where}); pass what its forward takes"
        ) from error
    left, written = tuple(left_behind(probe.model)), set_by_forward(template, probe.model)
    assert probe.out_spec is not None  # from the eager run: export undoes what forward writes to its module
    probe.updates = updates = updated_arguments(probe, double_all(tensors))
    parameters = parameters_of(template, method)
    returned = probe.out_spec, statics, probe.out_statics
    signature = Signature(spec, *returned, updates, leaf_paths(call), parameters)
    _refuse_rows_elsewhere(probe, double_all(tensors))
    _refuse_numbers(signature, probe, double_all(other_batch(tensors)))

    def fresh() -> Flat:
        return _in_double(flat(double=True)) if probe.arithmetic is InDouble else flat(double=True)

    sets, carried = carried_over(fresh, double_all(tensors), written)
    signature = replace(signature, sets=sets)
    if carried:
        raise CaptureError(carried, tuple(Failure(rung, carried) for rung, _ in RUNGS))
    failures: list[Failure] = []
    for rung, trace in RUNGS:
        try:
            # of a copy each: a trace that fails may leave it broken
            program = checked = run_passes(trace(flat(double=False), tensors, template), passes)
            used = probe
            batches = [double_all(batch) for batch in (tensors, other_batch(tensors, program.accepts))]
            try:
                _check_program(checked, used, batches)
            except CannotRunError:
                checked = program_in_float64(program)  # it makes or holds float32 tensors
                _check_program(checked, used, batches)
            except CaptureError:
                # a tracer leaves out casts that do nothing in float32, and bakes dtypes that forward asks for
                checked, used = program_in_float64(program), _in_double(flat(double=True))
                _check_program(checked, used, batches)
        except DescompilerError as error:
            failures.append(Failure(rung, str(error)))
            continue
        try:
            with used.arithmetic():
                classify(checked, partial(probe_values, checked, used), batches[0], trained)
            _check_leaves(checked)
            if carried := kept_by_leaves(checked, fresh, double_all(tensors)):
                raise LeafError(carried)
        except LeafError as error:
            failures.append(Failure(rung, str(error)))
            continue
        renew_leaves(checked)
        metas = {n.name: n.meta for n in checked.graph.nodes}
        for n in program.graph.nodes:
            n.meta.update({k: x for k, x in metas[n.name].items() if k in JUDGED})
        program = replace(program, rung=rung, failures=tuple(failures))
        program = replace(program, left_behind=left, reads=reads | _read_by_leaves(program, template))
        return program, signature
    raise CaptureError("\n".join([NOT_CAPTURED, *(f"  {f}" for f in failures)]), tuple(failures))

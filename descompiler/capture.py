"""Capture: from a user's module to a `Program`, accepted only after it reproduces the module.

The model is copied without its weights (`blueprint`), so that tables of any size can be captured anywhere. Tracing is
`torch.export`, non-strict, with a dynamic batch dimension. The graph then has to give the module's outputs and
gradients in float64, on the example batch and on a batch of another size with other values, and has to treat the rows
of a batch independently (batch norm and dropout aside), since each rank will see its own rows only.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from descompiler.checks import check_reproduces, check_rows_independent
from descompiler.errors import InputError, UnsupportedError
from descompiler.inputs import Signature, flatten, normalise_inputs, split_statics
from descompiler.probe import Flat, at_least_two_rows, double_all, materialise, other_batch, run_eager
from descompiler.program import Pass, Program, run_passes
from descompiler.tracers import trace_export


def capture(
    template: nn.Module,
    example_inputs: Any,
    *,
    training: dict[str, bool] | None = None,
    passes: tuple[Pass, ...] = (),
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

    Returns
    -------
    Program, Signature

    Raises
    ------
    CaptureError
        If tracing fails, or the graph does not reproduce the module.
    UnsupportedError
        If an operator mixes the rows of a batch.
    InputError
        If the example inputs can't be run.
    """
    leaves, spec = flatten(normalise_inputs(example_inputs, template.forward))
    tensors, statics = split_statics(leaves)
    tensors = at_least_two_rows(tensors)
    device = tensors[0].device

    def flat(double: bool) -> Flat:
        model = materialise(template, device, double=double)
        for name, module in model.named_modules():
            module.training = module.training if training is None else training[name]
        result = Flat(model, spec, statics)
        result.training = model.training
        return result

    probe = flat(double=True)
    try:
        run_eager(probe, double_all(tensors))
    except UnsupportedError:
        raise
    except Exception as error:
        raise InputError(
            f"the model can't run example_inputs ({type(error).__name__}: {error}); pass what its forward takes"
        ) from error

    traced = flat(double=False)
    program = run_passes(trace_export(traced, tensors, template), passes)
    assert probe.out_spec is not None  # from the eager run: export undoes what forward writes to its module
    signature = Signature(spec, probe.out_spec, statics, probe.out_statics)
    for batch in (tensors, other_batch(tensors)):
        check_reproduces(program, probe, double_all(batch))
    check_rows_independent(program, probe, double_all(tensors))
    return program, signature

"""`verify`: the distributed module against the original on the global batch, on real local processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from descompiler.capture.batch_size import with_batch_size
from descompiler.check.compare import train_and_compare
from descompiler.check.judge import Report
from descompiler.check.processes import on_ranks
from descompiler.check.smaller import smaller
from descompiler.errors import InputError, warn
from descompiler.model.attributes import copied
from descompiler.model.float64 import widen, widen_attributes
from descompiler.model.inputs import map_tensors, normalise_inputs
from descompiler.model.kept import keep_as_buffers
from descompiler.model.probe import CALL, blueprint, check_model, method_of
from descompiler.module.dynamic import tables_of
from descompiler.planning.objective import Terms
from descompiler.region.rule import Rule
from descompiler.runtime.room import free_bytes
from descompiler.tables.form import Form


def verify(
    model: nn.Module,
    example_inputs: Any,
    *,
    ranks: int = 2,
    steps: int = 3,
    plans: Sequence[Mapping[str, str] | None] = (None,),
    optimizers: Sequence[str] = ("sgd",),
    timeout_s: float = 120.0,
    device: str = "cpu",
    method: str = CALL,
    rows: int | None = None,
    rules: Sequence[Rule] = (),
    forms: Sequence[Form] = (),
    launch: Callable[..., list[Any]] | None = None,
    thorough: bool = False,
    wire_dtype: torch.dtype | None = None,
    ids: str = "own",
) -> Report:
    """Prove on ``ranks`` local gloo processes that the compiled model trains as the original.

    In float64, on uneven batches, one of them empty, with repeated rows: outputs, every gradient, every weight after
    ``steps`` optimiser steps, predicted against sent bytes. Dropout is set to 0: its masks are random. Random numbers
    that are drawn once for the whole batch are given to the original too; those that each rank draws for its own rows
    can't be compared.

    A difference may be `TOLERANCE_FLOAT64` of a tensor's size. Two kinds of gradient are judged otherwise, and are no
    part of `Report.worst`: those that are zero but for rounding (`Report.rounding`), and those that small changes of
    weights move by more than that (`Report.conditioned`): the differences of rounding that the weights have by then,
    themselves within the tolerance, or rounding them once. Such a gradient has to be that of the original at the
    module's own weights, within the tolerance or `SENSITIVITY_FACTOR` times what rounding moves.

    Parameters
    ----------
    plans : sequence of mapping or None
        Forms to force, one run each; None is the compiler's own choice of the fewest bytes
        (``cluster="bytes"``), which on few rows divides more than the fastest would.
    optimizers : sequence of str
        Keys of `OPTIMIZERS`. With sparse gradients, "sparse_adam" takes those tables and Adagrad the rest.
    device : str
        Where both models are; the ranks share it if it is a GPU.
    method : str
        What is compiled, as `compile`'s: by default a call of the model, or a method such as "calculate_loss".
    rows : int, optional
        Cut tables to so many rows, and look ids up modulo their number (`descompiler.check.smaller`): the proof of a
        model that is too large for this machine, which may be on the meta device.
    rules, forms : sequence, optional
        As `compile`'s: what is proved with the model.
    launch : callable, optional
        Calls a function on every rank, as `on_ranks`, which is the default and starts processes for it.
    thorough : bool
        Try also what users' training does, some fifty steps for each plan, which take so much longer:

        - each output alone in the loss, their plain sum, and the three kinds of ``loss``: gradients that are zero in
          place of None, outputs without one, losses averaged that were to be summed;
        - a gradient penalty by inputs that are floating-point: second-order terms that are dropped;
        - batches of other sizes (one row, one a rank, more than the example's): branches on a rank's own rows;
        - other lengths of sequences, 0 among them;
        - inputs at their edges (0, the smallest and largest, the last id, all rows equal), in every row and in one:
          branches that the example did not take;
        - Adam with weight decay, another batch each step, evaluation in between: state that is not updated, outputs of
          training in evaluation, weights that move without a gradient;
        - the model's own dtypes: values that cross in a narrower one.

        Trials in which the original itself has no result (it raises, or is not finite) are left out
        (`Report.left_out`); where rounding alone decides its gradient, as where all rows are equal in front of a batch
        norm, that gradient is not compared (`Report.conditioned`). What the module refuses by name is no difference;
        `Report.refused` has its words.
    wire_dtype : torch.dtype, optional
        As `compile`'s: measure what rounding to it does. `Report.worst` then has the largest relative errors of
        outputs, gradients and weights that it causes, and what differs by more than rounding may do is raised: eight
        times what the original's own results change when its weights are changed by the dtype's eps / 2, and eight
        such shares of a result's largest entry (`descompiler.check.rounding` derives it). Equivalence itself is proved
        without.
    ids : {"own", "global"}
        As `compile`'s: with "global" every rank is given the ids of the global batch, and own rows of the rest.

    Returns
    -------
    Report

    Raises
    ------
    EquivalenceError
        With the worst parameter named.
    InputError
        Before anything is allocated, if this machine's memory does not suffice: what is missing.
    """
    check_model(model)
    if thorough and wire_dtype is not None:
        raise InputError("thorough=True proves equivalence, which wire_dtype= gives up: call verify once with each")
    if thorough and ids != "own":
        raise InputError(f"thorough=True tries ranks' own inputs, and not ids={ids!r}: call verify once with each")
    terms = Terms(wire_dtype=wire_dtype, ids=ids)
    if (thorough or wire_dtype is not None) and tables_of(model):
        raise InputError("models with dynamic tables are proved without thorough=True and wire_dtype=")
    if rows is not None:
        model = smaller(model, rows)
    check_memory(model, ranks, optimizers)
    model = copy.deepcopy(model, copied(model))
    keep_as_buffers(model)  # as the compiled model does: Module.double() leaves values of a CSR parameter as they are
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.AlphaDropout | nn.FeatureAlphaDropout | nn.Dropout1d):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0
    example_inputs = with_batch_size(model, lambda: blueprint(model), example_inputs, method)
    own_inputs = map_tensors(lambda x: x.cpu(), normalise_inputs(example_inputs, method_of(model, method)))
    narrow = (copy.deepcopy(model, copied(model)).cpu(), own_inputs) if thorough else None
    inputs = map_tensors(widen, own_inputs)
    model = model.double().cpu()
    widen_attributes(model)
    report = Report(ranks, wire_dtype=wire_dtype)
    asked = (model, inputs, steps, list(plans), list(optimizers), device, method)
    what = (*asked, tuple(rules), tuple(forms), narrow, terms)
    for other in (launch or on_ranks)(train_and_compare, ranks, *what, timeout_s=timeout_s):
        report.join(other)
    return report


def needed_bytes(model: nn.Module, ranks: int, optimizers: Sequence[str]) -> int:
    """Bytes that `verify` takes for a model's parameters, in float64, of all processes together.

    The caller has a copy; a rank the original, its gradients and optimiser state, the same of its pieces, and the
    whole of these once, to compare.
    """
    elements = sum(p.numel() for p in model.parameters())
    state = max((STATE_OF.get(name, 0) for name in optimizers), default=0)
    return 8 * elements * (1 + ranks * (4 + state) + 2 + state)


STATE_OF = {"sgd": 1, "adagrad": 1, "adam": 2, "sparse_adam": 2, "ftrl": 2}
"""Tensors of a parameter's size that an optimiser of `OPTIMIZERS` keeps."""


TOLD_SHARE = 0.25
"""Share of the free memory from which on `verify` says what it needs."""


def check_memory(model: nn.Module, ranks: int, optimizers: Sequence[str]) -> None:
    """Say what a proof needs of memory where it is much, and refuse what there is not."""
    if on_meta := [n for n, p in model.named_parameters() if p.is_meta]:
        raise InputError(
            f"{', '.join(map(repr, on_meta[:5]))} are on the meta device, and the original needs values to be compared "
            "with: verify(..., rows=1000) draws them, for tables of so many rows"
        )
    needed, free = needed_bytes(model, ranks, optimizers), free_bytes(torch.device("cpu"))
    text = f"verify needs about {needed:,} B for the model on {ranks} ranks, and {free:,} B are free"
    if needed > free:
        raise InputError(
            f"{text}: {needed - free:,} B are missing. verify(..., rows=1000) cuts tables to so many rows, and takes "
            "ids modulo their number"
        )
    if needed > TOLD_SHARE * free:
        warn(f"{text}; verify(..., rows=1000) proves the same of smaller tables")

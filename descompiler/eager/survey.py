"""Partial capture, the last rung: the user's own Python forward runs on every rank, on its own rows.

`survey` runs the model (a probe, with random weights) and sees how each parameter is used. Parameters that are only
looked up are divided by rows and fetched (`descompiler.eager.pieces`); the others stay whole on every rank. What a
graph would have shown is checked on values: whether rows of a batch depend on each other, batch norm aside. Where they
do, every rank gathers the inputs of all and runs the global batch: exact, and no faster than one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from descompiler.capture.checks import TOLERANCE_FLOAT64, relative_error
from descompiler.errors import InputError, UnsupportedError
from descompiler.model.float64 import InDouble, is_double_meant
from descompiler.model.folded import has_own_values
from descompiler.model.inputs import flatten, knows_rows, map_tensors, normalise_inputs, split_statics, take_rows
from descompiler.model.probe import CALL, call_of, materialise, method_of
from descompiler.model.random_state import seeded
from descompiler.ops.functions import DROPOUTS, LOOKUPS, function_name

ROWS, MEAN, SUM, SAME, COUPLED = "rows", "mean", "sum", "same", "coupled"
"""What an output is: rows of the batch; a scalar that is a mean over rows, a sum over rows, or free of the batch; or
coupled: it combines rows in some other way."""


@dataclass
class Use:
    """How one parameter is used."""

    ids: int = 0  # looked up per batch
    vectors: int = 0  # that lookups return
    sparse: bool = False
    lookups: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)


@dataclass
class Survey:
    """What a run of the model showed.

    Attributes
    ----------
    uses : dict of str to Use
        By parameter.
    outputs : tuple of str
        What each tensor that forward returns is: `ROWS`, `MEAN`, `SUM`, `SAME`; where ``coupled``, `ROWS` or `COUPLED`.
    rows : int
        Of the example batch; 0 if it is not known.
    unchecked : str
        Why rows could not be checked; empty if they were.
    coupled : str
        Why every rank has to run the global batch: an output combines rows, or random numbers are drawn for all of
        them; empty if neither.
    input_bytes : int
        Of one row of the inputs.
    random : bool
        Whether forward draws random numbers, dropout aside.
    """

    uses: dict[str, Use]
    outputs: tuple[str, ...]
    rows: int
    unchecked: str = ""
    coupled: str = ""
    input_bytes: int = 0
    random: bool = False


class _Recorder(TorchFunctionMode):
    """Notes uses of parameters, and random draws; batch norm in training and dropout pass their input on, if asked."""

    def __init__(self, model: nn.Module, *, skip_norms: bool):
        super().__init__()
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.uses: dict[str, Use] = {}
        self.skip_norms = skip_norms
        self.random = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if self.skip_norms and func in DROPOUTS:
            return args[0].clone()
        if self.skip_norms and func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training")):
            return args[0].clone()
        result = func(*args, **kwargs)
        for leaf in leaves:
            name = self.names.get(id(leaf)) if isinstance(leaf, Tensor) else None
            if name is None:
                continue
            ids = [x for x in leaves if isinstance(x, Tensor) and not x.is_floating_point() and x.dtype != torch.bool]
            whole = isinstance(result, Tensor) and result.grad_fn is None and torch.is_grad_enabled()
            if whole and leaf.requires_grad:
                continue  # a size, a dtype, a detached value
            if not isinstance(result, Tensor):
                continue
            use = self.uses.setdefault(name, Use())
            if func in LOOKUPS and ids:
                use.lookups.add(function_name(func))
                use.ids += ids[0].numel()
                use.vectors += result.numel() // max(leaf.shape[1:].numel(), 1)
                use.sparse |= bool(kwargs.get("sparse", func is torch.embedding and len(args) > 4 and args[4]))
            else:
                use.others.add(function_name(func))
        return result


def survey(template: nn.Module, example_inputs: Any, method: str = CALL) -> Survey:
    """Run a model and see how it uses its parameters, and what it returns.

    Raises
    ------
    InputError
        If the model can't run the example inputs.
    UnsupportedError
        If it can't be told which rows of the inputs an output belongs to.
    """
    args, kwargs = normalise_inputs(example_inputs, method_of(template, method))
    double = map_tensors(lambda x: x.double() if x.is_floating_point() else x, (args, kwargs))
    tensors, _ = split_statics(flatten(double)[0])
    device = tensors[0].device if tensors else torch.device("cpu")
    model = materialise(template, device, double=True)
    state = {n: b.clone() for n, b in model.named_buffers()}

    def run(inputs: Any, *, skip_norms: bool) -> tuple[list[Tensor], _Recorder]:
        for n, b in model.named_buffers():
            b.copy_(state[n])
        recorder = _Recorder(model, skip_norms=skip_norms)
        with seeded(11, device) as has_drawn, InDouble() if double_meant else nullcontext(), recorder:
            out = call_of(model, method)(*inputs[0], **inputs[1])
            recorder.random = has_drawn()
        return split_statics(flatten(out)[0])[0], recorder

    double_meant = is_double_meant()
    try:
        try:
            _, recorder = run(double, skip_norms=False)
        except RuntimeError:  # perhaps float32, which its forward makes (and may have kept), meets float64
            double_meant, model = True, materialise(template, device, double=True)
            _, recorder = run(double, skip_norms=False)
    except UnsupportedError:
        raise
    except Exception as error:
        raise InputError(
            f"the model can't run example_inputs ({type(error).__name__}: {error}); pass what its forward takes"
        ) from error
    sizes = {t.shape[0] if t.dim() else None for t in tensors}
    whole, without_dropout = run(double, skip_norms=True)
    random = without_dropout.random
    if (len(sizes) != 1 or None in sizes) and not knows_rows(double):
        rows = next((o.shape[0] for o in whole if o.dim()), 0)
        if any(not o.dim() or o.shape[0] not in sizes for o in whole):
            raise UnsupportedError(
                "forward returns a tensor that has not the rows of any input, and its inputs' sizes differ in dim 0: "
                "its rows are not known. Return one row for each row of an input, or pass inputs of one size"
            )
        unchecked = "the inputs differ in dim 0" + ", and it draws random numbers, each rank its own" * random
        return Survey(recorder.uses, (ROWS,) * len(whole), rows, unchecked, random=random)
    rows = tensors[0].shape[0] if len(sizes) == 1 else next((o.shape[0] for o in whole if o.dim()), 0)
    if not rows:
        raise UnsupportedError("the inputs differ in dim 0 and forward returns a scalar: its rows are not known")
    kinds = _kinds(double, rows, lambda x: run(x, skip_norms=True)[0], lambda: _renew(model))
    if COUPLED in kinds:
        coupled = f"output {kinds.index(COUPLED)} of forward depends on how a batch is divided"
    elif random:  # of a few rows the numbers are those of many: one draw for all, which ranks have to share
        coupled = "forward draws random numbers for the whole batch"
    else:
        return Survey(recorder.uses, kinds, rows)
    if len(sizes) != 1 or None in sizes:
        raise UnsupportedError(
            f"{coupled}, no tracer captured the model as a graph, and the inputs differ in dim 0: ranks' batches "
            "can't be put together. Move what combines rows into the loss, make forward traceable, or pass padded "
            "tensors with one row for each row of the batch"
        )
    originals, _ = split_statics(flatten((args, kwargs))[0])
    row_bytes = sum(x[0].numel() * x.element_size() for x in originals)
    outputs = _of_the_whole(double, rows, kinds, lambda x: run(x, skip_norms=True)[0])
    return Survey(recorder.uses, outputs, rows, "", coupled, row_bytes, random)


def _of_the_whole(inputs: Any, rows: int, kinds: Sequence[str], run: Any) -> tuple[str, ...]:
    """What outputs are where every rank runs the global batch: `ROWS` if dim 0, and no other, follows its size."""
    sizes = (rows, 2 * rows)
    small, large = (run(take_rows(inputs, torch.arange(n) % rows)) for n in sizes)

    def follows(a: Tensor, b: Tensor) -> bool:
        moving = [d for d, n in enumerate(a.shape) if (n, b.shape[d]) != (n, n)]
        return moving == [0] and (a.shape[0], b.shape[0]) == sizes

    return tuple(ROWS if k == ROWS or follows(a, b) else COUPLED for k, a, b in zip(kinds, small, large, strict=True))


def _renew(model: nn.Module) -> None:
    """Give a probe other weights; large tables, which overlap in memory, keep theirs."""
    with torch.no_grad():
        for p in model.parameters():
            if has_own_values(p) and p.is_floating_point():
                p.normal_(std=0.3)


def _kinds(inputs: Any, rows: int, run: Any, renew: Any) -> tuple[str, ...]:
    """What each output is, from batches of rows drawn from the example, divided unevenly, and turned round.

    One division could be a mean over rows by accident (a mean over valid positions is, where both parts have as many),
    and for some weights a choice that is made for the whole batch is that of its parts: so it is done a few times.
    """
    possible: list[set[str]] = []
    for seed in range(DRAWS):
        index = torch.randint(rows, (DRAWN_ROWS,), generator=torch.Generator().manual_seed(seed))
        index[-1] = (index[0] + 1) % rows  # not one row again and again
        renew()
        whole, turned = run(take_rows(inputs, index)), run(take_rows(inputs, index.flip(0)))
        possible = possible or [{ROWS, SAME, MEAN, SUM} for _ in whole]
        for sizes in DIVISIONS:
            parts = [run(take_rows(inputs, part)) for part in index.split(sizes)]
            for kinds, w, t, *p in zip(possible, whole, turned, *parts, strict=True):
                kinds &= _kinds_of(w, t, p, sizes)
    return tuple(next((k for k in (ROWS, SAME, MEAN, SUM) if k in kinds), COUPLED) for kinds in possible)


DRAWS, DRAWN_ROWS, DIVISIONS = 4, 7, ((3, 4), (5, 2))


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and relative_error(x.double(), y.double()) <= TOLERANCE_FLOAT64


def _kinds_of(whole: Tensor, turned: Tensor, parts: Sequence[Tensor], sizes: Sequence[int]) -> set[str]:
    """What an output may be, given that of the batch, of the batch turned round, and of its parts."""
    if whole.dim():
        shapes = [(n, *whole.shape[1:]) for n in (*sizes, sum(sizes))]
        by_row = [tuple(x.shape) for x in (*parts, whole)] == shapes
        return {ROWS} if by_row and _same(whole, torch.cat(list(parts))) and _same(whole.flip(0), turned) else set()
    if any(p.dim() for p in parts) or not _same(whole, turned):
        return set()
    together = torch.stack(list(parts)).double()
    shares = torch.tensor(sizes, dtype=torch.float64, device=together.device) / sum(sizes)
    found = {
        SAME: all(_same(whole, p) for p in parts),
        MEAN: _same(whole, together @ shares),
        SUM: _same(whole, together.sum()),
    }
    return {kind for kind, holds in found.items() if holds}

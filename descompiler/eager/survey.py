"""Partial capture, the last rung: the user's own Python forward runs on every rank, on its own rows.

`survey` runs the model (a probe, with random weights) and sees how each parameter is used. Parameters that are only
looked up are divided by rows and fetched (`descompiler.eager.pieces`); the others stay whole on every rank. What a
graph would have shown is checked on values: whether rows of a batch depend on each other, batch norm aside. Where they
do, every rank gathers the inputs of all and runs the global batch: exact, and no faster than one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.capture.carried import AS_IF
from descompiler.capture.checks import CAPTURE_TOLERANCE, relative_error
from descompiler.classify.decisions import Decisions, decides_for_others
from descompiler.eager.recorder import Runs, Use, in_float64
from descompiler.errors import UnsupportedError
from descompiler.model.attributes import Place, dotted, held_tensors
from descompiler.model.folded import has_own_values
from descompiler.model.inputs import flatten, knows_rows, normalise_inputs, split_statics, take_rows
from descompiler.model.probe import CALL, method_of

ROWS, MEAN, SUM, SAME, UNION, COUPLED = "rows", "mean", "sum", "same", "union", "coupled"
"""What an output is: rows of the batch; a scalar that is a mean over rows, a sum over rows, or free of the batch; or
coupled: it combines rows in some other way. What is looked up in a dynamic table is the union of what each row does."""


Told = Tensor | frozenset[int]
"""An output, or what a run has looked up in a dynamic table."""


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
    kept : int
        Elements that autograd keeps for backward, of one row.
    """

    uses: dict[str, Use]
    outputs: tuple[str, ...]
    rows: int
    unchecked: str = ""
    coupled: str = ""
    input_bytes: int = 0
    random: bool = False
    kept: int = 0


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
    double = in_float64((args, kwargs))
    tensors, _ = split_statics(flatten(double)[0])
    run = Runs(template, double, method)
    sizes = {t.shape[0] if t.dim() else None for t in tensors}
    whole, without_dropout = run(double, skip_norms=True)
    random = without_dropout.random
    kept, counters = run.watch_buffers(), run.changed_numbers()

    def found(outputs: tuple[str, ...], rows: int, **more: Any) -> Survey:
        of_a_row = -(-run.first.kept // max(rows, 1))
        return Survey(run.first.uses, outputs, rows, random=random, kept=of_a_row, **more)

    if (len(sizes) != 1 or None in sizes) and not knows_rows(double):
        rows = next((o.shape[0] for o in whole if o.dim()), 0)
        if any(not o.dim() or o.shape[0] not in sizes for o in whole):
            raise UnsupportedError(
                "forward returns a tensor that has not the rows of any input, and its inputs' sizes differ in dim 0: "
                "its rows are not known. Return one row for each row of an input, or pass inputs of one size"
            )
        unchecked = "the inputs differ in dim 0" + ", and it draws random numbers, each rank its own" * random
        return found((ROWS,) * len(whole), rows, unchecked=unchecked)
    rows = tensors[0].shape[0] if len(sizes) == 1 else next((o.shape[0] for o in whole if o.dim()), 0)
    if not rows:
        raise UnsupportedError("the inputs differ in dim 0 and forward returns a scalar: its rows are not known")
    every = _output_kinds(double, rows, run.told, lambda: _renew(run.model))
    kinds, of_buffers = every[: len(whole)], every[len(whole) : len(whole) + len(kept)]
    apart = [n for n, kind in zip(kept, of_buffers, strict=True) if kind != SAME]
    sighted = zip(run.sighting(), every[len(whole) + len(kept) :], _looked_up_by_row(double, rows, run), strict=True)
    if elsewhere := [n.rpartition(".")[0] for (n, _), kind, by_row in sighted if kind != UNION or not by_row]:
        coupled = (
            f"which ids forward looks up in dynamic table {elsewhere[0]!r} depends on how a batch is divided (if it is "
            "padding, give the table its padding_idx)"
        )
    elif apart:
        coupled = f"what forward leaves in buffer {apart[0]!r} depends on how a batch is divided"
    elif COUPLED in kinds:
        coupled = f"output {kinds.index(COUPLED)} of forward depends on how a batch is divided"
    elif _gradients_mix(double, rows, lambda x: run(x, skip_norms=True)[0][: len(whole)], kinds, run.model):
        coupled = "the gradient of a row depends on how a batch is divided"
    elif random:  # of a few rows the numbers are those of many: one draw for all, which ranks have to share
        coupled = "forward draws random numbers for the whole batch"
    elif reason := _decides_for_others(double, rows, run, every):
        coupled = f"forward decides for all rows by {reason}"
    elif not all(_same_later(double, rows, run, every, counters, value) for value in AS_IF):
        coupled = f"what forward does depends on how often it was called ({', '.join(map(dotted, counters))})"
    else:
        return found(kinds, rows)
    if len(sizes) != 1 or None in sizes:
        raise UnsupportedError(
            f"{coupled}, no tracer captured the model as a graph, and the inputs differ in dim 0: ranks' batches "
            "can't be put together. Move what combines rows into the loss, make forward traceable, or pass padded "
            "tensors with one row for each row of the batch"
        )
    originals, _ = split_statics(flatten((args, kwargs))[0])
    row_bytes = sum(x[0].numel() * x.element_size() for x in originals)
    outputs = _of_the_whole(double, rows, kinds, lambda x: run(x, skip_norms=True)[0][: len(whole)])
    return found(outputs, rows, coupled=coupled, input_bytes=row_bytes)


def _looked_up_by_row(inputs: Any, rows: int, run: Runs) -> list[bool]:
    """By dynamic table, whether what a batch looks up is what its rows do: each twice, since not all run on one."""
    tables, some = len(run.sighting()), min(rows, MOST_DECIDING)
    if not tables:
        return []
    whole = run.told(take_rows(inputs, torch.arange(some)))[-tables:]
    alone = [run.told(take_rows(inputs, torch.tensor([i, i])))[-tables:] for i in range(some)]
    return [_kinds_of(w, w, parts, ()) == {UNION} for w, *parts in zip(whole, *alone, strict=True)]


def _same_later(inputs: Any, rows: int, run: Runs, kinds: Sequence[str], counters: Sequence[Place], value: int) -> bool:
    """Whether outputs are what they are now when forward has counted so far."""
    if not counters:
        return True
    run.counters, run.as_if = list(counters), value
    try:
        return _output_kinds(inputs, rows, run.told, lambda: _renew(run.model)) == kinds
    finally:
        run.counters = []


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


def _output_kinds(inputs: Any, rows: int, run: Any, renew: Any) -> tuple[str, ...]:
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
        possible = possible or [{*KINDS} for _ in whole]
        for sizes in DIVISIONS:
            parts = [run(take_rows(inputs, part)) for part in index.split(sizes)]
            for kinds, w, t, *p in zip(possible, whole, turned, *parts, strict=True):
                kinds &= _kinds_of(w, t, p, sizes)
    return tuple(next((k for k in KINDS if k in kinds), COUPLED) for kinds in possible)


def _gradients_mix(inputs: Any, rows: int, run: Any, kinds: Sequence[str], model: nn.Module) -> bool:
    """Whether parameters' gradients of a batch are not the sum of those of its parts, though outputs are its rows'.

    A backward that is the user's own, or a hook on a tensor, may combine rows where forward does not. Outputs are
    weighted at random, and the mean of the weights is not zero.
    """
    trained = [p for p in model.parameters() if p.requires_grad and has_own_values(p)]

    def gradients(index: Tensor, weights: Sequence[Tensor], share: float) -> list[Tensor]:
        terms = []
        for x, kind, w in zip(run(take_rows(inputs, index)), kinds, weights, strict=True):
            if not x.requires_grad:
                continue
            scale = {ROWS: w.reshape(-1, *[1] * (x.dim() - 1)), MEAN: share, SUM: 1.0, SAME: share}[kind]
            terms.append((x.double() * scale).sum())
        if not terms or not trained:
            return []
        found = torch.autograd.grad(sum(terms[1:], terms[0]), trained, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(trained, found, strict=True)]

    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(rows, (DRAWN_ROWS,), generator=generator)
        weights = [0.5 + torch.randn(DRAWN_ROWS, generator=generator, dtype=torch.float64) for _ in kinds]
        whole = gradients(index, weights, 1.0)
        largest = max((float(g.abs().max()) for g in whole if g.numel()), default=0.0)
        for sizes in DIVISIONS:
            cut = zip(index.split(sizes), *(w.split(sizes) for w in weights), strict=True)
            parts = [gradients(part, ws, len(part) / DRAWN_ROWS) for part, *ws in cut]
            for g, *terms in zip(whole, *parts, strict=True):
                if g.numel() and float((g - sum(terms[1:], terms[0])).abs().max()) > CAPTURE_TOLERANCE * largest:
                    return True
    return False


def _decides_for_others(inputs: Any, rows: int, run: Runs, kinds: Sequence[str]) -> str:
    """By what forward's Python branches for all rows, the values or the number of some; empty if it does not."""

    def run_on(index: Tensor, seen: Decisions) -> list[Told]:
        given = take_rows(inputs, index % rows)
        held = (x for _, _, x in held_tensors(run.model))
        seen.watch(split_statics(flatten(given)[0])[0], apart=(*run.model.buffers(), *held))
        with seen:
            return run.told(given)

    def turned(x: Told) -> Told:
        return x.flip(0) if isinstance(x, Tensor) and x.dim() else x

    def reproduces(whole: Sequence[Told], parts: Sequence[Sequence[Told]], sizes: Sequence[int]) -> bool:
        several = zip(kinds, whole, *parts, strict=True)
        return all(kind in _kinds_of(w, turned(w), p, sizes) for kind, w, *p in several)

    return decides_for_others(run_on, reproduces, max(DRAWN_ROWS, min(rows, MOST_DECIDING)))


MOST_DECIDING = 16
"""Rows of the example whose decisions are seen."""


KINDS = (ROWS, SAME, MEAN, SUM, UNION)
"""What an output may be, the first that it is."""


DRAWS, DRAWN_ROWS, DIVISIONS = 4, 7, ((3, 4), (5, 2))


def _close(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and relative_error(x.double(), y.double()) <= CAPTURE_TOLERANCE


def _kinds_of(whole: Any, turned: Any, parts: Sequence[Any], sizes: Sequence[int]) -> set[str]:
    """What an output may be, given that of the batch, of the batch turned round, and of its parts."""
    if not isinstance(whole, Tensor):
        return {UNION} if whole == turned == frozenset().union(*parts) else set()
    if whole.dim():
        shapes = [(n, *whole.shape[1:]) for n in (*sizes, sum(sizes))]
        by_row = [tuple(x.shape) for x in (*parts, whole)] == shapes
        return {ROWS} if by_row and _close(whole, torch.cat(list(parts))) and _close(whole.flip(0), turned) else set()
    if any(p.dim() for p in parts) or not _close(whole, turned):
        return set()
    together = torch.stack(list(parts)).double()
    shares = torch.tensor(sizes, dtype=torch.float64, device=together.device) / sum(sizes)
    found = {
        SAME: all(_close(whole, p) for p in parts),
        MEAN: _close(whole, together @ shares),
        SUM: _close(whole, together.sum()),
    }
    return {kind for kind, holds in found.items() if holds}

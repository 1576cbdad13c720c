"""Lookups of several tables as one operator, and of its gradients what goes to an optimiser as it is.

Tables that lie in one storage, one behind the other or with others between them, are one table to `lookups`: one
selection of rows in forward. In backward each table gets its sparse gradient, whose rows are sorted with those of the
others, unless an optimiser updates all of them in backward (`updated_by`), and nothing else is to see their gradients:
then it gets ids and values.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from descompiler.ops.local import are_alike, plain
from descompiler.ops.operation import Operation
from descompiler.ops.unique import Unique, unique


class Updater(Protocol):
    """What updates rows of tables in backward."""

    def takes(self, tables: Sequence[Tensor]) -> bool:
        """Whether it updates these tables, and nobody else waits for a gradient of theirs."""
        ...

    def came(self, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Tables, ids and gradients of their rows, in the backward that is under way; an id may be there twice."""
        ...


_UPDATERS: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Updater]]] = {}
"""By table, which is asked for in each backward: a dictionary of weak references asks each key in Python."""


def update_by(table: Tensor, updater: Updater) -> None:
    """Let an updater have the rows of a table; the last one that asked does."""
    number = id(table)
    _UPDATERS[number] = weakref.ref(table, lambda _: _UPDATERS.pop(number, None)), weakref.ref(updater)


def updated_by(tables: Sequence[Tensor]) -> Updater | None:
    """What updates all of these tables; None if that is not one, or others have to see a gradient."""
    known = _UPDATERS.get(id(tables[0]))
    updater = None if known is None else known[1]()
    if updater is None:
        return None
    for t in tables:
        known = _UPDATERS.get(id(t))
        if known is None or known[0]() is not t or known[1]() is not updater:
            return None
    return updater if updater.takes(tables) else None


def lookups(weights: Sequence[Tensor], ids: Sequence[Tensor], paddings: Sequence[int]) -> tuple[Tensor, ...]:
    """``nn.Embedding`` of several tables of one width and dtype, with sparse gradients; ids are known to be right.

    >>> table = torch.arange(6.0).reshape(3, 2)
    >>> [x.tolist() for x in lookups([table[:1], table[1:]], [torch.tensor([0]), torch.tensor([1, 0])], [-1, -1])]
    [[[0.0, 1.0]], [[4.0, 5.0], [2.0, 3.0]]]
    """
    found: tuple[Tensor, ...] = _Lookups.apply(list(paddings), len(weights), *weights, *ids)
    return found


class _Lookups(Operation):
    @staticmethod
    def forward(ctx: Any, paddings: list[int], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, ids = tensors[:count], tensors[count:]
        ctx.set_materialize_grads(False)  # of an output that no loss uses
        ctx.paddings, ctx.tables = paddings, [weakref.ref(w) for w in weights]
        ctx.shapes = [w.shape for w in weights]
        ctx.save_for_backward(*ids)
        if (found := one_table(weights)) is None:
            return tuple(
                plain(w).index_select(0, x.reshape(-1)).view(*x.shape, w.shape[1])
                for w, x in zip(weights, ids, strict=True)
            )
        whole, starts = found
        flat = _shifted(ids, starts)
        rows = whole.index_select(0, flat)
        if are_alike(ids):
            return rows.view(len(ids), *ids[0].shape, whole.shape[1]).unbind()
        return tuple(
            [r.view(*x.shape, whole.shape[1]) for r, x in zip(rows.split([x.numel() for x in ids]), ids, strict=True)]
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ids, count = ctx.saved_tensors, len(ctx.shapes)
        parts = []
        for i, (x, g, padding) in enumerate(zip(ids, grads, ctx.paddings, strict=True)):
            if g is None or not ctx.needs_input_grad[2 + i]:
                continue
            rows, values = x.reshape(-1), g.reshape(-1, g.shape[-1])
            if padding >= 0:
                kept = rows != padding
                rows, values = rows[kept], values[kept]
            parts.append((i, rows, values))
        if not parts:
            return (None,) * (2 + 2 * count)
        if are_updated(ctx, [i for i, _, _ in parts], [(ctx.tables[i](), rows, g) for i, rows, g in parts]):
            return (None,) * (2 + 2 * count)
        result: list[Tensor | None] = [None] * count
        on_cpu = parts[0][1].device.type == "cpu"  # the sizes of tables' gradients would be waited for elsewhere
        if on_cpu and len(parts) > 1 and not torch.is_grad_enabled():
            for i, gradient in _coalesced(ctx, parts):
                result[i] = gradient
        else:
            for i, rows, values in parts:
                result[i] = torch.sparse_coo_tensor(rows[None], values, ctx.shapes[i], check_invariants=False)
        return (None, None, *result, *(None,) * count)


def _coalesced(ctx: Any, parts: Sequence[tuple[int, Tensor, Tensor]]) -> list[tuple[int, Tensor]]:
    """Gradients of tables, coalesced: one sort of all their rows, where optimisers make one for each table.

    Of a table that is looked up several times the first lookup has the gradient of all.
    """
    if len(_SORTED) >= MOST_SORTED:  # backwards that failed have not come to their ends, which clear it
        _SORTED.clear()
    begins: dict[int, int] = {}
    bounds, receivers, starts = [0], [], []
    for i, _, _ in parts:
        table = ctx.tables[i]()
        key = -1 - i if table is None else id(table)
        if key not in begins:
            begins[key] = bounds[-1]
            bounds.append(bounds[-1] + ctx.shapes[i][0])
            receivers.append(i)
        starts.append(begins[key])
    rows = _shifted([x.long() for _, x, _ in parts], starts)
    once, sums = summed(rows, torch.cat([values for *_, values in parts]), _SORTED)
    cuts = torch.searchsorted(once, on_device(tuple(bounds), once.device)).tolist()
    counts = [end - start for start, end in itertools.pairwise(cuts)]
    once = once - _of_each(bounds[:-1], counts, once.device)
    result, marks = [], []
    for i, own, values in zip(receivers, once[None].split(counts, 1), sums.split(counts), strict=True):
        gradient = torch.sparse_coo_tensor(own, values, ctx.shapes[i], check_invariants=False, is_coalesced=True)
        result.append((i, gradient))
        marks.append((ctx.tables[i], own))
    torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_say_coalesced, marks))
    return result


MOST_SORTED = 16
"""Kinds of rows that are kept to be compared with."""

_SORTED: list[tuple[Tensor, Unique]] = []
"""What was sorted in the backward that is under way: tables of another width are often looked up with the same ids."""


def _say_coalesced(marks: Sequence[tuple[weakref.ref[Tensor], Tensor]]) -> None:
    """Say it again of gradients that tables have kept: autograd keeps the rows of a first one, and not what is known of
    them. One that was added to another has rows of its own."""
    _SORTED.clear()
    with torch._C.DisableTorchFunctionSubclass():
        for of, rows in marks:
            gradient = None if (table := of()) is None else table.grad
            if gradient is None or not gradient.is_sparse or gradient._nnz() != rows.shape[1]:
                continue
            if gradient._indices().data_ptr() == rows.data_ptr():
                gradient._coalesced_(True)


def summed(rows: Tensor, values: Tensor, known: list[tuple[Tensor, Unique]]) -> tuple[Tensor, Tensor]:
    """Each row once, with the sum of its parts: an id that was looked up twice is one row.

    Tables that are looked up with the same ids, as those of vectors and of weights are, have the same rows, and it is
    less to compare them than to sort them.
    """
    found = next((u for r, u in known if r.shape == rows.shape and torch.equal(r, rows)), None)
    if found is None:
        found = unique(rows)
        known.append((rows, found))
    return found.ids, found.sums(values)


def are_updated(ctx: Any, positions: Sequence[int], parts: Sequence[tuple[Tensor | None, Tensor, Tensor]]) -> bool:
    """Give rows of tables to what updates all of them in backward; False if they have to become gradients.

    Parameters
    ----------
    ctx : autograd function's
    positions : sequence of int
        Of these tables among the tensors that the function took.
    parts : sequence of tuple
        Tables (None: one that is gone), ids and gradients of their rows.
    """
    present = [(t, rows, values) for t, rows, values in parts if t is not None]
    if torch.is_grad_enabled() or len(present) < len(parts) or not _all_accumulate(ctx, positions):
        return False
    updater = updated_by([t for t, _, _ in present])
    if updater is None:
        return False
    updater.came(present)
    return True


def _all_accumulate(ctx: Any, positions: Sequence[int]) -> bool:
    """Whether this backward adds gradients to these tables, and does not only return them (`torch.autograd.grad`)."""
    functions = ctx.next_functions  # of tensors alone
    nodes = [functions[i][0] for i in positions]
    if any(type(n).__name__ != "AccumulateGrad" for n in nodes):
        return False  # something is computed of the table before it is looked up
    try:
        return all(torch._C._will_engine_execute_node(n) for n in nodes)
    except RuntimeError:  # what PyTorch raises of a leaf in autograd.grad
        return False


def _shifted(ids: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    """Ids of several tables as those of one, in which each begins somewhere; flat."""
    if len(ids) == 1:
        return ids[0].reshape(-1) + starts[0] if starts[0] else ids[0].reshape(-1)
    if are_alike(ids):
        rows = torch.stack(list(ids)).view(len(ids), -1)
        return (rows + on_device(tuple(starts), rows.device)[:, None] if any(starts) else rows).view(-1)
    flat = torch.cat([x.reshape(-1) for x in ids])
    return flat + _of_each(starts, [x.numel() for x in ids], flat.device) if any(starts) else flat


def _of_each(starts: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    """A start for each id."""
    shift, lengths = on_device(tuple(starts), device), torch.tensor(sizes, device=device)
    return shift.repeat_interleave(lengths, output_size=sum(sizes))


def one_table(weights: Sequence[Tensor]) -> tuple[Tensor, list[int]] | None:
    """A table in which all of these lie, and where each begins; None if they are in several storages."""
    first = weights[0]
    width = first.shape[1]
    size, storage = first.element_size(), first.untyped_storage()
    base, starts = storage.data_ptr(), []
    for w in weights:
        offset = w.storage_offset()
        if not w.is_contiguous() or not w.shape[0] or w.data_ptr() - offset * size != base or offset % width:
            return None
        starts.append(offset // width)
    whole = plain(first).as_strided((storage.nbytes() // (size * width), width), (width, 1), 0)
    return whole, starts


@functools.lru_cache(64)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers of every step, on a device: to bring them there in each would be to wait for it."""
    return torch.tensor(numbers, device=device)

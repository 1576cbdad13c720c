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
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from descompiler.ops.local import are_alike, plain, rows_at
from descompiler.ops.operation import Operation
from descompiler.ops.unique import Unique, unique

T = TypeVar("T")


class Part(NamedTuple, Generic[T]):
    """Ids of tables, ``[n, tables]``, and gradients of their rows, ``[n, tables, ...]``; an id may be there twice."""

    tables: Sequence[T]
    ids: Tensor
    gradients: Tensor

    @classmethod
    def of(cls, table: T, ids: Tensor, gradients: Tensor) -> Part[T]:
        """Of one table: ids ``[n]``, gradients ``[n, ...]``."""
        return cls([table], ids[:, None], gradients[:, None])

    def flat(self, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows ``[n * tables]`` where each table begins somewhere, and their gradients."""
        ids = self.ids + on_device(tuple(starts), self.ids.device) if any(starts) else self.ids
        return ids.reshape(-1), self.gradients.reshape(-1, *self.gradients.shape[2:])

    def of_table(self, i: int) -> Part[T]:
        """That of one of its tables."""
        return Part.of(self.tables[i], self.ids[:, i], self.gradients[:, i])


class Mixed(NamedTuple, Generic[T]):
    """Ids ``[n]`` of tables, ``which`` each is of, and gradients of their rows, ``[n, ...]``; in any order."""

    tables: Sequence[T]
    which: Tensor
    ids: Tensor
    gradients: Tensor

    def flat(self, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As `Part.flat`."""
        return self.ids + on_device(tuple(starts), self.ids.device)[self.which], self.gradients

    def of_table(self, i: int) -> Part[T]:
        """As `Part.of_table`."""
        mine = self.which == i
        return Part.of(self.tables[i], self.ids[mine], self.gradients[mine])


class Updater(Protocol):
    """What updates rows of tables in backward."""

    def takes(self, tables: Sequence[Tensor]) -> bool:
        """Whether it updates these tables, and nobody else waits for a gradient of theirs."""
        ...

    def came(self, parts: Sequence[Part[Tensor] | Mixed[Tensor]]) -> None:
        """Rows of tables and their gradients, in the backward that is under way."""
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
    found: tuple[Tensor, ...] = _Lookups.apply(False, list(paddings), len(weights), *weights, *ids)
    return found


def stacked(weights: Sequence[Tensor], ids: Sequence[Tensor], paddings: Sequence[int]) -> Tensor:
    """`torch.stack` of `lookups` along dim 1: no table has a result of its own that is copied, nor a gradient.

    >>> table = torch.arange(6.0).reshape(3, 2)
    >>> stacked([table[:1], table[1:]], [torch.tensor([0]), torch.tensor([1])], [-1, -1]).tolist()
    [[[0.0, 1.0], [4.0, 5.0]]]
    """
    found: Tensor = _Lookups.apply(True, list(paddings), len(weights), *weights, *ids)
    return found


class _Lookups(Operation):
    @staticmethod
    def forward(
        ctx: Any, stack: bool, paddings: list[int], count: int, *tensors: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        weights, ids = tensors[:count], tensors[count:]
        ctx.set_materialize_grads(False)  # of an output that no loss uses
        ctx.stack, ctx.paddings, ctx.tables = stack, paddings, [weakref.ref(w) for w in weights]
        ctx.shapes = [w.shape for w in weights]
        ctx.save_for_backward(*ids)
        if (found := one_table(weights)) is None:
            each = [
                rows_at(plain(w), x.reshape(-1)).view(*x.shape, w.shape[1]) for w, x in zip(weights, ids, strict=True)
            ]
            return torch.stack(each, 1) if stack else tuple(each)
        whole, starts = found
        alike, width = are_alike(ids), whole.shape[1]
        if stack and alike and ids[0].dim() == 1:
            rows = torch.stack(list(ids), 1) + on_device(tuple(starts), ids[0].device)
            return rows_at(whole, rows.view(-1)).view(*rows.shape, width)
        rows = rows_at(whole, _shifted(ids, starts))
        if alike and not stack:
            return rows.view(len(ids), *ids[0].shape, width).unbind()
        each = [r.view(*x.shape, width) for r, x in zip(rows.split([x.numel() for x in ids]), ids, strict=True)]
        return torch.stack(each, 1) if stack else tuple(each)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        parts, count = _parts(ctx, grads), len(ctx.shapes)
        nothing = (None,) * (3 + 2 * count)
        if not parts:
            return nothing
        positions = [i for p in parts for i in p.tables]
        if are_updated(ctx, positions, [Part([ctx.tables[i]() for i in p.tables], *p[1:]) for p in parts]):
            return nothing
        result: list[Tensor | None] = [None] * count
        on_cpu = parts[0].ids.device.type == "cpu"  # the sizes of tables' gradients would be waited for elsewhere
        if on_cpu and len(positions) > 1 and not torch.is_grad_enabled():
            for i, gradient in _coalesced(ctx, parts):
                result[i] = gradient
        else:
            for p in parts:
                for i, ids, values in zip(p.tables, p.ids.unbind(1), p.gradients.unbind(1), strict=True):
                    result[i] = torch.sparse_coo_tensor(ids[None], values, ctx.shapes[i], check_invariants=False)
        return (None, None, None, *result, *(None,) * count)


def _parts(ctx: Any, grads: Sequence[Tensor | None]) -> list[Part[int]]:
    """What a backward brings, by positions of tables among the weights."""
    ids, trained = ctx.saved_tensors, ctx.needs_input_grad[3 : 3 + len(ctx.shapes)]
    if ctx.stack:
        (gradient,) = grads
        if gradient is None:
            return []
        if ids[0].dim() == 1 and all(trained) and max(ctx.paddings) < 0:
            return [Part(range(len(ids)), torch.stack(ids, 1), gradient)]
        grads = gradient.unbind(1)
    parts = []
    for i, (x, g, padding) in enumerate(zip(ids, grads, ctx.paddings, strict=True)):
        if g is None or not trained[i]:
            continue
        rows, values = x.reshape(-1), g.reshape(-1, g.shape[-1])
        if padding >= 0:
            kept = rows != padding
            rows, values = rows[kept], values[kept]
        parts.append(Part.of(i, rows, values))
    return parts


def _coalesced(ctx: Any, parts: Sequence[Part[int]]) -> list[tuple[int, Tensor]]:
    """Gradients of tables, coalesced: one sort of all their rows, where optimisers make one for each table.

    Of a table that is looked up several times the first lookup has the gradient of all.
    """
    if len(_SORTED) >= MOST_SORTED:  # backwards that failed have not come to their ends, which clear it
        _SORTED.clear()
    begins: dict[int, int] = {}
    bounds, receivers, starts = [0], list[int](), []
    for p in parts:
        starts.append(list[int]())
        for i in p.tables:
            table = ctx.tables[i]()
            key = -1 - i if table is None else id(table)
            if key not in begins:
                begins[key] = bounds[-1]
                bounds.append(bounds[-1] + ctx.shapes[i][0])
                receivers.append(i)
            starts[-1].append(begins[key])
    once, sums = summed(*flat(parts, starts), _SORTED)
    of_receivers = [ctx.tables[i] for i in receivers], [ctx.shapes[i] for i in receivers]
    return list(zip(receivers, gradients_of(*of_receivers, bounds, once, sums), strict=True))


def gradients_of(
    tables: Sequence[weakref.ref[Tensor]],
    shapes: Sequence[torch.Size],
    bounds: Sequence[int],
    once: Tensor,
    sums: Tensor,
) -> list[Tensor]:
    """Coalesced gradients of tables, from the rows ``once`` ``[u]`` of all, ascending, and theirs; in a backward.

    ``bounds``: where each table begins among the rows, and their end.
    """
    cuts = torch.searchsorted(once, on_device(tuple(bounds), once.device)).tolist()
    counts = [end - start for start, end in itertools.pairwise(cuts)]
    once = once - _of_each(bounds[:-1], counts, once.device)
    result, marks = [], []
    every = zip(tables, shapes, once[None].split(counts, 1), sums.split(counts), strict=True)
    for table, shape, own, values in every:
        result.append(torch.sparse_coo_tensor(own, values, shape, check_invariants=False, is_coalesced=True))
        marks.append((table, own))
    torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_say_coalesced, marks))
    return result


def flat(parts: Sequence[Part[Any] | Mixed[Any]], starts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of one table, in which those of parts begin somewhere, and their gradients, one part after another."""
    if len(parts) == 1:
        return parts[0].flat(starts[0])
    if all(isinstance(p, Part) and len(p.tables) == 1 for p in parts):
        rows = _shifted([p.ids[:, 0] for p in parts], [start for (start,) in starts])
        return rows, torch.cat([p.gradients[:, 0] for p in parts])
    rows_of, gradients = zip(*(p.flat(s) for p, s in zip(parts, starts, strict=True)), strict=True)
    return torch.cat(rows_of), torch.cat(gradients)


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
    rows = rows.long()
    found = next((u for r, u in known if r.shape == rows.shape and torch.equal(r, rows)), None)
    if found is None:
        found = unique(rows)
        known.append((rows, found))
    return found.ids, found.sums(values)


def are_updated(
    ctx: Any, positions: Sequence[int], parts: Sequence[Part[Tensor | None] | Mixed[Tensor | None]]
) -> bool:
    """Give rows of tables to what updates all of them in backward; False if they have to become gradients.

    Parameters
    ----------
    ctx : autograd function's
    positions : sequence of int
        Of these tables among the tensors that the function took.
    parts : sequence of Part or Mixed
        Of tables; None: one that is gone.
    """
    tables = [t for p in parts for t in p.tables if t is not None]
    if torch.is_grad_enabled() or len(tables) < len(positions) or not _all_accumulate(ctx, positions):
        return False
    updater = updated_by(tables)
    if updater is None:
        return False
    updater.came(cast(Sequence[Part[Tensor] | Mixed[Tensor]], parts))
    return True


def _all_accumulate(ctx: Any, positions: Sequence[int]) -> bool:
    """Whether this backward adds gradients to these tables, and does not only return them (`torch.autograd.grad`)."""
    functions = ctx.next_functions  # of tensors alone
    nodes = [functions[i][0] for i in positions]
    if {kind.__name__ for kind in {*map(type, nodes)}} != {"AccumulateGrad"}:
        return False  # something is computed of the table before it is looked up
    try:
        return all(map(torch._C._will_engine_execute_node, nodes))
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

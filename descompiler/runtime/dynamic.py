"""Dynamic tables in a step: what a rank's program looks up in tables whose rows come and go on their owners.

    in the region      ids of the global batch are here: rows of those that this rank owns, zeros for the others'
    on own rows        unique ids -> [owners] -> rows -> lookup -> ... -> gradient of each row -> [owners]

Only owners know who is resident: ids cross as they are, and rows come where they are looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from descompiler.layout.fetches import Counts, Fetch
from descompiler.layout.transfer import crosses_in
from descompiler.ops.local import lookup, pool
from descompiler.ops.operation import Operation
from descompiler.runtime.agreement import Message
from descompiler.runtime.backward import differentiable_once
from descompiler.runtime.carriers import carries
from descompiler.runtime.runtime import Runtime


def look_up_dynamic(
    runtime: Runtime, name: str, weight: Tensor, ids: Tensor, create: bool, padding_idx: int | None
) -> Tensor:
    """Rows of the ids that this rank owns, zeros for the others' and for padding.

    Parameters
    ----------
    name : str
        Of the table's weight.
    weight : Tensor
        The weight as the program has it: gradients go to it.
    ids : Tensor
        Of any shape.
    create : bool
        Whether ids are sighted, and get rows.
    """
    table = runtime.tables[name]
    flat = ids.reshape(-1).to("cpu", torch.int64)
    rows = table.look_up_owned(flat, create=create, padding_idx=padding_idx, weight=weight)
    return rows.view(*ids.shape, rows.shape[1])


@carries(Fetch)
def pull_dynamic(
    runtime: Runtime,
    number: int,
    weight: Tensor,
    ids: Tensor,
    mode: str | None,
    create: bool,
    padding_idx: int | None,
) -> Tensor:
    """One lookup on own rows, by the ``number``-th fetch of the program; each id is asked of its owner once.

    Collective: every rank calls it, also for no ids at all, and every rank runs its backward.
    """
    name = runtime.layout.fetches[number].tables[0].name
    table = runtime.tables[name]
    unique, inverse = ids.reshape(-1).to("cpu", torch.int64).unique(return_inverse=True)
    owner = table.owner(unique)
    if padding_idx is not None:
        owner[unique == padding_idx] = runtime.ranks  # nobody is asked
    order = owner.argsort(stable=True)
    asked = torch.bincount(owner, minlength=runtime.ranks)[: runtime.ranks].tolist()
    told = runtime.tell(Fetch.COUNTS, [Message(False, n) for n in asked], None)
    served = [m.asked for m in told]
    send = unique[order[: sum(asked)]].to(weight.device)
    received = runtime.exchange(send, asked, served, Fetch.IDS).wait().to("cpu")
    elsewhere, answered = (sum(n) - n[runtime.rank] for n in (asked, served))
    counts = Counts(elsewhere, answered, 0, elsewhere * unique.element_size(), 0)
    runtime.unique[name] = runtime.unique.get(name, Counts()) + counts
    answers = table.look_up_owned(received, create=create, weight=weight)
    rows = _Answer.apply(runtime, answers, served, asked)
    if sum(asked) < len(unique):
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    found = lookup(rows, place[inverse].view(ids.shape).to(rows.device))
    return found if mode is None else pool(found, ids, mode, None)


@carries(Fetch)
class _Answer(Operation):
    """Rows that ranks have asked this one for -> those that it has asked for. Backward: gradients, averaged."""

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, rows: Tensor, served: Sequence[int], asked: Sequence[int]) -> Tensor:
        ctx.runtime, ctx.served, ctx.asked = runtime, served, asked
        ctx.wire = crosses_in(rows.dtype, runtime.layout.wire_dtype)
        return _exchanged(runtime, rows, served, asked, Fetch.ROWS, ctx.wire)

    @staticmethod
    @differentiable_once("lookups in a dynamic table on own rows")
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = _exchanged(ctx.runtime, grad, ctx.asked, ctx.served, Fetch.BACK, ctx.wire)
        return None, back / ctx.runtime.ranks, None, None


def _exchanged(
    runtime: Runtime, rows: Tensor, sent: Sequence[int], received: Sequence[int], name: str, wire: torch.dtype
) -> Tensor:
    return runtime.exchange_rows(rows.to(wire), sent, received, name).to(rows)

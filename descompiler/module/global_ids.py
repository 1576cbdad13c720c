"""Ids of the global batch, as a rank is given them: taken out of a call, and told to the others.

What remains of the call is one on own rows, as every other; the program gets the ids in place of their own rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from descompiler.errors import InputError
from descompiler.layout.layout import Layout
from descompiler.layout.rows import share_of
from descompiler.model.calls import Signature, bound
from descompiler.model.inputs import flatten, split_statics, unflatten_with
from descompiler.runtime.runtime import Runtime

OTHER_SIZES = (
    "ids='global': ranks' inputs have other sizes than each other, or forward branches on the rows of the batch, and "
    "whose rows are of which size is not known: pad to one length on all ranks"
)


def given_ids(
    positions: Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any], signature: Signature, runtime: Runtime
) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], dict[int, Tensor]]:
    """The call on own rows, and the ids of the global batch by position among its tensors.

    Raises
    ------
    InputError
        If they are fewer than own rows, or of different numbers of rows.
    """
    if not positions:
        return (args, kwargs), {}
    try:
        call = bound(args, kwargs, signature.parameters)
    except TypeError:  # who takes the call apart says it better
        return (args, kwargs), {}
    leaves, spec = flatten(call)
    tensors, statics = split_statics(leaves)
    ids = {i: tensors[i] for i in positions if i < len(tensors) and tensors[i].dim()}
    if len({len(x) for x in ids.values()}) != 1:
        raise InputError(
            f"ids='global': ids have {' and '.join(str(len(x)) for x in ids.values())} rows; they have one"
        )
    total = len(next(iter(ids.values())))
    own = next((len(x) for i, x in enumerate(tensors) if i not in ids and x.dim()), None)
    rows = share_of(total, runtime.rank, runtime.ranks) if own is None else own
    if rows > total:
        raise InputError(
            f"ids='global': this rank has {rows} rows, and ids are given for {total}: give every rank the ids of the "
            "global batch, in the order of the ranks"
        )
    shares = [ids[i][:rows] if i in ids else x for i, x in enumerate(tensors)]
    return unflatten_with(shares, spec, statics), ids


def told_ids(ids: Mapping[int, Tensor], layout: Layout) -> tuple[str, ...]:
    """What ranks have alike of the ids that they were given: the rows; and a sum, where all of them read all of it."""
    if not ids:
        return ()
    rows = len(next(iter(ids.values())))
    told = f"ids of {rows} rows"
    if all(e.columns == ((0, layout.ranks, None),) for e in layout.entries):
        told += f", of checksum {checksum(list(ids.values()))}"
    return (told,)


def checksum(ids: Sequence[Tensor]) -> int:
    """Another one if rows are others, or in another order.

    >>> a = torch.tensor([[1, 2], [3, 4]])
    >>> checksum([a]), checksum([a.flip(0)])
    (17, 13)
    """
    sums = [x.reshape(len(x), -1).long().sum(1) * torch.arange(1, len(x) + 1, device=x.device) for x in ids]
    return int(torch.stack(sums).sum()) if sums else 0

"""Weights between rank 0 and the ranks that hold pieces, in blocks, so that none needs room for all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from descompiler.layout.pieces import Pieces, locate
from descompiler.model.sparse import parts_of, with_parts
from descompiler.runtime import collectives
from descompiler.runtime.collectives import broadcast_object, receive, send
from descompiler.runtime.ranks import Ranks


def broadcast_tensor(x: Tensor, group: Any) -> Tensor:
    """Rank 0's tensor on every rank. Collective; ``x`` has its shape and layout, perhaps with more or fewer values."""
    sizes = [list(p.shape) for p in parts_of(x)]
    if x.layout is not torch.strided:
        sizes = broadcast_object(sizes, group)
    mine = dist.get_rank(group) == 0
    parts = [
        p.contiguous() if mine or list(p.shape) == size else p.new_empty(size)
        for p, size in zip(parts_of(x), sizes, strict=True)
    ]
    for p in parts:
        collectives.broadcast(p, 0, group)
    return with_parts(x, parts)


BLOCK_ELEMENTS = 1 << 22
"""Elements that are sent at a time: 16 MiB in float32."""


def scatter(whole: Tensor, like: Tensor, pieces: Pieces, ranks: Ranks, device: torch.device) -> Tensor:
    """This rank's piece of what rank 0 has whole. Collective."""
    mine = torch.empty(pieces.piece_shape(ranks.rank), dtype=like.dtype, device=device)
    for r in range(ranks.count):
        for there, here in pieces.blocks(r, BLOCK_ELEMENTS):
            if ranks.rank == 0 == r:
                mine[here] = whole[there]
            elif ranks.rank == 0:
                send(whole[there], r, ranks.group)
            elif ranks.rank == r:
                mine[here] = receive(torch.empty_like(mine[here]), 0, ranks.group)
    return mine


def collect(mine: Tensor, pieces: Pieces, ranks: Ranks, full: Tensor | None) -> None:
    """Put all ranks' pieces into rank 0's ``full``: the inverse of `scatter`. Collective."""
    for r in range(ranks.count):
        for there, here in pieces.blocks(r, BLOCK_ELEMENTS):
            if full is not None and r == 0:
                full[there] = mine[here]
            elif full is not None:
                full[there] = receive(torch.empty_like(full[there], device=mine.device), r, ranks.group).to(full.device)
            elif ranks.rank == r:
                send(mine[here], 0, ranks.group)


def collect_rows(mine: Tensor, pieces: Pieces, ranks: Ranks, start: int, stop: int) -> Tensor | None:
    """Rows ``start`` to ``stop`` of the original, on rank 0; None on the others. Collective."""
    shape = (stop - start, *pieces.shape[1:])
    full = torch.empty(shape, dtype=mine.dtype, device=mine.device) if ranks.rank == 0 else None
    if pieces.dim:
        collect(mine[start:stop], Pieces(shape, pieces.dim, pieces.division, pieces.ranks), ranks, full)
        return full
    owners, positions = locate(pieces, torch.arange(start, stop), 0)  # what all hold is taken from the first
    for r in range(ranks.count):
        here = (owners == r).nonzero()[:, 0]
        if not len(here):
            continue
        if ranks.rank == r:
            rows = mine[positions[here].to(mine.device)]
            if full is None:
                send(rows, 0, ranks.group)
            else:
                full[here.to(full.device)] = rows
        elif full is not None:
            full[here.to(full.device)] = receive(full.new_empty(len(here), *shape[1:]), r, ranks.group)
    return full


def gather(mine: Tensor, pieces: Pieces, ranks: Ranks, full: Tensor) -> None:
    """Put all ranks' pieces into every rank's ``full``. Collective."""
    for r in range(ranks.count):
        for there, here in pieces.blocks(r, BLOCK_ELEMENTS):
            part = mine[here].contiguous() if r == ranks.rank else torch.empty_like(full[there]).contiguous()
            collectives.broadcast(part, r, ranks.group)
            full[there] = part

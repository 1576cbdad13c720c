"""Weights: from rank 0 or from `reset_parameters` to pieces, and back to the original's state_dict."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from descompiler.errors import InputError
from descompiler.layout.pieces import Pieces
from descompiler.module.distributed import DistributedModule
from descompiler.module.dynamic import (
    check_weights,
    check_whole,
    load_whole,
    names_of_tables,
    tables_of,
    whole_table,
    without_tables,
)
from descompiler.module.installed import module_of, ranks_for
from descompiler.ops.local import plain
from descompiler.runtime.blocks import BLOCK_ELEMENTS, broadcast_tensor, collect, gather, scatter
from descompiler.runtime.collectives import broadcast_object
from descompiler.runtime.room import check_room


def full_state_dict(module: nn.Module, *, rank0_only: bool = False) -> dict[str, Tensor]:
    """The original model's ``state_dict``, bit for bit.

    Collective: every rank calls it.

    Parameters
    ----------
    rank0_only : bool
        Rank 0 gets it, in the memory of the CPU, and the others an empty one: no other rank holds more than its share,
        and no rank more than a block of `BLOCK_ELEMENTS` beside. By default every rank has the whole on its device.

    Raises
    ------
    PlanError
        On every rank, before anything is allocated, if the memory of a machine does not suffice.
    """
    module = module_of(module)
    result = static_state_dict(module, rank0_only=rank0_only)
    ranks = ranks_for(module, "full_state_dict")
    wholes = {n: whole_table(part, ranks, first_only=rank0_only) for n, part in tables_of(module).items()}
    for name, first in names_of_tables(module).items():
        if (whole := wholes[first]) is not None:
            result |= whole.state_dict(prefix=f"{name}.")
    return result


def static_state_dict(module: DistributedModule, *, rank0_only: bool = False) -> dict[str, Tensor]:
    """As `full_state_dict`, without dynamic tables; also within a step. Collective."""
    ranks, tables = ranks_for(module, "full_state_dict"), names_of_tables(module)
    check_weights(module, ranks)
    every = without_tables(module.state_dict(), tables)
    held = {n: plain(x) for n, x in without_extra(every).items()}
    cut = pieces_by_name(module)
    takes = not rank0_only or ranks.rank == 0
    shapes = {n: tuple(x.shape) if (p := cut[n]) is None else p.shape for n, x in held.items()}
    place = torch.device("cpu") if rank0_only else None
    room = sum(prod(shapes[n]) * x.element_size() for n, x in held.items()) if takes else 0
    device = place or next((x.device for x in held.values()), torch.device("cpu"))
    instead = "Let rank 0 alone have it (rank0_only=True), or run that rank where there is more memory"
    check_room(ranks, room, device, "the values of the whole state_dict", instead)
    result: dict[str, Any] = {n: copy.deepcopy(x) for n, x in every.items() if is_extra(n) and takes}
    for name, x in held.items():
        local, pieces = x.detach(), cut[name]
        if pieces is None or pieces.is_replicated or ranks.count == 1:
            if takes:
                result[name] = local.clone() if place is None else local.to(place, copy=True)
            continue
        full = torch.empty(pieces.shape, dtype=local.dtype, device=place or local.device) if takes else None
        if rank0_only:
            collect(local, pieces, ranks, full)
        else:
            assert full is not None
            gather(local, pieces, ranks, full)
        if full is not None:
            result[name] = full
    return result


def pieces_by_name(module: DistributedModule) -> dict[str, Pieces | None]:
    """How each tensor of the original's ``state_dict`` is cut; None of buffers, which every rank holds."""
    return {name: module.plan.pieces.get(_canonical(module, name)) for name in module.state_dict()}


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor], *, rank0_only: bool = False) -> None:
    """Load the original model's ``state_dict``; each rank takes its pieces.

    Collective: every rank calls it.

    Parameters
    ----------
    state : mapping of str to Tensor
        The same on every rank.
    rank0_only : bool
        Only rank 0's ``state`` is read, and streamed to the others, which may pass an empty one.

    Raises
    ------
    InputError
        If names or shapes differ on any rank; nothing is loaded then, on any.
    RankError
        If ranks load different values.
    """
    module = module_of(module)
    ranks = ranks_for(module, "load_full_state_dict")
    tables, names = tables_of(module), names_of_tables(module)
    check_weights(module, ranks)
    held = without_tables(module.state_dict(), names)
    mine = {n: plain(x) for n, x in without_extra(held).items()}
    every, state = state, without_tables(state, names)
    ranks.everywhere(
        lambda: _check_state(module, held, state) if not rank0_only or ranks.rank == 0 else None, "could not load"
    )
    extra = {n: x for n, x in state.items() if is_extra(n)}
    if rank0_only and ranks.count > 1 and any(map(is_extra, held)):
        extra = broadcast_object(extra, ranks.group)
    state = without_extra(state)
    of_tables: dict[str, Mapping[str, Tensor] | None] = {}
    for name, part in tables.items():
        of_table = {n.removeprefix(f"{name}."): x for n, x in every.items() if n.startswith(f"{name}.")}
        of_tables[name] = None if rank0_only and ranks.rank else of_table
        check_whole(part, name, of_tables[name], ranks)
    if not rank0_only:
        ranks.same("state_dict", _digest(module, state), doing="load")
    for name, part in tables.items():
        load_whole(part, of_tables[name], ranks)
    with torch.no_grad():
        for name, local in mine.items():
            pieces, value = module.plan.pieces.get(_canonical(module, name)), state.get(name)
            if not rank0_only or ranks.count == 1:
                assert value is not None
                _copy_piece(local, value, pieces, ranks.rank)
            elif pieces is None or pieces.is_replicated:
                whole = local.detach().clone() if value is None or ranks.rank else value.to(local, copy=True)
                local.copy_(broadcast_tensor(whole, ranks.group))
            else:
                local.copy_(scatter(local if value is None else value, local, pieces, ranks, local.device))
    set_extra(module, extra)


def is_extra(name: str) -> bool:
    """Whether a name of a ``state_dict`` is that of what a module keeps beside tensors, by its ``get_extra_state``."""
    return name.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX


def without_extra(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters and buffers of a ``state_dict``."""
    return {name: x for name, x in state.items() if not is_extra(name)}


def set_extra(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give modules what their ``get_extra_state`` returned, by its names."""
    for name, x in state.items():
        if is_extra(name):
            owner: Any = module.get_submodule(name.rpartition(".")[0])
            owner.set_extra_state(copy.deepcopy(x))


def _copy_piece(local: Tensor, value: Tensor, pieces: Pieces | None, rank: int) -> None:
    """Copy a rank's piece of a value to where it is held."""
    if pieces is None:
        local.copy_(value)
        return
    for there, here in pieces.blocks(rank, BLOCK_ELEMENTS):
        local[here] = value[there].to(local)


def _digest(module: DistributedModule, state: Mapping[str, Tensor]) -> str:
    """A number that tells states apart: of all that each rank reads, and of the ends of what ranks read in part."""
    result = 0
    for name, value in sorted(state.items()):
        pieces, flat = module.plan.pieces.get(_canonical(module, name)), value.detach().reshape(-1)
        if value.layout is torch.strided and (pieces is None or pieces.is_replicated):
            parts = list(flat.split(BLOCK_ELEMENTS))
        else:
            parts = [flat[:1024], flat[-1024:]] if value.layout is torch.strided else []
        for part in parts:
            result = zlib.crc32(part.cpu().contiguous().view(torch.uint8).numpy().tobytes(), result)
        result = zlib.crc32(f"{name} {value.dtype}".encode(), result)
    return f"{result:08x}"


def _check_state(module: DistributedModule, mine: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(set(mine) - set(state)), sorted(set(state) - set(mine))
    if missing or unexpected:
        raise InputError(f"state_dict does not fit: missing {missing}, unexpected {unexpected}")
    for name, value in state.items():
        if is_extra(name):
            continue
        pieces = module.plan.pieces.get(_canonical(module, name))
        shape = tuple(mine[name].shape) if pieces is None else pieces.shape
        if tuple(value.shape) != shape:
            raise InputError(f"{name!r} has shape {tuple(value.shape)}; the model's is {shape}")


def _canonical(module: DistributedModule, name: str) -> str:
    """The name under which a tied parameter is in the plan."""
    if name in module.plan.pieces:
        return name
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if name not in parameters:
        return name
    return next(n for n, p in module.named_parameters() if p is parameters[name])

"""Weights: from rank 0 or from `reset_parameters` to pieces, and back to the original's state_dict."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from descompiler.collectives import receive, send
from descompiler.errors import InputError, UnsupportedError
from descompiler.module import DistributedModule, module_of
from descompiler.pieces import Pieces
from descompiler.ranks import Ranks
from descompiler.sparse import broadcast

BLOCK_ROWS = 1 << 16
"""Rows of a table that are initialised at a time, each block from its own seed."""


def initial_values(
    model: nn.Module,
    template: nn.Module,
    pieces: Mapping[str, Pieces],
    seed: int | None,
    device: torch.device,
    ranks: Ranks,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's pieces, from rank 0's model or from ``reset_parameters``; and rank 0's buffers. Collective."""
    values = {}
    if meta := ranks.of_first([n for n, p in model.named_parameters() if p.is_meta]):
        seed = ranks.of_first(torch.initial_seed() if seed is None else seed)
        values = ranks.everywhere(lambda: reset_pieces(template, pieces, seed, ranks.rank, device, meta))
    values |= send_from_first(template, model, pieces, ranks.group, ranks.rank, ranks.count, without=meta)
    return values, send_buffers(model, template, ranks.group, ranks.rank, ranks.count)


def send_from_first(
    template: nn.Module,
    model: nn.Module,
    pieces: Mapping[str, Pieces],
    group: Any,
    rank: int,
    ranks: int,
    without: Collection[str] = (),
) -> dict[str, Tensor]:
    """Every rank's pieces of rank 0's parameters, but some, one parameter and one rank at a time.

    Collective. No rank needs more than its pieces and one buffer of a piece's size; the others' own weights are not
    read.
    """
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    source = dict(model.named_parameters())
    result: dict[str, Tensor] = {}
    for name, p in template.named_parameters():
        cut = pieces[name]
        if name in without:
            continue
        if ranks == 1:
            result[name] = source[name].detach().clone()
            continue
        if cut.is_replicated:
            whole = source[name].detach().clone() if rank == 0 else torch.empty(p.shape, dtype=p.dtype, device=device)
            dist.broadcast(whole, group_src=0, group=group)
            result[name] = whole
            continue
        for r in range(1, ranks):
            if not cut.numel(r):
                continue
            if rank == 0:
                send(cut.cut(source[name].detach(), r), r, group)
            elif rank == r:
                result[name] = receive(torch.empty(cut.piece_shape(r), dtype=p.dtype, device=device), 0, group)
        if rank == 0:
            result[name] = cut.cut(source[name].detach(), 0)
        elif name not in result:
            result[name] = torch.empty(cut.piece_shape(rank), dtype=p.dtype, device=device)
    return result


def send_buffers(model: nn.Module, template: nn.Module, group: Any, rank: int, ranks: int) -> dict[str, Tensor]:
    """Rank 0's buffers on every rank."""
    result = {}
    sources = dict(model.named_buffers(remove_duplicate=False))
    for name, b in template.named_buffers(remove_duplicate=False):
        value = b.detach().clone() if sources[name].is_meta else sources[name].detach().clone()
        result[name] = broadcast(value, group) if ranks > 1 else value
    return result


def reset_pieces(
    template: nn.Module,
    pieces: Mapping[str, Pieces],
    seed: int,
    rank: int,
    device: torch.device,
    wanted: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Pieces of parameters that a model has on the meta device, from each module's own ``reset_parameters``.

    A value depends on the seed, the module's name and its place in the table only, not on the number of ranks: tables
    are initialised in blocks of `BLOCK_ROWS` rows, other modules whole.

    Parameters
    ----------
    wanted : iterable of str, optional
        Names of the parameters; all by default.

    Raises
    ------
    UnsupportedError
        If a module holds such parameters and has no ``reset_parameters``.
    """
    canonical = {id(p): n for n, p in template.named_parameters()}
    left = set(canonical.values() if wanted is None else wanted)
    result: dict[str, Tensor] = {}
    # a table that is tied to another layer is initialised as a table
    modules = sorted(template.named_modules(), key=lambda m: not isinstance(m[1], nn.Embedding | nn.EmbeddingBag))
    for prefix, module in modules:
        own = module.named_parameters(recurse=isinstance(module, nn.MultiheadAttention))
        names = {n: canonical[id(p)] for n, p in own if canonical[id(p)] in left}
        if not names:
            continue
        left -= set(names.values())
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            name = names["weight"]
            result[name] = _reset_table(module, name, pieces[name], seed, rank, device)
            continue
        reset = next((r for r in RESETS if callable(getattr(module, r, None))), None)
        if reset is None:
            raise UnsupportedError(
                f"module {prefix or type(module).__name__!r} ({type(module).__name__}) is on meta and has no "
                f"reset_parameters() to initialise {', '.join(names.values())}; write one, or create the model with "
                "real weights"
            )
        whole = _emptied(module, device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(_seed(seed, prefix, 0))
            if isinstance(module, nn.MultiheadAttention):
                whole.get_submodule("out_proj").reset_parameters()  # type: ignore[operator] # then the bias is zeroed
            getattr(whole, reset)()
        for n, name in names.items():
            result[name] = pieces[name].cut(whole.get_parameter(n).detach(), rank)
    return result


RESETS = ("reset_parameters", "_reset_parameters")
"""What initialises a module; `torch.nn.MultiheadAttention` has the second, which initialises its child too."""


def _emptied(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a module with parameters to be initialised; children, which have their turn, stay as they are."""
    result = copy.copy(module)
    result._parameters = {
        n: None if p is None else nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
        for n, p in module._parameters.items()
    }
    result._buffers = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
    if isinstance(module, nn.MultiheadAttention):
        result._modules = {"out_proj": _emptied(module.out_proj, device)}
    return result


def _seed(seed: int, name: str, block: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()[:7], "little")


def _reset_table(
    module: nn.Embedding | nn.EmbeddingBag, name: str, pieces: Pieces, seed: int, rank: int, device: torch.device
) -> Tensor:
    rows, dim = module.weight.shape
    piece = torch.empty(pieces.piece_shape(rank), dtype=module.weight.dtype, device=device)
    by_row = pieces.dim == 0
    spans = [*pieces.own(rank), *pieces.shared()]
    # of each block that this rank holds rows of: first row, last, and where they are in the piece
    wanted: dict[int, list[tuple[int, int, int]]] = {}
    position = 0
    for start, stop in [(s.start, s.stop) for s in spans] if by_row else [(0, rows if piece.numel() else 0)]:
        for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
            a, b = max(start, block * BLOCK_ROWS), min(stop, (block + 1) * BLOCK_ROWS)
            wanted.setdefault(block, []).append((a, b, position))
            position += b - a
    for block, parts in wanted.items():
        first, last = block * BLOCK_ROWS, min(rows, (block + 1) * BLOCK_ROWS)
        small = copy.copy(module)
        small._parameters = {"weight": nn.Parameter(torch.empty(last - first, dim, dtype=piece.dtype, device=device))}
        small.padding_idx = None
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(_seed(seed, name, block))
            small.reset_parameters()
            if module.padding_idx is not None and first <= module.padding_idx < last:
                small.weight[module.padding_idx - first].zero_()
        for a, b, position in parts:
            values = small.weight.detach()[a - first : b - first]
            if not by_row:
                values = torch.cat([values.narrow(1, r.start, r.size) for r in spans], 1)
            piece[position : position + b - a] = values
    return piece


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The original model's ``state_dict``, bit for bit, on every rank.

    Collective: every rank calls it.
    """
    module = module_of(module)
    runtime = module._runtime
    result: dict[str, Tensor] = {}
    for name, local in module.state_dict().items():
        pieces = module.plan.pieces.get(_canonical(module, name))
        if pieces is None or pieces.is_replicated or runtime.ranks == 1:
            result[name] = local.detach().clone()
            continue
        full = local.new_empty(pieces.shape)
        for r in range(runtime.ranks):
            if not pieces.numel(r):
                continue
            part = local.detach().clone() if r == runtime.rank else local.new_empty(pieces.piece_shape(r))
            dist.broadcast(part, group_src=r, group=runtime.group)
            pieces.place(full, part, r)
        result[name] = full
    return result


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the original model's ``state_dict``; each rank takes its pieces. Not collective: every rank has the state.

    Raises
    ------
    InputError
        If names or shapes differ; nothing is loaded then.
    """
    module = module_of(module)
    mine = module.state_dict()
    missing, unexpected = sorted(set(mine) - set(state)), sorted(set(state) - set(mine))
    if missing or unexpected:
        raise InputError(f"state_dict does not fit: missing {missing}, unexpected {unexpected}")
    for name, value in state.items():
        pieces = module.plan.pieces.get(_canonical(module, name))
        shape = tuple(mine[name].shape) if pieces is None else pieces.shape
        if tuple(value.shape) != shape:
            raise InputError(f"{name!r} has shape {tuple(value.shape)}; the model's is {shape}")
    with torch.no_grad():
        for name, value in state.items():
            pieces = module.plan.pieces.get(_canonical(module, name))
            mine[name].copy_(value if pieces is None else pieces.cut(value, module._runtime.rank))


def _canonical(module: DistributedModule, name: str) -> str:
    """The name under which a tied parameter is in the plan."""
    if name in module.plan.pieces:
        return name
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if name not in parameters:
        return name
    return next(n for n, p in module.named_parameters() if p is parameters[name])

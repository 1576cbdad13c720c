"""Initial weights: from rank 0, or drawn on each rank by the modules' own `reset_parameters`."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.errors import UnsupportedError
from descompiler.layout.pieces import Pieces
from descompiler.model.kept import buffers_of, copies_of, trainable
from descompiler.model.random_state import seed_torch
from descompiler.runtime import collectives
from descompiler.runtime.blocks import broadcast_tensor, scatter
from descompiler.runtime.ranks import Ranks
from descompiler.runtime.room import check_room

BLOCK_ROWS = 1 << 16
"""Rows of a table that are initialised at a time, each block from its own seed."""


def initial_values(
    model: nn.Module,
    template: nn.Module,
    pieces: Mapping[str, Pieces],
    seed: int | None,
    device: torch.device,
    ranks: Ranks,
    *,
    in_place: bool = False,
    without: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's pieces, from rank 0's model or from ``reset_parameters``; and rank 0's buffers. Collective.

    ``without``: parameters that have their values otherwise.

    ``in_place``: the model's own parameters become the pieces, one by one, so that each original is freed before the
    next is cut.

    Raises
    ------
    PlanError
        On every rank, before anything is allocated, if the memory of a machine does not suffice.
    """
    values: dict[str, Tensor] = {}
    meta = ranks.of_first([n for n, p in trainable(model).items() if p.is_meta])
    instead = (
        "Run more ranks on more machines, create the model on the meta device, or compile it with in_place=True, which "
        "frees the original's parameters as they are cut"
    )
    room = _room(model, pieces, ranks.rank, device, without, in_place=in_place)
    check_room(ranks, room, device, "pieces of parameters", instead)
    if meta:
        seed = ranks.of_first(torch.initial_seed() if seed is None else seed)
        values = ranks.everywhere(lambda: reset_pieces(template, pieces, seed, ranks.rank, device, meta))
    values |= send_from_first(template, model, pieces, ranks, without=[*meta, *without], in_place=in_place)
    return values, send_buffers(model, template, ranks.group, ranks.rank, ranks.count)


def _room(
    model: nn.Module,
    pieces: Mapping[str, Pieces],
    rank: int,
    device: torch.device,
    without: Collection[str],
    *,
    in_place: bool,
) -> int:
    """Bytes that a rank has to allocate for its pieces, at most at one time."""
    free, most = 0, 0
    for name, p in trainable(model).items():
        if name in without:
            continue
        size = pieces[name].numel(rank) * p.element_size()
        kept = in_place and p.device == device  # the original is freed, or becomes the piece
        whole = kept and pieces[name].is_replicated
        free -= 0 if whole else size
        most = max(most, -free)
        free += p.nbytes if kept and not whole else 0
    return most


def send_from_first(
    template: nn.Module,
    model: nn.Module,
    pieces: Mapping[str, Pieces],
    ranks: Ranks,
    without: Collection[str] = (),
    *,
    in_place: bool = False,
) -> dict[str, Tensor]:
    """Every rank's pieces of rank 0's parameters, but some, one parameter and one rank at a time.

    Collective. No rank needs more than its pieces and one block of `BLOCK_ELEMENTS`; the others' own weights are not
    read.
    """
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    source = dict(model.named_parameters())
    result: dict[str, Tensor] = {}
    for name, p in template.named_parameters():
        if name in without:
            continue
        own = source[name].detach()
        if pieces[name].is_replicated:
            reused = in_place and not own.is_meta and own.is_contiguous()
            result[name] = own if reused else torch.empty(p.shape, dtype=p.dtype, device=device)
            if ranks.rank == 0 and not reused:
                result[name].copy_(own)
            if ranks.count > 1:
                collectives.broadcast(result[name], 0, ranks.group)
        else:
            result[name] = scatter(own, p, pieces[name], ranks, device)
        if in_place and not own.is_meta:
            del own
            source[name].data = result[name]
    return result


def send_buffers(model: nn.Module, template: nn.Module, group: Any, rank: int, ranks: int) -> dict[str, Tensor]:
    """Rank 0's buffers on every rank."""
    of_model, of_template = buffers_of(model), dict(template.named_buffers(remove_duplicate=False))
    sources = {n: b if of_model[n].is_meta else of_model[n] for n, b in of_template.items()}

    def sent(value: Tensor) -> Tensor:
        value = value.detach().clone()
        return broadcast_tensor(value, group) if ranks > 1 else value

    return copies_of(sources, sent)


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
        if type(module) is nn.Linear and module.out_features > BLOCK_ROWS:  # its values depend on its columns alone
            result |= {n: _reset_rows(module, p, n, pieces[n], seed, rank, device) for p, n in names.items()}
            continue
        reset = next((r for r in RESETS if callable(getattr(module, r, None))), None)
        if reset is None:
            raise UnsupportedError(
                f"module {prefix or type(module).__name__!r} ({type(module).__name__}) is on meta and has no "
                f"reset_parameters() to initialise {', '.join(names.values())}; write one, or create the model with "
                "real weights"
            )
        whole = _emptied(module, device)
        with _seeded(_seed(seed, prefix, 0), device):
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
    def block(first: int, last: int) -> Tensor:
        small = copy.copy(module)
        weight = torch.empty(last - first, module.weight.shape[1], dtype=module.weight.dtype, device=device)
        small._parameters = {"weight": nn.Parameter(weight)}
        small.padding_idx = None
        small.reset_parameters()
        if module.padding_idx is not None and first <= module.padding_idx < last:
            weight[module.padding_idx - first].zero_()
        return weight

    return _in_blocks(block, module.weight, name, pieces, seed, rank, device)


def _reset_rows(
    module: nn.Linear, kind: str, name: str, pieces: Pieces, seed: int, rank: int, device: torch.device
) -> Tensor:
    """The piece of a linear layer's weight or bias, ``kind``."""
    bias = module.bias is not None

    def block(first: int, last: int) -> Tensor:
        with torch.device(device):  # as the module itself would draw them, for fewer outputs
            small = nn.Linear(module.in_features, last - first, bias, dtype=module.weight.dtype)
        return small.get_parameter(kind).detach()

    return _in_blocks(block, module.get_parameter(kind), name, pieces, seed, rank, device)


def _in_blocks(
    block: Callable[[int, int], Tensor],
    like: Tensor,
    name: str,
    pieces: Pieces,
    seed: int,
    rank: int,
    device: torch.device,
) -> Tensor:
    """A rank's piece of a parameter whose rows ``block(first, last)`` draws; each `BLOCK_ROWS` have a seed."""
    rows, spans = like.shape[0], [*pieces.own(rank), *pieces.shared()]
    piece = torch.empty(pieces.piece_shape(rank), dtype=like.dtype, device=device)
    # of each block that this rank holds rows of: first row, last, and where they are in the piece
    wanted: dict[int, list[tuple[int, int, int]]] = {}
    position = 0
    for start, stop in [(s.start, s.stop) for s in spans] if pieces.dim == 0 else [(0, rows if spans else 0)]:
        for number in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
            a, b = max(start, number * BLOCK_ROWS), min(stop, (number + 1) * BLOCK_ROWS)
            wanted.setdefault(number, []).append((a, b, position))
            position += b - a
    for number, parts in wanted.items():
        first = number * BLOCK_ROWS
        with _seeded(_seed(seed, name, number), device):
            drawn = block(first, min(rows, first + BLOCK_ROWS))
        for a, b, position in parts:
            values = drawn[a - first : b - first]
            if pieces.dim != 0:
                values = torch.cat([values.narrow(pieces.dim, r.start, r.size) for r in spans], pieces.dim)
            piece[position : position + b - a] = values
    return piece


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context that draws from a seed, without gradients, and leaves the generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        seed_torch(seed)
        yield

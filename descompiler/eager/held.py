"""Tensors that are cut as a parameter is: pieces of gradients, of optimisers' state, of checkpoints.

What a `ShardedParameter` gives away (``p.grad``, ``p.detach()``, ``torch.zeros_like(p)``) is a `Held`: this rank's
tensor, which says of what it is which piece. It is an ordinary tensor to everything that goes element by element, as
optimisers do. What would be of all elements is asked of all ranks, or refused:

    norms (``clip_grad_norm_``)                  of the whole gradient: local terms, then every rank's. Collective
    the check of `torch.amp.GradScaler`          an overflow on one rank is one on all. Collective
    pieces of two ranks in one call              refused: a rank loaded what another saved
    torch.distributed.checkpoint                 ranges of the original, written once and read by whoever holds them

Its own class, and no DTensor: one rank may hold several ranges of a dimension, of sizes of their own, and ranges that
every rank holds, for which DTensor has no placement.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types as _of_optimizers
from torch.utils._foreach_utils import _foreach_supported_types

from descompiler.eager.elements import (
    COMPARES,
    EXTREMES,
    GIVES_PIECES,
    INITIALISERS,
    JOINS,
    KEEPS,
    MOVES,
    OF_ALL,
    OF_THE_WHOLE,
    RANDOM,
    REDUCTIONS,
    SPECIAL,
    TURNED,
    changes_in_place,
    is_local,
)
from descompiler.eager.piece import Piece, local
from descompiler.errors import UnsupportedError
from descompiler.layout.division import Division, Run
from descompiler.layout.pieces import Pieces
from descompiler.ops.functions import NORMS, function_name
from descompiler.ops.local import plain
from descompiler.runtime.collectives import all_gather, all_reduce
from descompiler.runtime.runtime import Runtime


@dataclass(frozen=True, eq=False)
class Whose:
    """Of what a tensor is a piece; see `descompiler.eager.piece.Piece`. A copy of the tensor has the same."""

    original: str
    pieces: Pieces
    rank: int
    runtime: Runtime | None
    is_moved: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Whose:
        return self


class Held(Piece, Tensor):
    """This rank's piece of what is cut as a parameter is: of its values, its gradient, an optimiser's state."""

    whose: Whose
    original = property(lambda self: self.whose.original)
    pieces = property(lambda self: self.whose.pieces)
    rank = property(lambda self: self.whose.rank)
    runtime = property(lambda self: self.whose.runtime)
    is_moved = property(lambda self: self.whose.is_moved)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_pieces(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        result = memo[id(self)] = held(plain(self).detach().clone(), self)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        p = self.pieces
        runs = [(run.size, run.owner, run.count) for run in p.division.runs]
        return _from_file, (plain(self), self.original, tuple(p.shape), p.dim, runs, p.ranks, self.rank)


def held(x: Tensor, like: Any, *, moved: bool = False) -> Held:
    """A tensor as the piece that another one is; ``moved``: with its elements in another shape."""
    result: Held = local(Tensor.as_subclass, (x, Held), {})
    result.whose = replace(like.whose, is_moved=True) if moved else like.whose
    return result


def _from_file(x: Tensor, original: str, shape: Any, dim: int, runs: Any, ranks: int, rank: int) -> Held:
    """A piece as it was saved."""
    result = x.as_subclass(Held)
    pieces = Pieces(tuple(shape), dim, Division(tuple(Run(*run) for run in runs)), ranks)
    result.whose = Whose(original, pieces, rank, None)
    return result


torch.serialization.add_safe_globals([_from_file])


def take_in_lists(*classes: type[Tensor]) -> None:
    """Let optimisers and ``clip_grad_norm_`` take these tensors in lists, as they do plain ones and DTensor."""
    for supported in (_of_optimizers, _foreach_supported_types):
        supported.extend(c for c in classes if c not in supported)


take_in_lists(Held)


def on_pieces(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A call on pieces outside of a graph of autograd's: of each element, or of all ranks'.

    Raises
    ------
    UnsupportedError
        If it takes pieces of two ranks.
    """
    if func in GIVES_PIECES:
        found = local(func, args, kwargs)
        return None if found is None else _given_away(found, args[0])
    if func not in SPECIAL:  # in place, of each element, or no value: an optimiser makes hundreds of these calls a step
        _check_of_one_rank(func, args)
        return local(func, args, kwargs) if is_local(func) else _unknown(func, args, kwargs)
    given = [x for a in (*args, *kwargs.values()) for x in (a if isinstance(a, list | tuple) else (a,))]
    pieces: list[Any] = [x for x in given if isinstance(x, Piece)]
    if any(x.runtime is not None and x.runtime.ranks == 1 for x in pieces):
        return local(func, args, kwargs)  # one rank holds all
    _check_of_one_rank(func, pieces)
    of_all = func in NORMS or func in REDUCTIONS
    if of_all and (moved := [x for x in pieces if x.is_moved]):
        raise refused(func, moved[0], ", reshaped")
    if func in JOINS and pieces[0].runtime is not None:
        raise refused(func, pieces[0], ", reshaped" if pieces[0].is_moved else "")
    if of_all:
        return _reduced(func, args, kwargs)
    if func in COMPARES and len(pieces) == 2 and all(_alike(x, pieces[0]) for x in pieces):
        return _all_agree(func, args, kwargs)
    if pieces[0].runtime is not None and (func in OF_THE_WHOLE or func in INITIALISERS or func in RANDOM):
        raise refused(func, pieces[0])
    if func is Tensor.__setitem__:
        return _set_rows(*args)
    if func is torch._foreach_norm:
        return _norms(func, args, kwargs)
    result = local(func, args, kwargs)
    if func is torch._amp_foreach_non_finite_check_and_unscale_:
        _overflow_of_all(pieces, args[1])
    if not isinstance(result, Tensor) or isinstance(result, Piece) or result.grad_fn is not None:
        return result
    if func in KEEPS:
        like = pieces[0]
        others = (x for x in given if isinstance(x, Tensor) and not isinstance(x, Piece))
        same = not any(x.dim() for x in others)  # what meets others is the caller's own
        staged = func is Tensor.new_empty and list(args[1]) == []  # DCP gives it a copied storage, and the shape
        if same and (staged or local(Tensor.size, (like,), {}) == result.shape):
            return held(result, like)
    elif (func in MOVES or func in TURNED) and args and isinstance(args[0], Piece):
        return held(result, args[0], moved=True)
    return result


def _unknown(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A call that nobody has said to go element by element: refused if it changes a piece, or makes tensors of one."""
    changes = changes_in_place(func)
    result = None if changes else local(func, args, kwargs)
    made = [] if changes or type(result) in (bool, int, torch.dtype) else tensors_among(result)
    if not made and not changes:
        return result
    pieces = [x for x in tensors_among((args, kwargs)) if isinstance(x, Piece)]
    cut = [x for x in pieces if x.runtime is not None and x.runtime.ranks > 1]
    if cut and (changes or any(all(x is not y for y in pieces) for x in made)):
        raise refused(func, cut[0])
    return local(func, args, kwargs) if changes else result


def tensors_among(x: Any) -> list[Tensor]:
    """The tensors in lists, tuples and dicts of arguments."""
    found: list[Tensor] = []
    torch.utils._pytree.tree_map_only(Tensor, found.append, x)
    return found


def _set_rows(x: Any, key: Any, value: Any) -> None:
    """Put a number in place of rows of the original, ``p[0] = 0``, or of what a piece's own mask says. Collective.

    Raises
    ------
    UnsupportedError
        For other rows than an integer's or a slice's, or other values than a number: a rank's own would be lost.
    """
    mine, number = plain(x), isinstance(value, int | float | bool)
    own_mask = isinstance(key, Held) and number and plain(key).shape == mine.shape
    if x.runtime is None or own_mask:
        local(Tensor.__setitem__, (x, key, value), {})
        return
    if x.is_moved or not number or not (key is Ellipsis or type(key) in (int, slice)):
        raise refused(Tensor.__setitem__, x, ", of which rows are set")
    x.runtime.meet_between_steps(f"{x.original!r}[{key}] = {value}")
    count = x.pieces.shape[0]
    if type(key) is int and not -count <= key < count:
        raise IndexError(f"{x.original!r} has {count} rows, and none is {key}")
    if x.pieces.dim != 0:
        mine[key] = value
        return
    rows = slice(None) if key is Ellipsis else slice(key, key + 1 or None) if type(key) is int else key
    first, stop, step = rows.indices(count)
    for start, here, size in x._ranges():  # no list of rows: a table may have billions
        skipped = max(0, -((first - start) // step))  # rows of the slice in front of this range
        mine[here + first + skipped * step - start : here + max(0, min(stop - start, size)) : step] = value


def _alike(x: Any, other: Any) -> bool:
    return x.runtime is not None and x.runtime is other.runtime and x.pieces == other.pieces and not x.is_moved


def _all_agree(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether two tensors that are cut alike are equal, or close, on every rank. Collective."""
    x = next(x for x in tensors_among((args, kwargs)) if isinstance(x, Piece))
    mine = torch.tensor([local(func, args, kwargs)], dtype=torch.uint8, device=plain(x).device)
    x.runtime.meet_between_steps(f"{function_name(func)} of {x.original!r}")  # type: ignore[union-attr]
    all_reduce(mine, x.runtime.group, dist.ReduceOp.MIN).wait()  # type: ignore[union-attr]
    return bool(mine)


def _check_of_one_rank(func: Any, given: Sequence[Any]) -> None:
    first: Any = None
    for a in given:
        for x in a if type(a) is list else (a,):
            if not isinstance(x, Piece):
                continue
            if first is None:
                first = x
            elif x.rank != first.rank:
                raise UnsupportedError(
                    f"{function_name(func)} of rank {first.rank}'s piece of {first.original!r} and rank {x.rank}'s: "
                    "this rank has loaded what another one saved. Save and load with torch.distributed.checkpoint, "
                    "which gives each its own"
                )


def _parts(x: Any) -> tuple[Tensor, Tensor]:
    """What this rank alone holds, and what every rank holds."""
    mine, own = plain(x), x.pieces.own_size(x.rank)
    return mine.narrow(x.pieces.dim, 0, own), mine.narrow(x.pieces.dim, own, mine.shape[x.pieces.dim] - own)


def _given_away(x: Tensor, parameter: Any) -> Any:
    """A parameter's gradient or data."""
    if not x.is_sparse:
        return held(x, parameter) if parameter.runtime.ranks > 1 else x
    if _asked_by("torch.amp.grad_scaler") and parameter.runtime.ranks > 1:
        return _Scaled(x, parameter)
    return x  # a sparse tensor can't be of another class


def _asked_by(module: str) -> bool:
    """Whether code of a module has made the call that is under way: the first that is none of this room."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(__package__):
        frame = frame.f_back
    return frame.f_globals.get("__name__") == module


class _Scaled:
    """A sparse gradient as `torch.amp.GradScaler` asks for it: its values are a piece, of which all ranks are asked."""

    is_sparse = True

    def __init__(self, gradient: Tensor, parameter: Any) -> None:
        self.gradient, self.parameter, self.dtype = gradient, parameter, gradient.dtype

    def coalesce(self) -> Tensor:
        return self.gradient.coalesce()

    def _values(self) -> Held:
        return held(self.gradient._values(), self.parameter, moved=True)


def refused(func: Any, x: Any, how: str = "") -> UnsupportedError:
    """The error for a call of which no rank can have the answer."""
    name = function_name(func)
    return UnsupportedError(
        f"{name} of {x.original!r}{how}: rank {x.rank} holds a piece of {tuple(local(Tensor.size, (x,), {}))}, of "
        f"{x.pieces.shape}. Take the whole, des.full_state_dict(module)[{x.original!r}], pin a form that leaves it "
        f"whole in plan= where an optimiser has to see it, or say that the piece is meant: {name}(des.local_tensor(x))"
    )


def _reduced(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A norm, sum, mean or extreme of all elements of the original, of every rank; along dimensions, of those here.

    Raises
    ------
    UnsupportedError
        Of another kind, or along a dimension that is cut.
    """
    x, rest = (args[0], args[1:]) if args else (kwargs.get("input", kwargs.get("self", kwargs.get("x"))), ())
    if (
        not isinstance(x, Piece)
        or x.runtime is None
        or x.runtime.ranks == 1
        or any(isinstance(y, Tensor) for y in rest)
    ):
        return local(func, args, kwargs)  # max(a, b) goes element by element
    order: Any = 2
    if func in NORMS:
        order, rest = (rest[0], rest[1:]) if rest else (kwargs.get("p", kwargs.get("ord", 2)), ())
        order = 2 if order in (None, "fro") else order
    dims = kwargs.get("dim", kwargs.get("axis", rest[0] if rest else None))
    if dims is not None and not (isinstance(dims, tuple | list) and not dims):
        along = {d % len(x.pieces.shape) for d in (dims if isinstance(dims, tuple | list) else (dims,))}
        if x.pieces.dim in along:
            raise refused(func, x, f" along dimension {x.pieces.dim}, which is cut")
        return local(func, args, kwargs)
    matrix = func is torch.linalg.norm and order != 2 and len(x.pieces.shape) > 1
    if func in NORMS and not matrix and isinstance(order, int | float) and order > 0:
        return norms_of([x], float(order), kwargs.get("dtype"))[0]
    name = REDUCTIONS.get(func, "")
    if name not in EXTREMES and name not in OF_ALL:
        raise refused(func, x)
    return _over_ranks(name, x, kwargs.get("dtype"))


def _over_ranks(name: str, x: Any, dtype: torch.dtype | None) -> Tensor:
    """A sum, a mean or an extreme of all elements of the original. Collective."""
    own, shared = _parts(x)
    if name in EXTREMES:
        identity = _identity(own.dtype, largest=name in ("min", "amin"))
        parts = [getattr(y, name.removeprefix("a"))() if y.numel() else own.new_tensor(identity) for y in (own, shared)]
    else:
        parts = [getattr(y, "sum" if name == "mean" else name)() for y in (own, shared)]
    total = parts[0].to(torch.uint8) if parts[0].dtype is torch.bool else parts[0].clone()
    x.runtime.meet_between_steps(f"{name} of {x.original!r}")
    all_reduce(total, x.runtime.group, (EXTREMES | OF_ALL)[name]).wait()
    total = total.to(parts[0])
    if name in EXTREMES:
        total = getattr(torch.stack([total, parts[1]]), name.removeprefix("a"))()
    elif name in ("any", "all"):
        total = total | parts[1] if name == "any" else total & parts[1]
    else:
        total = total + parts[1]
    if name == "mean":
        total = total / torch.Size(x.pieces.shape).numel()
    return total if dtype is None else total.to(dtype)


def _identity(dtype: torch.dtype, *, largest: bool) -> float | int | bool:
    """What no number of a dtype is larger than, or smaller."""
    if dtype is torch.bool:
        return largest
    if dtype.is_floating_point:
        return float("inf") if largest else float("-inf")
    return torch.iinfo(dtype).max if largest else torch.iinfo(dtype).min


def _norms(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Of each tensor of a list, of which some are pieces; one collective."""
    tensors, order, dtype = (*args, *((2, None)[len(args) - 1 :]))[:3]
    order, dtype = kwargs.get("ord", order), kwargs.get("dtype", dtype)
    is_cut = [isinstance(x, Piece) and x.runtime is not None for x in tensors]
    whole = [plain(x) for x, cut in zip(tensors, is_cut, strict=True) if not cut]
    of_whole = iter(local(func, (whole, order), {"dtype": dtype}) if whole else ())
    of_cut = iter(norms_of([x for x, cut in zip(tensors, is_cut, strict=True) if cut], float(order), dtype))
    return [next(of_cut if cut else of_whole) for cut in is_cut]


def norms_of(pieces: Sequence[Any], order: float, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Norms of the tensors that these are pieces of. Collective.

    Of a rank's own elements first, then of the ranks' norms: ``(sum_r |x_r|^p)^(1/p)``, of which the largest is the
    limit for p = infinity.
    """
    if not pieces or pieces[0].runtime.ranks == 1:
        return [torch.linalg.vector_norm(plain(x), order, dtype=dtype) for x in pieces]
    runtime = pieces[0].runtime

    def norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, order, dtype=dtype) if x.numel() else x.new_zeros((), dtype=dtype or x.dtype)

    parts = [_parts(x) for x in pieces]
    widest = max((norm(own) for own, _ in parts), key=lambda x: x.dtype.itemsize)
    own = torch.stack([norm(own).to(widest) for own, _ in parts])
    runtime.meet_between_steps("a norm of gradients, or of weights, that ranks have pieces of")
    every = all_gather(own, runtime.group)
    norms = zip(every.reshape(runtime.ranks, len(pieces)).unbind(1), parts, strict=True)
    return [
        torch.linalg.vector_norm(torch.cat([x, norm(rest).to(x).reshape(1)]), order).to(rest) for x, (_, rest) in norms
    ]


def _overflow_of_all(pieces: Sequence[Any], found: Tensor) -> None:
    """An overflow that any rank has found in its pieces is one on every rank. Collective."""
    runtime = pieces[0].runtime
    if runtime is not None and runtime.ranks > 1:
        runtime.meet_between_steps("GradScaler's look for overflows in gradients")
        all_reduce(found, runtime.group, dist.ReduceOp.MAX).wait()

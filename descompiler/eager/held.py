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
from torch import Tensor, nn
from torch.optim.optimizer import _foreach_supported_types as _of_optimizers
from torch.utils._foreach_utils import _foreach_supported_types

from descompiler.eager.piece import Piece, local, plain
from descompiler.errors import UnsupportedError
from descompiler.layout.division import Division, Run
from descompiler.layout.pieces import Pieces
from descompiler.ops.functions import ELEMENTWISE, NORMS, PRODUCTS, function_name
from descompiler.runtime.collectives import all_gather, all_reduce
from descompiler.runtime.runtime import Runtime

_COPIES = """
    clone detach detach_ to cpu cuda float double half bfloat16 contiguous zeros_like ones_like empty_like full_like
    new_empty new_zeros new_ones new_full rand_like randn_like lerp addcmul addcdiv addcdiv_ maximum minimum where
    reciprocal sign type type_as nan_to_num isfinite isnan isinf eq ne lt le gt ge logical_not logical_and logical_or
    floor ceil round __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __rtruediv__ __rpow__ __invert__ __and__ __or__
"""


_NEW = "detach zeros_like ones_like empty_like full_like rand_like randn_like"


COPIES = {getattr(h, n) for h in (torch, Tensor) for n in _NEW.split() if hasattr(h, n)}
"""What is of no graph, though gradients are on."""


KEEPS = ELEMENTWISE | {getattr(h, n) for h in (torch, Tensor) for n in _COPIES.split() if hasattr(h, n)}
"""What makes a piece of the same kind of a piece."""


_VIEWS = "view reshape flatten ravel t transpose permute unsqueeze squeeze unflatten movedim swapaxes expand"


MOVES = {getattr(h, n) for h in (torch, Tensor) for n in _VIEWS.split() if hasattr(h, n)}
TURNED: set[Any] = {Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
"""What leaves the elements, and puts them in another shape: sums and norms of that are no longer asked for."""


JOINS = {torch.cat, torch.stack, torch.hstack, torch.vstack, torch.concat}


GIVES_PIECES: set[Any] = {Tensor.grad.__get__, Tensor.data.__get__}  # type: ignore[attr-defined,union-attr]


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
        return local(func, args, kwargs)
    given = [x for a in (*args, *kwargs.values()) for x in (a if isinstance(a, list | tuple) else (a,))]
    pieces: list[Any] = [x for x in given if isinstance(x, Piece)]
    if any(x.runtime is not None and x.runtime.ranks == 1 for x in pieces):
        return local(func, args, kwargs)  # one rank holds all
    _check_of_one_rank(func, pieces)
    of_all = func in NORMS or func in REDUCTIONS
    if of_all and (moved := [x for x in pieces if x.is_moved]):
        raise _refused(func, moved[0], ", reshaped")
    if func in JOINS and pieces[0].runtime is not None:
        raise _refused(func, pieces[0], ", reshaped" if pieces[0].is_moved else "")
    if of_all:
        return _reduced(func, args, kwargs)
    fills = func in INITIALISERS or (func in RANDOM_FILLS and isinstance(args[0], nn.Parameter))
    if pieces[0].runtime is not None and (func in OF_THE_WHOLE or fills):
        raise _refused(func, pieces[0])
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


def _given_away(x: Tensor, parameter: Any) -> Tensor:
    """A parameter's gradient or data."""
    if not x.is_sparse:
        return held(x, parameter) if parameter.runtime.ranks > 1 else x
    # a sparse tensor can't be of another class
    if sys._getframe(4).f_globals.get("__name__") == "torch.amp.grad_scaler" and parameter.runtime.ranks > 1:
        raise UnsupportedError(
            f"GradScaler and the sparse gradient of {parameter.original!r}: each rank would look for overflows in its "
            "own rows. Scale without it (bfloat16 needs none), or let the table have dense gradients (sparse=False)"
        )
    return x


def _refused(func: Any, x: Any, how: str = "") -> UnsupportedError:
    name = function_name(func)
    return UnsupportedError(
        f"{name} of {x.original!r}{how}: rank {x.rank} holds a piece of {tuple(local(Tensor.size, (x,), {}))}, of "
        f"{x.pieces.shape}. Take the whole, des.full_state_dict(module)[{x.original!r}], pin a form that leaves it "
        f"whole in plan= where an optimiser has to see it, or say that the piece is meant: {name}(des.local_tensor(x))"
    )


_FILLS = "uniform_ normal_ random_ bernoulli_ exponential_ geometric_ cauchy_ log_normal_"


RANDOM_FILLS = {getattr(Tensor, n) for n in _FILLS.split()}


INITIALISERS: set[Any] = {
    f
    for n, f in vars(torch.nn.init).items()
    if n.endswith("_") and not n.startswith("_") and n not in ("constant_", "zeros_", "ones_")
}
"""What `torch.nn.init` fills at random, or for the sizes of what it is given."""


_EXTREMES = {"max": dist.ReduceOp.MAX, "amax": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN, "amin": dist.ReduceOp.MIN}


_OF_ALL = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "any": dist.ReduceOp.MAX, "all": dist.ReduceOp.MIN}


_WITHOUT_RANKS = "std var prod median nanmean nansum argmax argmin logsumexp softmax count_nonzero aminmax"


REDUCTIONS = {
    getattr(h, n): n for h in (torch, Tensor) for n in (*_EXTREMES, *_OF_ALL, *_WITHOUT_RANKS.split()) if hasattr(h, n)
}
"""By function, its name: along dimensions that are not cut each rank has the result of its piece."""


_NAMES = """
    numpy tolist item __array__ cumsum sort topk unique quantile histc dot vdot inner addmm mv einsum tensordot svd qr
"""


OF_THE_WHOLE = PRODUCTS | {getattr(h, n) for h in (torch, Tensor) for n in _NAMES.split() if hasattr(h, n)}
"""What means nothing of a piece."""


SPECIAL = (KEEPS | MOVES | TURNED | JOINS | NORMS | set(REDUCTIONS) | OF_THE_WHOLE | RANDOM_FILLS | INITIALISERS) | {
    torch._foreach_norm,
    torch._amp_foreach_non_finite_check_and_unscale_,
}
"""What is more than a call on what this rank holds."""


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
            raise _refused(func, x, f" along dimension {x.pieces.dim}, which is cut")
        return local(func, args, kwargs)
    matrix = func is torch.linalg.norm and order != 2 and len(x.pieces.shape) > 1
    if func in NORMS and not matrix and isinstance(order, int | float) and order > 0:
        return norms_of([x], float(order), kwargs.get("dtype"))[0]
    name = REDUCTIONS.get(func, "")
    if name not in _EXTREMES and name not in _OF_ALL:
        raise _refused(func, x)
    return _over_ranks(name, x, kwargs.get("dtype"))


def _over_ranks(name: str, x: Any, dtype: torch.dtype | None) -> Tensor:
    """A sum, a mean or an extreme of all elements of the original. Collective."""
    own, shared = _parts(x)
    if name in _EXTREMES:
        identity = _identity(own.dtype, largest=name in ("min", "amin"))
        parts = [getattr(y, name.removeprefix("a"))() if y.numel() else own.new_tensor(identity) for y in (own, shared)]
    else:
        parts = [getattr(y, "sum" if name == "mean" else name)() for y in (own, shared)]
    total = parts[0].to(torch.uint8) if parts[0].dtype is torch.bool else parts[0].clone()
    x.runtime.meet_between_steps(f"{name} of {x.original!r}")
    all_reduce(total, x.runtime.group, (_EXTREMES | _OF_ALL)[name]).wait()
    total = total.to(parts[0])
    if name in _EXTREMES:
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
    result = list(local(func, ([plain(x) for x in tensors], order), {"dtype": dtype}))
    cut = [i for i, x in enumerate(tensors) if isinstance(x, Piece) and x.runtime is not None]
    for i, norm in zip(cut, norms_of([tensors[i] for i in cut], float(order), dtype), strict=True):
        result[i] = norm
    return result


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

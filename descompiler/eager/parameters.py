"""Sharded parameters: what happens when Python code uses a parameter of which this rank holds a part.

A `ShardedParameter` is an ordinary parameter (this rank's part, for optimisers) whose uses are intercepted:

    lookup      F.embedding, F.embedding_bag, W[ids], index_select     each unique row is fetched once from its owner
    reduction   W.sum(), W.mean(), norms, also of f(W) elementwise     local terms, then every rank's
    the rest    W @ x, cat([W, V]), ...                                the whole parameter is gathered, with a note

so each means what it means in the original model.

Outside of the compiled method the user's loss is of this rank's rows alone. Where it is a sum over rows, or a mean of
which ranks have unlike shares, what parameters do to rows (`h @ w`) weighs as the method's outputs do; what is computed
of parameters alone (a regulariser), or of numbers of the global batch that the method returns, is a term of the loss,
and counts once. See `OfParameters`.

What crosses for that is the business of `descompiler.eager.exchange`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from descompiler.eager.elements import (
    COPIES,
    GIVES_PIECES,
    INITIALISERS,
    RANDOM,
    SPECIAL,
    is_local,
)
from descompiler.eager.fetched import fetched
from descompiler.eager.held import Whose, on_pieces, refused, take_in_lists, tensors_among
from descompiler.eager.piece import Divided, Piece, local
from descompiler.eager.rows import are_constants, of_batch
from descompiler.errors import UnsupportedError
from descompiler.layout.pieces import Pieces
from descompiler.ops.functions import ELEMENTWISE, LOOKUPS, NORMS, PRODUCTS, SUM_FUNCTIONS, TERMS, function_name
from descompiler.ops.local import plain, scale_grad
from descompiler.runtime.agreement import Kind
from descompiler.runtime.runtime import Runtime
from descompiler.tables.form import fallback


class PieceTransport(Protocol):
    """What uses of parameters ask of the other ranks: `descompiler.eager.exchange.PieceExchange`."""

    runtime: Runtime
    parameters: list[Divided]

    @property
    def outside(self) -> bool:
        """Whether uses are to weigh as the outputs of the compiled method do."""

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor is a buffer of the module's, or a view of one."""

    def fetch(self, parameter: ShardedParameter, ids: Tensor, sparse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Unique rows of a table, where each id's is among them, and their ids."""

    def whole(self, parameter: ShardedParameter, what: str) -> Tensor:
        """The original parameter."""

    def scalars(self, x: Tensor, what: str) -> Tensor:
        """A number of every rank."""

    def agree(self, what: str, kind: Kind) -> list[int]:
        """Come to a common call."""


class Tracked(Piece, Tensor):
    """An elementwise function of pieces, for reductions; it is cut as they are."""

    exchange: PieceTransport
    whose: Whose  # of what it gives away
    runtime = property(lambda self: self.exchange.runtime)
    rank = property(lambda self: self.exchange.runtime.rank)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _intercept(func, args, kwargs or {})


class ShardedParameter(Divided):
    """This rank's part of a parameter; see the module's text."""

    exchange: PieceTransport
    whose: Whose  # of what it gives away

    @property
    def runtime(self) -> Runtime:  # type: ignore[override]
        return self.exchange.runtime

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self.exchange.runtime.rank

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _intercept(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        result = nn.Parameter(plain(self).detach().clone(), self.requires_grad)
        return memo.setdefault(id(self), result)  # a copy is a plain tensor: it belongs to no module

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(plain(self).detach(), self.requires_grad).__reduce_ex__(protocol)


take_in_lists(ShardedParameter)


SHARDED = (ShardedParameter, Tracked)
"""What is cut, and knows how."""


BACKWARDS = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
"""What takes parameters to name them, and computes nothing of them."""


USES = {*BACKWARDS, *LOOKUPS, *PRODUCTS}
"""What uses a parameter, or names it, also where no graph is made."""


NEVER_USES = GIVES_PIECES | COPIES | INITIALISERS | RANDOM
"""What uses none, also where a graph is made."""


class OfParameters(Tensor):
    """Computed of parameters alone outside of the compiled method, or a number of the global batch that it returned."""

    exchange: PieceTransport

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _in_users_code(func, args, kwargs or {})


class WholeParameter(nn.Parameter):
    """A parameter that every rank holds, whose uses outside of the compiled method weigh as its outputs do."""

    exchange: PieceTransport

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _in_users_code(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return memo.setdefault(id(self), nn.Parameter(plain(self).detach().clone(), self.requires_grad))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(plain(self).detach(), self.requires_grad).__reduce_ex__(protocol)


WHOLE = (WholeParameter, OfParameters)


def weigh_outside(p: nn.Parameter, exchange: PieceTransport) -> None:
    """Let uses of a parameter that every rank holds weigh as the compiled method's outputs do."""
    p.__class__ = WholeParameter
    p.exchange = exchange  # type: ignore[attr-defined]


def _in_users_code(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in BACKWARDS:
        return local(func, args, kwargs)
    tensors = tensors_among((args, kwargs))
    if any(isinstance(x, SHARDED) for x in tensors):
        return _intercept(func, args, kwargs)
    own: list[Any] = [x for x in tensors if isinstance(x, WHOLE)]
    is_attribute = getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__")  # its own: data, grad
    if not own or is_attribute or not torch.is_grad_enabled() or not own[0].exchange.outside:
        return local(func, args, kwargs)
    exchange = own[0].exchange
    batch = [x for x in tensors if not isinstance(x, WHOLE) and of_batch(x, exchange.runtime, exchange.holds)]
    if batch and not are_constants(func, args, kwargs, own, batch, exchange.runtime):
        terms = func in TERMS and all(x.numel() == 1 for x in own) and not any(x.dim() for x in batch)
        if not terms:
            args, kwargs = torch.utils._pytree.tree_map(
                lambda x: exchange.runtime.output(plain(x)) if isinstance(x, WHOLE) else x, (args, kwargs)
            )
        return local(func, args, kwargs)
    return _of_parameters(local(func, args, kwargs), exchange)


def numbers_of_batch(outputs: list[Tensor], have_rows: Sequence[bool], exchange: PieceTransport) -> list[Tensor]:
    """Outputs of the compiled method: what is the global batch's, not this rank's rows, counts once in each loss."""
    return [x if rows else _of_parameters(x, exchange) for x, rows in zip(outputs, have_rows, strict=True)]


def _of_parameters(result: Any, exchange: PieceTransport) -> Any:
    def mark(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.grad_fn is None:
            return x
        marked = plain(x).as_subclass(OfParameters)
        marked.exchange = exchange
        return marked

    if not exchange.outside:
        return result
    return type(result)(map(mark, result)) if type(result) in (tuple, list) else mark(result)


def substitute(p: nn.Parameter, name: str, pieces: Pieces, exchange: PieceTransport) -> ShardedParameter:
    """Make a parameter that holds this rank's part a `ShardedParameter`, in place: optimisers keep their reference."""
    p.__class__ = ShardedParameter
    p.pieces, p.original, p.exchange = pieces, name, exchange  # type: ignore[attr-defined]
    p.whose = Whose(name, pieces, exchange.runtime.rank, exchange.runtime)  # type: ignore[attr-defined]
    serve(p, exchange)
    return p  # type: ignore[return-value]


def serve(p: nn.Parameter, exchange: PieceTransport) -> None:
    """Have a parameter, which is a piece, among those whose uses ranks serve each other."""
    p.position = len(exchange.parameters)  # type: ignore[attr-defined]
    exchange.parameters.append(p)  # type: ignore[arg-type]


def _intercept(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func not in USES and (not torch.is_grad_enabled() or func in NEVER_USES):
        return on_pieces(func, args, kwargs)  # optimisers, initialisers, copies: this rank's part
    if func in BACKWARDS:
        return local(func, args, kwargs)
    if func in LOOKUPS:
        result = _fetched_lookup(func, args, kwargs)
        found = _on_whole(func, args, kwargs) if result is NotImplemented else _looked_up(result, args, kwargs)
        if func is Tensor.__getitem__ and isinstance(args[0], ShardedParameter) and not torch.is_grad_enabled():
            return found if has_indices(args[1]) else fetched(found, args[0].original)
        return found
    if func in PRODUCTS:
        return _on_whole(func, args, kwargs)
    first: Any = args[0] if args else None
    if func in SUM_FUNCTIONS or func in NORMS:
        result = _reduce(func, first, args[1:], kwargs)
        if result is not NotImplemented:
            return _of_parameters(result, first.exchange)
        return _on_whole(func, args, kwargs)
    if func in ELEMENTWISE and (kind := _common(args, kwargs)) is not None:
        joined = torch.utils._pytree.tree_map(lambda x: _beside_part(x, kind), (args, kwargs))
        result = local(func, *joined)
        if isinstance(result, Tensor) and result.shape == kind.shape:
            tracked = result.as_subclass(Tracked)
            tracked.pieces, tracked.original = kind.pieces, kind.original
            tracked.exchange, tracked.whose = kind.exchange, kind.whose
            return tracked
    result = local(func, args, kwargs)
    tensors = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)]
    if any(x.grad_fn is not None for x in tensors):
        return _on_whole(func, args, kwargs)
    made = any(all(x is not y for y in tensors_among((args, kwargs))) for x in tensors)
    if func in SPECIAL or (made and not is_local(func)):  # what has no gradient, is not of each element
        return on_pieces(func, args, kwargs)
    return result  # sizes, dtypes: this rank's part


def has_indices(key: Any) -> bool:
    """Whether indexing copies: by tensors or lists. By numbers and slices it is a view."""
    return any(isinstance(k, Tensor | list | np.ndarray) for k in (key if isinstance(key, tuple) else (key,)))


def _common(args: Any, kwargs: Any) -> Any:
    """The piece that all tensors among the arguments are cut as; None if they are not (numbers may join)."""
    cut: list[Any] = [x for x in tensors_among((args, kwargs)) if x.numel() != 1 or isinstance(x, SHARDED)]
    if all(isinstance(x, SHARDED) and x.pieces == cut[0].pieces and x.shape == cut[0].shape for x in cut):
        return cut[0]
    return None


def _beside_part(x: Any, part: Any) -> Any:
    """A trained number that meets a part: each rank has the gradient of its own rows, all that of rows all hold."""
    ranks = part.exchange.runtime.ranks
    if not isinstance(x, Tensor) or isinstance(x, SHARDED) or not x.requires_grad or ranks == 1:
        return x
    own, shared = (y.shape for y in _own_and_shared(part))
    x = plain(x)
    return torch.cat([scale_grad(x, ranks).expand(own), x.expand(shared)], part.pieces.dim)


def _looked_up(result: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What was fetched, which outside of the compiled method weighs as its outputs do if the ids are the batch's."""
    tensors: list[Any] = tensors_among((args, kwargs))
    exchange = next(x.exchange for x in tensors if isinstance(x, SHARDED))
    others = [x for x in tensors if not isinstance(x, (*SHARDED, *WHOLE))]
    if exchange.outside and any(of_batch(x, exchange.runtime, exchange.holds) for x in others):
        return exchange.runtime.output(result)
    return _of_parameters(result, exchange)


def _own_and_shared(x: Any) -> tuple[Tensor, Tensor]:
    """The part that this rank alone holds, and the part that every rank holds."""
    held, own = plain(x), x.pieces.own_size(x.exchange.runtime.rank)
    return held.narrow(x.pieces.dim, 0, own), held.narrow(x.pieces.dim, own, held.shape[x.pieces.dim] - own)


def _reduce(func: Any, x: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A sum, mean or norm over all elements; NotImplemented for one over a dimension."""
    if not isinstance(x, SHARDED):
        return NotImplemented
    what = f"{function_name(func)} of {x.original!r}"
    own, shared = _own_and_shared(x)
    if func in SUM_FUNCTIONS:
        if rest or kwargs:
            return NotImplemented
        total = x.exchange.scalars(own.sum(), what).sum() + shared.sum()
        return total / torch.Size(x.pieces.shape).numel() if SUM_FUNCTIONS[func] == "mean" else total
    order = kwargs.get("p", kwargs.get("ord", rest[0] if rest else 2))
    order = 2 if order in (None, "fro") else order
    if len(rest) > 1 or set(kwargs) - {"p", "ord"} or not isinstance(order, int | float) or order <= 0:
        return NotImplemented
    if func is torch.linalg.norm and order != 2:
        return NotImplemented  # a matrix norm
    norms = [torch.linalg.vector_norm(part, order) if part.numel() else part.sum() for part in (own, shared)]
    return torch.linalg.vector_norm(torch.cat([x.exchange.scalars(norms[0], what), norms[1].reshape(1)]), order)


def _on_whole(func: Any, args: Any, kwargs: Any) -> Any:
    def gathered(x: Any) -> Any:
        if isinstance(x, ShardedParameter):
            return _of_parameters(x.exchange.whole(x, function_name(func)), x.exchange)
        if isinstance(x, Tracked):
            raise UnsupportedError(
                f"{function_name(func)} takes an elementwise function of {x.original!r}, of which each rank holds a "
                "part; only sums, means and norms over all its elements are computed from parts. Pin it: "
                f"plan={{{x.original!r}: {fallback().name!r}}}"
            )
        if isinstance(x, Piece):
            raise refused(func, x)
        return x

    return func(*torch.utils._pytree.tree_map(gathered, args), **torch.utils._pytree.tree_map(gathered, kwargs))


def _fetched_lookup(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A lookup through fetched rows; NotImplemented if the call is none (a slice, ids that are no piece's)."""
    names: tuple[str, ...]
    if func is F.embedding:
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    elif func is F.embedding_bag:
        names = (
            "input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
            "per_sample_weights", "include_last_offset", "padding_idx",
        )  # fmt: skip
    elif func is torch.embedding:
        names = ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse")
    else:
        return _index_rows(func, args, kwargs)
    call = dict(zip(names, args, strict=False)) | kwargs
    weight, ids = call["weight"], call["input"]
    if not isinstance(weight, ShardedParameter) or isinstance(ids, SHARDED) or weight.pieces.dim != 0:
        return NotImplemented
    for option in ("max_norm", "scale_grad_by_freq"):
        if call.get(option):
            raise UnsupportedError(
                f"table {weight.original!r} is looked up with {option}: it depends on what one rank sees; leave it out"
            )
    rows, inverse, unique = weight.exchange.fetch(weight, ids, bool(call.get("sparse")))
    padding = call.get("padding_idx")
    if (padding is not None and padding != -1) or (padding == -1 and func is not torch.embedding):
        padding = padding + weight.pieces.shape[0] if padding < 0 else padding
        place = (unique == padding).nonzero()
        padding = int(place) if len(place) else None
    elif func is torch.embedding:
        padding = -1
    if func is torch.embedding:
        return torch.embedding(rows, inverse, -1 if padding is None else padding)
    call |= {"weight": rows, "input": inverse, "padding_idx": padding, "sparse": False}
    return func(**call)


def _index_rows(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is Tensor.__getitem__:
        weight, ids = args
    else:
        weight, dim, ids = (dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs).values()
        if dim != 0:
            return NotImplemented
    if isinstance(ids, int):
        ids = torch.tensor(ids)
    integers = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dtype not in (torch.bool, torch.uint8)
    if not isinstance(weight, ShardedParameter) or not integers or weight.pieces.dim != 0:
        return NotImplemented
    if func is Tensor.__getitem__:
        ids = torch.where(ids < 0, ids + weight.pieces.shape[0], ids)
    rows, inverse, _ = weight.exchange.fetch(weight, ids, False)
    return rows[inverse]

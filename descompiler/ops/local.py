"""Operators of emitted programs that send nothing: lookups in this rank's rows, pooling, scaled gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from descompiler.ops.operation import Operation


def bag(
    weight: Tensor,
    ids: Tensor,
    mode: str,
    padding_idx: int | None = None,
    sparse: bool = False,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """``nn.EmbeddingBag`` on 2-D ids ``[b, L]``: ``[b, dim]``."""
    if not ids.shape[0]:
        return lookup(weight, ids, -1, sparse).sum(1)
    return F.embedding_bag(
        ids, weight, mode=mode, padding_idx=padding_idx, sparse=sparse, scale_grad_by_freq=scale_grad_by_freq
    )


def are_alike(ids: Sequence[Tensor]) -> bool:
    """Whether ids have one shape and one dtype."""
    return len({(x.dtype, x.shape) for x in ids}) == 1


def lookup(weight: Tensor, ids: Tensor, padding_idx: int = -1, sparse: bool = False) -> Tensor:
    """``weight[ids]`` with the gradients of ``nn.Embedding``; ``padding_idx`` -1 is none."""
    return torch.ops.aten.embedding.default(weight, ids, padding_idx, False, sparse)


def lookup_rows(weight: Tensor, ids: Tensor, start: int, padding_idx: int = -1, sparse: bool = False) -> Tensor:
    """Rows that this rank owns, zeros for the others' ids.

    Only owned rows are selected: a masked lookup of some other row would leave entries in sparse gradients, and
    optimisers such as SparseAdam move every row that has one.
    """
    return lookups_rows([weight], [ids], [start], [padding_idx], sparse)[0]


def lookups_rows(
    weights: Sequence[Tensor], ids: Sequence[Tensor], starts: Sequence[int], paddings: Sequence[int], sparse: bool
) -> list[Tensor]:
    """`lookup_rows` of several tables, of one dtype and as many columns, as one operator.

    >>> table = torch.arange(6.0).reshape(3, 2)
    >>> lookups_rows([table, table], [torch.tensor([1, 4]), torch.tensor([4])], [0, 3], [-1, -1], sparse=False)
    [tensor([[2., 3.],
            [0., 0.]]), tensor([[2., 3.]])]
    """
    device, dim = ids[0].device, weights[0].shape[1]
    sizes = [x.numel() for x in ids]
    limits = torch.tensor([starts, [w.shape[0] for w in weights]], device=device)
    if len(ids) > 1 and len(set(sizes)) > 1:  # a start and a number of rows for each id
        limits = limits.repeat_interleave(torch.tensor(sizes, device=device), dim=1)
    flat = [x if x.ndim == 1 else x.reshape(-1) for x in ids]
    position = (flat[0] if len(flat) == 1 else torch.cat(flat)).reshape(limits.shape[1], -1) - limits[0][:, None]
    owned = ((position >= 0) & (position < limits[1][:, None])).reshape(-1)
    index = owned.nonzero().squeeze(1)
    own = position.reshape(-1)[index]
    if len(weights) == 1:
        rows = lookup(weights[0], own, paddings[0], sparse)
    else:
        # of each table, how many ids are owned: those up to its last id
        ends = torch.tensor(sizes, device=device).cumsum(0)
        counts = torch.searchsorted(index, ends).diff(prepend=ends.new_zeros(1)).tolist()
        parts = zip(weights, own.split(counts), paddings, strict=True)
        rows = torch.cat([lookup(w, x, p, sparse) for w, x, p in parts])
    out = rows.new_zeros((owned.shape[0], dim)).index_copy_(0, index, rows)
    return [x.reshape(*i.shape, dim) for x, i in zip(out.split(sizes) if len(ids) > 1 else [out], ids, strict=True)]


def bag_rows(
    weight: Tensor,
    ids: Tensor,
    start: int,
    mode: str,
    padding_idx: int | None,
    local_padding: int,
    sparse: bool,
) -> Tensor:
    """This rank's term of a bag over all rows; the mean divides by the whole bag's count."""
    return pool(lookup_rows(weight, ids, start, local_padding, sparse), ids, mode, padding_idx)


def pool(rows: Tensor, ids: Tensor, mode: str, padding_idx: int | None) -> Tensor:
    """Sum or mean of ``rows`` ``[b, L, dim]`` over dim 1, leaving out padding; the mean of nothing is 0."""
    if padding_idx is not None:
        rows = rows * (ids != padding_idx).unsqueeze(-1)
    total = rows.sum(1)
    if mode == "mean":
        count = torch.full_like(ids[:, :1], ids.shape[1]) if padding_idx is None else (ids != padding_idx).sum(1, True)
        total = total / count.clamp(min=1)
    return total


FEW, SOME = 128, 1024
"""Rows from which on NumPy reads, and writes, them faster: of fewer its calls take longer."""

MANY, WIDE = 4096, 8
"""Rows, and columns of them, from which on bags of one row each are the fastest."""


def rows_at(table: Tensor, rows: Tensor) -> Tensor:
    """``table.index_select(0, rows)``, not for autograd; ``rows`` (int64 ``[n]``) are known to be right.

    On a CPU with one thread in a third to two thirds of the time, where rows lie far apart: PyTorch copies them one by
    one, NumPy without a call for each, and FBGEMM's bags, which PyTorch has, fetch the next ones ahead.

    >>> rows_at(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 1, 0])).tolist()
    [[2.0], [2.0], [1.0]]
    """
    table = table.detach()
    if len(rows) < FEW or not _is_copied_fast(table):
        return table.index_select(0, rows)
    if table.dtype is torch.float32 and len(rows) >= MANY and table.dim() == 2 and table.shape[1] >= WIDE:
        bags: Tensor = torch.embedding_bag(table, rows, torch.arange(len(rows)))[0]
        return bags
    return torch.from_numpy(table.numpy().take(rows.numpy(), axis=0))


def put_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """``table.index_copy_(0, rows, values)``; ``rows`` (int64 ``[n]``) are known to be right, and differ.

    On a CPU with one thread a row is one item of NumPy's, which copies it whole: in a quarter of the time.

    >>> table = torch.zeros(3, 2)
    >>> put_rows(table, torch.tensor([2, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> table.tolist()
    [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
    """
    table = table.detach()
    alike = values.is_contiguous() and values.dtype == table.dtype and values.numel()
    if len(rows) < SOME or not (alike and _is_copied_fast(table)):
        table.index_copy_(0, rows, values)
        return
    item = np.dtype((np.void, values.nbytes // len(rows)))
    into, come = (x.numpy().reshape(len(x), -1).view(item)[:, 0] for x in (table, values.detach()))
    into[rows.numpy()] = come
    table[:0].zero_()  # tells autograd that it has changed


def _is_copied_fast(table: Tensor) -> bool:
    """Whether NumPy copies rows of a table faster: threads share PyTorch's copies, and of what is not contiguous NumPy
    makes a copy first."""
    if type(table) is not Tensor or table.device.type != "cpu" or table.dtype not in _OF_NUMPY:
        return False
    return torch.get_num_threads() == 1 and table.is_contiguous()


_OF_NUMPY = (torch.float32, torch.float64, torch.float16, torch.int64)


def plain(x: Tensor) -> Tensor:
    """What this rank holds of a parameter, its gradient or an optimiser's state, as an ordinary tensor.

    It shares memory with the piece; sums, norms and indices of it are those of the piece alone.

    >>> plain(torch.ones(2))
    tensor([1., 1.])
    """
    if type(x) is Tensor:  # a sparse one can't be viewed as another class
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


class _ScaleGradient(Operation):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        ctx.set_materialize_grads(False)  # of an output that no loss uses
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None if grads[0] is None else grads[0] * ctx.factor, None


def scale_grad(x: Tensor, factor: float) -> Tensor:
    """``x``; its gradient is multiplied by ``factor``."""
    return x if factor == 1 else _ScaleGradient.apply(x, factor)


def join_local(dim: int, segments: Sequence[Sequence[int]], region: Tensor | None, local: Tensor) -> Tensor:
    """Interleave the exchanged segments of a value with those computed from own rows (owner -1)."""
    if region is None:
        return local
    sizes = [size for size, owner in segments if owner != -1]
    exchanged = iter(torch.split(region, sizes, dim))
    own = iter(torch.split(local, [size for size, owner in segments if owner == -1], dim))
    return torch.cat([next(own if owner == -1 else exchanged) for _, owner in segments], dim)


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds the numbers of all of them without loss; float32 if none has a gradient.

    >>> widest([torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float16)])
    torch.float32
    """
    dtypes = [x.dtype for x in tensors if differentiable(x)]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def differentiable(x: Tensor) -> bool:
    """Whether it can have a gradient: real and complex numbers do, integers don't."""
    return x.is_floating_point() or x.is_complex()


def real_parts(x: Tensor) -> Tensor:
    """``x``; a complex one's real and imaginary parts, in one more dimension."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def sqrt_or_zero(x: Tensor) -> Tensor:
    """The square root; its gradient at 0 is 0, as a norm's."""
    positive = x > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, x, torch.ones_like(x))), torch.zeros_like(x))


def take_columns(ids: Tensor, columns: Sequence[int]) -> Tensor:
    """Some columns of ids ``[rows, columns, ...]``."""
    return ids[:, list(columns)]

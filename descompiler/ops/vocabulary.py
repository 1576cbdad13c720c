"""Products with a table divided over the vocabulary: what is asked of the logits, and an owner's part of the answer.

`descompiler.runtime.vocabulary` has the requests, and what crosses for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Request = tuple[Any, ...]


def vocabulary(
    x: Tensor, weight: Tensor, bias: Tensor | None, first: int, size: int, requests: Sequence[Request]
) -> list[Tensor]:
    """What the requests ask of ``x @ weight[first : first + size].T + bias``, in one process.

    Parameters
    ----------
    x : Tensor [..., k]
    weight : Tensor [V, k]
    bias : Tensor [size] or None
    requests : sequence of tuple
        See the module's text. Ids count from ``first``; the ignored id (third, or None) selects 0.

    Returns
    -------
    list of Tensor
        By request; "max" and "top" give two each, values and ids.
    """
    rows = x.reshape(-1, x.shape[-1])
    ids = [r[1].reshape(rows.shape[0], r[1].shape[-1]) for r in requests if r[0] == "select"]
    kinds = kinds_of(requests, lambda ids: ids.shape[-1])
    partial = partial_of(rows, weight[first : first + size], bias, ids, kinds, 0)
    return shaped(list(partial), x.shape[:-1], kinds)


def kinds_of(requests: Sequence[Request], width: Callable[[Any], int]) -> tuple[tuple[str, int], ...]:
    """The kind of each request, and for how many numbers per row of x; ``width(ids)`` is the last dimension's size."""
    counts = {"select": lambda r: width(r[1]), "top": lambda r: int(r[1])}
    return tuple((r[0], counts[r[0]](r) if r[0] in counts else 1) for r in requests)


def partial_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Sequence[Tensor], kinds: Sequence[tuple[str, int]], start: int
) -> tuple[Tensor, ...]:
    """Partial results ``[rows, n]`` of a range of the vocabulary that begins at ``start``."""
    logits = F.linear(x, weight, bias) if any(kind != "select" for kind, _ in kinds) else None
    queue = iter(ids)
    result: list[Tensor] = []
    for kind, count in kinds:
        if kind == "select":
            position = next(queue) - start
            owned = (position >= 0) & (position < weight.shape[0])
            position = position.where(owned, 0)
            if not weight.shape[0]:
                found = x.new_zeros(position.shape)
            elif logits is not None:
                found = logits.gather(1, position)
            else:
                found = torch.einsum("bk,bck->bc", x, F.embedding(position, weight))
                found = found if bias is None else found + bias[position]
            result.append(found * owned)
            continue
        assert logits is not None
        if kind == "log_sum_exp":
            result.append(logits.logsumexp(1, keepdim=True))
        elif kind == "total":
            result.append(logits.sum(1, keepdim=True))
        elif kind == "max":
            values, best = logits.max(1, keepdim=True)
            result += [values, best + start]
        elif kind == "top":
            values, best = logits.topk(min(count, weight.shape[0]), 1)
            result += [values, best + start]
        else:
            result.append(logits)
    return tuple(result)


def shaped(results: list[Tensor], shape: torch.Size, kinds: Sequence[tuple[str, int]]) -> list[Tensor]:
    """Results ``[rows, n]`` with the leading dimensions of x; n = 1 is dropped where it is no count of the request."""
    flat = [kind in ("log_sum_exp", "total", "max") for kind, _ in kinds for _ in range(outputs_of(kind))]
    return [r.reshape(shape) if f else r.reshape(*shape, r.shape[1]) for r, f in zip(results, flat, strict=True)]


def outputs_of(kind: str) -> int:
    """How many results a request has."""
    return 2 if kind in ("max", "top") else 1

"""A smaller model for a proof: tables of fewer rows, in which ids are looked up modulo their number."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.errors import InputError
from descompiler.model.attributes import copied

LARGE_ELEMENTS = 1 << 24
"""A parameter of more elements that `smaller` can't cut is an error: the model would not be small."""


class Modulo:
    """Of the ids that a table's module is called with, the remainders: a hook in front of its forward."""

    def __init__(self, rows: int):
        self.rows = rows

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0] % self.rows, *args[1:]), kwargs
        return args, kwargs | {"input": kwargs["input"] % self.rows}


def smaller(model: nn.Module, rows: int) -> nn.Module:
    """A copy of a model whose `torch.nn.Embedding` and `torch.nn.EmbeddingBag` have ``rows`` rows at most.

    Values are the first rows'; those of parameters on the meta device are random. What else uses the weight of such a
    module (an output layer that is tied to it) uses the smaller one.

    Raises
    ------
    InputError
        For a large parameter of another module.

    Examples
    --------
    >>> model = smaller(nn.Embedding(10**9, 4, device="meta"), rows=100)
    >>> model.weight.shape, torch.equal(model(torch.tensor([5])), model(torch.tensor([10**8 + 5])))
    (torch.Size([100, 4]), True)
    """
    if rows < 1:
        raise InputError(f"rows={rows}: tables need a row at least")
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.num_embeddings > rows]
    cut = {id(m.weight) for m in tables}
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for name, p in model.named_parameters():
        if id(p) in cut:
            memo[id(p)] = nn.Parameter(_values(p[:rows].detach(), generator), p.requires_grad)
        elif p.numel() > LARGE_ELEMENTS:
            raise InputError(
                f"rows={rows} cuts the tables of nn.Embedding and nn.EmbeddingBag, and {name!r} {tuple(p.shape)} is "
                "none: verify a model that was created with a smaller one"
            )
        elif p.is_meta:
            memo[id(p)] = nn.Parameter(_values(p.detach(), generator), p.requires_grad)
    result = copy.deepcopy(model, copied(model) | memo)
    for m in result.modules():
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.num_embeddings > rows:
            m.num_embeddings = rows
            if m.padding_idx is not None:
                m.padding_idx %= rows
            m.register_forward_pre_hook(Modulo(rows), with_kwargs=True)
    return result


def _values(x: Tensor, generator: torch.Generator) -> Tensor:
    if not x.is_meta:
        return x.clone()
    return (0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).to(x.dtype)

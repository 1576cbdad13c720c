"""Functions of torch that user code calls, by what they do to the parameters that they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

_ELEMENTWISE_NAMES = """
    square pow abs mul multiply add sub subtract div divide true_divide neg negative sqrt rsqrt exp log log1p sigmoid
    tanh relu clamp clamp_min clamp_max sign __mul__ __rmul__ __add__ __radd__ __sub__ __rsub__ __neg__ __truediv__
    __pow__ softplus logsigmoid gelu silu clone float double
"""


ELEMENTWISE = {
    getattr(home, name) for home in (torch, Tensor, F) for name in _ELEMENTWISE_NAMES.split() if hasattr(home, name)
}


_TERM_NAMES = "add sub subtract stack __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ add_ sub_"


TERMS = {getattr(home, name) for home in (torch, Tensor) for name in _TERM_NAMES.split() if hasattr(home, name)}
"""What puts terms of a loss side by side."""


SUM_FUNCTIONS = {torch.sum: "sum", Tensor.sum: "sum", torch.mean: "mean", Tensor.mean: "mean"}


NORMS = {torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm}


LOOKUPS = {F.embedding, F.embedding_bag, torch.embedding, Tensor.__getitem__, torch.index_select, Tensor.index_select}


DROPOUTS = {F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d}


PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, torch.bmm}


def function_name(func: Callable[..., Any]) -> str:
    return str(resolve_name(func) or getattr(func, "__name__", func))

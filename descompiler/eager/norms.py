"""Batch norms in the user's own forward: their statistics are those of the global batch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from descompiler.eager.parameters import PieceTransport
from descompiler.runtime.agreement import Kind


class SynchroniseNorms(TorchFunctionMode):
    """Batch norm in training takes its statistics over the global batch."""

    def __init__(self, exchange: PieceTransport, *, spare: bool = False):
        super().__init__()
        self.exchange = exchange
        self.spare = spare  # the rows are none of the batch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        call: dict[str, Any] = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
        call |= dict(zip(names, args, strict=False)) | (kwargs or {})
        if not call["training"]:
            return func(*args, **(kwargs or {}))
        self.exchange.agree("batch norm", Kind.NORM)
        x = call["input"][:0] if self.spare else call["input"]
        arguments = (call[n] for n in ("weight", "bias", "running_mean", "running_var", "momentum", "eps"))
        out = self.exchange.runtime.batch_norm(x, *arguments)
        if out.requires_grad:
            out.register_hook(self._before_backward)
        return call["input"] + out.sum() if self.spare else out  # a sum over no rows: 0

    def _before_backward(self, gradient: Tensor) -> None:
        self.exchange.runtime.meet("backward of batch norm")

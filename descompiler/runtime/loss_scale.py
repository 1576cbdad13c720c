"""What the user's loss is multiplied by, so that gradients of parameters, which are averaged over ranks, are right.

It is multiplied where gradients come in, at the outputs, and divided where they go out, at inputs that require them:
users have gradients of the loss that their code computes. Gradients of a loss that is made of such gradients come in
where those went out, and go out where those came in: what then has to be multiplied and divided again cancels the
derivative of the division and the multiplication, so that `_Times` passes them on as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from descompiler.ops.operation import Operation


@dataclass
class LossScale:
    """The factor of one forward; its inputs are there before it is known."""

    factor: float = 1.0

    def multiply(self, output: Tensor) -> Tensor:
        """An output, where gradients of the user's loss come in."""
        return output if self.factor == 1 else cast(Tensor, _AtOutput.apply(output, self.factor))

    def divide(self, given: Tensor) -> Tensor:
        """An input, where gradients go out to the user."""
        return cast(Tensor, _AtInput.apply(given, self))


class _AtOutput(Operation):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        ctx.set_materialize_grads(False)  # an output that no loss uses has none
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None if grads[0] is None else _Times.apply(grads[0], ctx.factor), None


class _AtInput(Operation):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: LossScale) -> Tensor:
        ctx.scale = scale
        ctx.set_materialize_grads(False)  # nor has an input behind it
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        factor = ctx.scale.factor  # 0 for a rank without rows: it has no gradients
        return grads[0] if grads[0] is None or factor in (0, 1) else _Times.apply(grads[0], 1 / factor), None


class _Times(Operation):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, factor: float) -> Tensor:
        return grad * factor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None

"""Code that fails where it is told to, and what was said of it."""

import torch

import descompiler as des


class Raises(torch.autograd.Function):
    """Identity; backward raises where it is told to."""

    @staticmethod
    def forward(ctx, x, raises):
        ctx.raises = raises
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if ctx.raises:
            raise ValueError("no such gradient")
        return grad, None


def raised(function) -> str:
    """The error of a call, with its class; "nothing" if it raises none of the compiler's."""
    try:
        function()
    except des.DescompilerError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"

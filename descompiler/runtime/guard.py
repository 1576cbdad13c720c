"""Code of the user's whose backward may raise on one rank only, where the others would wait in backward's collectives.

An exception ends autograd's run, and with it this rank's part in all that comes later. So the code is cut out of the
graph: what it takes is detached (`Guard.enter`), and one node (`Guard.leave`) runs its backward as one of its own, with
the gradients of all that it takes as results. If that raises, the node sends on gradients of zero, so that this rank
makes every collective as the others do, and what was raised is told at the end of backward, where every rank raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from descompiler.model.reach import leaves_of
from descompiler.ops.operation import Operation
from descompiler.runtime.backward import differentiable_once


class Guard:
    """A stretch of code between `enter` and one `leave`, with gradients on.

    Parameters
    ----------
    failed : callable
        Gets what its backward raises; may raise.
    what : str
        Whose code it is.
    """

    def __init__(self, failed: Callable[[Exception], None], what: str):
        self.failed, self.what = failed, what
        self.given: dict[int, Tensor] = {}  # by the identity of what the code takes in its place

    def enter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the code is to take in place of these."""
        result = [x.detach().requires_grad_() if x.requires_grad else x for x in tensors]
        self.given.update({id(y): x for x, y in zip(tensors, result, strict=True) if x.requires_grad})
        return result

    def leave(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the code has returned, for the graph around it."""
        result = list(tensors)
        trained = [i for i, x in enumerate(result) if x.requires_grad]
        ends = [result[i] for i in trained]
        sources = leaves_of(ends)
        given = [self.given.get(id(x), x) for x in sources]
        for i, x in zip(
            trained, _Leave.apply(self.failed, self.what, ends, sources, *given) if ends else (), strict=True
        ):
            result[i] = x
        return result


@contextlib.contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Users' hooks on parameters come with the sum of all gradients, where autograd accumulates them."""
    hooks = [(x._backward_hooks, dict(x._backward_hooks)) for x in tensors if x._backward_hooks]
    try:
        for live, _ in hooks:
            live.clear()
        yield
    finally:
        for live, before in hooks:
            live.update(before)


class _Leave(Operation):
    @staticmethod
    def forward(
        ctx: Any,
        failed: Callable[[Exception], None],
        what: str,
        ends: list[Tensor],
        sources: list[Tensor],
        *given: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.what, ctx.failed, ctx.ends, ctx.sources = what, failed, ends, sources
        ctx.set_materialize_grads(False)  # what no loss uses has no gradient
        return tuple(x.detach() for x in ends)

    @staticmethod
    @differentiable_once(
        lambda ctx: f"{ctx.what}, which is not traced", "write it with operators of torch that can be traced"
    )
    def backward(ctx: Any, *grads: Any) -> Any:
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        ends, given = zip(*((x, g) for x, g in zip(ctx.ends, grads, strict=True) if g is not None), strict=True)
        try:
            with _without_hooks(ctx.sources), torch._C.DisableTorchFunctionSubclass():
                found = torch.autograd.grad(ends, ctx.sources, given, retain_graph=keep, allow_unused=True)
        except Exception as error:  # whatever the user's code raises
            ctx.failed(error)
            with torch._C.DisableTorchFunctionSubclass():
                found = tuple(map(torch.zeros_like, ctx.sources))
        return None, None, None, None, *found

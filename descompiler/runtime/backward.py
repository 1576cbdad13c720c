"""What a backward is asked for: all gradients, added up in the parameters, or some of them, perhaps returned.

``loss.backward()`` comes to every parameter, on every rank, and nothing has to be told. ``loss.backward(inputs=...)``
and ``torch.autograd.grad`` leave out what does not lead to what they ask for, so ranks first agree that all of them ask
for the same, of the same forward. `Begin` stands behind every output and sees which kind of backward begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from descompiler.errors import UnsupportedError

if TYPE_CHECKING:
    from descompiler.runtime.runtime import Runtime

NO_BACKWARD = -1
"""What torch calls the backward that is under way where there is none."""


def is_returned(leaf: Any) -> bool:
    """Whether the backward under way returns a leaf's gradient (``torch.autograd.grad``), instead of adding it up.

    ``leaf`` is the leaf's node, of `get_gradient_edge`, which the backward comes to.
    """
    try:
        torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # the engine tells no more of a leaf that it does not execute, and takes the gradient of
        return True
    return False


def leaf_of(x: Tensor) -> Any:
    """The node of a leaf, also of one that intercepts its uses."""
    with torch._C.DisableTorchFunctionSubclass():
        return get_gradient_edge(x).node


def _asks_for(x: Tensor) -> bool:
    node = leaf_of(x)
    return is_returned(node) or torch._C._will_engine_execute_node(node)


def behind(
    runtime: Runtime, outputs: Sequence[Tensor], parameters: Callable[[], Iterable[tuple[str, Tensor]]]
) -> list[Tensor]:
    """The outputs of a forward; when a backward through any of them begins, ranks agree what it asks for."""
    if runtime.ranks == 1 or not torch.is_grad_enabled():
        return list(outputs)
    sentinel, forward = torch.zeros((), requires_grad=True), runtime.forwards
    return [_Begin.apply(runtime, forward, parameters, sentinel, x) if x.requires_grad else x for x in outputs]


class _Begin(torch.autograd.Function):
    """Identity; the sentinel is a leaf that nobody asks for by name, so it is left out unless all is asked for."""

    @staticmethod
    def forward(ctx: Any, runtime: Runtime, forward: int, parameters: Any, sentinel: Tensor, x: Tensor) -> Tensor:
        ctx.runtime, ctx.forward, ctx.parameters = runtime, forward, parameters
        ctx.sentinel = get_gradient_edge(sentinel).node
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        runtime, task = ctx.runtime, torch._C._current_graph_task_id()
        if runtime.begun != (task, ctx.forward):
            # newer forwards are gone through first
            latest = ctx.forward == runtime.forwards or runtime.begun[0] == task
            if runtime.begun[0] != task:
                runtime.asked, runtime.returns = None, False
            runtime.begun = task, ctx.forward
            if not torch._C._will_engine_execute_node(ctx.sentinel):
                _agree(runtime, ctx.forward, ctx.parameters)
            elif not latest:
                runtime.meet_in_backward(f"backward of forward {ctx.forward} of {runtime.forwards}")
        return None, None, None, None, *grads


def _agree(runtime: Runtime, forward: int, parameters: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
    """Raise on every rank unless all ask for the gradients of the same parameters, which can be told."""
    trained = [(n, p) for n, p in parameters() if p.requires_grad]
    asked = [(n, p) for n, p in trained if _asks_for(p)]
    names = ", ".join(n for n, _ in asked) or "no parameter"
    twice = torch.is_grad_enabled()
    runtime.asked = frozenset(n for n, _ in asked)
    runtime.returns = any(is_returned(leaf_of(p)) for _, p in asked)
    how = "torch.autograd.grad" if runtime.returns else "backward(inputs=...)"
    what = f"gradients of {names} by {how}{', with create_graph' * twice}, of forward {forward}"
    runtime.meet_in_backward(what)
    if asked and twice:
        raise UnsupportedError(
            f"{what}: gradients of gradients with respect to parameters are not computed on {runtime.ranks} ranks. "
            "Gradients with respect to inputs are (torch.autograd.grad(outputs, inputs, create_graph=True))"
        )

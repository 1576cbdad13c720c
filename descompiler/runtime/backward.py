"""What a backward is asked for: all gradients, added up in the parameters, or some of them, perhaps returned.

``loss.backward()`` comes to every parameter, on every rank, and nothing has to be told. ``loss.backward(inputs=...)``
and ``torch.autograd.grad`` leave out what does not lead to what they ask for, so ranks first agree that all of them ask
for the same, of the same forward. `Begin` stands behind every output and sees which kind of backward begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from descompiler.errors import UnsupportedError
from descompiler.runtime.agreement import Agreement

NO_BACKWARD = -1
"""What torch calls the backward that is under way where there is none."""


@dataclass
class Asked:
    """What the latest backward through a module was asked for.

    Attributes
    ----------
    backward : int
        As torch numbers them.
    forward : int
        That it went through last.
    latest : int
        Of all forwards.
    names : frozenset of str or None
        Of parameters; None: all.
    returns : bool
        Whether it returns their gradients.
    """

    backward: int = NO_BACKWARD
    forward: int = 0
    latest: int = 0
    names: frozenset[str] | None = None
    returns: bool = False


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


KEEP_WHOLE = "keep the table replicated: plan={table: form}, with a form of docs/forms.md that every rank holds whole"
"""What to do about a table."""


def differentiable_once(what: str, instead: str = KEEP_WHOLE) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a ``backward`` whose result can't be differentiated again: who comes to it by a second one is refused.

    Torch's `once_differentiable` says neither what it was nor what to do, and goes by whether gradients have a history:
    that of a product of two values depends on both where the gradient that comes in is a constant. ``instead`` is what
    to do.
    """

    def mark(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *grads: Any) -> Any:
            twice = torch.is_grad_enabled()
            with torch.no_grad():
                result = backward(ctx, *grads)
            if not twice:
                return result
            several = result if isinstance(result, tuple) else (result,)
            there = [i for i, g in enumerate(several) if g is not None]
            marked = _Once.apply(what, instead, torch.zeros((), requires_grad=True), *(several[i] for i in there))
            found = dict(zip(there, marked, strict=True))
            return tuple(found.get(i, g) for i, g in enumerate(several))

        return once

    return mark


class _Once(torch.autograd.Function):
    """Identity, which refuses to go back; the anchor requires a gradient."""

    @staticmethod
    def forward(ctx: Any, what: str, instead: str, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.what, ctx.instead = what, instead
        return tuple(g.detach() for g in gradients)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError(
            f"the gradient of {ctx.what} is differentiated again (create_graph=True): that is not computed on several "
            f"ranks; {ctx.instead}"
        )


def _asks_for(x: Tensor) -> bool:
    node = leaf_of(x)
    return is_returned(node) or torch._C._will_engine_execute_node(node)


def behind(
    ranks: Agreement,
    asked: Asked,
    forward: int,
    outputs: Sequence[Tensor],
    parameters: Callable[[], Iterable[tuple[str, Tensor]]],
) -> list[Tensor]:
    """The outputs of a forward; when a backward through any of them begins, ranks agree what it asks for."""
    if ranks.ranks == 1 or not torch.is_grad_enabled():
        return list(outputs)
    asked.latest, sentinel = forward, torch.zeros((), requires_grad=True)
    return [_Begin.apply(ranks, asked, forward, parameters, sentinel, x) if x.requires_grad else x for x in outputs]


class _Begin(torch.autograd.Function):
    """Identity; the sentinel is a leaf that nobody asks for by name, so it is left out unless all is asked for."""

    @staticmethod
    def forward(
        ctx: Any, ranks: Agreement, asked: Asked, forward: int, parameters: Any, sentinel: Tensor, x: Tensor
    ) -> Tensor:
        ctx.ranks, ctx.asked, ctx.forward, ctx.parameters = ranks, asked, forward, parameters
        ctx.sentinel = get_gradient_edge(sentinel).node
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        asked, backward = ctx.asked, torch._C._current_graph_task_id()
        if (asked.backward, asked.forward) != (backward, ctx.forward):
            is_first = asked.backward != backward
            if is_first:
                asked.names, asked.returns = None, False
            asked.backward, asked.forward = backward, ctx.forward
            if not torch._C._will_engine_execute_node(ctx.sentinel):
                _agree(ctx.ranks, asked, ctx.parameters)
            elif torch.is_grad_enabled():
                _refuse_twice("backward(create_graph=True)", ctx.ranks)
            elif is_first and ctx.forward != asked.latest:  # a backward goes through the newest of its forwards first
                ctx.ranks.meet_in_backward(f"backward of forward {ctx.forward} of {asked.latest}")
        return None, None, None, None, None, *grads


def _agree(ranks: Agreement, asked: Asked, parameters: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
    """Raise on every rank unless all ask for the gradients of the same parameters, which can be told."""
    wanted = [(n, p) for n, p in parameters() if p.requires_grad and _asks_for(p)]
    names = ", ".join(n for n, _ in wanted) or "no parameter"
    twice = torch.is_grad_enabled()
    asked.names = frozenset(n for n, _ in wanted)
    asked.returns = any(is_returned(leaf_of(p)) for _, p in wanted)
    how = "torch.autograd.grad" if asked.returns or not wanted else "backward(inputs=...)"
    what = f"gradients of {names} by {how}{', with create_graph' * twice}, of forward {asked.forward}"
    ranks.meet_in_backward(what)
    if wanted and twice:
        _refuse_twice(what, ranks)


def _refuse_twice(what: str, ranks: Agreement) -> None:
    raise UnsupportedError(
        f"{what}: gradients of gradients with respect to parameters are not computed on {ranks.ranks} ranks. "
        "Gradients with respect to inputs are (torch.autograd.grad(outputs, inputs, create_graph=True))"
    )

"""What a backward is asked for: all gradients, added up in the parameters, or some of them, perhaps returned.

``loss.backward()`` comes to every parameter, on every rank, and nothing has to be told. ``loss.backward(inputs=...)``
and ``torch.autograd.grad`` leave out what does not lead to what they ask for, so ranks first agree that all of them ask
for the same, of the same forward. `Begin` stands behind every output and sees which kind of backward begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from descompiler.classify.behind import Behind
from descompiler.errors import UnsupportedError
from descompiler.layout.step import UsedOutputs
from descompiler.runtime.agreement import Agreement
from descompiler.runtime.carriers import carries

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


@carries(UsedOutputs)
@dataclass
class Used:
    """Which outputs of one forward the losses of the ranks use, in the latest backward through it.

    A loss that ignores an output gives what is behind it no gradient, where an exchange that outputs share would bring
    one of zeros, which optimisers with weight decay or momentum act upon.

    Attributes
    ----------
    told : bool
        Whether ranks tell each other; where the same parameters are behind all outputs, they need not.
    behind : Behind, optional
        Which parameters are behind each output.
    seen : dict of str to list of bool
        Of which operands the results of this forward's leaves are made (`descompiler.classify.behind.Seen`).
    outputs : set of int
        Those that any rank uses.
    parameters : sequence of set of str
        By output, those that are behind it.
    """

    told: bool = False
    behind: Behind | None = None
    seen: dict[str, list[bool]] = field(default_factory=dict)
    outputs: set[int] = field(default_factory=set)
    parameters: Sequence[Collection[str]] = ()

    def reaches(self, name: str) -> bool:
        """Whether a gradient comes to a parameter through forward."""
        return not self.told or self.behind is None or any(name in self.parameters[i] for i in self.outputs)

    def has(self, output: int) -> bool:
        return not self.told or output in self.outputs

    def agree(self, ranks: Agreement, sentinels: Sequence[Any], *, some: bool) -> None:
        """Tell the others which outputs the backward under way comes to; if it asks for ``some``, that can't be seen.

        Collective.
        """
        every = range(len(sentinels))
        self.outputs, self.parameters = set(every), () if self.behind is None else self.behind.possible
        if self.told and not some:
            mine = [s is not None and torch._C._will_engine_execute_node(s) for s in sentinels]
            mine += [] if self.behind is None else self.behind.told(self.seen)
            sent = torch.tensor(mine, dtype=torch.uint8, device=ranks.header_device())
            found = ranks.gather(UsedOutputs.GATHER, sent).reshape(ranks.ranks, len(mine)).any(0).tolist()
            self.outputs = {i for i in every if found[i]}
            if self.behind is not None:
                self.parameters = self.behind.of(found[len(sentinels) :])

    def gate(self, name: str, p: Tensor) -> Tensor:
        """A parameter, as forward is to take it: what it is given by outputs that no loss uses is no gradient."""
        return _Gate.apply(self, name, p) if self.told and p.requires_grad else p


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, used: Used, name: str, p: Tensor) -> Tensor:
        ctx.used, ctx.name, ctx.parameter = used, name, p
        ctx.set_materialize_grads(False)  # of one that may be sparse
        return p.view_as(p)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # autograd calls hooks on a leaf without a gradient, too, and users' take none
        reaches = ctx.used.reaches(ctx.name) or _has_users_hooks(ctx.parameter)
        return None, None, grads[0] if reaches else None


def _has_users_hooks(p: Tensor) -> bool:
    own = __name__.partition(".")[0]
    return any(getattr(hook, "__module__", "").partition(".")[0] != own for hook in (p._backward_hooks or {}).values())


def behind(
    ranks: Agreement,
    asked: Asked,
    forward: int,
    outputs: Sequence[Tensor],
    parameters: Callable[[], Iterable[tuple[str, Tensor]]],
    used: Used,
) -> list[Tensor]:
    """The outputs of a forward; when a backward through any of them begins, ranks agree what it asks for."""
    if ranks.ranks == 1 or not torch.is_grad_enabled():
        return list(outputs)
    asked.latest = forward
    sentinels = [torch.zeros((), requires_grad=True) if x.requires_grad else None for x in outputs]
    nodes = [None if s is None else get_gradient_edge(s).node for s in sentinels]
    step = ranks, asked, forward, parameters, used, nodes
    return [x if s is None else _Begin.apply(*step, s, x) for s, x in zip(sentinels, outputs, strict=True)]


class _Begin(torch.autograd.Function):
    """Identity; sentinels are leaves that nobody asks for by name, so they are left out unless all is asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        ranks: Agreement,
        asked: Asked,
        forward: int,
        parameters: Any,
        used: Used,
        sentinels: Sequence[Any],
        sentinel: Tensor,
        x: Tensor,
    ) -> Tensor:
        ctx.ranks, ctx.asked, ctx.forward, ctx.parameters = ranks, asked, forward, parameters
        ctx.used, ctx.sentinels, ctx.sentinel = used, sentinels, get_gradient_edge(sentinel).node
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
            some = not torch._C._will_engine_execute_node(ctx.sentinel)
            if some:
                _agree(ctx.ranks, asked, ctx.parameters)
            elif torch.is_grad_enabled():
                _refuse_twice("backward(create_graph=True)", ctx.ranks)
            elif is_first and ctx.forward != asked.latest:  # a backward goes through the newest of its forwards first
                ctx.ranks.meet_in_backward(f"backward of forward {ctx.forward} of {asked.latest}")
            ctx.used.agree(ctx.ranks, ctx.sentinels, some=some)
        return *(None,) * 7, *grads


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

"""What a backward is asked for: all gradients, added up in the parameters, or some of them, perhaps returned.

``loss.backward()`` comes to every parameter, on every rank, and nothing has to be told. ``loss.backward(inputs=...)``
and ``torch.autograd.grad`` leave out what does not lead to what they ask for, so ranks first agree that all of them ask
for the same, of the same forward. `Begin` stands behind every output and sees which kind of backward begins.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from descompiler.classify.behind import Behind
from descompiler.errors import UnsupportedError, running_at
from descompiler.layout.id_checks import Check
from descompiler.layout.step import UsedOutputs
from descompiler.model.reach import leaves_of
from descompiler.ops.operation import Operation
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


def lookups_of(checks: Iterable[Check]) -> str:
    """Lookups in divided tables, those that are checked by name."""
    named = ", ".join(sorted({c.named for c in checks}))
    return f"lookups in tables that ranks hold in part{f': {named}' if named else ''}"


def differentiable_once(
    what: str | Callable[[Any], str], instead: str = KEEP_WHOLE
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a ``backward`` whose result can't be differentiated again: who comes to it by a second one is refused.

    Torch's `once_differentiable` says neither what it was nor what to do, and goes by whether gradients have a history:
    that of a product of two values depends on both where the gradient that comes in is a constant. ``what`` is a
    function of ctx where that knows more; ``instead`` is what to do. The error has the line of the first backward.
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
            said = what if isinstance(what, str) else what(ctx)
            if at := running_at():
                said = f"{said}, which was taken at {at},"
            marked = _Once.apply(said, instead, torch.zeros((), requires_grad=True), *(several[i] for i in there))
            found = dict(zip(there, marked, strict=True))
            return tuple(found.get(i, g) for i, g in enumerate(several))

        return once

    return mark


class _Once(Operation):
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


def _is_under_way(node: Any) -> bool:
    """Whether the backward under way comes to a node, which is gone with all that the user has computed of it."""
    return node is not None and torch._C._will_engine_execute_node(node)


def _asks_for(x: Tensor) -> bool:
    node = leaf_of(x)
    return is_returned(node) or torch._C._will_engine_execute_node(node)


@carries(UsedOutputs)
@dataclass
class Used:
    """Which outputs of one forward the losses of the ranks use, in the latest backward through it.

    A loss that ignores an output gives what is behind it no gradient, where an exchange that outputs share would bring
    one of zeros, which optimisers with weight decay or momentum act upon, and hooks of the user's see.

    Attributes
    ----------
    told : bool
        Whether ranks tell each other; where the same parameters are behind all outputs, they need not.
    behind : Behind, optional
        Which parameters are behind each output.
    seen : dict of str to list of bool
        Of which operands the results of this forward's leaves are made (`descompiler.classify.behind.Seen`).
    ends : sequence of Tensor
        The outputs as the user's code has computed them, where no graph says what is behind them; autograd's does.
    outputs : set of int
        Those that any rank uses.
    parameters : sequence of set of str
        By output, those that are behind it.
    returned : dict of str to bool
        Of a backward that returns gradients through ``ends``: the parameters that any rank comes to, and if all do.
    divided : collection of str
        Parameters of which ranks hold pieces.
    """

    told: bool = False
    behind: Behind | None = None
    seen: dict[str, list[bool]] = field(default_factory=dict)
    ends: Sequence[Tensor] = ()
    outputs: set[int] = field(default_factory=set)
    parameters: Sequence[Collection[str]] = ()
    returned: dict[str, bool] = field(default_factory=dict)
    divided: Collection[str] = ()
    _inputs: list[weakref.ref[Tensor]] = field(default_factory=list)  # that the user holds

    @property
    def knows_parameters(self) -> bool:
        """Whether a backward has told which parameters it comes to."""
        return self.told and bool(self.parameters)

    def reaches(self, name: str) -> bool:
        """Whether a gradient comes to a parameter through forward."""
        if self.ends:
            return name in self.returned
        return not self.told or self.behind is None or any(name in self.parameters[i] for i in self.outputs)

    def has(self, output: int) -> bool:
        return not self.told or output in self.outputs

    def agree(self, ranks: Agreement, begins: Sequence[Any], returned: Sequence[tuple[str, Tensor]]) -> None:
        """Tell the others which outputs the backward under way comes to, and which parameters, if it returns gradients.

        Collective. ``begins`` are the outputs' nodes, ``returned`` the parameters.
        """
        every = range(len(begins))
        self.outputs, self.returned = set(every), {}
        self.parameters = () if self.behind is None else self.behind.possible
        asked = returned if self.ends else ()
        if not self.told and not asked:
            return
        mine = [not self.told or (n is not None and _is_under_way(n())) for n in begins]
        mine += self.behind.told(self.seen) if self.told and self.behind is not None else []
        of_forward = len(mine)
        for x in self.ends if asked else ():
            leaves = {id(leaf) for leaf in leaves_of([x])}
            mine += [id(p) in leaves for _, p in asked]
        told = ranks.gather(UsedOutputs.GATHER, torch.tensor(mine, dtype=torch.uint8, device=ranks.header_device()))
        found = told.reshape(ranks.ranks, -1).bool()
        on_any = found[:, :of_forward].any(0).tolist()
        self.outputs = {i for i in every if on_any[i]}
        if self.told and self.behind is not None:
            self.parameters = self.behind.of(on_any[len(begins) :])
        if asked:
            behind = found[:, of_forward:].reshape(ranks.ranks, len(begins), len(asked))
            comes = behind[:, sorted(self.outputs)].any(1)
            by_name = zip((n for n, _ in asked), comes.any(0).tolist(), comes.all(0).tolist(), strict=True)
            self.returned = {n: on_all for n, some, on_all in by_name if some}

    def watch_hooks(self, inputs: Iterable[Tensor]) -> None:
        """The user's hooks on these inputs are not to be called without a gradient."""
        self._inputs += [weakref.ref(x) for x in inputs if x.requires_grad and x.is_leaf]

    def spare_hooks(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """A backward begins: no hook on parameters or inputs is to be called without a gradient, as the original's.

        Raises
        ------
        UnsupportedError
            If a hook waits for the gradients of several parameters, pieces among them: they come when backward ends.
        """
        inputs = (("", x) for reference in self._inputs if (x := reference()) is not None)
        with torch._C.DisableTorchFunctionSubclass():
            for name, x in itertools.chain(parameters, inputs):
                if hooks := x._backward_hooks:
                    if name in self.divided and any(map(_is_of_several, hooks.values())):
                        raise UnsupportedError(
                            f"register_multi_grad_hook on {name!r}, of which every rank holds a piece: torch calls the "
                            "hook before that gradient is there. Register a hook on each parameter (register_hook, or "
                            "register_post_accumulate_grad_hook), or act after backward"
                        )
                    hooks.update({k: _WithGradient(h) for k, h in hooks.items() if _wants_gradient(h)})
                waiting = x._post_accumulate_grad_hooks
                if waiting and (x.grad is not None or not {*map(type, waiting.values())} <= TakesNone.kinds):
                    before = _accumulated(x)
                    plain = {k: h.hook if isinstance(h, _Accumulated) else h for k, h in waiting.items()}
                    waiting.update({k: _Accumulated(h, before) for k, h in plain.items()})

    def gate(self, name: str, p: Tensor) -> Tensor:
        """A parameter or input, as forward is to take it: what outputs that no loss uses give it is no gradient."""
        return _Gate.apply(self, name, p) if self.told and p.requires_grad else p


class _Gate(Operation):
    @staticmethod
    def forward(ctx: Any, used: Used, name: str, p: Tensor) -> Tensor:
        ctx.used, ctx.name = used, name
        ctx.set_materialize_grads(False)  # of one that may be sparse
        return p.view_as(p)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, grads[0] if ctx.used.reaches(ctx.name) else None


@dataclass(frozen=True)
class _WithGradient:
    """A hook on a parameter, which autograd calls without a gradient too where an output's backward brings it none."""

    hook: Callable[[Tensor], Any]

    def __call__(self, gradient: Tensor | None) -> Any:
        return None if gradient is None else self.hook(gradient)


def _is_of_several(hook: Any) -> bool:
    """Whether it is torch's own, which counts its calls: `torch.autograd.graph.register_multi_grad_hook`."""
    return getattr(hook, "__module__", None) == torch.autograd.graph.__name__


def _wants_gradient(hook: Any) -> bool:
    return not isinstance(hook, _WithGradient) and not _is_of_several(hook)


class TakesNone:
    """A hook that waits for an accumulated gradient, and looks itself whether there is one.

    Attributes
    ----------
    kinds : set of type
        Of such hooks: each backward asks of every table's hooks whether they are.
    """

    kinds: ClassVar[set[type]] = set()

    def __init_subclass__(cls) -> None:
        cls.kinds.add(cls)


@dataclass
class _Accumulated:
    """A hook that waits for an accumulated gradient, which autograd calls even where there was none to accumulate.

    Attributes
    ----------
    before : tuple
        Which backward is under way, and what the parameter had accumulated when it began.
    """

    hook: Callable[[Tensor], Any]
    before: tuple[int, ...] = ()

    def __call__(self, p: Tensor) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            now = _accumulated(p)
        return None if self.before == now else self.hook(p)


def _accumulated(p: Tensor) -> tuple[int, ...]:
    """Called where a piece is an ordinary tensor: pieces of a gradient are made anew whenever they are asked for."""
    grad = p.grad
    return torch._C._current_graph_task_id(), *(() if grad is None else (id(grad), grad._version))


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
    nodes: list[Any] = []
    sentinel = torch.zeros((), requires_grad=True)
    step = ranks, asked, forward, parameters, used, nodes, sentinel
    result = [_Begin.apply(*step, x) if x.requires_grad else x for x in outputs]
    # each node has the list, and would be held by it
    nodes += [weakref.ref(y.grad_fn) if x.requires_grad else None for x, y in zip(outputs, result, strict=True)]
    return result


class _Begin(Operation):
    """Identity; the sentinel is a leaf that nobody asks for by name, so it is left out unless all is asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        ranks: Agreement,
        asked: Asked,
        forward: int,
        parameters: Any,
        used: Used,
        nodes: Sequence[Any],
        sentinel: Tensor,
        x: Tensor,
    ) -> Tensor:
        ctx.ranks, ctx.asked, ctx.forward, ctx.parameters = ranks, asked, forward, parameters
        ctx.used, ctx.nodes, ctx.sentinel = used, nodes, get_gradient_edge(sentinel).node
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
            ctx.used.spare_hooks(ctx.parameters())
            wanted: list[tuple[str, Tensor]] = []
            if not torch._C._will_engine_execute_node(ctx.sentinel):
                wanted = _agree(ctx.ranks, asked, ctx.parameters)
            elif torch.is_grad_enabled():
                _refuse_twice("backward(create_graph=True)", ctx.ranks)
            elif is_first and ctx.forward != asked.latest:  # a backward goes through the newest of its forwards first
                ctx.ranks.meet_in_backward(f"backward of forward {ctx.forward} of {asked.latest}")
            ctx.used.agree(ctx.ranks, ctx.nodes, wanted if asked.returns else ())
        return *(None,) * 7, *grads


def _agree(
    ranks: Agreement, asked: Asked, parameters: Callable[[], Iterable[tuple[str, Tensor]]]
) -> list[tuple[str, Tensor]]:
    """What is asked for; raises on every rank unless all ask for the same parameters' gradients, which can be told."""
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
    return wanted


def _refuse_twice(what: str, ranks: Agreement) -> None:
    at = running_at()
    raise UnsupportedError(
        f"{what}{f' at {at}' if at else ''}: gradients of gradients with respect to parameters are not computed "
        f"on {ranks.ranks} ranks. "
        "Gradients with respect to inputs are (torch.autograd.grad(outputs, inputs, create_graph=True))"
    )

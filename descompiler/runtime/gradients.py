"""Gradients of replicated parameters: caught before they are accumulated, and averaged over ranks.

`Caught` holds them back; `Reducer` averages them while backward goes on. Where ranks first have to agree on which
gradients there are, `descompiler.eager.gradients` averages what `Caught` holds.

The reducer is this library's own. DistributedDataParallel's calls Python in gloo's threads, is made for one backward of
each forward, and keeps its process group, with these threads, alive for as long as any of its objects is; see
`descompiler.runtime.shutdown`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.errors import UnsupportedError
from descompiler.layout.step import DenseGradients
from descompiler.layout.traffic import all_reduce_bytes
from descompiler.runtime.backward import is_returned, leaf_of
from descompiler.runtime.carriers import carries
from descompiler.runtime.collectives import all_reduce
from descompiler.runtime.communicator import Communicator

FIRST_BUCKET_BYTES = 1 << 20


BUCKET_BYTES = 25 << 20
"""As DistributedDataParallel's: a small first bucket starts early, larger ones cost fewer calls."""


class Caught:
    """The gradients that the backward under way has brought for some parameters, in place of accumulating them.

    Users' hooks on the parameters come first, and may change a gradient; those that wait for an accumulated gradient
    are called once the average is accumulated.

    Attributes
    ----------
    parameters : list of nn.Parameter
    local : dict of int to Tensor
        By position in ``parameters``.

    forward : bool
        Whether the user's forward runs: what is differentiated there is its own, and of the rows that it has.

    Where the backward returns gradients (``torch.autograd.grad``) it is given a tensor that holds the average when it
    ends.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], arrived: Callable[[int, Tensor], None]):
        """``arrived(position, gradient)`` is called with each gradient."""
        self.parameters, self._arrived = list(parameters), arrived
        self.local: dict[int, Tensor] = {}
        self.forward = False
        self._nodes: list[Any] = [None] * len(self.parameters)
        self._handles: list[Any] = [None] * len(self.parameters)
        self._givers: list[Any] = [None] * len(self.parameters)
        self._waiting: dict[int, dict[int, Any]] = {}  # users' hooks, by position, that the node is not to call
        self._returned: dict[int, Tensor] = {}  # by position, what the backward returns
        self._returns = False  # whether it returns gradients
        self._end: Any = None  # what closes it with its owner

    def hook(self) -> None:
        """Watch the nodes that accumulate gradients.

        A parameter has none while it is frozen, and another one once its dtype or device has changed.
        """
        if not torch.is_grad_enabled():
            return
        me = weakref.ref(self)  # a node that held this object would keep it, and itself, for ever

        def hold(position: int, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
            caught, (gradient,) = me(), gradients
            if caught is None or gradient is None:
                return None
            if caught.forward:
                raise UnsupportedError(
                    "forward calls backward, which adds to gradients of its parameters that are this rank's alone; "
                    "take them with torch.autograd.grad"
                )
            if live := caught.parameters[position]._post_accumulate_grad_hooks:
                caught._waiting[position] = dict(live)
                live.clear()
            caught._returns = False
            caught._arrived(position, gradient.to_dense() if gradient.is_sparse else gradient)
            return (None,)

        def give(position: int, gradient: Tensor | None) -> Tensor | None:
            caught = me()
            if caught is None or gradient is None or caught.forward or not is_returned(caught._nodes[position]):
                return None
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            caught._returns, caught._returned[position] = True, torch.empty_like(gradient)
            caught._arrived(position, gradient)
            return caught._returned[position]

        for i, p in enumerate(self.parameters):
            if not p.requires_grad:
                continue
            if (node := leaf_of(p)) is not self._nodes[i]:
                self._nodes[i] = node
                self._handles[i] = node.register_prehook(lambda gradients, i=i: hold(i, gradients))
            if self._givers[i] is None:
                self._givers[i] = p.register_hook(lambda gradient, i=i: give(i, gradient))
            call_last(p, self._givers[i].id)

    def close(self) -> None:
        """Catch no more: another object will, on the same nodes perhaps."""
        self.take()
        for handle in filter(None, (*self._handles, *self._givers)):
            handle.remove()
        if self._end is not None:
            self._end.detach()
        self._nodes = [None] * len(self.parameters)  # they hold parameters where no garbage collector sees it

    def close_with(self, owner: Any) -> None:
        """Catch no more once an object is gone."""
        me = weakref.ref(self)
        self._end = weakref.finalize(owner, lambda: None if (caught := me()) is None else caught.close())
        self._end.atexit = False

    def take(self) -> dict[int, Tensor]:
        """What was caught, which is forgotten here; hooks are on their parameters again."""
        taken, self.local = self.local, {}
        for position, hooks in self._waiting.items():
            self.parameters[position]._post_accumulate_grad_hooks.update(hooks)
        self._waiting = {}
        return taken

    def flat(self, positions: Sequence[int], local: Mapping[int, Tensor], ranks: int) -> Tensor:
        """This rank's share of the average of some gradients, one after another; zeros where it has none."""
        parts = [local[i] if i in local else torch.zeros_like(self.parameters[i]) for i in positions]
        return torch.cat([g.reshape(-1) for g in parts]).div_(ranks)

    def accumulate(self, positions: Sequence[int], flat: Tensor) -> None:
        """Add averages, one after another, to the parameters' gradients, or to what backward returns."""
        for i, g in zip(positions, flat.split([self.parameters[i].numel() for i in positions]), strict=True):
            if (returned := self._returned.pop(i, None)) is not None:
                returned.copy_(g.reshape(returned.shape))
            elif self._returns:
                raise UnsupportedError(
                    f"torch.autograd.grad: other ranks have a gradient of a parameter of shape "
                    f"{tuple(self.parameters[i].shape)} that this rank's loss does not come to, and can't return here: "
                    "let the loss of every rank use it"
                )
            else:
                add_gradient(self.parameters[i], g.reshape(self.parameters[i].shape))


def call_last(p: Tensor, hook: int) -> None:
    """Let users' hooks on a tensor come before one of ours; autograd calls them as the dict took them in."""
    hooks = p._backward_hooks
    if hooks is not None and next(reversed(hooks)) != hook:
        hooks[hook] = hooks.pop(hook)


def add_gradient(p: Tensor, gradient: Tensor) -> None:
    """Accumulate a gradient that autograd does not bring, and call the hooks that wait for it."""
    if p.grad is None:
        p.grad = gradient.clone()
    elif p.grad.is_sparse or gradient.is_sparse:
        p.grad = sum_of(p.grad, gradient)
    else:
        p.grad.add_(gradient)
    for hook in list((p._post_accumulate_grad_hooks or {}).values()):
        hook(p)


def sum_of(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two gradients that may be sparse; torch adds a sparse one to a dense one only."""
    return b + a if a.is_sparse else a + b


@carries(DenseGradients)
class Reducer:
    """Averages of replicated parameters' gradients: each bucket is all-reduced as soon as backward has brought it.

    Every rank has to come to each of the parameters in every backward; one that none of them comes to keeps what it
    has. Buckets start in one order on every rank, in a process group of their own: in which order they come with
    respect to other collectives differs between ranks.

    Parameters
    ----------
    runtime : Communicator
    group : process group
    parameters : mapping of str to nn.Parameter
    """

    def __init__(self, runtime: Communicator, group: Any, parameters: Mapping[str, nn.Parameter]):
        self.runtime, self.group, self.names = runtime, group, list(parameters)
        self.caught = Caught(list(parameters.values()), self._arrived)
        self.buckets = buckets_of(self.caught.parameters)
        self._forget()

    def _forget(self) -> None:
        self._started: list[tuple[list[int], Tensor, Any]] = []  # positions, their sum under way, its work
        self._scheduled = False

    def begin(self) -> None:
        """A forward begins: forget what a backward that was broken off has left, and watch the parameters."""
        self.caught.take()
        self._forget()
        self.caught.hook()

    def _arrived(self, position: int, gradient: Tensor) -> None:
        local = self.caught.local
        if position in local:
            raise UnsupportedError(
                f"the gradient of {self.names[position]!r} is computed in two parts in one backward (reentrant "
                "checkpoints do so), and ranks have begun to average the first: use torch.utils.checkpoint with "
                "use_reentrant=False"
            )
        local[position] = gradient
        if not self._scheduled:
            self._scheduled = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        while len(self._started) < len(self.buckets) and local.keys() >= set(self.buckets[len(self._started)]):
            self._start()

    def _start(self) -> None:
        runtime, positions = self.runtime, self.buckets[len(self._started)]
        flat = self.caught.flat(positions, self.caught.local, runtime.ranks)
        size = all_reduce_bytes(flat.numel() * flat.element_size(), runtime.ranks)
        runtime.traffic.add(DenseGradients.AVERAGE, size, calls=int(not self._started))
        # Under a clock collectives are waited for. To wait for these as they come could wait for ever, since they come
        # in another order with respect to those of the exchange on each rank.
        runtime.name_next(DenseGradients.AVERAGE)
        work = None if runtime.clock is not None else all_reduce(flat, self.group)
        self._started.append((positions, flat, work))

    def _finish(self) -> None:
        """Add the averages, once backward has ended."""
        while len(self._started) < len(self.buckets):  # of parameters that this backward did not come to
            self._start()
        local, started, runtime = self.caught.take(), self._started, self.runtime
        self._forget()
        if runtime.clock is not None:
            runtime.clock.time(DenseGradients.AVERAGE, self.group, lambda: _all_reduce(started, self.group))
        with torch.no_grad():
            for positions, flat, work in started:
                if work is not None:
                    work.wait()
                if not local.keys() >= set(positions):  # leave out what no rank came to
                    sizes = [self.caught.parameters[i].numel() for i in positions]
                    parts = list(zip(positions, flat.split(sizes), strict=True))
                    some = [(i, g) for i, g in parts if i in local or bool(g.any())]
                    positions, flat = [i for i, _ in some], torch.cat([g for _, g in some] or [flat[:0]])
                self.caught.accumulate(positions, flat)


def _all_reduce(started: Sequence[tuple[list[int], Tensor, Any]], group: Any) -> None:
    for work in [all_reduce(flat, group) for _, flat, _ in started]:
        work.wait()


def buckets_of(parameters: Sequence[Tensor]) -> list[list[int]]:
    """Positions of parameters that are reduced together: of one dtype, the last ones first, as backward brings them.

    >>> [len(b) for b in buckets_of([torch.zeros(n, 1 << 10) for n in (200, 300, 7 << 10, 2 << 10, 100)])]
    [2, 1, 2]
    >>> buckets_of([torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.zeros(1)])
    [[2], [1], [0]]
    """
    result: list[list[int]] = []
    size = 0
    for i in reversed(range(len(parameters))):
        p = parameters[i]
        limit = FIRST_BUCKET_BYTES if len(result) == 1 else BUCKET_BYTES
        if result and size < limit and (p.dtype, p.device) == _dtype_and_device(parameters[result[-1][0]]):
            result[-1].append(i)
            size += p.nbytes
        else:
            result.append([i])
            size = p.nbytes
    return result


def _dtype_and_device(p: Tensor) -> tuple[torch.dtype, torch.device]:
    return p.dtype, p.device

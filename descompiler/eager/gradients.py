"""Gradients of a module whose parameters are sharded, exchanged at the end of backward, all at once.

Only then it is known which uses have a gradient: ranks may use a value in their loss, or not. They agree that none of
them has failed, tell which gradients there are, return those of sharded parameters to their owners, use by use, and
average those of replicated parameters.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from descompiler.dynamic.rows import Ticket
from descompiler.eager.dynamic import DynamicParameter
from descompiler.eager.piece import Divided
from descompiler.errors import DescompilerError, UnsupportedError, raised_at
from descompiler.layout.fetches import Fetch
from descompiler.layout.global_values import WholeTables
from descompiler.layout.step import DenseGradients
from descompiler.runtime.backward import NO_BACKWARD, Used, is_returned, leaf_of
from descompiler.runtime.carriers import carries
from descompiler.runtime.gradients import Caught, add_gradient, sum_of
from descompiler.runtime.guard import Guard
from descompiler.runtime.room import give_back
from descompiler.runtime.runtime import Runtime

FLAGS = "all_reduce (which gradients there are)"


KEPT_FORWARDS = 8
"""Forwards whose backward may still come; older ones are forgotten."""


@dataclass(eq=False)
class UseOfPiece:
    """One use of a sharded parameter in a forward; its gradient is exchanged when backward ends."""

    parameter: Divided
    forward: int
    sent: list[int]  # rows asked of each rank, in the order of the fetched rows
    asked: list[int]  # rows that each rank asked for
    positions: Tensor | None  # which rows of this rank's part they were; None: the whole parameter was gathered
    sparse: bool = False
    ticket: Ticket | None = None  # of rows that may go
    gradient: Tensor | None = None


class GradientSync:
    """Gradients of one module: of the uses of its sharded parameters, and of its replicated ones.

    Attributes
    ----------
    uses : deque of Use
        Of the latest forwards, in their order, which is the same on every rank.
    sharded : list of Divided
        In an order that is the same on every rank. If ``in_part``, their gradients come from their uses alone, and
        autograd is not to call users' hooks on them.
    caught : Caught
        The gradients of replicated parameters that backward has brought.
    """

    def __init__(self, runtime: Runtime, *, in_part: bool = False):
        self.runtime, self.in_part = runtime, in_part
        self.uses: deque[UseOfPiece] = deque()
        self.sharded: list[Divided] = []
        self._givers: dict[int, Any] = {}  # hooks on sharded parameters, by position
        self._users_hooks: dict[int, dict[int, Any]] = {}  # that autograd is not to call, by position
        self._to_fill: dict[int, Tensor] = {}  # what the backward under way returns, by position
        self._entered = False  # whether that backward goes through a forward's outputs
        self._scheduled = False
        self._failure: Exception | None = None  # of the user's code in the backward that is under way
        self.watch([])

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average these parameters' gradients over ranks when backward ends, while they require gradients."""
        self.caught = Caught(parameters if self.runtime.ranks > 1 else [], self._arrived)
        self.caught.hook()

    # ---- forward

    def begin(self) -> None:
        """A forward begins."""
        self.runtime.failed = False
        self.runtime.forwards += 1
        if self.runtime.channels is not None:
            self.runtime.channels.watch.begin(self.runtime.forwards)
        if self.runtime.ranks > 1:
            give_back(self.runtime.forwards)
        if torch._C._current_graph_task_id() == NO_BACKWARD:  # what a backward that was broken off has left
            self._forget()
        self.caught.hook()
        while self.uses and self.uses[0].forward <= self.runtime.forwards - KEPT_FORWARDS:
            self.uses.popleft()

    def keep(self, use: UseOfPiece) -> None:
        """A use whose gradient may come."""
        if torch.is_grad_enabled() and use.parameter.requires_grad:
            self.uses.append(use)

    def guard(self) -> Guard:
        """For the user's code in a forward: what its backward raises on this rank is told when backward ends."""

        def failed(error: Exception) -> None:
            if self.runtime.failed:  # ranks have told each other already
                raise error
            self._failure = self._failure or error

        return Guard(failed, "forward")

    # ---- backward

    def watch_sharded(self) -> list[Tensor]:
        """The sharded parameters, for `Finish`; a gradient of theirs that backward returns is filled in at its end."""

        def give(position: int, gradient: Tensor | None) -> Tensor | None:
            sync = me()
            if sync is None or gradient is None:
                return None
            if not is_returned(leaf_of(sync.sharded[position])):
                return sync._hooked(position, gradient)
            sync._to_fill[position] = gradient.clone()
            return sync._to_fill[position]

        if not self.in_part:  # the program brings their gradients
            return []
        me = weakref.ref(self)
        for i, p in enumerate(self.sharded):
            if p.requires_grad and i not in self._givers:
                self._givers[i] = p.register_hook(lambda gradient, i=i: give(i, gradient))
        return list(self.sharded)

    def _hooked(self, position: int, gradient: Tensor) -> Tensor:
        """A sharded parameter's gradient, as users' hooks change it."""
        giver = self._givers.get(position)
        hooks = {**(self.sharded[position]._backward_hooks or {}), **self._users_hooks.get(position, {})}
        for key, hook in hooks.items():
            if giver is None or key != giver.id:
                changed = hook(gradient)
                gradient = gradient if changed is None else changed
        return gradient

    def enter_backward(self, sharded: int, used: Used) -> list[Tensor | None]:
        """Backward goes through outputs of a forward: gradients of sharded parameters to fill in, if returned."""
        self.schedule()
        self._entered = True
        asked = self.runtime.asked.names or ()
        dynamic = (p.original for p in self.sharded if isinstance(p, DynamicParameter))
        if by_itself := ", ".join(n for n in dynamic if n in asked):
            raise UnsupportedError(
                f"a gradient of {by_itself} is asked for by itself, the rows of a dynamic table in a model that is "
                "captured in part: call backward without inputs=, or ask for gradients of what lookups return"
            )
        names = {p.original for p in self.sharded}
        if apart := ", ".join(n for n, on_all in used.returned.items() if not on_all and n not in names):
            raise UnsupportedError(
                f"torch.autograd.grad of {apart}: the losses of some ranks come to it, those of others do not, which "
                "can't return its gradient: let the loss of every rank use it, or call backward"
            )
        result: list[Tensor | None] = [None] * sharded
        for i, p in enumerate(self.sharded[:sharded]):
            self._quiet(p)
            if p.requires_grad and self.runtime.asked.returns and is_returned(leaf_of(p)) and used.reaches(p.original):
                result[i] = torch.zeros(p.shape, dtype=p.dtype, device=p.device)
        return result

    def _quiet(self, p: Divided) -> None:
        """Keep users' hooks from autograd, which has no gradient for them; `finish` calls them with it."""
        if (live := p._backward_hooks) and p.position not in self._users_hooks:
            giver = self._givers.get(p.position)
            users = {k: h for k, h in live.items() if giver is None or k != giver.id}
            self._users_hooks[p.position] = users
            for k in users:
                del live[k]

    def hold(self, use: UseOfPiece, gradient: Tensor) -> None:
        """Take a use's gradient, as backward brings it."""
        if not any(u is use for u in self.uses):
            raise UnsupportedError(f"backward through a forward that ended more than {KEPT_FORWARDS} forwards ago")
        if self.caught.forward:
            raise UnsupportedError(
                f"forward differentiates by {use.parameter.original!r}, of which each rank holds a part: "
                "pin the form that keeps it whole on every rank"
            )
        if not self._entered:
            if self.in_part:
                self._quiet(use.parameter)
            if is_returned(leaf_of(use.parameter)):
                raise UnsupportedError(
                    f"torch.autograd.grad of {use.parameter.original!r}, of which each rank holds a part, through a "
                    "use outside of forward: use it in forward, or call backward"
                )
        use.gradient = gradient
        self.schedule()

    def _arrived(self, position: int, gradient: Tensor) -> None:
        before = self.caught.local.get(position)
        self.caught.local[position] = gradient if before is None else before + gradient
        self.schedule()

    def schedule(self) -> None:
        """Run `finish` when the backward that is under way ends."""
        if not self._scheduled:
            self._scheduled = True
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)

    def _forget(self) -> None:
        """Forget what the latest backward held."""
        self._scheduled, self._failure = False, None
        self._calm()
        self.caught.take()
        for use in self.uses:
            use.gradient = None

    def _calm(self) -> None:
        """A backward has ended: users' hooks are on their parameters again."""
        self._entered, self._to_fill = False, {}
        for position, hooks in self._users_hooks.items():
            live = self.sharded[position]._backward_hooks
            assert live is not None  # they were taken from it
            live.update(hooks)
        self._users_hooks = {}

    def finish(self) -> None:
        """Exchange the gradients of this backward."""
        self._scheduled = False
        returned, asked = self._to_fill, self.runtime.asked.names if self._entered else None
        self._calm()
        cause, problem = self._failure, None
        if cause is not None:
            place = raised_at(cause) or "an operator of torch"
            problem = f"backward of forward ({place}): {type(cause).__name__}: {cause}"
        try:
            self.runtime.meet(f"the end of backward, {len(self.uses)} uses of split parameters", problem=problem)
        except DescompilerError as error:
            self._forget()
            raise error from cause
        held = self.caught.take()
        some = self._known_to_any(
            [u.gradient is not None for u in self.uses] + [i in held for i in range(len(self.caught.parameters))]
        )
        with torch.no_grad():
            self._return(some[: len(self.uses)], returned, asked)
            self._average(held, some[len(self.uses) :])

    def _known_to_any(self, mine: Sequence[bool]) -> list[int]:
        """Which gradients any rank has."""
        runtime, flags = self.runtime, torch.tensor(mine, dtype=torch.uint8)
        if runtime.ranks > 1 and len(flags):
            flags = flags.to(runtime.header_device())
            runtime.all_reduce_start(FLAGS, flags, dist.ReduceOp.MAX).wait()
        return flags.tolist()

    def _return(self, present: Sequence[int], returned: Mapping[int, Tensor], asked: frozenset[str] | None) -> None:
        """Return the gradients of sharded parameters to their owners; of those that are ``asked`` for, or all."""
        totals: dict[Divided, Tensor] = {}
        for use, some in zip(self.uses, present, strict=True):
            if some:
                gradient = self._returned(use)
                use.gradient = None  # its graph may be kept for another backward
                before = totals.get(use.parameter)
                totals[use.parameter] = gradient if before is None else sum_of(before, gradient)
        for parameter, gradient in totals.items():
            if parameter.position not in returned and (asked is None or parameter.original in asked):
                add_gradient(parameter, self._hooked(parameter.position, gradient))
        for position, result in returned.items():
            gradient = totals.get(self.sharded[position], result)
            result.copy_(self._hooked(position, gradient if gradient is result else gradient + result))

    @carries(Fetch)
    def _returned(self, use: UseOfPiece) -> Tensor:
        """Of this rank's part, from every rank's use of it; the convention's share of a sum over ranks."""
        parameter, ranks = use.parameter, self.runtime.ranks
        if use.positions is None:
            return self._scattered(use) / ranks
        gradient = use.gradient
        if gradient is None:
            gradient = parameter.detach().new_zeros((sum(use.sent), *parameter.shape[1:]))
        received = self.runtime.exchange_rows(gradient, use.sent, use.asked, Fetch.BACK) / ranks
        positions = use.positions
        if use.ticket is not None:  # rows that have gone have no gradient, nor has the default row
            stay = use.ticket.stay(positions)
            positions, received = positions[stay], received[stay]
        if use.sparse:
            of = positions[None], received, parameter.shape
            return torch.sparse_coo_tensor(*of, check_invariants=False).coalesce()
        return torch.zeros(parameter.shape, dtype=parameter.dtype).index_add_(0, positions, received)

    @carries(WholeTables)
    def _scattered(self, use: UseOfPiece) -> Tensor:
        """The sum over ranks of this rank's part of a whole parameter's gradient."""
        parameter, pieces, runtime = use.parameter, use.parameter.pieces, self.runtime
        full = use.gradient
        if full is None:
            full = torch.zeros(pieces.shape, dtype=parameter.dtype)
        if runtime.ranks == 1:
            return full
        parts = [pieces.cut(full, r) for r in range(runtime.ranks)]
        mine = parts[runtime.rank]
        sizes = [p.numel() for p in parts]
        flat = torch.cat([p.reshape(-1) for p in parts])
        out = runtime.exchange_rows(flat, sizes, [mine.numel()] * runtime.ranks, WholeTables.BACK)
        return out.reshape(runtime.ranks, *mine.shape).sum(0)

    @carries(DenseGradients)
    def _average(self, held: Mapping[int, Tensor], present: Sequence[int]) -> None:
        """Average the gradients of replicated parameters that any rank has."""
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, p in enumerate(self.caught.parameters):
            if present[i]:
                by_dtype.setdefault(p.dtype, []).append(i)
        for positions in by_dtype.values():
            flat = self.caught.flat(positions, held, self.runtime.ranks)
            self.runtime.all_reduce(DenseGradients.AVERAGE, flat)
            self.caught.accumulate(positions, flat)

"""`prefetch`: what depends on the next batches alone is exchanged while this one's step runs.

    before batch k is given to the user:   unique ids, and ids into the region, of batch k + 1
                                           announcement of batch k + 2

    where rows go ahead, too:              ids of batch k + 2, and announcement of batch k + 3
                                           which rows go ahead of batch k + 1
    when rows of batch k have come:        those rows

An announcement has come by the next batch, so nobody waits for one, but for those of the first two. All that is sent is
sent from here, in the order of the batches, which is one on all ranks; `descompiler.runtime.ahead` says what becomes of
it. Ranks that have announced differently all know, and all leave that batch to its step; where a loader has ended, all
leave the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descompiler.errors import InputError, RankError, warn
from descompiler.layout.step import AHEAD
from descompiler.layout.traffic import Traffic
from descompiler.module.ahead import Prepared, Waiting
from descompiler.module.distributed import DistributedModule
from descompiler.module.installed import module_of
from descompiler.runtime.agreement import Call
from descompiler.runtime.ahead import NO_BATCH, Announcement, Seen
from descompiler.runtime.runtime import Runtime

B = TypeVar("B")

MANY_MISSED = 8
"""Batches of which something was sent ahead in vain, and of none not: users are told."""


MANY_CHANGED = 3
"""Steps in turn whose rows were sent again, as each had changed some: no more go ahead."""


LOOPS = 32
"""From this bit of a batch's number on it is that of its loop."""


def prefetch(
    loader: Iterable[B], module: nn.Module, inputs: Callable[[B], Any] | None = None, *, rows: bool = False
) -> Prefetch[B]:
    """Batches of a loader, unchanged, of which ids are exchanged before their step.

    While a step runs, forward, backward and optimiser, the next batch's ids travel to where they are looked up. Rows
    and all else that the step changes travel in it, as ever, so that training is the same, bit for bit. What has gone
    ahead is used by the forward that gets these very tensors; any other forward (evaluation, a batch that is changed in
    place, given twice or left out) exchanges what it needs itself. Collective: every rank iterates, in the same order.

    Parameters
    ----------
    loader : iterable
        It is asked for batches two steps earlier than they are used, so it has to give other tensors each time.
    module : DistributedModule, or a model that was compiled in place
    inputs : callable, optional
        Forward's arguments of a batch: a tuple of them, a dict, or one tensor; the very objects that forward will be
        called with. By default the batch itself, or as many of its first elements as the example had arguments.
    rows : bool
        Let rows travel early, too: those that the next batch asks for and this one does not, of tables whose unique
        rows are fetched. They cross while this rank computes, which pays where links are slow; a row that has changed
        when its step begins is sent again. The loader is asked for batches three steps early.

    Returns
    -------
    Prefetch
        An iterable; it can be iterated again if the loader can.

    Notes
    -----
    On one rank, in a model that was captured in part, with ids="global" and under NCCL nothing goes ahead; all but the
    first say so. A program goes ahead from the first batch that comes after it was captured: at its first step.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import descompiler as des
    >>> table = nn.Embedding(9, 4)
    >>> module = des.compile(table, (torch.tensor([1, 2]),))
    >>> batches = [(torch.tensor([3, 4]), 1.0), (torch.tensor([5, 6]), 0.0)]
    >>> [(tuple(module(ids).shape), y) for ids, y in des.prefetch(batches, module)]
    [((2, 4), 1.0), ((2, 4), 0.0)]
    """
    compiled = module_of(module)
    runtime = compiled._runtime
    reason = None
    if not compiled.predicts_traffic:
        reason = "the model was captured in part: which ids its own forward looks up is known when it runs"
    elif runtime.ranks > 1 and dist.get_backend(runtime.group) != "gloo":
        reason = "ids go ahead under gloo only"
    elif compiled.plan.layout.given:
        reason = "with ids='global' no id crosses"
    if reason is not None and runtime.rank == 0:
        warn(f"prefetch gives batches as they come: {reason}")
    active = reason is None and runtime.ranks > 1
    fetched = [f for f in compiled.plan.layout.fetches if f.early and f.divided and not f.dynamic] if active else []
    if active and rows and not fetched and runtime.rank == 0:
        warn("prefetch: no rows go ahead, as no table of this plan has its unique rows fetched; ids do")
    return Prefetch(loader, compiled, inputs, active=active, rows=rows and bool(fetched))


class Prefetch(Generic[B]):
    """What `prefetch` returns.

    Attributes
    ----------
    taken : int
        Steps so far that have used what had gone ahead.
    rows_taken : int
        Steps so far that have used rows that had gone ahead, on every rank.
    unused : Traffic
        What has gone ahead and no step has used: sent besides what steps count.
    """

    def __init__(
        self,
        loader: Iterable[B],
        module: DistributedModule,
        inputs: Callable[[B], Any] | None,
        *,
        active: bool,
        rows: bool,
    ):
        self._loader, self._module, self._inputs, self._rows = loader, module, inputs, rows
        self.taken, self.rows_taken, self.unused = 0, 0, Traffic()
        self._missed = self._changed = 0
        self._runtime: Runtime | None = None
        if active:
            assert module._runtime.channels is not None
            channels = module._runtime.channels.ahead()
            of = module._runtime
            self._runtime = Runtime(channels.data, of.rank, of.ranks, of.loss, channels=channels, tables=of.tables)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[B]:
        batches = iter(self._loader)
        if self._runtime is None:
            yield from batches
            return
        loop = _Loop(self, batches, self._runtime)
        try:
            while loop.fill():
                yield loop.take()
        finally:
            loop.end()

    def given(self, batch: B) -> Any:
        """What the user says that forward gets of a batch."""
        return batch if self._inputs is None else self._inputs(batch)

    def prepared(self, given: Any) -> Prepared | None:
        """What can be sent of a batch; None if it is left to its step, which says what is wrong with it."""
        assert self._runtime is not None
        module = self._module
        try:
            known = module._known_call(*self._arguments(given))
            if known is None:
                return None
            tensors, program, call = known
            self._runtime.device = next(iter(module._now().parameters.values())).device
            return Prepared.of(self._runtime, module._now(), tensors, program, call)
        except Exception:  # what the user's inputs raise: forward does on every rank, if it is given them
            return None

    def count(self, waiting: Waiting | None) -> None:
        """What became of what had gone ahead of a batch, if anything had."""
        if waiting is not None and waiting.ahead.taken:
            self.taken += 1
            if (early := waiting.ahead.early) is not None:
                self._count_rows(any(early.changes))
            return
        if waiting is not None:
            self.unused.include(waiting.ahead.traffic)
        self._missed += 1
        if self._missed == MANY_MISSED and not self.taken and self._module._runtime.rank == 0:
            warn(
                f"of {MANY_MISSED} batches no step has used ids that prefetch sent ahead: forward got other tensors, "
                "or ran in another mode. Call it with the very objects of the batch (move or change them in the "
                "loader, or say which they are with inputs=), and let no_grad() be around the loop, not in it. "
                "docs/standard.md says of which programs nothing can go ahead"
            )

    def offer_rows(self, before: Waiting, waiting: Waiting) -> Callable[[], object] | None:
        """Tell ranks which rows go ahead of a batch, during the step before it; what sends them, if any do. Collective.

        They are sent when rows of that step have come, or when what is returned is called.
        """
        module = self._module
        if not self._rows or self._runtime is None or not waiting.offer_rows(self._runtime, before):
            return None
        module._runtime.then = send = lambda: waiting.send_rows(module._now())
        return send

    def _count_rows(self, changed: bool) -> None:
        """A step has taken rows; ``changed``: some rank has sent them again. Ranks count alike."""
        self.rows_taken += not changed
        self._changed = self._changed + 1 if changed else 0
        if self._changed == MANY_CHANGED:
            self._rows = False
            if self._module._runtime.rank == 0:
                warn(
                    "prefetch: no more rows go ahead, only ids: each step changes rows that its batch did not look up, "
                    "which are sent again (optimisers do so that move all rows, as Adam with dense gradients)"
                )

    def _arguments(self, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward's: of a batch, those of the example."""
        assert self._module._signature is not None
        args, kwargs = self._module._signature.inputs.children()
        mine = self._inputs is None
        if isinstance(given, dict) and not (mine and args.num_children):
            return (), {k: given[k] for k in kwargs.context} if mine else given
        if isinstance(given, tuple | list):
            return tuple(given[: args.num_children] if mine else given), {}
        return (given,), {}


@dataclass
class _Queued(Generic[B]):
    """A batch between the loader and the user."""

    batch: B
    tensors: list[Tensor]
    waiting: Waiting | None = None


@dataclass
class _Announced(Generic[B]):
    """A batch of which ranks are telling each other."""

    queued: _Queued[B] | None
    prepared: Prepared | None
    number: int
    hear: Callable[[], list[Announcement]]
    traffic: Traffic


class _Loop(Generic[B]):
    """One way through a loader."""

    def __init__(self, owner: Prefetch[B], batches: Iterator[B], runtime: Runtime):
        self._owner, self._batches, self._runtime = owner, batches, runtime
        self._queue: deque[_Queued[B]] = deque()
        self._announced: _Announced[B] | None = None
        self._given: _Queued[B] | None = None
        self._error: Exception | None = None
        self._more = self._together = True  # the loader has more; all ranks' have
        self._lead = 3 if owner._rows else 2  # batches between the loader and the one that the user has
        self._send_rows: Callable[[], object] | None = None  # of the next batch
        channels = runtime.channels
        assert channels is not None
        channels.loops += 1
        self._number = channels.loops << LOOPS

    def fill(self) -> bool:
        """Go on with the next batches; whether there is one."""
        self._flush()
        self._forget(self._given)
        self._given = None
        while self._more and len(self._queue) <= self._lead:
            self._hear()
            self._pull()
        before, following = [x.waiting for x in self._queue][:2] if len(self._queue) > 1 else (None, None)
        if before is not None and following is not None:  # so they are on every rank
            self._send_rows = self._owner.offer_rows(before, following)
        if not self._queue and self._error is not None:
            raise self._error
        return bool(self._queue)

    def take(self) -> B:
        """The batch that the user gets."""
        self._given = self._queue.popleft()
        return self._given.batch

    def end(self) -> None:
        """The user asks for no more."""
        assert self._runtime.channels is not None
        if self._runtime.channels.alive:  # a loop that an error has ended is closed when nobody has it any more
            self._flush()
        for queued in (self._given, *self._queue):
            self._forget(queued)
        self._queue.clear()
        if self._announced is not None:
            self._owner.unused.include(self._announced.traffic)
        self._given = self._announced = None

    def _flush(self) -> None:
        """Send the rows that ranks wait for, if no step has."""
        if self._send_rows is not None:
            send, self._send_rows = self._send_rows, None
            send()

    def _pull(self) -> None:
        """Ask the loader for a batch, and announce it."""
        queued = None
        try:
            before = [Seen.of(other.tensors) for other in self._queue]
            batch = next(self._batches)
            if not all(seen.is_now(seen.tensors) for seen in before):
                self.end()  # nobody should train on what is left of them
                raise InputError(
                    "the loader has changed a batch in place that it gave before: prefetch asks for batches "
                    f"{self._lead} steps before they are used. Let it give other tensors each time"
                )
            given = self._owner.given(batch)
            tensors = [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor) and not x.is_inference()]
            queued = _Queued(batch, tensors)
            self._queue.append(queued)
        except StopIteration:
            self._more = False
        except Exception as error:  # the user's loader's: it is raised where the batch would come
            self._more, self._error = False, error
        if not self._together:
            return
        ranks, self._number = self._runtime.ranks, self._number + 1
        prepared = None if queued is None else self._owner.prepared(given)
        if prepared is not None:
            mine = prepared.announced(ranks, self._number)
        else:
            rows = NO_BATCH if queued is None else 0
            mine = [Announcement(True, rows=rows, call=Call(), batch=self._number)] * ranks
        self._runtime.traffic = traffic = Traffic()
        self._announced = _Announced(queued, prepared, self._number, self._runtime.telling(AHEAD, mine), traffic)

    def _hear(self) -> None:
        """Hear what ranks have told of the batch that was announced last, and send its ids if all have theirs."""
        announced, self._announced = self._announced, None
        if announced is None:
            return
        told = announced.hear()
        self._check_order(announced.number, told)
        self._together = all(m.rows != NO_BATCH for m in told)
        if any(m.failed for m in told) or len({m.call for m in told}) > 1:
            self._owner.unused.include(announced.traffic)
            return
        assert announced.prepared is not None and announced.queued is not None
        self._runtime.traffic = announced.traffic
        announced.queued.waiting = announced.prepared.send(self._runtime, told)
        self._owner._module._ahead.append(announced.queued.waiting)

    def _check_order(self, number: int, told: list[Announcement]) -> None:
        if len({m.batch for m in told}) == 1:
            return
        lines = [
            f"rank {r}: batch {(m.batch & (1 << LOOPS) - 1) - 1} of loop {m.batch >> LOOPS}" for r, m in enumerate(told)
        ]
        error = RankError(
            "ranks are at different batches of loops over prefetch(...): let all of them begin the same loops and "
            "leave each at the same batch\n" + "\n".join(lines)
        )
        assert self._runtime.channels is not None
        self._runtime.channels.watch.failed(error)  # the others may wait for what this rank does not announce now
        raise error

    def _forget(self, queued: _Queued[B] | None) -> None:
        """The user has had this batch, or will not."""
        if queued is None:
            return
        if queued.waiting in self._owner._module._ahead:
            self._owner._module._ahead.remove(queued.waiting)
        self._owner.count(queued.waiting)

"""A batch before its step: whether its program is known, what of it can be sent, and whether a step is that of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from descompiler.emit.ahead import Beginning
from descompiler.emit.emit import Emitted
from descompiler.module.contents import Contents
from descompiler.module.sizes import Sized
from descompiler.ops.local import plain
from descompiler.runtime.agreement import Call
from descompiler.runtime.ahead import Ahead, Announcement, Seen
from descompiler.runtime.early_rows import EarlyRows
from descompiler.runtime.fetch import fetch_start, prepared
from descompiler.runtime.fetching import Fetching, hear_asked
from descompiler.runtime.pulling import Pulling
from descompiler.runtime.runtime import Runtime


def taken(beginning: Beginning, emitted: Emitted, now: Contents, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the beginning of a program takes, constants aside."""
    inputs = iter(tensors)
    given = [next(inputs) if s.kind == "input" else None for s in emitted.sources]
    result = []
    for place in beginning.places:
        source, x = emitted.sources[place], given[place]
        if source.kind != "constant":
            result.append(now.every_buffer[source.name] if x is None else x)
    return result


@dataclass(frozen=True)
class Prepared:
    """What can be sent of a batch.

    Attributes
    ----------
    call : Call
        The program that it is sent for.
    seen : Seen
        What is sent is made of these.
    trains : bool
        Whether its step is followed by a backward.
    """

    call: Call
    emitted: Emitted
    beginning: Beginning
    seen: Seen
    rows: int
    entering: Sequence[Tensor] | None
    fetching: Fetching | Pulling | None
    trains: bool

    @classmethod
    def of(
        cls, runtime: Runtime, now: Contents, tensors: Sequence[Tensor], program: Sized, call: Call
    ) -> Prepared | None:
        """None if nothing can be sent before the step, an id is wrong, or a change of the batch would not be seen."""
        emitted, first = program.emitted, program.beginning
        if first is None:
            return None
        made_of = taken(first, emitted, now, tensors)
        if any(x.is_inference() for x in made_of):
            return None
        seen, queue, trains = Seen.of(made_of), iter(made_of), torch.is_grad_enabled()
        values: list[Any] = []
        for s in (emitted.sources[place] for place in first.places):
            values.append(emitted.constant(s.name, runtime.device) if s.kind == "constant" else next(queue))
        with torch.no_grad():
            rows, ids, fetched, entering = first.module(*values)
            runtime.layout, runtime.checks = emitted.layout, emitted.checks
            if runtime.problem(ids) is not None:
                return None
            fetching = None if fetched is None else prepared(runtime, emitted.layout.fetches[0], fetched)
        return cls(call, emitted, first, seen, rows, entering, fetching, trains)

    def announced(self, ranks: int, batch: int) -> list[Announcement]:
        """What each rank is told of it."""
        fetching = self.fetching
        asked = [0] * ranks if fetching is None else fetching.asked_told
        gathered = 0 if fetching is None else fetching.gathered_told
        return [Announcement(False, n, gathered, self.rows, self.call, batch) for n in asked]

    def send(self, runtime: Runtime, told: Sequence[Announcement]) -> Waiting:
        """Begin to send it to the ranks that have announced theirs."""
        runtime.layout, runtime.rows = self.emitted.layout, [m.rows for m in told]
        entering = None if self.entering is None else runtime.enter_start(self.entering)
        if self.fetching is not None:
            self.fetching.hear(told)
            fetch_start(runtime, self.fetching)
        ahead = Ahead(told[0].batch, runtime.rows, entering, self.fetching, runtime.traffic)
        return Waiting(self.call, self.emitted, self.beginning, self.seen, ahead, self.trains)


@dataclass(frozen=True, eq=False)
class Waiting:
    """What has gone ahead of a batch, until its step takes it."""

    call: Call
    emitted: Emitted
    beginning: Beginning
    seen: Seen
    ahead: Ahead
    trains: bool

    def is_of(self, call: Call, emitted: Emitted, now: Contents, tensors: Sequence[Tensor]) -> bool:
        """Whether a step is that of this batch: the same program, on the very tensors, which nobody has changed."""
        if self.call != call or self.emitted is not emitted:
            return False
        return self.seen.is_now(taken(self.beginning, emitted, now, tensors))

    def offer_rows(self, runtime: Runtime, before: Waiting) -> bool:
        """Tell ranks which rows go ahead of this batch, during the step ``before`` it; whether any can. Collective."""
        fetching, other = self.ahead.fetching, before.ahead.fetching
        if not isinstance(fetching, Fetching) or not isinstance(other, Fetching) or not fetching.fetch.divided:
            return False
        if [t.name for t in fetching.fetch.tables] != [t.name for t in other.fetch.tables]:  # keys of others
            return False
        hear_asked(other, runtime.rank)
        changing = other.served_keys if before.trains else [keys[:0] for keys in other.served_keys]
        self.ahead.early = EarlyRows.offered(runtime, self.ahead.traffic, fetching, changing)
        return True

    def send_rows(self, now: Contents) -> None:
        """Send the rows that were offered, once. Collective."""
        if (early := self.ahead.early) is not None:
            early.send(_weights(early.fetching, now), self.emitted.layout.wire_dtype)

    def begin(self, now: Contents) -> None:
        """Its step begins: see whether the rows that went ahead are what was sent."""
        if (early := self.ahead.early) is not None:
            self.send_rows(now)  # a step that begins before its turn
            early.look(_weights(early.fetching, now))


def _weights(fetching: Fetching, now: Contents) -> list[Tensor]:
    """This rank's pieces of the tables of a fetch."""
    return [plain(now.every_parameter[t.name]).detach() for t in fetching.fetch.tables]

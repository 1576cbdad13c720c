"""Agreement: all ranks go on, or all of them raise, and none waits for another in a collective.

Every rank tells the others how it stands, also one that has failed; all see the same, so all decide the same. In a step
they tell numbers, and words follow only where all raise; when they compile, which nobody counts, words at once.

    when                                    what is told                    raised unless
    a step begins, or Python uses a piece   a `Header` to each rank         none failed, and all make the same `Call`
    the same, of a batch that went ahead    the same, heard before more     the same; all take that batch, or none does
                                            is sent (`Agreement.settle`)
    a fetch begins late                     a `Message` to each rank        none failed
    a leaf was run, backward has ended      a byte                          none failed
    ranks compile                           words (`say`)                   none failed (`settle`), all say the same
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from enum import IntEnum
from typing import Any, Self, TypeVar

import torch

from descompiler.errors import InputError, RankError
from descompiler.layout import step
from descompiler.layout.step import LeafStatus
from descompiler.layout.traffic import Traffic
from descompiler.runtime.carriers import carries
from descompiler.runtime.collectives import gather_objects
from descompiler.runtime.communicator import Communicator

T = TypeVar("T")


def say(value: T, group: Any, ranks: int) -> list[T]:
    """What every rank says. Collective."""
    if ranks == 1:
        return [value]
    return gather_objects(value, group)


def settle(problem: str | None, group: Any, ranks: int, kind: type[Exception], title: str = "", what: str = "") -> None:
    """Raise on every rank what any of them has to say, if any has; ``what`` it could not do. Collective."""
    texts = say(problem, group, ranks)
    lines = [f"rank {r}{what}: {t}" for r, t in enumerate(texts) if t is not None]
    if lines:
        raise kind("\n".join([title, *lines] if title else lines))


class Kind(IntEnum):
    """What ranks come to in a step."""

    PROGRAM = 0
    POINT = 1
    END = 2  # of the user's forward
    NORM = 3
    FETCH = 4
    WHOLE = 5
    AHEAD = 6  # a program, with what went ahead of a batch
    SIGHT = 7  # as FETCH, of a dynamic table, whose ids are sighted


class OtherProgramError(Exception):
    """Ranks know from the header that this program is not the step's; all raise, and begin the step with another.

    It is caught where programs are chosen (`descompiler.module.sizes`).
    """


class NotAheadError(Exception):
    """Ranks know from the header that not all of them take what went ahead of one batch; all begin the step again.

    It is caught where programs are run (`descompiler.module.distributed`).
    """


def any_rows(rows: int) -> bool:
    """Of a program in which forward does not branch on the rows of the batch."""
    return True


SIZES = 33
"""From this bit of a call's number on it is a digest of the sizes of a rank's inputs."""


@dataclass(frozen=True)
class Call:
    """What a rank is about to do.

    Attributes
    ----------
    kind : Kind
    number : int
        Which one: calls of one kind and number are the same. At least 0, less than 2^60.
    name : str
        For people; it is not sent.
    """

    kind: Kind = Kind.PROGRAM
    number: int = 0
    name: str = field(default="", compare=False)

    @staticmethod
    def named(name: str, kind: Kind = Kind.POINT) -> Call:
        """A call that is known by its name."""
        return Call(kind, zlib.crc32(name.encode()), name)

    def with_sizes(self, sizes: object) -> Call:
        """The call for inputs of some sizes: another one for others."""
        return replace(self, number=self.number | zlib.crc32(repr(sizes).encode()) >> 5 << SIZES)

    def without_sizes(self) -> Call:
        return replace(self, number=self.number & (1 << SIZES) - 1)

    def begun_alike(self) -> Call:
        """The call of a program, whether or not its ids went ahead."""
        return replace(self, kind=Kind.PROGRAM) if self.kind is Kind.AHEAD else self

    def encode(self) -> int:
        return self.number << 3 | self.kind

    @staticmethod
    def decode(word: int) -> Call:
        return Call(Kind(word & 7), word >> 3)


@dataclass(frozen=True)
class Message:
    """What a rank tells another one before they exchange rows.

    Attributes
    ----------
    failed : bool
    asked : int
        How many rows it will ask of the other; or another number for that one alone; or which batch went ahead.
    gathered : int
        Of how many shared rows it will send a gradient to every rank; or whether rows that went ahead have changed.
    """

    failed: bool
    asked: int = 0
    gathered: int = 0

    def encode(self) -> list[int]:
        return [int(self.failed), self.asked, self.gathered]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Self:
        failed, asked, gathered = numbers
        return cls(bool(failed), asked, gathered)


@dataclass(frozen=True)
class Header(Message):
    """What a rank tells another one when a step begins.

    Attributes
    ----------
    rows : int
        Of its batch.
    call : Call
    """

    rows: int = 0
    call: Call = Call()

    def encode(self) -> list[int]:
        return [*super().encode(), self.rows, self.call.encode()]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Self:
        *first, rows, call = numbers
        base = Message.decode(first)
        return cls(base.failed, base.asked, base.gathered, rows, Call.decode(call))


M = TypeVar("M", bound=Message)


@dataclass
class Agreement(Communicator):
    """A communicator whose ranks agree.

    Attributes
    ----------
    call : Call
        What this rank does; ranks that do different things raise.
    rows : list of int
        Of all ranks, at the latest header.
    changed : list of bool
        By rank, whether its rows that went ahead of this step are others now.
    started : bool
        Whether the step's header was sent.
    failed : bool
        Whether all ranks have raised since the latest forward began.
    accepts : callable
        Whether the program under way is that for so many rows of the global batch.
    """

    _: KW_ONLY
    call: Call = Call()
    rows: list[int] = field(default_factory=list)
    changed: list[bool] = field(default_factory=list)
    started: bool = False
    failed: bool = False
    accepts: Callable[[int], bool] = any_rows

    def telling(self, name: str, mine: Sequence[M]) -> Callable[[], list[M]]:
        """Begin to send ``mine[r]`` to rank r; what is returned waits, and has what each told this one."""
        kind = type(mine[0])
        send = torch.tensor([m.encode() for m in mine], dtype=torch.int64, device=self.header_device())
        sizes = [send.shape[1]] * self.ranks
        under_way = self.exchange(send.reshape(-1), sizes, sizes, name, control=True)
        return lambda: [kind.decode(numbers) for numbers in under_way.wait().reshape(send.shape).tolist()]

    def tell(self, name: str, mine: Sequence[M], problem: str | None) -> list[M]:
        """Send ``mine[r]`` to rank r; returns what each told this one. Unless none has failed, all raise."""
        return self._unfailed(self.telling(name, mine)(), problem)

    def _unfailed(self, told: list[M], problem: str | None) -> list[M]:
        if any(m.failed for m in told):
            self.raise_everywhere(problem, InputError)
        return told

    @carries(step.StepHeader)
    def header(
        self,
        rows: int,
        problem: str | None,
        asked: Sequence[int] | None = None,
        gathered: int = 0,
        *,
        same_call: bool = True,
    ) -> list[Header]:
        """Every rank calls this once a step, also when it has failed: then all ranks raise.

        Parameters
        ----------
        asked, gathered
            See `Message`; ``asked`` by rank.
        same_call : bool
            Whether ranks in different calls raise.

        Returns
        -------
        list of Header
            What each rank told this one.

        Raises
        ------
        OtherProgramError
            If calls differ in nothing but the sizes of inputs, or the program is not that for so many rows.
        NotAheadError
            If some rank takes what went ahead of a batch.
        """
        self.started = True
        if self.ranks == 1:
            if problem is not None:
                self.failed = True
                raise InputError(problem)
            told = [Header(False, rows=rows, call=self.call)]  # it asks nobody
        else:
            asked, failed = [0] * self.ranks if asked is None else asked, problem is not None
            self._name_call()
            told = self.tell(
                step.StepHeader.SEND, [Header(failed, n, gathered, rows, self.call) for n in asked], problem
            )
        return self._agreed(told, same_call=same_call)

    def header_ahead(self, batch: int, rows: Sequence[int], changed: bool) -> None:
        """The header of a step whose ids went ahead, with the ``rows`` of all ranks; it is heard in `settle`.

        ``changed``: whether rows of this rank that went ahead are not what was sent any more.
        """
        self.started, self.rows, self.call = True, list(rows), replace(self.call, kind=Kind.AHEAD)
        self._name_call()
        mine = Header(False, batch, int(changed), rows[self.rank], self.call)
        told = self.telling(step.StepHeader.SEND, [mine] * self.ranks)

        def hear() -> None:
            heard = self._agreed(self._unfailed(told(), None), same_call=True)
            self.changed = [bool(m.gathered) for m in heard]

        self.due = hear

    def _name_call(self) -> None:
        if self.channels is not None:
            self.channels.watch.call = self.call.name

    def _agreed(self, told: list[Header], *, same_call: bool) -> list[Header]:
        """What ranks have told, if they go on: the end of `header`."""
        self.rows = [m.rows for m in told]
        if same_call and len(calls := {m.call.begun_alike() for m in told}) > 1:
            if len({c.without_sizes() for c in calls}) > 1:
                self.raise_different()
            raise OtherProgramError if not any(m.call.kind is Kind.AHEAD for m in told) else NotAheadError
        if same_call and len({m.asked if m.call.kind is Kind.AHEAD else None for m in told}) > 1:
            raise NotAheadError
        if not self.accepts(sum(self.rows)):
            raise OtherProgramError
        return told

    def known_rows(self) -> int:
        """This rank's rows at the latest header: one that is about something else tells them again."""
        return self.rows[self.rank] if self.rows else 0

    def meet(
        self, name: str, *, rows: int | None = None, problem: str | None = None, tell: Sequence[int] | None = None
    ) -> list[int]:
        """Every rank comes to the same point, and none has failed; ``tell[r]`` is a number for rank r.

        ``rows``: those that ranks know of already, by default.

        Returns
        -------
        list of int
            What each rank told this one.
        """
        self.call = Call.named(name)
        return [m.asked for m in self.header(self.known_rows() if rows is None else rows, problem, tell)]

    def meet_in_backward(self, what: str) -> None:
        """Every rank begins the same backward."""
        self.call = Call.named(what)
        if len({m.call for m in self.header(self.known_rows(), None, same_call=False)}) > 1:
            self.raise_everywhere(what, RankError, "ranks begin different backwards")

    def meet_between_steps(self, what: str) -> None:
        """Every rank begins the same, which is part of no step. A header, too: those of a step may be on their way."""
        traffic, self.traffic = self.traffic, Traffic()
        try:
            self.meet(what)
        finally:
            self.traffic = traffic

    @carries(LeafStatus)
    def agree(self, problem: str | None) -> None:
        """Every rank calls this after code of the user's has run, also when that has failed: then all ranks raise.

        Before the header of a step nothing is sent: it will tell.
        """
        if self.ranks > 1 and self.started:
            self._agree(LeafStatus.RUN, problem)
        elif problem is not None:
            raise InputError(problem)

    def _agree(self, name: str, problem: str | None) -> None:
        mine = torch.tensor([problem is not None], dtype=torch.uint8, device=self.header_device())
        if bool(self.gather(name, mine).any()):
            self.raise_everywhere(problem, InputError)

    @carries(LeafStatus)
    def agree_after_backward(self, failures: list[tuple[str, Exception]]) -> None:
        """At the end of the backward that is under way, ranks tell whether a leaf's failed: then all ranks raise.

        The last of all that is done then: the reducer, and the exchange of gradients, have to end as in any backward.
        """
        queue = torch.autograd.Variable._execution_engine.queue_callback

        def tell() -> None:
            problem, cause = failures[0] if failures else (None, None)
            failures.clear()
            try:
                self._agree(LeafStatus.BACKWARD, problem)
            except InputError as error:
                raise error from cause

        failures.clear()  # of another backward through a graph that was kept
        queue(lambda: queue(tell))

    def raise_different(self) -> None:
        """Raise on every rank, with the calls of all."""
        self.raise_everywhere(f"runs in mode {self.call.name}", RankError, "ranks call forward in different modes")

    def raise_everywhere(self, problem: str | None, kind: type[Exception], title: str = "") -> None:
        """Raise on every rank what any of them has to say. Collective."""
        self.failed = True
        settle(problem, self.group, self.ranks, kind, title)

"""The watch: no rank waits for ever, and each that gives up says for what, for whom, and why if that is known.

A collective that is there within `WAIT_LOOK_S` seconds costs nothing here. A rank that waits longer writes in the job's
store where it waits, and reads what the others wrote:

    a rank has failed                      its words are raised here too
    ranks wait for each other              (one in backward's exchange, one in the next header): raised at once
    nothing for ``timeout`` seconds, or    raised, with the ranks that did not come: they died, stall, or do something
    a connection was closed                else

What a rank writes last stays, so that those which meet its closed connection know the cause.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import queue
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

from descompiler.errors import RankError

WAIT_LOOK_S = 1.0
"""Seconds between two looks at what the others wrote; a rank that is seen twice in one place waits there."""


LAST_WORDS_S = 3.0
"""How long a rank that gives up looks for what the others say."""


STORE_S = 5.0
"""How long the store may take to answer: the process that holds it may be what has died, or was stopped."""

Notes = Mapping[int, dict[str, Any]]


class Board:
    """What ranks write for each other in the job's store: a note each. A store that doesn't answer is left alone.

    It is asked by a thread of its own, since torch waits for an answer however long it takes.
    """

    def __init__(self, store: Any, rank: int, ranks: int):
        self._store, self.rank, self.ranks = store, rank, ranks
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # the thread ends with the board; where the process ends, it may yet have last words
        weakref.finalize(self, self._tasks.put, None).atexit = False
        self.answers = True

    def write(self, note: Mapping[str, Any]) -> None:
        """Put this rank's note in the place of its last."""
        self._ask(lambda: self._store.set(str(self.rank), json.dumps(note)))

    def read(self) -> Notes:
        """The notes of all ranks that wrote one."""
        return self._ask(self._read) or {}

    def _read(self) -> Notes:
        keys = {r: str(r) for r in range(self.ranks)}
        return {r: json.loads(self._store.get(k)) for r, k in keys.items() if self._store.check([k])}

    def _ask(self, task: Callable[[], Any]) -> Any:
        if not self.answers:
            return None
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=_serve, args=(self._tasks,), daemon=True, name="descompiler board")
            self._thread.start()
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._tasks.put((task, answer))
        try:
            result = answer.get(timeout=STORE_S)
        except queue.Empty:
            result = RuntimeError("no answer")
        if isinstance(result, Exception):
            self.answers = False
            return None
        return result


def _serve(tasks: queue.SimpleQueue[Any]) -> None:
    while (asked := tasks.get()) is not None:
        task, answer = asked
        try:
            answer.put(task())
        except Exception as error:  # of the store: whoever asked decides
            answer.put(error)
            return
        del asked, task, answer  # they hold the board


@dataclass(frozen=True)
class Entered:
    """A collective that this rank has entered: the ``index``-th of a channel.

    Ranks enter a channel's collectives in one order, so a rank that has entered fewer is missing in this one.
    """

    watch: Watch
    channel: str
    index: int
    name: str

    def wait(self, work: Any) -> None:
        """Wait for its end.

        Raises
        ------
        RankError
            If it does not come.
        """
        self.watch.wait(work, self)


@dataclass
class Watch:
    """One per process group that modules were compiled for.

    Attributes
    ----------
    timeout : float
        Seconds that a rank waits for the others.
    step : int
        Forwards begun.
    name : str
        What the next collective is.
    call : str
        What this rank tells the others that it does, in the latest header.
    broken : str or None
        Why no more collectives can be made here: this rank left one that others are in.
    entered : dict of str to int
        Collectives, by channel.
    groups : tuple of process groups
        Of all channels.
    """

    board: Board
    timeout: float
    step: int = 0
    name: str = "a collective"
    call: str = ""
    broken: str | None = None
    entered: dict[str, int] = field(default_factory=dict)
    groups: tuple[Any, ...] = ()
    _looks: int = 0
    _failure: str | None = None  # what this rank raised on its own
    _written: bool = True  # others would read what an earlier job wrote in this store

    def __post_init__(self) -> None:
        _LIVE.add(self)
        _hook_exceptions()

    __hash__ = object.__hash__

    def begin(self, step: int) -> None:
        """A forward begins."""
        self.step = step
        if self._written and self.broken is None:  # what was raised before was not the end
            self._write("goes on")

    def enter(self, channel: str) -> Entered:
        """This rank enters the next collective of a channel."""
        if self.broken is not None:
            raise RankError(f"an earlier step has failed, and its collectives can't go on: start anew. {self.broken}")
        index = self.entered[channel] = self.entered.get(channel, 0) + 1
        told = f"{self.name}: {self.call}" if channel.startswith("control") else self.name
        return Entered(self, channel, index, told)

    def wait(self, work: Any, entered: Entered) -> None:
        """See `Entered.wait`."""
        deadline = time.monotonic() + self.timeout
        before: Notes = {}
        try:
            while not _is_done(work, min(WAIT_LOOK_S, max(deadline - time.monotonic(), 0.01))):
                self._write("waits", entered)
                notes = self.board.read()
                self._judge(notes, before)
                if time.monotonic() > deadline:
                    self._give_up(entered.name, f"nothing came for {self.timeout:g} s")
                before = notes
        except RuntimeError as error:  # gloo's
            self._give_up(entered.name, _said(error), error)
        if self._written:
            self._write("goes on")

    def failed(self, error: BaseException) -> None:
        """This rank has raised where the others go on: tell those that wait for it why."""
        if self.broken is not None:  # what it raises is what it was told
            return
        self._failure = f"rank {self.board.rank} raised in step {self.step}: {type(error).__name__}: {error}"
        self._write("failed")

    @contextlib.contextmanager
    def over(self, name: str) -> Iterator[None]:
        """Code that waits for other ranks in one call, which nobody can look into."""
        try:
            yield
        except RuntimeError as error:
            self._give_up(name, _said(error), error)

    # ---- what ranks say

    def _write(self, state: str, entered: Entered | None = None, text: str = "") -> None:
        self._looks += 1
        self._written = state != "goes on"
        self.board.write(
            {
                "state": state,
                "look": self._looks,
                "step": self.step,
                "text": text,
                "failure": self._failure,
                "entered": self.entered,
                "in": None if entered is None else [entered.channel, entered.index, entered.name],
            }
        )

    def _judge(self, notes: Notes, before: Notes) -> None:
        """Raise what another rank has failed of, or that ranks wait for each other."""
        mine, rank = notes.get(self.board.rank), self.board.rank
        for r, note in notes.items():
            if r != rank and note["state"] in ("failed", "gave up"):
                self._break(note["text"] or note["failure"])
        waiting = {r: n for r, n in notes.items() if n["state"] == "waits" and _stays(n, before.get(r))}
        waiting |= {rank: mine} if mine is not None else {}
        if len(waiting) == self.board.ranks and all(_missing(n, waiting) for n in waiting.values()):
            lines = [f"rank {r}: step {n['step']}, {n['in'][2]}" for r, n in sorted(waiting.items())]
            lines += [n["failure"] for n in waiting.values() if n["failure"]]
            self._break("ranks wait for each other, since they do different things:\n" + "\n".join(lines))

    def _give_up(self, name: str, why: str, cause: BaseException | None = None) -> None:
        """Raise, with what the other ranks say of it within `LAST_WORDS_S`."""
        self._write("leaves")
        first, others = self.board.read(), set(range(self.board.ranks)) - {self.board.rank}
        deadline, heard, notes = time.monotonic() + LAST_WORDS_S, set[int](), first
        while heard != others and time.monotonic() < deadline:
            time.sleep(WAIT_LOOK_S / 4)
            notes = self.board.read()
            heard = {r for r in others & notes.keys() if _is_alive(notes[r], first.get(r))}
        lines = [f"rank {self.board.rank} waited in step {self.step}, {name}: {why}"]
        lines += [n["failure"] for n in notes.values() if n["failure"]]
        silent = sorted(others - heard)
        if not self.board.answers:
            lines.append("the job's store does not answer: the process that holds it (rank 0, or torchrun) has ended")
        elif silent:
            ranks = ", ".join(map(str, silent))
            lines.append(f"did not come: rank {ranks}, which has ended, is stopped, or does something else for long")
        self._break("\n".join(lines), cause)

    def _break(self, text: str, cause: BaseException | None = None) -> None:
        if self.broken is None:
            for group in self.groups:  # its end would wait for the collective that this rank leaves
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        self.broken = text
        self._write("gave up", text=text)
        raise RankError(text) from cause


def _said(error: RuntimeError) -> str:
    """What gloo says, without its source file and its advice."""
    return re.sub(r"^\[\S*\.cc:\d+\] ", "", str(error).splitlines()[0]).partition(". This is typically")[0]


def _is_done(work: Any, seconds: float) -> bool:
    """Wait for a collective, some seconds at most."""
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # it has ended since, or raises why it failed
    return True


def _stays(note: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
    """Whether a rank has looked again, and waits where it waited."""
    if before is None or before["look"] == note["look"]:
        return False
    return (before["in"], before["entered"]) == (note["in"], note["entered"])


def _missing(note: Mapping[str, Any], notes: Notes) -> bool:
    """Whether a rank waits for one that has not entered, or has entered another collective in its place.

    One that raised in a step, and does something else now, is in the next collective of the channel: of another name.
    """
    channel, index, name = note["in"]
    elsewhere = any(n["in"][:2] == [channel, index] and n["in"][2] != name for n in notes.values())
    return elsewhere or any(n["entered"].get(channel, 0) < index for n in notes.values())


def _is_alive(note: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
    return note["state"] in ("failed", "leaves", "gave up") or before is None or before["look"] != note["look"]


# ---- exceptions that end a process

_LIVE: weakref.WeakSet[Watch] = weakref.WeakSet()


def _hook_exceptions() -> None:
    """Tell the other ranks of an exception that ends this process, before the hook that was there."""
    if getattr(sys.excepthook, "_tells_ranks", False):
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        for watch in list(_LIVE):
            if watch.broken is None:
                watch.failed(error)
        before(kind, error, trace)

    hook._tells_ranks = True  # type: ignore[attr-defined]
    sys.excepthook = hook

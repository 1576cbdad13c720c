"""Channels: the process groups of modules that are compiled for one group of ranks, which one watch looks after."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from descompiler.runtime.watch import LAST_WORDS_S, Board, Entered, Watch

TIMEOUT_S = 300.0
"""How long ranks wait for each other by default. Longer than what one rank does alone now and then, such as to write a
checkpoint; shorter than the half hour of gloo, in which a cluster idles because one process has died."""


@dataclass(eq=False)
class Channels:
    """The process groups of modules that are compiled for one group of ranks, made when the first of them is compiled.

    What is agreed on, what is exchanged and what the reducer averages each have a group of their own. Ranks that do
    different things then wait for each other, which the watch sees; in one group gloo would take one's message for the
    other's, and end the process.

    Attributes
    ----------
    loops : int
        Over batches of which something is sent ahead, begun so far.
    """

    parent: Any
    data: Any
    control: Any
    reducer: Any
    watch: Watch
    loops: int = 0
    _ahead: Channels | None = None

    @property
    def alive(self) -> bool:
        """Whether the process groups have not been destroyed."""
        return self.parent in dist.distributed_c10d._world.pg_map

    def ahead(self) -> Channels:
        """Those of what is sent of batches before their steps: no step's are mistaken for it. Collective, once."""
        if self._ahead is None:
            limit, kind = timedelta(seconds=self.watch.timeout + 10 * LAST_WORDS_S), dist.get_backend(self.data)
            members = dist.get_process_group_ranks(self.parent)
            data, control = (_new_group(self.parent, members, limit, kind) for _ in range(2))
            self._ahead = Channels(self.parent, data, control, self.reducer, self.watch)
            self.watch.groups = (*self.watch.groups, data, control)
            _watch_groups(self.watch, {"data ahead": data, "control ahead": control})
        return self._ahead

    @classmethod
    def of(cls, parent: Any, timeout: float = TIMEOUT_S) -> Channels:
        """Those of a group. Collective where they are made."""
        for key in [k for k, c in _CHANNELS.items() if not c.alive]:
            ended = _CHANNELS.pop(key).watch
            for name in [n for n, (watch, _) in _WATCHED.items() if watch is ended]:
                del _WATCHED[name]
        key = (id(parent), timeout)
        if key not in _CHANNELS:
            members, kind = dist.get_process_group_ranks(parent), None
            if parent is not dist.group.WORLD:
                kind = dist.get_backend(parent)
            # gloo's own end comes after the watch's
            limit = timedelta(seconds=timeout + 10 * LAST_WORDS_S)
            data, control, reducer = (_new_group(parent, members, limit, kind) for _ in range(3))
            store = dist.PrefixStore(f"descompiler/{control.group_name}", dist.distributed_c10d._get_default_store())
            board = Board(store, dist.get_rank(parent), dist.get_world_size(parent))
            watch = Watch(board, timeout, groups=(data, control, reducer))
            watch.begin(0)
            _CHANNELS[key] = cls(parent, data, control, reducer, watch)
            _watch_groups(watch, {"data": data, "control": control, "reducer": reducer})
        return _CHANNELS[key]


def _watch_groups(watch: Watch, groups: Mapping[str, Any]) -> None:
    """Let a watch look after groups, by the names of their channels."""
    for channel, group in groups.items():
        if dist.get_backend(group) == "gloo":  # NCCL waits on the device, and ends the process by itself
            _WATCHED[group.group_name] = (watch, channel)


def _new_group(parent: Any, members: list[int], timeout: timedelta, backend: str | None) -> Any:
    """A group of the same ranks, of a name that none has had.

    Torch's own name counts the groups that a rank is in now: it is another one on each of two ranks that are in other
    groups besides, who then wait for each other; and after a group was destroyed it is one that is still taken.
    """
    made = _MADE.setdefault(dist.distributed_c10d._get_default_group(), Counter())
    made[parent.group_name] += 1
    name = f"descompiler/{parent.group_name}/{made[parent.group_name]}"
    usual = dist.distributed_c10d._process_group_name
    dist.distributed_c10d._process_group_name = lambda *_, **__: name  # type: ignore[assignment]
    try:
        return dist.new_group(members, timeout=timeout, backend=backend, use_local_synchronization=True)
    finally:
        dist.distributed_c10d._process_group_name = usual


_MADE: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()
"""Groups made here, by the job's group and the name of a group."""


_CHANNELS: dict[tuple[int, float], Channels] = {}
_WATCHED: dict[str, tuple[Watch, str]] = {}  # by the name of a process group


def entered(group: Any) -> Entered | None:
    """This rank enters the next collective of a group; None if nobody watches it (another library's)."""
    found = _WATCHED.get(group.group_name) if group is not None else None
    return None if found is None else found[0].enter(found[1])


@contextlib.contextmanager
def over(group: Any) -> Iterator[None]:
    """Code that waits for other ranks in one call; see `Watch.over`."""
    found = _WATCHED.get(group.group_name) if group is not None else None
    with contextlib.nullcontext() if found is None else found[0].over(found[0].name):
        yield

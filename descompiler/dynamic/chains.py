"""Chains: what one owner has written of its tables, full states and updates, and where a run of several can go on.

An owner writes its own files alone: a part for each time, and then a list of its parts (the manifest), which has the
size and checksum of each, and in a moment takes the place of the list before. So a process may die anywhere: what no
list names is not there. Each process that writes begins a run of its own, with full states, and numbers what it writes
from there; owners that make the same steps write the same numbers. What can be restored is a number that all owners of
a run have, each with the full state before it and all updates between.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from descompiler.dynamic.stores import Store
from descompiler.errors import InputError, warn

FORMAT = 2
KNOWN = 1, 2
"""Formats that are read. In the first, all owners have the slices of `owners.Owners`."""

LATE = 3
"""When an owner has written so often, all others have begun."""

_NAME = re.compile(r"(?P<run>\d{6})-(?P<rank>\d+)-of-(?P<ranks>\d+)(?P<rest>[.-].*)")
_LIST = ".json"


@dataclass(frozen=True)
class Entry:
    """One part: a full state, or an update of the part that has the number before."""

    number: int
    full: bool
    file: str
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Listed:
    """What a manifest says.

    ``slices``: which the owner has of a table (`owners.as_ranges`), by name, where those of `owners.Owners` are others.
    """

    kind: str
    run: int
    rank: int
    ranks: int
    entries: tuple[Entry, ...]
    slices: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{_prefix(self.run, self.rank, self.ranks)}{_LIST}"

    def numbers(self) -> set[int]:
        """What can be restored."""
        fulls = [e.number for e in self.entries if e.full]
        found, after = set(fulls), {e.number for e in self.entries if not e.full}
        for number in fulls:
            while (number := number + 1) in after:
                found.add(number)
        return found

    def parts(self, number: int) -> list[Entry]:
        """The full state before a number, or of it, and the updates since."""
        first = max(e.number for e in self.entries if e.full and e.number <= number)
        return [
            next(e for e in self.entries if e.full and e.number == first),
            *sorted((e for e in self.entries if not e.full and first < e.number <= number), key=lambda e: e.number),
        ]

    def encoded(self) -> bytes:
        """As bytes, with a checksum."""
        body = {"format": FORMAT, **asdict(self)}
        return json.dumps({"crc32": _sum_of(body), "chain": body}, indent=1).encode()


@dataclass(frozen=True)
class Point:
    """Where a run can go on: the manifest of each of its owners, and the number of the parts that they have."""

    owners: tuple[Listed, ...]
    number: int


class Chain:
    """What an owner writes.

    Parameters
    ----------
    store : Store
    kind : str
        What the parts are.
    rank, ranks : int
        Which owner this is, and of how many.
    slices : mapping of str to str
        See `Listed`.
    keep : int
        Updates that stay beside those that are needed.
    """

    def __init__(
        self, store: Store, kind: str, rank: int, ranks: int, slices: Mapping[str, str] | None = None, *, keep: int = 0
    ):
        if not 0 <= rank < ranks:
            raise InputError(f"rank={rank}, ranks={ranks}: owners are numbered from 0 to ranks - 1")
        self._store, self._keep = store, keep
        run = max((int(m["run"]) for m in _matches(store.names())), default=0) + 1
        self.listed, self.next, self.is_broken = Listed(kind, run, rank, ranks, (), slices or {}), 0, False

    def append(self, number: int, parts: Iterable[Any], *, full: bool) -> None:
        """Write a part, and list it.

        Raises
        ------
        InputError
            If it can't be written; what was there is there. Other owners may have written theirs: the number is used
            up, and what comes next has to be a full state.
        """
        self.next, self.is_broken = number + 1, True
        listed = self.listed
        prefix = _prefix(listed.run, listed.rank, listed.ranks)
        file = f"{prefix}-{number:09d}.{'full' if full else 'update'}.safetensors"
        entry = Entry(number, full, file, *self._store.write(file, parts))
        self._list((*listed.entries, entry))
        self.is_broken = False
        if len(self.listed.entries) == LATE:
            self._look_for_others()

    def use_up(self, number: int) -> None:
        """What was to be a part is none: other owners may have one of that number, so that this one has none of it."""
        if self.next == number:
            self.next, self.is_broken = number + 1, True

    def _look_for_others(self) -> None:
        listed, there = self.listed, set(self._store.names())
        others = [replace(listed, rank=rank) for rank in range(listed.ranks)]
        if missing := [other.rank for other in others if other.name not in there]:
            warn(
                f"owners {missing} have written nothing to run {listed.run} of {self._store}, and owner {listed.rank} "
                f"{LATE} times: it can't be restored. Each owner has to begin before any of them writes, and to write "
                "after the same steps"
            )

    def _list(self, entries: tuple[Entry, ...]) -> None:
        listed = replace(self.listed, entries=entries)
        self._store.write(listed.name, [listed.encoded()])
        self.listed = listed

    def prune(self) -> None:
        """Remove what nobody needs, when all owners have what comes after it."""
        listed = self.listed
        fulls = [i for i, e in enumerate(listed.entries) if e.full]
        others = [m for m in _matches(self._store.names()) if self._is_left(m)]
        if len(fulls) < 2 and not others:
            return
        point = _common(self._store, listed.kind, listed.run, listed.ranks)
        if point is None:
            return
        needed = listed.entries.index(listed.parts(point.number)[0])
        first = min(needed, max(len(listed.entries) - self._keep, 0))
        if first:
            self._list(listed.entries[first:])
        self._store.remove(sorted((m.string for m in others), key=lambda n: not n.endswith(_LIST)))
        self._store.remove(e.file for e in listed.entries[:first])

    def _is_left(self, match: re.Match[str]) -> bool:
        """Whether this owner removes a file of an earlier run."""
        return int(match["run"]) < self.listed.run and int(match["rank"]) % self.listed.ranks == self.listed.rank


def latest(store: Store, kind: str) -> Point | None:
    """The latest moment that can be restored; None where no first save was ever finished by all owners.

    Raises
    ------
    InputError
        If there is something, but no run is whole.
    """
    runs: dict[tuple[int, int], set[int]] = {}
    for match in _matches(store.names()):
        if match["rest"] == _LIST:
            runs.setdefault((int(match["run"]), int(match["ranks"])), set()).add(int(match["rank"]))
    for run, ranks in sorted(runs, reverse=True):
        if (point := _common(store, kind, run, ranks)) is not None:
            return point
    for (run, ranks), there in runs.items():
        listed = [_listed(store, kind, run, rank, ranks) for rank in there]
        if any(e.number for x in listed if x is not None for e in x.entries):  # all have finished number 0
            raise InputError(
                f"{store} has nothing that is whole: of run {run} there are the lists of owners {sorted(there)}, and "
                f"it has {ranks}. Bring back the files that are missing"
            )
    return None


def read(store: Store, entry: Entry) -> bytes:
    """The bytes of a part.

    Raises
    ------
    InputError
        If they are not those that were written.
    """
    try:
        data = store.read(entry.file)
    except FileNotFoundError as error:
        raise InputError(f"{store} is not as it was written: it lacks {entry.file}") from error
    if (len(data), crc := zlib.crc32(data)) != (entry.bytes, entry.crc32):
        raise InputError(
            f"{store} is not as it was written: {entry.file} has {len(data):,} B of checksum {crc:08x}, and had "
            f"{entry.bytes:,} B of {entry.crc32:08x}"
        )
    return data


def _common(store: Store, kind: str, run: int, ranks: int) -> Point | None:
    """The last number that all owners of a run have."""
    listed = [_listed(store, kind, run, rank, ranks) for rank in range(ranks)]
    found = [x for x in listed if x is not None]
    if len(found) < ranks or not (common := set.intersection(*(x.numbers() for x in found))):
        return None
    return Point(tuple(found), max(common))


def _listed(store: Store, kind: str, run: int, rank: int, ranks: int) -> Listed | None:
    """What an owner's manifest says; None where there is none."""
    name = f"{_prefix(run, rank, ranks)}{_LIST}"
    try:
        found = json.loads(store.read(name))
        body = found["chain"]
        if found["crc32"] != _sum_of(body):
            raise ValueError("its checksum is another")
        version = body.pop("format")
        listed = Listed(**{**body, "entries": tuple(Entry(**e) for e in body["entries"])})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name} of {store} can't be read: {type(error).__name__}: {error}") from error
    if version not in KNOWN:
        raise InputError(f"{name} of {store} has format {version}, and this version reads {', '.join(map(str, KNOWN))}")
    if (listed.kind, listed.name) != (kind, name):
        raise InputError(f"{name} of {store} is a list of {listed.kind}, {listed.name}, and not of {kind}")
    return listed


def _sum_of(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _prefix(run: int, rank: int, ranks: int) -> str:
    return f"{run:06d}-{rank}-of-{ranks}"


def _matches(names: Sequence[str]) -> list[re.Match[str]]:
    return [m for m in map(_NAME.fullmatch, names) if m is not None]

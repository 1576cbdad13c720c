"""A dynamic table: who is resident, their rows, and what optimisers keep; `Table.look_up` and `Table.end_step`."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from descompiler.dynamic.admission import Admission
from descompiler.dynamic.eviction import Eviction
from descompiler.dynamic.hashing import mix, unmix, word_of
from descompiler.dynamic.initial import Initial
from descompiler.dynamic.residence import Residence
from descompiler.dynamic.rows import Rows, lasting
from descompiler.dynamic.states import States, step_with
from descompiler.errors import UnsupportedError

EVERY_RANK = -1
"""Who owns a slice that every rank has."""


@dataclass(frozen=True)
class Config:
    """What a table is made from; those of equal configurations that see the same sets of ids step by step are equal."""

    dim: int
    name: str
    seed: int
    init: Initial
    admit: Admission
    evict: Eviction | None
    max_rows: int | None

    @property
    def salt(self) -> int:
        """What makes the keys of this table other ones than those of another name or seed."""
        return word_of(self.seed, self.name)


class Watcher(Protocol):
    """What a table tells of its changes, by slot."""

    def restarted(self) -> None: ...
    def looked_up(self, slots: Tensor, came: Tensor) -> None: ...
    def changed(self, slots: Tensor) -> None: ...
    def ends_step(self) -> None: ...
    def went(self, slots: Tensor) -> None: ...


_NONE = torch.empty(0, dtype=torch.int64)


def _same(slots: Tensor, one: Residence, other: Residence) -> bool:
    """Whether these slots, all that are taken of one, have the same keys in another."""
    keys = one.map.keys.tensor[slots]
    return len(one) == len(other) and torch.equal(other.find(keys), slots)


class LooksUp(Protocol):
    """What finds rows of ids, as `Table.look_up` does."""

    def __call__(self, ids: Tensor, *, create: bool) -> Tensor: ...


class Table:
    """The rows of ids, which come and go.

    Parameters
    ----------
    config : Config
    dtype : torch.dtype
        Of rows.
    device : torch.device
        Of rows; who is resident is known on the CPU.

    Examples
    --------
    >>> from descompiler.dynamic import Always, Constant
    >>> config = Config(2, "user", 0, Constant(0.5), Always(), None, None)
    >>> table = Table(config, torch.float32, torch.device("cpu"))
    >>> table.look_up(torch.tensor([7, -7]), create=True).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    >>> table.look_up(torch.tensor([7, 8]), create=False).tolist()
    [[0.5, 0.5], [0.0, 0.0]]
    >>> table.resident().tolist()
    [-7, 7]
    """

    @lasting
    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device):
        self.config, self._salt = config, config.salt
        self.watching: weakref.WeakSet[Watcher] = weakref.WeakSet()
        self.restart()
        self.rows = Rows(config.dim, dtype, device, config.max_rows)
        self.states = States(self.rows)
        step_with(self.rows.parameter, self)

    @property
    def _watchers(self) -> Iterable[Watcher]:
        return self.watching if len(self.watching) else ()  # mostly, and weak sets take long to say so

    residence: Residence
    padding_idx: int | None = None
    """An id that has the default row always: nobody is asked for it."""

    elsewhere: LooksUp | None = None
    """What finds rows that other ranks may have, while a forward of the user's own runs on parts of a table."""

    rank, ranks = 0, 1
    owners: Tensor | None = None
    """The rank of each slice, `EVERY_RANK` for those that all have: ids of this one's are looked up here. None: all
    are."""

    def copied_from(self, original: Table) -> None:
        """This is a copy, made just now: what others write to its rows, by slot, is asked about (`check_written`)."""
        self._original, self._known_writes = weakref.ref(original), self.rows.writes

    _original: weakref.ref[Table] | None = None
    _known_writes = 0

    @property
    def called(self) -> str:
        """The table, for messages."""
        return f"dynamic table {self.config.name!r}" if self.config.name else "the dynamic table"

    def check_weight(self, weight: object) -> None:
        """Whether this is the parameter that has the rows, and what others have written to it is of ids that are there.

        Raises
        ------
        UnsupportedError
            If it is another tensor, has other rows, or may have; or if the default row is no zeros any more.
        """
        if weight is not self.parameter:
            raise UnsupportedError(
                f"the rows of {self.called} are in the parameter that it was made with, and come and go; another "
                "tensor is its `weight` now, as torch.func.functional_call, parametrisations (weight_norm), pruning, "
                "tied weights and `table.weight = ...` put there. Write to the parameter, in torch.no_grad(); or share "
                "the module"
            )
        self.rows.follow()
        self.rows.notice()
        if self.rows.writes != self._looked_at:
            self._check_default()
        self._check_copied()

    def check_written(self) -> None:
        """Whether rows are those of their ids, whatever has written to them.

        Raises
        ------
        UnsupportedError
            If they may be others, or if the default row is no zeros any more.
        """
        self._looked_at = -1  # writes to `weight.data` are not counted
        self.check_weight(self.parameter)

    def _check_default(self) -> None:
        if bool(self.rows.tensor[0].any()):
            raise UnsupportedError(
                f"the default row of {self.called}, row 0 of its weight, was written to, as torch.nn.init does: ids "
                "without a row have zeros, and new rows begin as init= of the table says. Leave `weight` out of what "
                "initialises parameters"
            )
        self._looked_at = self.rows.writes

    def _check_copied(self) -> None:
        """Raise unless a copy has the same ids in the same slots as the original still, if it was written to."""
        if self._original is None or self.rows.writes == self._known_writes:
            return
        original, mine = self._original(), self.residence.resident()
        if original is None or not _same(mine, self.residence, original.residence):
            raise UnsupportedError(
                f"the rows of a copy of the dynamic table {self.config.name!r} were written in place, slot by slot, as "
                "torch.optim.swa_utils.AveragedModel does, and its slots are not (or no longer) those of the original: "
                "ids have come or gone. Average models without dynamic tables, or exports of them (to_embedding)"
            )
        self._known_writes = self.rows.writes

    _looked_at = -1
    """How often others had written to the rows when the default row was looked at; -1: it was not."""

    def restart(self) -> Residence:
        """Nobody is resident any more; rows are as they were."""
        self.residence = Residence(self.config.admit, self.config.evict, self.config.max_rows)
        for watcher in self._watchers:
            watcher.restarted()
        self._limit()
        return self.residence

    _held: Tensor | None = None
    """Of each slice, whether its ids are looked up here; None: all are."""

    def own(self, owners: Tensor | None, rank: int, ranks: int) -> None:
        """Look up the ids of a rank's slices alone, with their share of ``max_rows``."""
        self.owners, self.rank, self.ranks = owners, rank, ranks
        held = None if owners is None else (owners == rank).logical_or_(owners == EVERY_RANK)
        self._held = None if held is None or held.all() else held
        self._limit()

    def _limit(self) -> None:
        if self.owners is not None and self.config.max_rows is not None:
            self.residence.max_rows = self.config.max_rows * len(self.own_slices) // self.residence.slices

    @property
    def parameter(self) -> nn.Parameter:
        """The rows, by slot."""
        return self.rows.parameter

    @lasting
    def adopt(self, parameter: nn.Parameter) -> None:
        """Have the rows in another parameter, or in what this one was cast or moved to."""
        self.rows.adopt(parameter)
        self._known_writes += 1  # as adopting is one
        step_with(parameter, self)

    def keys(self, ids: Tensor) -> Tensor:
        """The keys of ids."""
        return torch.from_numpy(mix(ids.numpy() ^ self._salt))

    def look_up(self, ids: Tensor, *, create: bool) -> Tensor:
        """The rows of ids (int64 ``[n]``, on the CPU), default rows for those that have none.

        Parameters
        ----------
        ids : Tensor
        create : bool
            Whether this is training: ids are sighted, and get rows if they are admitted.

        Raises
        ------
        TableFullError
            If there would be more rows than ``max_rows``; nothing has changed.
        """
        return self.rows.look_up(self.slots(self.keys(ids), create=create))

    def look_up_keys(self, keys: Tensor, *, create: bool, weight: Tensor) -> Tensor:
        """As `look_up`, of keys that are this table's; ``weight``: the parameter, as the gradient is to come to it."""
        return self.rows.look_up(self.slots(keys, create=create), weight)

    def look_up_owned(self, ids: Tensor, *, create: bool, weight: Tensor | None = None) -> Tensor:
        """As `look_up`, of those ids that this table owns; zeros for the others, and for padding.

        ``weight``: the parameter as the caller has it, which the gradient goes to.
        """
        keys = self.keys(ids)
        if self._held is None and self.padding_idx is None:
            return self.rows.look_up(self.slots(keys, create=create), weight)
        mine = self.holds(keys)
        if self.padding_idx is not None:
            mine &= ids != self.padding_idx
        slots = torch.zeros_like(keys)
        slots[mine] = self.slots(keys[mine], create=create)
        return self.rows.look_up(slots, weight)

    @property
    def held_slices(self) -> Tensor:
        """The slices whose ids are looked up here."""
        return torch.arange(self.residence.slices) if self._held is None else self._held.nonzero()[:, 0]

    @property
    def own_slices(self) -> Tensor:
        """Those that this rank tells of, where each is told of once: rank 0 does of those that all have."""
        if self.owners is None:
            return torch.arange(self.residence.slices)
        return (self.tellers == self.rank).nonzero()[:, 0]

    @property
    def tellers(self) -> Tensor:
        """The rank of each slice that tells of it."""
        if self.owners is None:
            return torch.zeros(self.residence.slices, dtype=torch.int64)
        return self.owners.clamp(min=0)

    def holds(self, keys: Tensor) -> Tensor:
        """Of each key, whether its id is looked up here."""
        if self._held is None:
            return torch.ones_like(keys, dtype=torch.bool)
        return self._held[self.residence.slices_of(keys)]

    @property
    def is_idle(self) -> bool:
        """Whether no slice is this rank's."""
        return self._held is not None and not bool(self._held.any())

    def owner(self, keys: Tensor) -> Tensor:
        """The rank of each key."""
        slices = self.residence.slices_of(keys)
        return torch.zeros_like(slices) if self.owners is None else self.owners[slices]

    @lasting
    def slots(self, keys: Tensor, *, create: bool) -> Tensor:
        """Slots of keys, 0 of those that have no rows; after those have come that are to have."""
        if not create:
            return self.residence.find(keys)
        slots, came, places = self.residence.look_up(keys)
        if len(came):
            self.states.fresh.append(places)
            self.rows.write(places, self.config.init.values(came, self.config.dim))
        for watcher in self._watchers:
            watcher.looked_up(slots, places)
        return slots

    def end_step(self) -> None:
        """End a step: rows go, and what was sighted counts from now on.

        Steps of the parameter's optimiser do that. A row whose gradient an optimiser has not taken yet stays.
        """
        self._end_step(self.rows.pending())

    def after_optimizer(self, changed: Tensor | None = None) -> None:
        """End a step whose gradients have been taken; ``changed``: slots that had one, where the parameter has none."""
        self.rows.taken()
        for watcher in self._watchers:
            watcher.changed(self.rows.pending() if changed is None else changed)
        self._end_step(_NONE)

    @lasting
    def enter(self, ids: Tensor, rows: Tensor) -> None:
        """Give rows to ids that differ and have none, and are not asked whether they are admitted."""
        places = self.residence.enter(self.keys(ids))
        self.states.fresh.append(places)
        self.rows.write(places, rows)
        for watcher in self._watchers:
            watcher.changed(places)

    def ids_of(self, slots: Tensor) -> Tensor:
        """The ids of slots that are taken."""
        return self.ids_by(self.residence.map.keys.tensor[slots])

    def ids_by(self, keys: Tensor) -> Tensor:
        """The ids of keys."""
        return unmix(keys) ^ self._salt

    def resident(self) -> Tensor:
        """The ids that have rows, sorted."""
        return self.ids_of(self.residence.resident()).sort().values

    def memory_bytes(self) -> int:
        """Bytes of rows and what optimisers keep for them, with the room for more, of map, counters and sketch."""
        sketch = 0 if self.residence.sketch is None else self.residence.sketch.counters.nbytes
        return self.rows.tensor.nbytes + self.states.memory_bytes() + self.residence.memory_bytes() + sketch

    @lasting
    def _end_step(self, kept: Tensor) -> None:
        self.rows.follow()
        for watcher in self._watchers:
            watcher.ends_step()
        gone = self.residence.end_step(kept)
        self.rows.clear(gone)
        for watcher in self._watchers:
            watcher.went(gone)
        self.rows.end_step(self.residence.free.end)

"""The state of a table by id, in the order of keys: nothing of slots, of history, or of who owns which slices.

`take_out` reads it from a table, of all slices or of some; `put_in` gives parts of any number of tables to one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from descompiler.dynamic import saved
from descompiler.dynamic.hashing import mix, signed, slice_of, unmix, word_of
from descompiler.dynamic.states import initial_of, name_of
from descompiler.dynamic.table import Table
from descompiler.errors import InputError, UnsupportedError
from descompiler.ops.local import plain

Scalar = int | float | Tensor
"""What an optimiser keeps once for all rows, as its step: a number, or a tensor without dimensions."""

_SIGN = signed(1 << 63)


@dataclass(frozen=True)
class Kept:
    """What an optimiser keeps for a table: of each row, by name, and once; both empty until it has stepped.

    ``initial`` is what it begins with, by name.
    """

    optimizer: str
    initial: Mapping[str, float]
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class ById:
    """What there is of some slices of a table; tensors lie on the CPU.

    Parameters
    ----------
    made : mapping
        What the table was made from, by name: only a table of the same goes on as it did.
    step : int
        Steps that have ended.
    slices : Tensor
        Sorted.
    ids : Tensor
        Of rows, by key: as unsigned words, so that rows of a slice are together, and slices in their order.
    rows : Tensor
    last, counts : Tensor or None
        The last step that saw each row, and in how many it was, where the table evicts by that.
    sketch : Tensor or None
        The counters of each slice, ``[slices, counters]``.
    sighted : Tensor
        Ids that the step under way has looked up and not admitted, by key.
    kept : Kept or None
        None if it was taken out without an optimiser.
    """

    made: Mapping[str, str | int]
    step: int
    slices: Tensor
    ids: Tensor
    rows: Tensor
    last: Tensor | None
    counts: Tensor | None
    sketch: Tensor | None
    sighted: Tensor
    kept: Kept | None

    def slices_of(self, ids: Tensor) -> Tensor:
        """The slice of each id."""
        return slice_of(keys_of(self.made, ids), int(self.made["slices"]))

    def by_row(self) -> dict[str, Tensor]:
        """What has an entry for each row, by name."""
        found = {"ids": self.ids, "rows": self.rows}
        found |= {n: x for n, x in (("last", self.last), ("counts", self.counts)) if x is not None}
        return found | {f"{_KEPT}{n}": x for n, x in (self.kept.rows.items() if self.kept else ())}

    def kept_begun(self, kept: Kept) -> ById:
        """The same with what an optimiser that keeps this begins with, of what is not there."""
        own = self.kept or kept
        rows = {n: begun_as(x, len(self.ids), own.initial[n]) for n, x in kept.rows.items()} | dict(own.rows)
        return replace(self, kept=replace(kept, rows=rows))

    def with_rows(self, by_row: Mapping[str, Tensor]) -> ById:
        """The same with other rows, of what `by_row` has; sorted."""
        order = sorted_by_key(keys_of(self.made, by_row["ids"]))
        found = {n: x[order] for n, x in by_row.items()}
        kept = {n.removeprefix(_KEPT): found.pop(n) for n in list(found) if n.startswith(_KEPT)}
        return replace(self, **found, kept=self.kept and replace(self.kept, rows=kept))  # type: ignore[arg-type]

    def only(self, slices: Tensor) -> ById:
        """What there is of some of its slices."""
        own = torch.isin(self.slices, slices)
        mine = torch.isin(self.slices_of(self.ids), slices)
        return replace(
            self.with_rows({n: x[mine] for n, x in self.by_row().items()}),
            slices=self.slices[own],
            sketch=None if self.sketch is None else self.sketch[own],
            sighted=self.sighted[torch.isin(self.slices_of(self.sighted), slices)],
        )


_KEPT = "kept."


def keys_of(made: Mapping[str, str | int], ids: Tensor) -> Tensor:
    """The keys of ids in a table that was made from this."""
    return mix(ids ^ word_of(made["seed"], made["name"]))


def ids_of(made: Mapping[str, str | int], keys: Tensor) -> Tensor:
    """The ids of keys in a table that was made from this."""
    return unmix(keys) ^ word_of(made["seed"], made["name"])


def sorted_by_key(keys: Tensor) -> Tensor:
    """Where keys are, in their order as unsigned words."""
    return (keys ^ _SIGN).argsort()


def made_from(table: Table) -> dict[str, str | int]:
    """What a table was made from, as `ById.made` has it: its configuration, but for ``max_rows``, and its dtype."""
    config = table.config
    strategies = {"init": config.init, "admit": config.admit, "evict": config.evict}
    return {
        "dim": config.dim,
        "seed": config.seed,
        "name": config.name,
        "dtype": str(table.rows.tensor.dtype).removeprefix("torch."),
        "slices": table.residence.slices,
        # of a class that has no text of its own repr has its address
        **{n: repr(x) if is_dataclass(x) or x is None else type(x).__qualname__ for n, x in strategies.items()},
    }


def take_out(table: Table, optimizer: Optimizer | None = None, slices: Tensor | None = None) -> ById:
    """What a table has of some slices, or of all, between two steps or within one.

    Parameters
    ----------
    table : Table
    optimizer : torch.optim.Optimizer, optional
        Whose state of the rows is taken out too.
    slices : Tensor, optional

    Raises
    ------
    UnsupportedError
        If a gradient waits for an optimiser, which would be lost; and for optimisers that a table can't have.

    Examples
    --------
    >>> from descompiler.dynamic import DynamicEmbedding
    >>> one, other = (DynamicEmbedding(2, name="user", seed=3) for _ in range(2))
    >>> rows = one(torch.tensor([7, -7]))
    >>> put_in(other._table, [take_out(one._table)])
    >>> bool((other(torch.tensor([7, -7])) == rows).all()), len(other)
    (True, 2)
    """
    table.check_written()
    residence = table.residence
    slices = torch.arange(residence.slices) if slices is None else slices.unique()
    return of_slots(table, residence.map.in_slices(slices), slices, optimizer)


def of_slots(table: Table, slots: Tensor, slices: Tensor, optimizer: Optimizer | None, *, sketch: bool = True) -> ById:
    """What a table has in some slots that are taken, and of slices that are sorted. See `take_out`."""
    residence, rows = table.residence, table.rows
    counters = residence.sketch.counters if sketch and residence.sketch is not None else None
    if rows.untaken and rows.gradient() is not None:
        raise UnsupportedError(
            f"{table.called} has a gradient that no optimiser has taken, and a state has no gradients: take it after "
            "optimizer.step(), or after optimizer.zero_grad()"
        )
    slots = slots[sorted_by_key(residence.map.keys.tensor[slots])]
    sighted = torch.cat([torch.empty(0, dtype=torch.int64), *residence.sighted]).unique()
    sighted = sighted[torch.isin(slice_of(sighted, residence.slices), slices)]
    return ById(
        made=made_from(table),
        step=residence.step,
        slices=slices,
        ids=table.ids_of(slots),
        rows=rows.tensor[slots.to(rows.tensor.device)].cpu(),
        last=None if residence.last is None else residence.last.tensor[slots],
        counts=None if residence.counts is None else residence.counts.tensor[slots],
        sketch=None if counters is None else counters.view(residence.slices, -1)[slices],
        sighted=table.ids_by(sighted[sorted_by_key(sighted)]),
        kept=None if optimizer is None else _kept(table, optimizer, slots),
    )


def _kept(table: Table, optimizer: Optimizer, slots: Tensor) -> Kept:
    initial, state = initial_of(optimizer), optimizer.state.get(table.parameter, {})
    fresh = torch.isin(slots, torch.cat(table.states.fresh)) if table.states.fresh else slots < 0
    rows, scalars = {}, {}
    for name, value in state.items():
        if name not in initial:
            scalars[name] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
            continue
        there = (slots < len(value)).logical_and_(~fresh)
        found = torch.full((len(slots), *value.shape[1:]), initial[name], dtype=value.dtype)
        found[there] = plain(value)[slots[there].to(value.device)].cpu()
        rows[name] = found
    return Kept(name_of(optimizer), initial, rows, scalars)


def put_in(
    table: Table, parts: Sequence[ById], optimizer: Optimizer | None = None, slices: Tensor | None = None
) -> None:
    """Have what parts have of some slices, or of all, in the place of what the table has, and go on as they did.

    Parameters
    ----------
    table : Table
    parts : sequence of ById
        Of one moment; in any number, also of slices that are not asked for.
    optimizer : torch.optim.Optimizer, optional
        Without, what an optimiser keeps begins anew.
    slices : Tensor, optional

    Raises
    ------
    InputError
        If parts are of another table, of several moments, or lack slices or what the optimiser keeps; nothing has
        changed.
    """
    state = joined(table, parts, optimizer, slices)
    saved.load(table, _by_slot(table, state, begins_anew=optimizer is None), table.config.name)
    if optimizer is not None and state.kept is not None:
        optimizer.state.pop(table.parameter, None)
        if state.kept.rows or state.kept.scalars:
            optimizer.state[table.parameter] = _kept_by_slot(table, state.kept)


def joined(
    table: Table, parts: Sequence[ById], optimizer: Optimizer | None = None, slices: Tensor | None = None
) -> ById:
    """What `put_in` gives to a table: changes nothing, and raises what that raises."""
    made, what = made_from(table), table.called
    for part in parts:
        for name, here in made.items():
            if (there := part.made.get(name)) != here:
                raise InputError(
                    f"this state of {what} is of a table with {name}={there}, and the table has {name}={here}: make "
                    "the table as the one that was saved"
                )
    if len(steps := {part.step for part in parts}) != 1:
        raise InputError(f"parts of {what} are of steps {sorted(steps)}: they have to be of one moment")
    wanted = torch.arange(table.residence.slices) if slices is None else slices.unique()
    parts = [part.only(wanted) for part in parts]
    held, times = torch.cat([part.slices for part in parts]).unique(return_counts=True)
    for found, why in ((held[times > 1], "several parts"), (wanted[~torch.isin(wanted, held)], "no part")):
        if len(found):
            raise InputError(f"slices {found[:8].tolist()} of {what} ({len(found)} in all) are in {why}")
    if (most := table.config.max_rows) is not None and (rows := sum(len(p.ids) for p in parts)) > most:
        raise InputError(f"this state of {what} has {rows} rows, more than max_rows={most}")
    if optimizer is None:
        return _cat([replace(part, kept=None) for part in parts], wanted)
    return _cat(_of_optimizer(parts, optimizer, what), wanted)


def _cat(parts: Sequence[ById], slices: Tensor) -> ById:
    """Parts of other slices each, as one."""
    first = parts[0]
    order = torch.cat([p.slices for p in parts]).argsort()
    sketches = [p.sketch for p in parts if p.sketch is not None]
    sighted = torch.cat([p.sighted for p in parts])
    of_rows = [p.by_row() for p in parts]
    return replace(
        first.with_rows({n: torch.cat([x[n] for x in of_rows]) for n in first.by_row()}),
        slices=slices,
        sketch=torch.cat(sketches)[order] if sketches else None,
        sighted=sighted[sorted_by_key(keys_of(first.made, sighted))],
    )


def _of_optimizer(parts: Iterable[ById], optimizer: Optimizer, what: str) -> list[ById]:
    """The parts with what the optimiser keeps: in those where it has not stepped, what it begins with."""
    name, held = name_of(optimizer), []
    for part in parts:
        if part.kept is None or part.kept.optimizer != name:
            there = "without an optimiser" if part.kept is None else f"with {part.kept.optimizer}"
            raise InputError(f"this state of {what} was saved {there}, and is loaded with {name}: give the same one")
        held.append(part.kept)
    stepped = [x for x in held if x.rows or x.scalars]
    for other in stepped[1:]:
        if (differ := sorted(_unlike(stepped[0].scalars, other.scalars))) or other.rows.keys() != stepped[
            0
        ].rows.keys():
            raise InputError(f"parts of {what} differ in what {name} keeps of all rows: {', '.join(differ)}")
    if not stepped:
        return list(parts)
    return [part.kept_begun(stepped[0]) for part in parts]


def begun_as(rows: Tensor, count: int, initial: float) -> Tensor:
    """What an optimiser keeps for so many rows that it has not stepped on, of the kind of these."""
    return rows.new_full((count, *rows.shape[1:]), initial)


def _unlike(one: Mapping[str, Scalar], other: Mapping[str, Scalar]) -> set[str]:
    return {n for n in one.keys() | other.keys() if n not in one or n not in other or bool(one[n] != other[n])}


def _by_slot(table: Table, state: ById, *, begins_anew: bool) -> dict[str, Tensor]:
    """The state dict of a table whose slots are in the order of the state's rows."""

    def shifted(values: Tensor) -> Tensor:
        return torch.cat([values.new_zeros(1, *values.shape[1:]), values])

    resident = torch.ones(len(state.ids) + 1, dtype=torch.bool)
    resident[0] = False
    found = {
        "ids": shifted(state.ids),
        "resident": resident,
        "weight": shifted(state.rows),
        "step": torch.tensor(state.step),
        "made_from": torch.tensor([signed(table.config.seed), table.config.salt]),
        "sighted": table.keys(state.sighted),
        "fresh": torch.arange(1, len(resident)) if begins_anew else torch.empty(0, dtype=torch.int64),
    }
    found |= {n: shifted(x) for n, x in (("last_seen", state.last), ("counts", state.counts)) if x is not None}
    if table.owners is not None:
        found |= {"owners": table.owners, "rank": torch.tensor(table.rank)}
    if state.sketch is not None:
        sketch = state.sketch.new_zeros(table.residence.slices, state.sketch.shape[1])
        sketch[state.slices] = state.sketch
        found["sketch"] = sketch.view(-1)
    return found


def _kept_by_slot(table: Table, kept: Kept) -> dict[str, Scalar]:
    device = table.rows.tensor.device
    scalars = {n: x.clone() if isinstance(x, Tensor) else x for n, x in kept.scalars.items()}
    rows = {n: torch.cat([begun_as(x, 1, kept.initial[n]), x]).to(device) for n, x in kept.rows.items()}
    return {**scalars, **{n: table.rows.marked(x) for n, x in rows.items()}}

"""What has changed in a table since somebody asked: rows that came, were trained, were seen, and ids that went.

A table tells its `Changes` as steps go; each has its own moment from which it counts. What that costs is of the rows
of a step, and nothing where there are none. An `Update` has what is there of the changes, by id.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from descompiler.dynamic.by_id import ById, of_slots
from descompiler.dynamic.hashing import slice_of
from descompiler.dynamic.storage import Growing
from descompiler.dynamic.table import Table


class Changes:
    """What has changed in a table since the last `forget`, or `everything`.

    Everything counts as changed at first, after a state was loaded, and when something else than an optimiser has
    written to the table's ``weight`` (in place; what is written to ``weight.data`` nobody sees).

    Parameters
    ----------
    table : Table
        It knows this one as long as somebody holds it.
    seen : bool
        Whether a row that was only seen has changed: its last step and its count have.
    """

    def __init__(self, table: Table, *, seen: bool):
        self._table, self._seen = table, seen
        self.restarted()
        table.watching.add(self)

    def restarted(self) -> None:
        """Other rows are in the slots."""
        self._everything = True
        self._clear()

    def looked_up(self, slots: Tensor, came: Tensor) -> None:
        """A lookup of training has seen these slots, of which some have got rows."""
        self.changed(slots if self._seen and self._table.residence.last is not None else came)

    def changed(self, slots: Tensor) -> None:
        """Rows in these slots have other numbers."""
        self._marked.grow(self._table.residence.free.end)
        new = slots[self._marked.tensor[slots].logical_not()]
        if len(new):
            self._marked.tensor[new] = True
            self._slots.append(new)

    def ends_step(self) -> None:
        """A step ends; what it has sighted goes to the sketch."""
        for keys in self._table.residence.sighted:
            self._sketched[slice_of(keys, len(self._sketched))] = True

    def went(self, slots: Tensor) -> None:
        """Rows have gone from these slots, just now."""
        if len(slots):
            self._gone.append(self._table.residence.map.keys.tensor[slots])

    @property
    def everything(self) -> bool:
        """Whether it is not known what has changed."""
        self._table.rows.notice()
        return self._everything or self._table.rows.writes != self._writes

    def update(self, slices: Tensor, optimizer: Optimizer | None) -> Update:
        """What has changed in some slices; `everything` has not. See `by_id.take_out`."""
        residence = self._table.residence
        keys = residence.map.keys.tensor
        asked = torch.zeros_like(self._sketched)
        asked[slices] = True
        slots = torch.cat([_NONE, *self._slots]).unique()
        slots = slots[residence.find(keys[slots]) == slots]  # others are free
        slots = slots[asked[residence.slices_of(keys[slots])]]
        gone = torch.cat([_NONE, *self._gone]).unique()
        gone = gone[residence.find(gone) == 0]  # others have come again
        gone = gone[asked[residence.slices_of(gone)]]
        sketch = residence.sketch
        lines = self._sketched.logical_and(asked).nonzero()[:, 0]
        return Update(
            of_slots(self._table, slots, slices, optimizer, sketch=False),
            self._table.ids_by(gone),
            0 if sketch is None else sketch.halvings(self._step, residence.step),
            lines,
            None if sketch is None else sketch.counters.view(residence.slices, -1)[lines],
        )

    def forget(self) -> None:
        """Count from now on."""
        self._table.rows.notice()
        for slots in self._slots:
            self._marked.tensor[slots] = False
        self._everything = False
        self._clear(self._marked)

    def _clear(self, marked: Growing | None = None) -> None:
        table = self._table
        self._marked = marked or Growing((1,), torch.bool, torch.device("cpu"), table.rows.most)
        self._marked.tensor[0] = True  # the default row does not change
        self._slots: list[Tensor] = []
        self._gone: list[Tensor] = []
        self._sketched = torch.zeros(table.residence.slices, dtype=torch.bool)
        self._step, self._writes = table.residence.step, table.rows.writes


_NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Update:
    """What has changed in slices of a table since another moment.

    Parameters
    ----------
    now : ById
        Rows that came or changed, and what is not of rows; without the sketch.
    gone : Tensor
        Ids that have no row any more.
    halved : int
        How often the counters of the sketch were halved.
    lines, sketch : Tensor, Tensor or None
        Slices whose counters have changed otherwise, and these.

    Examples
    --------
    >>> from descompiler.dynamic import DynamicEmbedding
    >>> from descompiler.dynamic.by_id import take_out
    >>> table = DynamicEmbedding(2)._table
    >>> changes, before = Changes(table, seen=True), take_out(table)
    >>> changes.forget()
    >>> rows = table.look_up(torch.tensor([7]), create=True)
    >>> changes.update(before.slices, None).after(before).ids.tolist()
    [7]
    """

    now: ById
    gone: Tensor
    halved: int
    lines: Tensor
    sketch: Tensor | None

    def after(self, before: ById) -> ById:
        """What there is, of what there was."""
        kept = self.now.kept
        old, new = (before if kept is None else before.kept_begun(kept)).by_row(), self.now.by_row()
        stay = torch.isin(old["ids"], torch.cat([self.gone, new["ids"]])).logical_not_()
        sketch = before.sketch
        if sketch is not None and self.sketch is not None:
            sketch = sketch >> self.halved
            sketch[torch.isin(before.slices, self.lines)] = self.sketch
        rows = {n: torch.cat([old[n][stay], new[n]]) for n in new}
        return replace(self.now.with_rows(rows), slices=before.slices, sketch=sketch)

"""Rows of dynamic tables that are updated when backward ends, and the table's step with them."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from descompiler.dynamic.rows import Ticket, among
from descompiler.dynamic.states import initial_of
from descompiler.dynamic.table import Table
from descompiler.module.updates import Step, Update, rows_of
from descompiler.ops.local import plain
from descompiler.ops.together import summed


class Taken(NamedTuple):
    """Slots and their gradients, and what tells which of them have gone since: of a backward within another's step."""

    slots: Tensor
    gradients: Tensor
    ticket: Ticket

    def left(self) -> tuple[Tensor, Tensor]:
        """Those whose rows are still there."""
        stay = torch.ones_like(self.slots, dtype=torch.bool)
        for gone in self.ticket.gone:
            stay.logical_and_(among(self.slots, gone).logical_not_())
        return self.slots[stay], self.gradients[stay]


@dataclass
class DynamicRows:
    """A dynamic table that an optimiser updates in backward.

    Attributes
    ----------
    row_wise : bool
        Whether it keeps one number for each row.
    """

    table: Table
    update: Update
    row_wise: bool

    def take(self) -> Taken:
        """The gradient that the table's parameter has; it has none from then on.

        Raises
        ------
        UnsupportedError
            If it is dense.
        """
        rows, ticket = self.table.rows, Ticket()
        with torch._C.DisableTorchFunctionSubclass():
            gradient = rows.gradient()
            assert gradient is not None
            rows.parameter.grad = None
            rows.tickets.add(ticket)
            return Taken(*rows_of(gradient), ticket)

    def step(self, optimizer: Optimizer, group: dict[str, Any], came: Sequence[Taken]) -> None:
        """Update what has gradients, and end the table's step.

        Parameters
        ----------
        optimizer : FusedOptimizer
        group : dict
            The table's options.
        came : sequence of Taken
            Empty if the backward came to other tables only.
        """
        table, state, changed = self.table, optimizer.state[self.table.parameter], _NONE
        if not state:  # at first, and when it was loaded from where no step was made
            self._begin(optimizer, state)
        table.states.before_step(optimizer, group)
        if came:
            number = float(state["step"]) + 1
            state["step"] = torch.tensor(number)
            slots, values = (torch.cat(x) for x in zip(*(t.left() for t in came), strict=True))
            slots, values = summed(slots, -values if group["maximize"] else values, [])
            states = [plain(state[name]) for name in self.update.states]
            self.update.of(Step(table.rows.tensor, slots, values, states, number, group))
            changed = slots.cpu()
        table.after_optimizer(changed)

    def _begin(self, optimizer: Optimizer, state: MutableMapping[str, Any]) -> None:
        rows = self.table.rows
        like = rows.tensor[:, :1] if self.row_wise else rows.tensor
        for name, value in initial_of(optimizer).items():
            state[name] = rows.marked(torch.full_like(like, value, memory_format=torch.contiguous_format))
        state["step"] = torch.zeros(())


_NONE = torch.empty(0, dtype=torch.int64)

"""What a compiled module says of itself: bytes that it sent and will send, what it covers, its program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.emit.emit import Emitted
from descompiler.errors import CaptureError, UnsupportedError
from descompiler.layout.fetches import Counts
from descompiler.layout.pieces import Pieces
from descompiler.layout.rows import Rows
from descompiler.layout.step import DenseGradients
from descompiler.layout.traffic import Traffic
from descompiler.model.inputs import map_tensors
from descompiler.module.advice import FIRST, WORTH_IT, Advice
from descompiler.module.parts import UsersForward
from descompiler.module.sizes import Sized
from descompiler.planning.coverage import Coverage
from descompiler.planning.plan import Plan
from descompiler.runtime.backward import Used
from descompiler.runtime.runtime import Runtime


class Reports(nn.Module):
    """The reports of a `descompiler.DistributedModule`."""

    plan: Plan
    _runtime: Runtime
    _coverage: Coverage
    _planned: bool
    _told: Used
    _forwards: dict[tuple[bool, ...], UsersForward]
    _advise: Callable[[Sequence[Any]], tuple[Plan, Plan]] | None
    _first: list[Any]

    def _sized(self, sample: Sequence[Tensor] | None = None) -> Sized:
        raise NotImplementedError

    def _training_flags(self) -> tuple[bool, ...]:
        raise NotImplementedError

    def _replicas(self, program: Emitted) -> Mapping[str, nn.Parameter]:
        raise NotImplementedError

    def _remember(self, args: Any, kwargs: Any) -> None:
        """Keep the first batches of training: they say which ids come."""
        if len(self._first) < FIRST and self.training and torch.is_grad_enabled() and self._runtime.rank == 0:
            self._first.append(map_tensors(Tensor.detach, (args, kwargs)))

    def advise(self, threshold: float = WORTH_IT) -> Advice:
        """Whether another plan would be cheaper for ids as those of the first steps of training. Collective.

        A plan that is made without ``samples=`` assumes how often ids repeat. Here the ids of rank 0's first batches
        are measured, the plan is priced for them, and so is the best one under the same terms; pins stay.

        Parameters
        ----------
        threshold : float
            Share of a step that the other plan has to save to be advised.

        Returns
        -------
        Advice
            ``print`` says it in words.

        Raises
        ------
        InputError
            On every rank, if no step of training has run.
        UnsupportedError
            If the model was captured in part.
        """
        if self._advise is None:
            raise UnsupportedError(
                "the model is captured in part, and its plan is not priced anew: compile with samples=, some batches"
            )
        return Advice(*self._advise(self._first), threshold)

    def traffic(self) -> Traffic:
        """Bytes and calls of each collective on this rank since the latest forward began."""
        return self._runtime.traffic

    def predicted_traffic(self, *, backward: bool = True) -> Traffic:
        """What `traffic` is of a step as the latest, exactly; ``backward``: whether gradients are sent.

        It is `Plan.traffic` for that step's rows and unique ids. Where forward branches on the batch's size, and took
        another branch than on the example, it is what crosses in that branch's program; and a step that began with
        the program of another one has a second header. A backward that comes to no replicated parameter on any rank,
        as one that only an opaque leaf holds and does not use, averages none.
        """
        layout = self.plan.layout if self._planned else self._runtime.layout
        if self._told.knows_parameters and not any(map(self._told.reaches, self._replicas(self._sized().emitted))):
            layout = replace(layout, transfers=tuple(t for t in layout.transfers if not isinstance(t, DenseGradients)))
        return self._runtime.predicted(layout, self.plan.itemsize, backward=backward)

    def unique(self) -> dict[str, Counts]:
        """Unique ids of the latest forward, by table that is fetched by unique rows."""
        return self._runtime.unique

    def id_columns(self) -> dict[int, list[int] | None]:
        """With ``ids="global"``: by position of the inputs of ids, the columns that this rank reads; None: all."""
        found = self._sized().emitted.id_columns
        return {i: None if columns is None else sorted(columns) for i, columns in found.items()}

    @property
    def rank(self) -> int:
        """This one."""
        return self._runtime.rank

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self._runtime.ranks

    def coverage(self) -> Coverage:
        """What became of every weights-rich parameter, captured by which tracer, and why not better.

        A parameter is weights-rich if it has `WEIGHTS_RICH_ELEMENTS` elements or is looked up by ids.
        """
        return self._coverage

    @property
    def output_rows(self) -> tuple[Rows | None, ...]:
        """Where a rank's own rows are in each output tensor; None: it is the global batch's, equal on all ranks."""
        try:
            return self._sized().emitted.outputs
        except CaptureError:
            if (users := self._forwards.get(self._training_flags())) is None:
                raise
            return users.output_rows

    def next_draws(self) -> AbstractContextManager[None]:
        """Context in which one process draws what the next forward will draw for the whole batch. Collective."""
        return self._draws(self._runtime.forwards + 1)

    def latest_draws(self) -> AbstractContextManager[None]:
        """Context in which one process draws what the latest forward drew for the whole batch."""
        return self._draws(self._runtime.forwards)

    def _draws(self, forward: int) -> AbstractContextManager[None]:
        return self._runtime.draws.of_forward(forward, next(self.parameters(), torch.zeros(())).device)

    def print_readable(self) -> str:
        """Print (and return) this rank's program for the current mode."""
        text = self._sized().emitted.module.print_readable(print_output=False)
        print(text)
        return text

    def pieces(self, name: str) -> Pieces:
        """Which part of an original parameter this rank holds."""
        return self.plan.pieces[name]

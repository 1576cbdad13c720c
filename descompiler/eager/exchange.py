"""The exchange behind a module's sharded parameters: rows of them, or all, when Python uses them.

Every use begins with an agreement (`PieceExchange.agree`): ranks whose Python looks up more or less than the others'
serve each other, any other difference is an error that says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from descompiler.dynamic.table import Table
from descompiler.eager import functions
from descompiler.eager.dynamic import DynamicParameter
from descompiler.eager.gradients import GradientSync, UseOfPiece
from descompiler.eager.parameters import ShardedParameter
from descompiler.eager.piece import Divided
from descompiler.errors import InputError, TableFullError, warn
from descompiler.layout.fetches import Fetch
from descompiler.layout.pieces import locate
from descompiler.ops.local import lookup
from descompiler.ops.unique import unique
from descompiler.runtime.agreement import Call, Kind
from descompiler.runtime.carriers import carries

SERVED = (Kind.FETCH, Kind.WHOLE, Kind.SIGHT)
"""Calls that a rank which does not make them can take part in, if it waits at one of `WAITING`."""


WAITING = (Kind.END, Kind.NORM, *SERVED)


def inverted(order: Tensor) -> Tensor:
    """Where each element goes that an order takes from its place.

    >>> inverted(torch.tensor([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _of_no_batch(table: Table, ids: Tensor, *, create: bool) -> Tensor:
    """Rows as ids begin with them: who has spare rows asks nobody for them, and so nobody sights their ids."""
    p = table.parameter
    rows = table.config.init.values(table.keys(ids), table.config.dim).to(p.device, p.dtype)
    return rows.requires_grad_(p.requires_grad and torch.is_grad_enabled())


class PieceExchange:
    """What uses of one module's sharded parameters ask of the other ranks.

    Attributes
    ----------
    gradients : GradientSync
        Gets each use, for its gradient.
    buffers : callable
        The module's buffers, which are no rows of the batch.
    parameters : list of Divided
        In an order that is the same on every rank.
    weighs : bool
        Whether uses outside of the compiled method weigh as its outputs do (`eager.parameters.OfParameters`).
    inside : bool
        Whether the method runs, as the user's own Python.
    """

    def __init__(self, gradients: GradientSync, buffers: Callable[[], Iterable[Tensor]] = tuple):
        self.gradients, self.runtime = gradients, gradients.runtime
        self.parameters: list[Divided] = gradients.sharded
        self._noted: set[tuple[str, str]] = set()
        self.weighs = self.inside = False
        self._buffers = buffers

    @property
    def outside(self) -> bool:
        """Whether what uses a parameter now is to weigh as the method's outputs do."""
        return self.weighs and not self.inside

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor is a buffer of the module's, or a view of one."""
        held = [b for b in self._buffers() if b.layout == x.layout == torch.strided]
        return any(b is x or b.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for b in held)

    # ---- agreement

    def agree(
        self,
        what: str,
        kind: Kind,
        parameter: Divided | None = None,
        *,
        rows: int | None = None,
        problem: str | None = None,
        tell: Sequence[int] | None = None,
    ) -> list[int]:
        """Come to a common call: none has failed, and every rank makes the same, or serves those that do.

        A rank that has reached a batch norm or the end of forward, or wants another parameter's rows, takes part in the
        lookups of the others with no ids of its own; the lowest rank's call comes first. Any other difference raises on
        every rank.
        ``tell[r]`` is a number for rank r; returns what each rank told this one. ``rows``: as `Agreement.meet`'s.
        """
        runtime = self.runtime
        rows = runtime.known_rows() if rows is None else rows
        runtime.call = mine = Call.named(what, kind) if parameter is None else Call(kind, parameter.position, what)
        while True:
            told = runtime.header(rows, problem, tell, same_call=False)
            calls = [m.call for m in told]
            if len(set(calls)) == 1:
                return [m.asked for m in told]
            served = [c for c in calls if c.kind in SERVED]
            if not served or not all(c.kind in WAITING for c in calls):
                runtime.raise_different()
            asked = [m.asked if m.call == served[0] else 0 for m in told]
            if served[0] == mine:
                return asked
            self._serve(served[0], asked)

    def _serve(self, call: Call, asked: list[int]) -> None:
        """Take part in other ranks' use of a parameter."""
        parameter = self.parameters[call.number]
        if call.kind == Kind.WHOLE:
            self._gathered(parameter)
            return
        none, sent = torch.zeros(0, dtype=torch.int64, device=parameter.device), [0] * self.runtime.ranks
        if isinstance(parameter, DynamicParameter):
            self._found(parameter, none, sent, asked, create=call.kind == Kind.SIGHT)
        else:
            self._fetched(parameter, none, sent, asked, False)

    # ---- uses

    def fetch(self, parameter: ShardedParameter, ids: Tensor, sparse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Unique rows of the original parameter.

        Returns
        -------
        rows : Tensor [U, ...]
        inverse : Tensor
            ``rows[inverse]`` are the rows at ``ids``.
        unique : Tensor [U]
            The ids of ``rows``.
        """
        pieces, name = parameter.pieces, parameter.original
        total = pieces.shape[0]
        problem = None
        if ids.is_floating_point() or ids.dtype == torch.bool:
            problem = f"table {name!r}: ids must be integers, and are {ids.dtype}"
        elif ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= total):
            bad = ids[(ids < 0) | (ids >= total)][0]
            problem = f"table {name!r}: id {int(bad)} is not in 0 to {total - 1}; check the vocabulary size"
        what = f"lookup in {name!r}"
        if problem is not None:
            if not ids.numel():  # of a batch without rows: forward is run again on a spare row
                raise InputError(problem)
            self.agree(what, Kind.FETCH, parameter, problem=problem)
        once, inverse = torch.unique(ids.reshape(-1), return_inverse=True)
        owners, positions = locate(pieces, once, self.runtime.rank)
        order = torch.argsort(owners, stable=True)
        sent = torch.bincount(owners, minlength=self.runtime.ranks).tolist()
        asked = self.agree(what, Kind.FETCH, parameter, tell=sent) if self.runtime.ranks > 1 else sent
        rows = self._fetched(parameter, positions[order], sent, asked, sparse)
        return rows, inverted(order)[inverse].reshape(ids.shape), once[order]

    @carries(Fetch)
    def _fetched(self, parameter: Divided, wanted: Tensor, sent: list[int], asked: list[int], sparse: bool) -> Tensor:
        positions = self.runtime.exchange_rows(wanted, sent, asked, Fetch.IDS)
        use = UseOfPiece(parameter, self.runtime.forwards, sent, asked, positions, sparse)
        rows = functions.fetched(self.gradients, use)
        self.gradients.keep(use)
        return rows

    @contextmanager
    def looking_up(self, *, spare: bool) -> Iterator[None]:
        """Dynamic tables are looked up on the ranks that have the rows; ``spare``: for rows of no batch, on none."""
        every = [(self.runtime.tables[p.original], p) for p in self.parameters if isinstance(p, DynamicParameter)]
        for table, p in every:
            table.elsewhere = partial(_of_no_batch, table) if spare else partial(self.look_up, table, p)
        try:
            yield
        finally:
            for table, _ in every:
                table.elsewhere = None

    def look_up(self, table: Table, parameter: DynamicParameter, ids: Tensor, *, create: bool) -> Tensor:
        """As `Table.look_up` of all ranks' parts: each rank asks for a row once, and its owner sights the id."""
        ranks, once = self.runtime.ranks, unique(ids)
        keys = table.keys(once.ids)
        owners = table.owner(keys)
        order = torch.argsort(owners, stable=True)
        sent = torch.bincount(owners, minlength=ranks).tolist()
        kind = Kind.SIGHT if create else Kind.FETCH
        asked = self.agree(f"lookup in {parameter.original!r}", kind, parameter, tell=sent)
        rows = self._found(parameter, keys[order], sent, asked, create=create)
        return lookup(rows, inverted(order)[once.inverse].to(rows.device))

    @carries(Fetch)
    def _found(
        self, parameter: DynamicParameter, keys: Tensor, sent: list[int], asked: list[int], *, create: bool
    ) -> Tensor:
        runtime, table = self.runtime, self.runtime.tables[parameter.original]
        keys = runtime.exchange_rows(keys.to(runtime.device), sent, asked, Fetch.IDS).to("cpu")
        try:
            slots = table.slots(keys, create=create)
        except TableFullError as error:  # the others wait for rows, and for nothing that this rank could tell there
            runtime.failed = True
            if runtime.channels is not None:
                runtime.channels.watch.failed(error)
            raise
        of = slots.to(parameter.device), True, table.rows.ticket()
        use = UseOfPiece(parameter, runtime.forwards, sent, asked, *of)
        rows = functions.fetched(self.gradients, use)
        self.gradients.keep(use)
        return rows

    def whole(self, parameter: Divided, what: str) -> Tensor:
        """The original parameter, gathered from all ranks."""
        size = torch.Size(parameter.pieces.shape).numel() * parameter.element_size()
        if (parameter.original, what) not in self._noted:
            self._noted.add((parameter.original, what))
            warn(
                f"{what} needs the whole of {parameter.original!r}: its {size:,} bytes are gathered in every call, and "
                "their gradients sent back"
            )
        self.agree(f"{what} on {parameter.original!r}", Kind.WHOLE, parameter)
        return self._gathered(parameter)

    def _gathered(self, parameter: Divided) -> Tensor:
        use = UseOfPiece(parameter, self.runtime.forwards, [], [], None)
        full = functions.gathered(self.gradients, use)
        self.gradients.keep(use)
        return full

    def scalars(self, x: Tensor, what: str) -> Tensor:
        """``[ranks]``: a scalar of every rank."""
        return functions.scalars(self.runtime, x, what)

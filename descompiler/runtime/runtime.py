"""The runtime: what an emitted program calls that crosses between ranks, and the exchange behind it.

A program's forward makes at most four collectives: a header (row counts, agreement, errors), the ids into the region,
the region's values out of it; its backward sends the gradients of those values back. Everything that crosses in one
direction at one stage shares one all-to-all. Starts and waits are separate calls, so that work which does not depend on
an exchange runs beside it, in backward too: `torch.autograd` runs the newest ready node first, and the local operators
are newer than the start of the exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from descompiler.dynamic.table import Table
from descompiler.errors import InputError
from descompiler.layout.border import IdsIn, ValuesOut
from descompiler.layout.global_values import GatherRows, NormsInside, SumTerms, WholeTables
from descompiler.layout.id_checks import Check, are_in_range
from descompiler.layout.layout import Layout
from descompiler.layout.rows import Rows, share_of
from descompiler.layout.traffic import Traffic
from descompiler.layout.transfer import crosses_in
from descompiler.ops.local import are_alike
from descompiler.runtime.ahead import TakesAhead
from descompiler.runtime.backward import Asked
from descompiler.runtime.border import Anchor, ExitStart, ExitWait, Handle, ReduceShared, apart, put_together
from descompiler.runtime.carriers import carries
from descompiler.runtime.draws import Draws
from descompiler.runtime.global_values import (
    Gather,
    GatherTables,
    ReduceTerms,
    Slice,
    Spread,
    SumOverRanks,
    SyncBatchNorm,
    Together,
)
from descompiler.runtime.loss_scale import LossScale
from descompiler.runtime.messages import message_dtype, packed, size_in, unpacked
from descompiler.runtime.vocabulary import vocabulary_on_ranks


@dataclass(frozen=True)
class Regions:
    """The regions of a step in which ranks' inputs have other sizes than each other.

    Attributes
    ----------
    layouts : sequence of Layout
        Of each rank's program.
    groups : sequence of sequence of int
        Ranks whose inputs have the same sizes.
    run : sequence of callable
        Of each group: from the number of its rows, and their ids by entry, the values of its region.
    """

    layouts: Sequence[Layout]
    groups: Sequence[Sequence[int]]
    run: Sequence[Callable[[int, list[Tensor | None]], Sequence[Tensor]]]


@dataclass
class Runtime(TakesAhead):
    """What emitted operators know at run time. One per compiled module; programs set their layout before they run."""

    loss: str
    _: KW_ONLY
    layout: Layout = field(default_factory=lambda: Layout(1))
    checks: tuple[Check, ...] = ()
    forwards: int = 0
    asked: Asked = field(default_factory=Asked)
    failures: list[tuple[str, Exception]] = field(default_factory=list)  # of backwards of the latest forward's leaves
    seen: dict[str, list[bool]] = field(default_factory=dict)  # of this forward's leaves, as `Used` has it
    loss_scale: LossScale = field(default_factory=LossScale)  # of this forward
    regions: Regions | None = None  # of this step, where ranks' inputs have other sizes
    tables: dict[str, Table] = field(default_factory=dict)  # dynamic ones, by their weights' names

    def __post_init__(self) -> None:
        self.draws = Draws(self.group, self.ranks)

    def anew(self) -> Runtime:
        """Of another module on the same ranks."""
        return Runtime(self.group, self.rank, self.ranks, self.loss, channels=self.channels)

    def new_step(self) -> None:
        """A forward begins."""
        self.traffic, self.unique, self.failures, self.beside = Traffic(), {}, [], Traffic()
        self.started, self.regions, self.ahead, self.due = False, None, None, None

    def begin(self, rows: int, ids: Sequence[Tensor], given: int | None = None) -> int:
        """Check ids, exchange row counts, agree with the other ranks; returns the rows of the global batch.

        ``given``: the rows of which this rank was given ids, as all ranks were (`Call` tells); if they are the global
        batch's.
        """
        if self.take_ahead() is None:
            self.header(rows, self.problem(ids))
        if given not in (None, sum(self.rows)):  # on every rank
            self.failed = True
            raise InputError(
                f"ids='global': ids are given for {given} rows, and ranks have {' + '.join(map(str, self.rows))} rows: "
                "give every rank the ids of the global batch, in the order of the ranks"
            )
        return sum(self.rows)

    def share_of(self, rows: int) -> int:
        """This rank's own of the rows of a global batch, where no input says how many."""
        return share_of(rows, self.rank, self.ranks)

    def problem(self, ids: Sequence[Tensor]) -> str | None:
        """Why ids are wrong, or None."""
        if are_in_range(self.checks, ids):
            return None
        return next(filter(None, (c.problem(i) for c, i in zip(self.checks, ids, strict=True))), None)

    def predicted(self, layout: Layout, itemsize: int, *, backward: bool) -> Traffic:
        """What this rank has to send in a step as the latest, in which that crosses which the layout says."""
        result = layout.predict(self.rank, self.rows, itemsize, backward=backward, unique=self.unique)
        result.include(self.beside)
        return result

    # ---- tables that are used whole

    def gather_tables(self, *pieces: Tensor) -> list[Tensor]:
        """The tables of ``layout.wholes`` from all ranks' pieces; backward sends each owner its rows' gradients."""
        (transfer,) = self.layout.of(WholeTables)
        return list(GatherTables.apply(self, transfer, *pieces))

    # ---- ids into the region

    @carries(IdsIn)
    def enter_start(self, ids: Sequence[Tensor]) -> Handle:
        """Send each rank the ids that its tables need; ``ids`` follow ``layout.entries``."""
        if self.ahead is not None:
            assert self.ahead.entering is not None
            return self.ahead.entering
        mine, dtype = self.rows[self.rank], torch.int32 if self.layout.id_bytes == 4 else torch.int64
        every = [self.layout.parts_on(r) for r in range(self.ranks)]
        sent = [mine * sum([p.width for p in parts]) for parts in every]
        chunks: list[Tensor] = []
        if len(ids) > 1 and are_alike(ids) and all(p.columns is None for parts in every for p in parts):
            together = torch.stack(list(ids)).to(dtype)  # one matrix, of which each rank gets rows
            for parts in every:
                chosen = [p.entry for p in parts]
                chunks.append((together if len(chosen) == len(ids) else together[chosen]).reshape(-1))
        else:
            for parts in every:
                for p in parts:
                    x = ids[p.entry] if p.columns is None else ids[p.entry][:, p.columns]
                    chunks.append(x.to(dtype).reshape(-1))
        of_ranks = zip(self.rows, range(self.ranks), strict=True)
        received = [b * sum([p.width for p in self.layout_of(r).parts_on(self.rank)]) for b, r in of_ranks]
        send = torch.cat(chunks) if chunks else torch.empty(0, dtype=dtype, device=self.device)
        return Handle(self.exchange(send, sent, received, IdsIn.SEND))

    def enter_wait(self, handle: Handle) -> list[Tensor | None]:
        """Ids of the global batch ``[rows, ...]`` for this rank's tables, by entry; None where it needs none."""
        parts = self.layout.parts_on(self.rank)
        if self.regions is not None or len({p.tail for p in parts}) != 1:
            return _joined(self._entered(handle))
        # ids of one shape: a matrix of each rank, and no list of tensors for each table
        assert handle.forward is not None
        tail, width = parts[0].tail, parts[0].width
        of_ranks = torch.split(handle.forward.wait(), [b * width * len(parts) for b in self.rows])
        matrices = [x.reshape(len(parts), b, *tail) for x, b in zip(of_ranks, self.rows, strict=True)]
        result: list[Tensor | None] = [None] * len(self.layout.entries)
        for p, x in zip(parts, torch.cat(matrices, 1).long().unbind(), strict=True):
            result[p.entry] = x
        return result

    def _entered(self, handle: Handle) -> list[list[Tensor | None]]:
        """The ids that each rank has sent, by entry; None where this rank needs none."""
        assert handle.forward is not None
        layouts = [self.layout_of(r) for r in range(self.ranks)]
        of_ranks = [x.parts_on(self.rank) for x in layouts]
        sizes = [b * p.width for b, parts in zip(self.rows, of_ranks, strict=True) for p in parts]
        arrived = iter(torch.split(handle.forward.wait(), sizes))
        result: list[list[Tensor | None]] = []
        for b, layout, parts in zip(self.rows, layouts, of_ranks, strict=True):
            result.append([None] * len(layout.entries))
            for p in parts:
                result[-1][p.entry] = next(arrived).reshape(b, *p.tail)
        return result

    def layout_of(self, rank: int) -> Layout:
        """What crosses in the program that a rank runs."""
        return self.layout if self.regions is None else self.regions.layouts[rank]

    def run_regions(self, handle: Handle) -> list[list[Tensor]]:
        """Each group's region on its ranks' rows: its values, by group."""
        assert self.regions is not None
        entered, found = self._entered(handle), []
        for group, run in zip(self.regions.groups, self.regions.run, strict=True):
            found.append(run(sum(self.rows[r] for r in group), _joined([entered[r] for r in group])))
        return [list(values) for values in zip(*found, strict=True)]

    def in_rank_order(self, values: Sequence[Tensor]) -> Tensor:
        """The global batch of a value that is there by group."""
        assert self.regions is not None
        parts: dict[int, Tensor] = {}
        for group, x in zip(self.regions.groups, values, strict=True):
            parts.update(zip(group, torch.split(x, [self.rows[r] for r in group]), strict=True))
        return torch.cat([parts[r] for r in range(self.ranks)])

    # ---- values out of the region, their gradients back

    def exit_start(
        self,
        anchor: Tensor,
        values: Sequence[Tensor | Sequence[Tensor] | None],
        unread: Sequence[Tensor | Sequence[Tensor]] = (),
    ) -> list[Any]:
        """Send each rank its rows of every value; ``values`` follow ``layout.exits`` (None: this rank has no part).

        A value is a tensor of the global batch, or one for each group of ranks (`Regions`). Those that are ``unread``
        are sent to nobody, and get gradients of zero.
        """
        reached = [x for v in unread for x in ([v] if isinstance(v, Tensor) else v)]
        anchor = Anchor.apply(anchor, [torch.strided] * len(reached), *reached)
        handle = Handle()
        present: list[tuple[Sequence[int], Tensor]] = []
        (transfer,) = self.layout.of(ValuesOut)
        for e, v in zip(transfer.exits, values, strict=True):
            dtype = self.dtype_of(e.wire_dtype)
            if isinstance(v, Tensor):
                present.append((range(self.ranks), v.to(dtype)))
            elif v is not None:
                assert self.regions is not None
                present.extend(zip(self.regions.groups, (x.to(dtype) for x in v), strict=True))
        covers = [ranks for ranks, _ in present]
        narrow = self.layout.wire_dtype
        return [handle, ExitStart.apply(self, transfer, handle, covers, narrow, anchor, *(v for _, v in present))]

    def exit_wait(self, started: list[Any]) -> list[Tensor]:
        """The values for this rank's own rows: summed, or put together (`LOCAL` ranges left out)."""
        handle, token = started
        mine, exits = self.rows[self.rank], self.layout.exits
        senders = [(i, r) for r in range(self.ranks) for i, e in enumerate(exits) if e.width(r)]
        counts = [mine * exits[i].width(r) for i, r in senders]
        own = [self.dtype_of(exits[i].wire_dtype) for i, _ in senders]
        dtypes = [crosses_in(dtype, self.layout.wire_dtype) for dtype in own]
        parts = apart(ExitWait.apply(self, handle, counts, dtypes, token), counts, dtypes)
        by_exit: list[dict[int, Tensor]] = [{} for _ in exits]
        for (i, r), p, dtype in zip(senders, parts, own, strict=True):
            by_exit[i][r] = p.reshape(mine, *exits[i].tail_on(r)).to(dtype)  # sums are made in it
        return [put_together(e, by_exit[i]) for i, e in enumerate(exits)]

    # ---- weights that several ranks hold in part

    def reduce_shared(self, anchor: Tensor, *slices: Tensor) -> list[Tensor]:
        """The slices, and a token; in backward the slices' gradients are averaged over ranks, after the exchange."""
        return list(ReduceShared.apply(self, anchor, *slices))

    def anchor(self, used_elsewhere: Sequence[Tensor], region: Sequence[Tensor], sparse: Sequence[bool]) -> Tensor:
        """A scalar that requires a gradient, so that backward runs on ranks that own nothing.

        Parameters
        ----------
        used_elsewhere : sequence of Tensor
            Weights that only other ranks use: they get zero gradients here, as in the original and for the reducer.
        region : sequence of Tensor
            Parameters that any rank uses inside, and whether their gradients are ``sparse``: a backward that asks for
            one of them comes to the exchange on all.
        """
        anchor = torch.zeros((), dtype=self.wire_dtype, device=self.device, requires_grad=True)
        kinds: list[torch.layout | None] = [torch.strided] * len(used_elsewhere)
        idle = [t.rows.tensor.data_ptr() for t in self.tables.values() if t.is_idle]  # dynamic ones without rows here
        uses = [0 not in x.shape and not (idle and x.data_ptr() in idle) for x in region]
        kinds += [  # one that this rank uses gets its gradient there
            None if used else torch.sparse_coo if s else torch.strided for used, s in zip(uses, sparse, strict=True)
        ]
        return Anchor.apply(anchor, kinds, *used_elsewhere, *region)

    def vocabulary(
        self, number: int, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Sequence[Tensor]
    ) -> list[Tensor]:
        """What is asked of a product with a table whose rows are divided: ``layout.vocabularies[number]``."""
        counts = [b * self.layout_of(r).vocabularies[number].per_row for r, b in enumerate(self.rows)]
        return vocabulary_on_ranks(self, self.layout.vocabularies[number], counts, x, weight, bias, ids)

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Batch norm in training over the global batch; x ``[b, C, ...]``."""
        if self.ranks == 1:
            return torch.batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps, True)
        return SyncBatchNorm.apply(self, x, weight, bias, running_mean, running_var, momentum, eps)

    def norm_inside(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        mine: list[int],
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Batch norm in training of some channels ``mine``, of which this rank has the global batch."""
        self.settle()
        if running_mean is None or running_var is None:
            return torch.batch_norm(x, weight, bias, None, None, True, momentum, eps, True)
        kept = [running_mean[mine], running_var[mine]]
        result = torch.batch_norm(x, weight, bias, kept[0], kept[1], True, momentum, eps, True)
        running_mean[mine], running_var[mine] = kept
        return result

    @carries(NormsInside)
    def share_statistics(
        self, buffers: Sequence[Sequence[Tensor]], channels: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        """Send each running statistic from the rank that has moved it to all; ``channels`` of each norm, by rank."""
        n = self.ranks
        pairs = [(b, c) for pair, c in zip(buffers, channels, strict=True) for b in pair]
        dtypes = [b.dtype for b, _ in pairs]
        dtype = message_dtype(dtypes)
        own = packed([b[c[self.rank]] for b, c in pairs], dtype, self.device)
        sizes = [size_in(dtype, (len(c[r]) for _, c in pairs), dtypes) for r in range(n)]
        every = self.exchange(own.repeat(n), [own.numel()] * n, sizes, NormsInside.SEND).wait()
        places = [(b, c[r]) for r in range(n) for b, c in pairs]
        for (b, mine), values in zip(places, unpacked(every, [len(m) for _, m in places], dtypes * n), strict=True):
            b[mine] = values

    # ---- values that mix the rows of the batch: every rank computes them, from the global batch

    @carries(GatherRows)
    def gather_rows(self, values: Sequence[Tensor], layouts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The global batch of each value, on every rank; ``layouts`` are the fields of each value's `Rows`.

        What is computed from the results has the same gradients on every rank, so backward sends nothing.
        """
        return list(Gather.apply(self, GatherRows.GATHER, list(self.rows), [Rows(*x) for x in layouts], *values))

    @carries(SumTerms)
    def sum_terms(self, terms: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks of each term, on every rank. Backward sends nothing, as in `gather_rows`."""
        return list(ReduceTerms.apply(self, SumTerms.SUM, *terms))

    def slice_rows(self, x: Tensor, dim: int, outer: int, inner: int) -> Tensor:
        """Own rows of a value that every rank has; backward gathers the gradients of all ranks' rows."""
        return Slice.apply(self, list(self.rows), Rows(dim, outer, inner), x)

    def spread(self, x: Tensor) -> Tensor:
        """A value that every rank has, for its own rows; backward sums the gradients of all ranks."""
        return Spread.apply(self, x)

    def draw(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A random draw that is the same on every rank: the next of this forward's."""
        self.settle()
        with self.draws.next_of_forward(self.forwards, self.device):
            return function(*args, **kwargs)

    def total(self, own: Tensor, shared: Tensor | None = None) -> Tensor:
        """A number made from a whole table: terms of this rank's own piece, and of rows that all ranks hold."""
        return SumOverRanks.apply(self, own, shared)

    def own_rows(self) -> int:
        """Rows of this rank, once the header has told."""
        return self.rows[self.rank]

    def together(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs; in backward all of them get a gradient, so that every rank runs the same collectives.

        That it begins is known here, on every rank: if it goes through opaque leaves, ranks agree when it ends.
        """
        return list(Together.apply(self, self.failures if self.layout.leaves_backward else None, *outputs))

    def reach(self, x: Tensor, fetched: Sequence[Sequence[Tensor]]) -> Tensor:
        """``x``, from which backward also comes to rows that nobody reads, with gradients of zero."""
        return x + sum(r[:0].sum().to(x) for rows in fetched for r in rows)

    def output(self, x: Tensor) -> Tensor:
        """Scale the gradient that the user's loss sends in to the convention of averaging over ranks."""
        if self.ranks == 1 or not x.requires_grad or self.loss == "rank_mean":
            return x
        weight = 1.0 if self.loss == "sum" else self.rows[self.rank] / max(sum(self.rows), 1)
        self.loss_scale.factor = self.ranks * weight
        return self.loss_scale.multiply(x)

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A forward's inputs, whose gradients are those of the loss that the user's code computes."""
        self.loss_scale = LossScale()
        if self.ranks == 1 or self.loss == "rank_mean" or not torch.is_grad_enabled():
            return list(tensors)
        return [self.loss_scale.divide(x) if x.requires_grad else x for x in tensors]


def _joined(ids: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """By entry, the ids of several ranks, one after another."""
    return [None if parts[0] is None else torch.cat(parts).long() for parts in zip(*ids, strict=True)]

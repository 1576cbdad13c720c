"""What forms hold and emit, judged by numbers: each rank's part of a lookup is made here, and all are put together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from descompiler.cost_models.table import Table
from descompiler.graph.nodes import aten
from descompiler.layout.fetches import Fetch, FetchTable
from descompiler.layout.placement import Disjoint, Region
from descompiler.layout.spans import at
from descompiler.ops.local import bag
from descompiler.runtime.differences import decode
from descompiler.runtime.fetch import take
from descompiler.runtime.fetching import Fetching, prepare
from descompiler.tables.form import Choice, Form, LookupPart, Split
from descompiler.tables.tables import Lookup, Operator
from tests.harness.calls import KNOWN, PARAMETER, Call, Operand, Site, site_of
from tests.harness.parts import BATCH, RANKS, Held, by_rank, join, own_rows, support


@dataclass(frozen=True)
class LookupCase:
    """A table ``[rows, dim]`` and one lookup of it: ids ``[b, *ids]``, pooled if there is a mode; padding -1 is none.

    ``starts``: first rows of fields, of which each column of ids is one.
    """

    rows: int
    dim: int
    ids: tuple[int, ...] = ()
    mode: str | None = None
    padding: int = -1
    sparse: bool = False
    starts: tuple[int, ...] | None = None

    @cached_property
    def site(self) -> Site:
        """The lookup as a program; its ids, but not its columns, are those of every table of as many rows."""
        generator = torch.Generator().manual_seed(self.rows)
        ids = torch.randint(self.rows, (BATCH, *self.ids), generator=generator)
        if self.starts is not None:
            stops = (*self.starts[1:], self.rows)
            columns = [
                torch.randint(a, b, (BATCH,), generator=generator) for a, b in zip(self.starts, stops, strict=True)
            ]
            ids = torch.stack(columns, 1)
        weight = Operand("w", PARAMETER, (self.rows, self.dim))
        operands = weight, Operand(f"ids_{self.rows}", KNOWN, self.ids, tuple(ids.flatten().tolist()))
        if self.mode is not None:
            return site_of(Call(bag, (*operands, self.mode, self.padding if self.padding >= 0 else None, self.sparse)))
        return site_of(Call(aten.embedding.default, (*operands, self.padding, False, self.sparse)))

    @cached_property
    def lookup(self) -> Lookup:
        ids = next(node for x, node in self.site.nodes.items() if x.kind == KNOWN)
        return Lookup(self.site.node, ids, self.mode, self.padding, self.sparse)

    @cached_property
    def operator(self) -> Operator:
        return Operator(self.table("w"), (self.lookup,), self.starts)

    def table(self, name: str) -> Table:
        options = {"padding_idx": self.padding, "sparse": self.sparse}
        return Table(name, self.rows, self.dim, torch.float64, math.prod(self.ids), **options)

    @property
    def numbers(self) -> tuple[Tensor, Tensor]:
        """The table, and the ids of the global batch."""
        weight, ids = self.site.numbers.values()
        return weight, ids


class Looked:
    """All ranks' parts of a table's lookup in a form, and the gradients that come of them.

    Attributes
    ----------
    placement : Region or None
        Of the result; None for own rows.
    held : Held
    pieces : list of Tensor
        Each rank's piece, with a gradient after `faults`.
    """

    def __init__(self, table: LookupCase, form: Form, choice: Choice):
        self.table, self.form = table, form
        self.split = form.split(table.operator, RANKS, choice)
        self.placement: Region | None = form.placement(self.split, table.operator, table.lookup)
        weight, ids = table.numbers
        self.pieces = [self.split.pieces.cut(weight, r).requires_grad_() for r in range(RANKS)]
        if self.placement is not None:
            parts = {r: self._emitted(r, self.pieces[r], self._ids(ids, r)) for r in range(RANKS)}
            self.held = Held({r: x for r, x in parts.items() if x is not None})
        elif form.fetches(self.split):
            self.held = Held(own=fetched([self.split], [self.pieces], [table], [ids])[0])
        else:
            whole = [weight.clone().requires_grad_() for _ in range(RANKS)] if self.split.whole else self.pieces
            self.held = Held(own={r: self._own(r, whole[r], x) for r, x in by_rank(ids).items()})
            self.gathered = whole

    def _ids(self, ids: Tensor, rank: int) -> Tensor | None:
        """What a rank gets of the ids of the global batch."""
        columns = at(self.form.columns(self.split, self.table.operator, self.table.lookup), rank, ())
        return ids if columns is None else ids[:, list(columns)] if columns else None

    def _own(self, rank: int, weight: Tensor, ids: Tensor) -> Tensor:
        result = self._emitted(rank, weight, ids)
        assert result is not None
        return result

    def _emitted(self, rank: int, weight: Tensor, ids: Tensor | None) -> Tensor | None:
        if ids is None:
            return None
        graph, constants = fx.Graph(), self.form.constants(self.split, rank)
        nodes = [graph.placeholder(name) for name in ("runtime", "weight", "ids", *constants)]
        part = LookupPart(
            graph,
            nodes[0],
            rank,
            RANKS,
            self.table.operator,
            self.table.lookup,
            self.split,
            nodes[1],
            nodes[2],
            dict(zip(constants, nodes[3:], strict=True)),
        )
        graph.output(self.form.emit(part))
        return fx.Interpreter(torch.nn.Module(), graph=graph).run(None, weight, ids, *constants.values())

    def faults(self) -> list[str]:
        """What is wrong with the form; nothing if it is right."""
        site, found = self.table.site, []
        if self.placement is None:
            got = torch.cat([self.held.own[r] for r in range(RANKS)])
        else:
            got = join(self.held, self.placement, site.result.shape)
        if not torch.allclose(got, site.result):
            found.append("not the rows that were looked up")
        if isinstance(self.placement, Disjoint) and support(self.held, self.placement.lead) is None:
            found.append("two ranks have one row")
        (got * site.weights).sum().backward()
        return found + self._wrong_gradients()

    def _wrong_gradients(self) -> list[str]:
        """Whether pieces get their part of the table's gradient, and entries for those rows alone that it has."""
        expected = next(iter(self.table.site.gradients.values()))
        if self.split.whole:
            gradients = torch.stack([_dense(w) for w in self.gathered]).sum(0)
            return [] if torch.allclose(gradients, expected.to_dense()) else ["not the gradient of the table"]
        pieces, found = self.split.pieces, []
        of_all = [
            _dense(w).narrow(pieces.dim, pieces.own_size(r), pieces.shared_size()) for r, w in enumerate(self.pieces)
        ]
        shared = torch.stack(of_all).sum(0)
        for rank, w in enumerate(self.pieces):
            mine = _dense(w).narrow(pieces.dim, 0, pieces.own_size(rank))
            if not torch.allclose(torch.cat([mine, shared], pieces.dim), pieces.cut(expected.to_dense(), rank)):
                found.append(f"not the gradient of rank {rank}'s piece")
            if self.placement is not None and w.grad is not None and w.grad.is_sparse != expected.is_sparse:
                found.append("sparse where the table's gradient is dense, or the other way round")
            elif w.grad is not None and w.grad.is_sparse and self._entries(expected, rank) != _rows(w.grad):
                found.append(f"entries of rank {rank} for other rows than those that were looked up")
        return found

    def _entries(self, gradient: Tensor, rank: int) -> set[int]:
        """The rows of a rank's piece that a sparse gradient of the table has an entry for."""
        marks = torch.zeros(self.table.rows, self.table.dim)
        marks[list(_rows(gradient))] = 1
        return set(self.split.pieces.cut(marks, rank).any(1).nonzero().flatten().tolist())


def fetched(
    splits: list[Split], pieces: list[list[Tensor]], tables: list[LookupCase], ids: list[Tensor]
) -> list[dict[int, Tensor]]:
    """Each lookup's result for own rows by rank, with rows from their owners' pieces; tables are of one kind."""
    fetch = Fetch(
        tuple(
            FetchTable(t.table(f"t{i}"), s.pieces, s.gathered)
            for i, (s, t) in enumerate(zip(splits, tables, strict=True))
        ),
        tuple(range(len(tables))),
    )
    results: list[dict[int, Tensor]] = [{} for _ in tables]
    for rank in range(RANKS):
        fetching = prepare(fetch, [own_rows(x, rank) for x in ids], RANKS)
        rows = _answered(fetching, splits, pieces, rank)
        for i, t in enumerate(tables):
            results[i][rank] = take(fetching, [rows], i, t.mode)
    return results


def _answered(fetching: Fetching, splits: list[Split], pieces: list[list[Tensor]], rank: int) -> Tensor:
    """The rows of a fetch on a rank: shared ones of its own, then what each owner answers."""
    shared = [w[rank][s.pieces.own_size(rank) :] for s, w in zip(splits, pieces, strict=True)]
    parts, start = [torch.cat(shared)[fetching.shared_keys[0]]], 0
    counts = [sum(of) for of in fetching.asked]
    keys = decode(fetching.asking_ids.encoded(sum(fetching.asked_bytes)), counts, fetching.fetch.digits)
    for owner, count in enumerate(counts):
        own = [w[owner][: s.pieces.own_size(owner)] for s, w in zip(splits, pieces, strict=True)]
        parts.append(torch.cat(own)[keys[start : start + count]])
        start += count
    return torch.cat(parts)


def patterns(looked: Mapping[str, Looked]) -> list[str]:
    """Pairs of lookups with one placement, of which two ranks have one row."""
    found: list[str] = []
    seen: dict[Any, tuple[str, Tensor | None]] = {}
    for name, x in looked.items():
        if isinstance(x.placement, Disjoint):
            mine = support(x.held, x.placement.lead)
            other, theirs = seen.setdefault((x.placement, x.table.ids), (name, mine))
            if mine is None or theirs is None or bool(((mine != theirs) & (mine >= 0) & (theirs >= 0)).any()):
                found.append(f"{name} and {other}")
    return found


def _dense(w: Tensor) -> Tensor:
    return torch.zeros_like(w) if w.grad is None else w.grad.to_dense()


def _rows(gradient: Tensor) -> set[int]:
    return set(gradient.coalesce().indices()[0].tolist())

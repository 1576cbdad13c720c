"""What rules answer and emit, judged by numbers: each rank's part is run here, and all are put together."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from descompiler.graph.nodes import shape_of
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import LOCAL, Disjoint, Placement, Region, Shard
from descompiler.passes import RULES
from descompiler.region.place import ask
from descompiler.region.rule import Declined, Part, Placed, Rule
from descompiler.runtime.runtime import Runtime
from tests.harness.calls import BUFFER, KNOWN_TO_ONE, OWN, PARAMETER, SHARED, Operand, Site
from tests.harness.parts import BATCH, RANKS, ROWS, Held, cut, join, own_rows, support

TOLERANCE = 1e-9

Placements = Mapping[Operand, Region]


def answer(site: Site, placements: Placements) -> tuple[Placed | Declined, Rule]:
    """The first rule's answer that places the call, as the compiler asks; else why none does."""
    return ask(site.node, RULES, site.situation(placements))


def held_by_ranks(site: Site, placements: Placements) -> dict[Operand, Held]:
    """The numbers of a call's values, as ranks hold them."""
    generator = torch.Generator().manual_seed(0)
    held = {x: cut(site.numbers[x], p, generator) for x, p in placements.items()}
    for parts in held.values():
        for _, _, part in parts.every():
            part.requires_grad_()
    return held


def faults(site: Site, placements: Placements, placed: Placed, rule: Rule) -> list[str]:
    """What is wrong with a rule's answer; nothing if it is right."""
    try:
        ranks = Emitted(site, placements, held_by_ranks(site, placements), placed, rule)
        got = join(ranks.held, placed.placement, site.result.shape)
    except Exception as error:  # whatever a rule raises is its fault
        return [f"{type(error).__name__}: {error}"]
    found = list(ranks.faults)
    if not _equal(got, site.result.double()):
        found.append("not the operator's result")
    if isinstance(placed.placement, Disjoint) and support(ranks.held, placed.placement.lead) is None:
        found.append("two ranks have one row")
    return found + _wrong_gradients(ranks, got, placements)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def _wrong_gradients(ranks: Emitted, got: Tensor, placements: Placements) -> list[str]:
    """Operands whose parts' gradients are not the parts of the operator's own."""
    if not got.requires_grad:
        return []
    found = []
    (got * ranks.site.weights).sum().backward()
    for x, gradient in ranks.site.gradients.items():
        if x in placements:
            parts = ranks.operands[x].every()
            right = all(_is_part(part, gradient, placements[x], rank, own) for rank, own, part in parts)
        else:
            right = _equal(_gradient(ranks.leaves[x]), gradient)
        if not right:
            found.append(f"not the gradient of {x.name}")
    return found


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def _is_part(part: Tensor, gradient: Tensor, placement: Region, rank: int, own: bool) -> bool:
    """Whether the gradient of a rank's part is that of the value, for what the rank has of it."""
    got, expected = _gradient(part), gradient
    if isinstance(placement, Disjoint):  # of what others have it is dropped, but not before it is multiplied by 0
        mine = [torch.where(part != 0, x, 0) for x in (got, expected)]
        return bool(got.isfinite().all()) and _equal(*mine)
    if isinstance(placement, Shard):
        expected = expected.index_select(placement.dim, torch.tensor(placement.positions(LOCAL if own else rank)))
    return _equal(got, own_rows(expected, rank) if own else expected)


class Emitted:
    """All ranks' parts of a call that a rule placed.

    Attributes
    ----------
    held : Held
    leaves : dict of Operand to Tensor
        The numbers of what is given, with gradients; all ranks' pieces of a weight are taken from them.
    faults : list of str
        What the answer should have said: weights that are used on the global batch, statistics that moved.
    """

    def __init__(
        self, site: Site, placements: Placements, operands: Mapping[Operand, Held], placed: Placed, rule: Rule
    ):
        self.site, self.rule, self.placed, self.operands = site, rule, placed, operands
        self.names = {n: x for x, n in site.nodes.items()}
        self.at: dict[fx.Node, Placement] = {site.nodes[x]: p for x, p in placements.items()}
        self.at[site.node] = placed.placement
        self.pieces = {n: Pieces.replicate(tuple(p.shape), RANKS) for n, p in site.program.parameters.items()}
        self.pieces.update(placed.pieces)
        self.leaves = {x: t.clone().requires_grad_(x.trained) for x, t in site.numbers.items()}
        self.faults: list[str] = []
        whole, own = {r: self._run(r, r) for r in range(RANKS)}, {r: self._run(r, LOCAL) for r in range(RANKS)}
        self.held = Held(*({r: x for r, x in found.items() if x is not None} for found in (whole, own)))

    def _run(self, rank: int, owner: int) -> Tensor | None:
        """What the rule emits for a rank's part of the global batch, or of its own rows (owner `LOCAL`)."""
        graph, values = fx.Graph(), []
        used: set[str] = set()
        buffers = {x: t.clone() for x, t in self.leaves.items() if x.kind == BUFFER}

        def put(x: Any) -> fx.Node:
            values.append(x)
            return graph.placeholder(f"x{len(values)}")

        def operand(n: fx.Node) -> fx.Node | None:
            x = self.names[n]
            if x in self.operands:
                found = self.operands[x].part(rank, owner)
                return None if found is None else put(found)
            return put(self._given(x, rank, owner, buffers)) if owner == LOCAL else None

        def given(n: fx.Node) -> Any:
            x = self.names[n]
            if x.kind in (PARAMETER, SHARED) and self.pieces[x.name].is_replicated:
                used.add(x.name)
            return put(self._given(x, rank, owner, buffers))

        rows = ROWS[rank] if owner == LOCAL else BATCH
        runtime = SimpleNamespace(norm_inside=partial(Runtime.norm_inside, SimpleNamespace(settle=lambda: None)))
        part = Part(
            graph, put(runtime), self.site.program, rank, RANKS, owner, put(rows), self.at, self.pieces, operand, given
        )
        if not part.holds(self.placed.placement):
            return None
        graph.output(self.rule.emit(self.site.node, part))
        result = fx.Interpreter(torch.nn.Module(), graph=graph).run(*values)
        if owner != LOCAL:
            self._judge_weights(used)
            self._judge_statistics(part, buffers)
        return result

    def _given(self, x: Operand, rank: int, owner: int, buffers: Mapping[Operand, Tensor]) -> Tensor:
        """A given operand as emission gives it: for the global batch, or for own rows."""
        numbers = self.leaves[x]
        if x.kind in (PARAMETER, SHARED):
            pieces = self.pieces[x.name]
            mine, own, shared = pieces.cut(numbers, rank), pieces.own_size(rank), pieces.shared_size()
            if pieces.is_replicated or not shared:
                return mine
            return mine.narrow(pieces.dim, *((own, shared) if owner == LOCAL else (0, own)))
        if x.kind == BUFFER:
            return buffers[x]
        if owner == LOCAL:
            return own_rows(numbers, rank)
        if x.kind == OWN or (x.kind == KNOWN_TO_ONE and rank != 0):
            raise LookupError(f"rank {rank} has {x.name} for its own rows only")
        return numbers

    def _judge_weights(self, used: set[str]) -> None:
        """Gradients of weights that are used on the global batch are complete only if the answer names them."""
        if used != set(self.placed.replicated):
            self.faults.append(f"uses {sorted(used)} on the global batch and says {sorted(self.placed.replicated)}")

    def _judge_statistics(self, part: Part, buffers: Mapping[Operand, Tensor]) -> None:
        """Running statistics have moved as the operator's own, for the channels that the rank has."""
        if not any(x.numbers == "running" for x in buffers):
            return
        expected = {x: x.tensor() for x in self.site.call.operands}
        self.site.call(expected)
        placement, channels = self.placed.placement, int(shape_of(self.site.node)[1])
        mine = placement.positions(part.rank) if hasattr(placement, "positions") else list(range(channels))
        for x, moved in buffers.items():
            should = x.tensor()
            should[mine] = expected[x][mine]
            if not torch.allclose(moved, should):
                self.faults.append(f"{x.name} did not move as the operator moves it")

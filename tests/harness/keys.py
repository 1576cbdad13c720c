"""Do equal keys mean equal patterns of rows? Values whose keys are made of keys, as long as new ones come.

From lookups' placements, values grow: every operator of a few kinds is applied to every value (or pair of values) that
is there, with parts of ranks as the rules emit them, level by level. All results that have one placement and one shape
of leading dimensions have to be non-zero on the same rank in each of their positions, since they may be multiplied.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from descompiler.graph.nodes import aten
from descompiler.layout.placement import Disjoint
from descompiler.region.rule import Placed
from tests.harness.calls import BUFFER, Call, Operand, site_of, value
from tests.harness.parts import BATCH, Held, cut, support
from tests.harness.rules import Emitted, answer

MOST_DIMS, MOST_SIZE = 3, 4
"""Of the dimensions behind the batch: what grows beyond them is left."""


@dataclass(frozen=True)
class Grown:
    """A value that ranks hold disjointly, and how it was made."""

    text: str
    shape: tuple[int, ...]
    placement: Disjoint
    held: Held

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """Two values of one kind may be multiplied."""
        return (self.placement, self.shape[: self.placement.lead - 1])


def conflicts(levels: int) -> tuple[list[str], int]:
    """Pairs of values whose placements are equal and whose patterns are not, and how many values were compared."""
    patterns: dict[Any, tuple[Tensor, str]] = {}
    found, seen, compared = [], set(), 0
    level = list(_lookups())
    before: list[Grown] = []
    for depth in range(levels + 1):
        kept = []
        for v in level:
            compared += 1
            mine = support(v.held, v.placement.lead)
            if mine is None:
                found.append(f"{v.text}: several ranks have one row")
                continue
            theirs, text = patterns.setdefault(v.kind, (mine, v.text))
            if not torch.equal(mine, theirs):
                found.append(f"{v.text} and {text} have one key and different rows")
            elif (v.kind, v.shape) not in seen:
                seen.add((v.kind, v.shape))
                kept.append(v)
        if depth < levels:
            level = [*_applied(kept), *_joined(kept, before if depth else kept)]
            before = before or kept
    return found, compared


def _lookups() -> Iterator[Grown]:
    """Vectors of two columns of ids, and of one of lists of ids; tables of equal rows that share ids share keys."""
    generator = torch.Generator().manual_seed(0)
    for key, shape, lead in (
        *(("i", (size,), 1) for size in (1, 2)),
        *(("j", (size,), 1) for size in (1, 2)),
        *(("k", (2, size), 2) for size in (1, 2)),
    ):
        placement = Disjoint((0, 2), key, lead)
        x = torch.rand((BATCH, *shape), generator=generator, dtype=torch.float64) + 0.5
        yield Grown(f"{key}{list(shape)}", shape, placement, cut(x, placement, generator))


def _applied(values: list[Grown]) -> Iterator[Grown]:
    for v in values:
        for call in _unary(v.shape):
            yield from _result(call, [v])


def _joined(values: list[Grown], others: list[Grown]) -> Iterator[Grown]:
    """Pairs side by side, and their products and sums, each in both orders."""
    pairs = {(a.text, b.text): [a, b] for a, b in (*product(values, others), *product(others, values))}
    for a, b in pairs.values():
        for call in _pairs(a.shape, b.shape):
            yield from _result(call, [a, b])


def _result(call: Call, operands: list[Grown]) -> Iterator[Grown]:
    """What a call makes of values, if it is of the kind that grows further."""
    site = site_of(call)
    shape = tuple(site.result.shape[1:])
    if len(shape) > MOST_DIMS or any(not 0 < n <= MOST_SIZE for n in shape):
        return
    at = {x: v.placement for x, v in zip(call.operands, operands, strict=False)}
    found, rule = answer(site, at)
    if isinstance(found, Placed) and isinstance(found.placement, Disjoint):
        held = {x: v.held for x, v in zip(call.operands, operands, strict=False)}
        text = f"{call} of {', '.join(v.text for v in operands)}"
        yield Grown(text, shape, found.placement, Emitted(site, at, held, found, rule).held)


@cache
def _unary(shape: tuple[int, ...]) -> tuple[Call, ...]:
    return tuple(_calls_on(value("x", *shape)))


def _calls_on(x: Operand) -> Iterator[Call]:
    shape = x.shape
    yield Call(aten.reshape.default, (x, [-1, *shape, 1]))
    yield Call(aten.unsqueeze.default, (x, 1))
    for d, size in enumerate(shape, 1):
        if d < len(shape):
            yield Call(aten.flatten.using_ints, (x, d, d + 1))
        if size == 4:
            yield Call(aten.unflatten.int, (x, d, [2, 2]))
        for index in range(size):
            yield Call(aten.select.int, (x, d, index))
        yield Call(aten.slice.Tensor, (x, d, 0, 1))
        yield Call(aten.slice.Tensor, (x, d, 1))
        for step in (2, 3):
            yield Call(aten.slice.Tensor, (x, d, 0, size, step))
        for chosen in ((0, 0), (0, size - 1), (size - 1, 0), (size - 1,)):
            yield Call(aten.index_select.default, (x, d, Operand("chosen", BUFFER, (len(chosen),), chosen)))
        if size == 1:
            yield Call(aten.expand.default, (x, [-1, *(2 if e == d else -1 for e in range(1, len(shape) + 1))]))
        yield Call(aten.repeat.default, (x, [1, *(2 if e == d else 1 for e in range(1, len(shape) + 1))]))
        yield Call(aten.sum.dim_IntList, (x, [d]))
        yield Call(aten.amax.default, (x, [d], True))
        yield Call(aten.cumsum.default, (x, d))
    for a, b in combinations(range(1, len(shape) + 1), 2):
        yield Call(aten.transpose.int, (x, a, b))
    if len(shape) == 3:
        yield Call(aten.permute.default, (x, [0, 2, 3, 1]))
        yield Call(aten.permute.default, (x, [0, 3, 1, 2]))


def _pairs(first: tuple[int, ...], second: tuple[int, ...]) -> Iterator[Call]:
    x, y = value("x", *first), value("y", *second)
    if first == second:
        yield Call(aten.mul.Tensor, (x, y))
        yield Call(aten.add.Tensor, (x, y))
        for d in range(1, len(first) + 2):
            yield Call(aten.stack.default, ([x, y], d))
    if len(first) == len(second):
        for d in range(1, len(first) + 1):
            if all(a == b for e, (a, b) in enumerate(zip(first, second, strict=True), 1) if e != d):
                yield Call(aten.cat.default, ([x, y], d))

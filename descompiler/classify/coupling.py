"""Batch coupling: how values that mix the rows of the batch stay exact, and what crosses between ranks for it.

Global values (`descompiler.classify.scope`) form one computation that every rank repeats, with equal values *and equal
gradients*, so that only its borders cross the wire:

    gather   local -> global    forward: every rank's rows to all; backward: own rows of the gradient, nothing is sent
    reduce   a sum over the batch: forward: an all-reduce of the ranks' terms; backward: nothing is sent
    slice    global -> local    forward: own rows, nothing is sent; backward: every rank's rows of the gradient to all
    spread   global -> local, no batch dimension: backward: an all-reduce of the gradient
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from descompiler.classify.operator_kinds import HEAVY, SHAPE_ONLY
from descompiler.classify.scope import (
    CONSTANT,
    GLOBAL,
    OWN,
    OWN_ROWS,
    SIZE,
    SIZED,
    WHOLE,
    polynomial,
    scope_of,
    size_terms,
)
from descompiler.errors import UnsupportedError
from descompiler.graph.arguments import LOOKUP_OPERATORS, training_norm
from descompiler.graph.leaf import Leaf
from descompiler.graph.nodes import aten, is_tensor, mutates, size_of, target_name, user_line, value, where
from descompiler.graph.program import Program
from descompiler.graph.rewrite import descendants
from descompiler.layout.global_values import CoupledValues, GatherRows, GlobalValue, SliceRows, SpreadValue, SumTerms
from descompiler.model.random_state import EACH_ITS_OWN, ONE_DRAW
from descompiler.ops.local import differentiable
from descompiler.ops.vocabulary import vocabulary

COLLECTED = {k.kind: k for k in (GatherRows, SumTerms)}
"""What collects the ranks' parts of a value, by the kind of a `CouplingStage`."""


Demand = tuple[fx.Node, str]
"""A node, and the version of it that is needed."""


@dataclass(frozen=True)
class CouplingStage:
    """Values that are gathered, or reduced, in one collective."""

    kind: str  # "gather" or "reduce"
    members: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Coupling:
    """Which versions of which nodes a program computes, and what crosses for it.

    Attributes
    ----------
    demands : mapping of (node, version) to tuple of (node, version)
        What is needed, in the order of the graph, and what it is made from.
    stages : tuple of Stage
    slices, spreads : frozenset of node
        Global values that local nodes, or the user, take.
    exchanges : tuple of CoupledValues
    free : frozenset of node
        Local nodes whose value for the global batch is computed from their operands' and not gathered.
    """

    demands: dict[Demand, tuple[Demand, ...]]
    stages: tuple[CouplingStage, ...]
    slices: frozenset[fx.Node]
    spreads: frozenset[fx.Node]
    exchanges: tuple[CoupledValues, ...]
    free: frozenset[fx.Node]

    @property
    def backward(self) -> bool:
        """Whether gradients cross the borders of the global computation."""
        return any(isinstance(e, SliceRows | SpreadValue) for e in self.exchanges)

    def before(self, stage: CouplingStage) -> list[Demand]:
        """All that the members of a stage are made from, in the order of the graph."""
        members = {(n, WHOLE) for n in stage.members}
        needed: set[Demand] = set()
        for demand in reversed(self.demands):  # a value is made from values before it
            if demand in members or demand in needed:
                needed.update(self.demands[demand])
        return [d for d in self.demands if d in needed and d[0].op == "call_function"]


def couple(program: Program, inside: frozenset[fx.Node]) -> Coupling:
    """What has to be computed and exchanged, given the nodes in the substituted region."""
    return _Coupler(program, inside).run()


class _Coupler:
    def __init__(self, program: Program, inside: frozenset[fx.Node]):
        self.program, self.inside = program, inside
        self.free: set[fx.Node] = set()
        self.after = inside | descendants(program.graph, inside)
        candidates = []
        for n in program.graph.nodes:
            scope = scope_of(n)
            once = (
                n in inside or scope.drawn or n.target in LOOKUP_OPERATORS | {vocabulary} or isinstance(n.target, Leaf)
            )
            once |= n.target is aten.batch_norm.default
            if n.op == "call_function" and scope.kind == OWN_ROWS and not once:
                candidates.append(n)
        for n in candidates:
            # a list of values is not gathered, but made again
            if not is_tensor(n) or all(self._everywhere(a) for a in n.all_input_nodes):
                self.free.add(n)
        light = [n for n in candidates if n.target not in HEAVY]
        while True:
            gathered = {n for n, version in self._demands() if version == WHOLE and self._exchanges(n)}
            made = {n for n in light if n in gathered and all(self._known(a, gathered) for a in n.all_input_nodes)}
            if not made:
                break
            self.free |= made

    def _everywhere(self, a: fx.Node) -> bool:
        return scope_of(a).kind in (CONSTANT, SIZE, GLOBAL) or a in self.free

    def _known(self, a: fx.Node, gathered: set[fx.Node]) -> bool:
        return self._everywhere(a) or (a in gathered and not scope_of(a).reduced)

    def run(self) -> Coupling:
        demands = self._demands()
        depths: dict[Demand, int] = {}
        for (n, version), needs in demands.items():
            exchanged = version == WHOLE and self._exchanges(n)
            depths[n, version] = int(exchanged) + max((depths[d] for d in needs), default=0)
        groups: dict[Any, list[fx.Node]] = {}
        slices: list[fx.Node] = []
        spreads: list[fx.Node] = []
        for n, version in demands:
            scope = scope_of(n)
            dtype = str(value(n).dtype) if is_tensor(n) else ""
            if version == WHOLE and self._exchanges(n):
                kind = "reduce" if scope.reduced else "gather"
                groups.setdefault((n in self.after, depths[n, version], kind, dtype), []).append(n)
            elif version == OWN and scope.kind == GLOBAL and is_tensor(n):
                (spreads if scope.rows is None else slices).append(n)
        stages = [CouplingStage(key[2], tuple(members)) for key, members in sorted(groups.items(), key=lambda g: g[0])]
        exchanges = [self._exchange(COLLECTED[s.kind], *s.members) for s in stages]
        exchanges += [self._exchange(SliceRows, n) for n in slices if self._sends_back(n, demands)]
        exchanges += [self._exchange(SpreadValue, n) for n in spreads if self._sends_back(n, demands)]
        return Coupling(
            demands,
            tuple(stages),
            frozenset(slices),
            frozenset(spreads),
            tuple(exchanges),
            frozenset(self.free),
        )

    def _exchanges(self, n: fx.Node) -> bool:
        """Whether the value for the global batch is gathered, or reduced, from the ranks'."""
        scope = scope_of(n)
        return scope.reduced or (scope.kind == OWN_ROWS and n not in self.free)

    def _demands(self) -> dict[Demand, tuple[Demand, ...]]:
        """The versions that are needed, in the order of the graph, each after those that it is made from."""
        wanted: dict[fx.Node, set[str]] = {}
        needs: dict[Demand, tuple[Demand, ...]] = {}
        for n in reversed(self.program.graph.nodes):
            versions = wanted.setdefault(n, set())
            if n.op == "output":
                starts = [(o, OWN) for o in n.args[0]]
            elif n in self.inside:
                starts = [(a, OWN) for a in n.all_input_nodes]
            else:
                starts = []
                if n.op == "call_function" and _writes(n):
                    versions.add(WHOLE if scope_of(n).kind == GLOBAL else OWN)
            for a, v in starts:
                wanted.setdefault(a, set()).add(self._plain(a, v))
            for version in (OWN, WHOLE, SIZED, OWN, WHOLE):  # a version may need another one of the same node
                if version in versions and (n, version) not in needs:
                    needs[n, version] = tuple((a, self._plain(a, v)) for a, v in self._needs(n, version))
                    for a, v in needs[n, version]:
                        wanted.setdefault(a, set()).add(v)
        order = {n: i for i, n in enumerate(self.program.graph.nodes)}

        def position(d: Demand) -> tuple[int, bool]:
            own_last = scope_of(d[0]).kind == GLOBAL
            return order[d[0]], (d[1] == OWN) == own_last

        return {d: needs[d] for d in sorted(needs, key=position)}

    def _plain(self, n: fx.Node, version: str) -> str:
        """Constants have one version."""
        return OWN if scope_of(n).kind == CONSTANT else version

    def _needs(self, n: fx.Node, version: str) -> Iterable[Demand]:
        """What a version of a node is made from."""
        scope, operands = scope_of(n), n.all_input_nodes
        if version == OWN and (n.op == "placeholder" or n in self.inside):
            return []
        if scope.kind == CONSTANT:
            return [(a, OWN) for a in operands]
        if scope.kind == SIZE:
            return self._size_needs(n, version)
        if version == SIZED:
            return [(a, SIZED if scope_of(a).sized else OWN) for a in operands]
        if scope.kind == GLOBAL and version == OWN:
            return [(n, WHOLE)]
        if scope.kind == OWN_ROWS and version == WHOLE:
            return [(a, WHOLE) for a in operands] if n in self.free else [(n, OWN)]
        return list(zip(operands, scope.uses, strict=True))

    def _size_needs(self, n: fx.Node, version: str) -> list[Demand]:
        if n.target is not aten.sym_size.int:
            return [(a, version) for a in n.all_input_nodes]
        if size_terms(self.program, n) is not None:
            return []
        x = n.all_input_nodes[0]
        return [(x, WHOLE if scope_of(x).kind == GLOBAL else OWN)]

    def _sends_back(self, n: fx.Node, demands: Mapping[Demand, Any]) -> bool:
        """Whether a gradient comes to a global value from local nodes or from the user."""
        if not scope_of(n).grad:
            return False
        for u in n.users:
            if u.op == "output":
                return True
            scope = scope_of(u)
            if u in self.inside:
                return True
            shape_only = u.target in SHAPE_ONLY and u.args[1] is n and u.args[0] is not n
            if (u, OWN) in demands and scope.kind == OWN_ROWS and scope.grad and not shape_only:
                return True
        return False

    def _exchange(self, kind: type[CoupledValues], *nodes: fx.Node) -> CoupledValues:
        return kind(tuple(self._value(n, kind.by_row) for n in nodes))

    def _value(self, n: fx.Node, by_row: bool) -> GlobalValue:
        scope, fake = scope_of(n), value(n)
        own = self.program.wire_dtype(fake.dtype) is not None or not differentiable(fake)
        itemsize = fake.dtype.itemsize if own else None
        if by_row:
            assert scope.rows is not None
            shape = [size_of(s) for s in fake.shape]
            del shape[scope.rows.dim]
            if not all(isinstance(s, int) for s in shape):
                raise UnsupportedError(f"{where(n)}: rows of a size that depends on data are used across the batch")
            terms: tuple[tuple[int, ...], ...] = ((scope.rows.outer * scope.rows.inner * torch.Size(shape).numel(),),)
        else:
            found = [polynomial(size_of(s), self.program) for s in fake.shape]
            if None in found:
                sizes = ", ".join(str(size_of(s)) for s in fake.shape)
                raise UnsupportedError(
                    f"{where(n)}: a gradient crosses between ranks of a size that depends on data, or on the rows of "
                    f"the batch otherwise than as a multiple of them and a constant ({sizes}): multiply rows by a mask "
                    "instead of cutting them out"
                )
            terms = tuple(f for f in found if f is not None)
        return GlobalValue(n.name, terms, itemsize)


def _writes(n: fx.Node) -> bool:
    return mutates(n) or training_norm(n) is not None


def coupling_notes(program: Program, exchanges: Sequence[CoupledValues]) -> list[str]:
    """For people: what mixes the rows of the batch and crosses, and what is drawn at random."""
    nodes = {n.name: n for n in program.graph.nodes}
    notes = []
    for transfer, v in [(t, v) for t in exchanges for v in t.values]:
        n = nodes[v.name]
        size = "x".join(_polynomial_text(t) for t in v.terms) or "1"
        what = f"{size} elements" + (" a row" if transfer.by_row else "")
        name = f"input {n.name}" if n.op == "placeholder" else target_name(n)
        notes.append(f"{transfer.kind} {name}, {what}: {transfer.why}  {user_line(n)}".rstrip())
    for n in program.graph.nodes:
        if n.op == "call_function" and scope_of(n).drawn:
            each = ONE_DRAW if scope_of(n).kind == GLOBAL else EACH_ITS_OWN
            notes.append(f"random {target_name(n)}: {each}  {user_line(n)}".rstrip())
    return notes


def _polynomial_text(coefficients: Sequence[int]) -> str:
    """A polynomial in the rows B of the global batch.

    >>> _polynomial_text((1, 2))
    '1+2B'
    """
    terms = [
        f"{c if c != 1 or not i else ''}{'B' * (i > 0)}{'^' + str(i) if i > 1 else ''}"
        for i, c in enumerate(coefficients)
        if c
    ]
    return "+".join(terms) or "0"

"""One call of an operator, as a program of its own that rules can be asked about."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from descompiler.graph.nodes import Source, aten, target_name
from descompiler.graph.program import Program
from descompiler.layout.placement import Region
from descompiler.region.rule import Givens, Situation
from tests.harness.parts import BATCH, RANKS

VALUE, PARAMETER, SHARED, BUFFER, KNOWN, KNOWN_TO_ONE, OWN = (
    "value",
    "parameter",
    "shared parameter",
    "buffer",
    "known",
    "known to rank 0",
    "own rows",
)
"""Kinds of operands: a value of the region; a parameter that one node uses, or two; a tensor that every rank has; one
that ranks compute from ids that they get, or that only rank 0 gets; one that each rank has for its own rows alone."""

WITH_ROWS = frozenset({VALUE, KNOWN, KNOWN_TO_ONE, OWN})

_MODE = FakeTensorMode(shape_env=ShapeEnv())
_MODE.cache_enabled = False  # to keep what a call gives takes longer than the call
_BATCH = _MODE.from_tensor(
    torch.empty(BATCH), symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
).shape[0]
"""The batch size as a symbol, for all calls."""


@dataclass(frozen=True)
class Operand:
    """A tensor that a call takes: equal ones are one tensor.

    Attributes
    ----------
    shape : tuple of int
        Behind the batch, where it has rows.
    numbers : {"normal", "positive", "running", "mask", "index"} or tuple of int
        What it is filled with: running statistics are positive, and move; an index is below 2; a tuple has the numbers
        themselves.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    numbers: str | tuple[int, ...] = "normal"

    @property
    def dtype(self) -> torch.dtype:
        if isinstance(self.numbers, tuple):
            return torch.int64
        return {"mask": torch.bool, "index": torch.int64}.get(self.numbers, torch.float64)

    @property
    def trained(self) -> bool:
        """Whether it has a gradient."""
        return self.kind != BUFFER and self.numbers in ("normal", "positive")

    def tensor(self) -> Tensor:
        """Its numbers for the global batch; always the same."""
        shape = (BATCH, *self.shape) if self.kind in WITH_ROWS else self.shape
        if isinstance(self.numbers, tuple):
            return torch.tensor(self.numbers).reshape(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        if self.numbers == "index":
            return torch.randint(2, shape, generator=generator)
        x = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        if self.numbers in ("positive", "running"):
            return x
        negative = torch.rand(shape, generator=generator) < 0.5
        return negative if self.numbers == "mask" else torch.where(negative, -x, x)


def value(name: str, *shape: int, numbers: str = "normal") -> Operand:
    """A value of the region."""
    return Operand(name, VALUE, shape, numbers)


@dataclass(frozen=True)
class Call:
    """An operator and its arguments, in which `Operand` stands for tensors."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        shown = [_shown(a) for a in self.args] + [f"{k}={_shown(v)}" for k, v in self.kwargs]
        return f"{self.name}({', '.join(shown)})"

    @property
    def name(self) -> str:
        node = fx.Graph().call_function(self.target)
        return target_name(node)

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        """Each once, in order."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return tuple(dict.fromkeys(x for x in leaves if isinstance(x, Operand)))

    @property
    def values(self) -> tuple[Operand, ...]:
        return tuple(x for x in self.operands if x.kind == VALUE)

    def __call__(self, tensors: Mapping[Operand, Any]) -> Any:
        """The operator on other tensors (or nodes, or numbers) for its operands."""
        args, kwargs = self.bound(tensors)
        return self.target(*args, **kwargs)

    def bound(self, tensors: Mapping[Operand, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, with these in place of the operands."""
        put = {True: tensors.__getitem__, False: lambda x: x}
        args, kwargs = pytree.tree_map(lambda x: put[isinstance(x, Operand)](x), (list(self.args), dict(self.kwargs)))
        return args, kwargs


def _shown(x: Any) -> str:
    if isinstance(x, Operand):
        shape = ["b", *map(str, x.shape)] if x.kind in WITH_ROWS else [*map(str, x.shape)]
        return f"{x.name}[{','.join(shape)}]"
    return f"[{', '.join(map(_shown, x))}]" if isinstance(x, list | tuple) else str(x)


@dataclass
class Site:
    """A call in a program of its own, with its operands' numbers and its result."""

    call: Call
    program: Program = field(init=False)
    node: fx.Node = field(init=False)
    nodes: dict[Operand, fx.Node] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        graph, sources, constants, parameters = fx.Graph(), {}, {}, {}
        for x in self.call.operands:
            node = graph.placeholder(x.name)
            with _MODE:
                node.meta["val"] = torch.empty((_BATCH, *x.shape) if x.kind in WITH_ROWS else x.shape, dtype=x.dtype)
            kind = {PARAMETER: "parameter", SHARED: "parameter", BUFFER: "buffer"}.get(x.kind, "input")
            sources[node.name] = Source(kind, x.name)
            if kind == "buffer":
                constants[x.name] = x.tensor()
            if kind == "parameter":
                parameters[x.name] = torch.empty(x.shape, dtype=torch.float64, device="meta", requires_grad=True)
            self.nodes[x] = node
        args, kwargs = self.call.bound(self.nodes)
        self.node = graph.call_function(self.call.target, tuple(args), kwargs)
        try:
            with _MODE:
                self.node.meta["val"] = self.call({x: n.meta["val"] for x, n in self.nodes.items()})
        except Exception as error:
            raise ValueError(f"torch itself refuses the call {self.call}: {error}") from error
        others = [
            graph.call_function(aten.neg.default, (self.nodes[x],)) for x in self.call.operands if x.kind == SHARED
        ]
        graph.output([self.node, *others])
        batch = _BATCH.node.expr
        assert not batch.is_number, f"{self.call} makes the batch size a number, for all that follow"
        self.program = Program(graph, sources, constants, parameters, True, batch)

    @cached_property
    def numbers(self) -> dict[Operand, Tensor]:
        return {x: x.tensor() for x in self.call.operands}

    @cached_property
    def result(self) -> Tensor:
        """The operator on the global batch; running statistics are kept."""
        return self.call({x: t.clone() for x, t in self.numbers.items()})

    @cached_property
    def weights(self) -> Tensor:
        """What the result is multiplied with to a number whose gradients are compared."""
        return torch.randn(self.result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    @cached_property
    def gradients(self) -> dict[Operand, Tensor]:
        """Those of the operator on the global batch, of every operand that has one."""
        tensors = {x: t.clone().requires_grad_(x.trained) for x, t in self.numbers.items()}
        trained = [x for x in tensors if x.trained]
        total = (self.call(tensors) * self.weights).sum()
        found = torch.autograd.grad(total, [tensors[x] for x in trained], materialize_grads=True)
        return dict(zip(trained, found, strict=True))

    @cached_property
    def givens(self) -> Givens:
        constants: dict[fx.Node, tuple[str, ...]] = {}
        known: dict[fx.Node, frozenset[int]] = {}
        for x, node in self.nodes.items():
            if x.kind in (PARAMETER, SHARED, BUFFER):
                constants[node] = () if x.kind == BUFFER else (x.name,)
            if x.kind in (KNOWN, KNOWN_TO_ONE):
                known[node] = frozenset(range(RANKS) if x.kind == KNOWN else (0,))
        return Givens(constants, known, frozenset(), frozenset())

    def situation(self, placements: Mapping[Operand, Region]) -> Situation:
        """What a rule sees if values have these placements."""
        at = {self.nodes[x]: p for x, p in placements.items()}
        return Situation(self.program, RANKS, at, self.givens)


_SITES: dict[str, Site] = {}


def site_of(call: Call) -> Site:
    """The site of a call: made once, for all placements that are tried."""
    key = repr(call)
    if key not in _SITES:
        _SITES[key] = Site(call)
    return _SITES[key]

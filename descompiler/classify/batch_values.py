"""A graph's values on a batch and on its parts, each computed of what the distributed program would give it."""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from descompiler.classify.backward import ROW_TOLERANCE
from descompiler.classify.operator_kinds import DROPPING
from descompiler.classify.scope import SIZED, WHOLE
from descompiler.graph.leaf import Leaf
from descompiler.layout.rows import Rows
from descompiler.model.folded import has_own_values
from descompiler.model.reach import reached
from descompiler.ops.local import differentiable, real_parts

CHECK_ROWS = 7
"""The numbers are compared on a batch of so many rows, or as near above as a program's guards accept."""


MOST_CHECK_ROWS = 1 << 12


def batch_splits(rows: int) -> tuple[tuple[int, int], ...]:
    """Two different uneven divisions of that batch: of 7 rows, 3 and 4, and 5 and 2."""
    return tuple((n, rows - n) for n in ((3, 5) if rows >= CHECK_ROWS else (1, rows - 1)))


def check_batch(tensors: Sequence[Tensor], count: int, *, move: bool) -> list[Tensor]:
    """Rows drawn from the example's, each input on its own; ``move``: features that are no integers differ."""
    rows, generator = tensors[0].shape[0], torch.Generator().manual_seed(23)
    result = []
    for t in tensors:
        if rows >= count:
            index = torch.randperm(rows, generator=generator)[:count]
        else:
            index = torch.randint(rows, (count,), generator=generator)
        t = t.detach()[index.to(t.device)]
        if move and differentiable(t) and not torch.equal(real_parts(t), real_parts(t).round()):
            t = t * (1 - 0.1 * torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t))
        result.append(t)
    return result


class BatchValues:
    """Values of the nodes of a graph, as far as they are known.

    Attributes
    ----------
    whole : dict of torch.fx.Node to value
        Of the whole batch.
    parts, sized : list of list of dict
        By division (``splits``) and part of it: what a rank has of the node; and what a node that knows of the
        batch no more than its size would be of the part alone.
    anchors : dict of torch.fx.Node to Tensor
        Zeros that stand for parameters where gradients are concerned.
    """

    def __init__(self, splits: Sequence[tuple[int, int]]) -> None:
        self.splits = splits
        self.whole: dict[fx.Node, Any] = {}
        self.parts = [[dict[fx.Node, Any]() for _ in s] for s in splits]
        self.sized = [[dict[fx.Node, Any]() for _ in s] for s in splits]
        self.anchors: dict[fx.Node, Tensor] = {}

    def add_parameter(self, node: fx.Node, x: Tensor, *, trained: bool) -> None:
        self.whole[node] = x.detach()
        if trained:
            self.whole[node].requires_grad_()
            self.anchors[node] = torch.zeros((), dtype=torch.float64, device=x.device, requires_grad=True)

    def set_same(self, node: fx.Node) -> None:
        """The parts see the whole's value."""
        for part in itertools.chain(*self.parts):
            part[node] = detach(self.whole[node])

    def slice_parts(self, node: fx.Node, rows: Any) -> None:
        """The parts see their rows of the whole's value; ``rows`` is a list if the value is one."""
        whole = detach(self.whole[node])
        for sizes, parts in zip(self.splits, self.parts, strict=True):
            for first, size, part in zip((0, sizes[0]), sizes, parts, strict=True):
                if isinstance(rows, list):
                    part[node] = tuple(r.narrow(x, first, size) for r, x in zip(rows, whole, strict=True))
                else:
                    part[node] = rows.narrow(whole, first, size)

    def set_parts(self, node: fx.Node, parts: Sequence[Sequence[Any]]) -> None:
        """The parts' values, by division."""
        for division, results in zip(self.parts, parts, strict=True):
            for part, result in zip(division, results, strict=True):
                part[node] = result

    def set_sized(self, node: fx.Node) -> None:
        """What the node would be of each part alone."""
        for parts, alone in zip(self.parts, self.sized, strict=True):
            for part, values in zip(parts, alone, strict=True):
                values[node] = self.call(node, ChainMap(values, part).__getitem__)

    def call(self, node: fx.Node, find: Callable[[fx.Node], Any]) -> Any:
        """The node's value, of what ``find`` says of its operands; nothing is dropped at random."""
        args: Any
        args, kwargs = fx.map_arg((list(node.args), dict(node.kwargs)), find)
        target: Any = node.target
        if isinstance(target, Leaf):
            return target.judged(*args)
        if target in DROPPING:
            for i, a in enumerate(target._schema.arguments):
                if a.name in ("p", "dropout", "dropout_p") and (a.name in kwargs or i >= len(args)):
                    kwargs = {**kwargs, a.name: 0.0}
                elif a.name in ("p", "dropout", "dropout_p"):
                    args = [*args[:i], 0.0, *args[i + 1 :]]
        return target(*args, **kwargs)

    def on_parts(self, node: fx.Node, versions: Mapping[fx.Node, str]) -> list[list[Any]]:
        """The node's value on each part, of versions of its operands, by division."""

        def value_on(division: int, part: int) -> Any:
            return self.call(node, lambda a: self.operand(a, division, part, versions[a]))

        with torch.no_grad():
            return [[value_on(d, k) for k in range(len(sizes))] for d, sizes in enumerate(self.splits)]

    def operand(self, a: fx.Node, division: int, part: int, version: str) -> Any:
        """A version of a value, as a part is given it."""
        if version == WHOLE:
            return detach(self.whole[a])
        return (self.sized if version == SIZED else self.parts)[division][part][a]

    def reaching(self, x: Tensor, sources: Sequence[fx.Node]) -> Tensor:
        """``x``, whose gradient also comes to sources, in this analysis."""
        for a in sources:
            s = self.whole[a]
            if isinstance(s, Tensor) and s.requires_grad:
                # a slice of a parameter would have a gradient of the parameter's size
                s = self.anchors[a] if a in self.anchors else s.reshape(-1 if not s.dim() else s.shape)[:0].sum()
                x = x + s.to(x)
        return x

    def received(self, outputs: Sequence[fx.Node]) -> set[fx.Node]:
        """The nodes that get a gradient from the outputs."""
        ends = [x for o in outputs if isinstance(x := self.whole[o], Tensor) and x.requires_grad]
        trained = [(n, x) for n, x in self.whole.items() if isinstance(x, Tensor) and x.requires_grad]
        if not ends or not trained:
            return set()
        # a gradient of the size of a large table is not asked for
        small = [(n, x) for n, x in trained if n not in self.anchors or has_own_values(x)] + list(self.anchors.items())
        total = torch.stack([real_parts(x).double().sum() for x in ends]).sum()
        found = torch.autograd.grad(total, [x for _, x in small], allow_unused=True)
        received = {n for (n, _), g in zip(small, found, strict=True) if g is not None}
        received |= reached(ends, {n: x for n, x in trained if n in self.anchors})
        several = [n for n, x in self.whole.items() if isinstance(x, tuple | list)]  # their elements are nodes too
        return received | {n for n in several if any(u in received for u in n.users)}


def detach(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach()
    return type(x)(detach(y) for y in x) if isinstance(x, tuple | list) else x


def element(x: Any, i: int, whole: Any) -> Any:
    return x[i] if isinstance(whole, tuple | list) else x


def assembles(rows: Rows, parts: Sequence[Any], whole: Tensor) -> bool:
    """Whether parts are the rows of the whole, in order."""
    if not all(isinstance(p, Tensor) and p.dim() == whole.dim() for p in parts):
        return False
    multiple = rows.outer * rows.inner
    if any(p.shape[rows.dim] % multiple for p in parts) or whole.shape[rows.dim] % multiple:
        return False
    leading = [rows.lead(p) for p in parts]
    if len({x.shape[1:] for x in leading}) > 1:
        return False
    both, expected = torch.cat(leading), rows.lead(whole.detach())
    if both.shape != expected.shape or both.dtype != expected.dtype:
        return False
    both, expected = real_parts(both), real_parts(expected)
    if not both.is_floating_point():
        return bool(torch.equal(both, expected))
    if not torch.equal(both.isfinite(), expected.isfinite()):
        return False
    both, expected = both.nan_to_num(), expected.nan_to_num()
    if not both.numel():
        return True
    return bool((both - expected).abs().max() <= ROW_TOLERANCE * max(float(expected.abs().max()), 1e-30))

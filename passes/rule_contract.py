"""contract: ``einsum("bfd,bgd->bfg", gather_2(x_r), gather_2(y_r))  -->  sum_r(einsum(x_r, y_r))``

Products of tensors, as einsum writes them: `einsum`, `bmm`, `matmul`, `tensordot`. Each dimension has a letter. If a
letter is divided, alike in all values that have it, each rank contracts its share: the result is divided by that
letter, or, if it is summed over, a sum of terms. A parameter that has the letter is cut along it (co-located); one
that has it not is used whole. It pays where the result is narrower than the operands: attention scores, inner products.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from descompiler.passes.rule_linear import ranges_of, with_owner
from descompiler.pieces import Pieces
from descompiler.placement import Disjoint, Local, Owned, Partial, Shard, has_local, ranks_of
from descompiler.program import aten, shape_of
from descompiler.rule import Declined, Part, Placed, Situation


@dataclass(frozen=True)
class Contract:
    name: str = "contract"
    targets: frozenset[Any] = frozenset(
        {aten.einsum.default, aten.bmm.default, aten.matmul.default, aten.tensordot.default}
    )

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        found = letters(node)
        if found is None:
            return Declined("no letters for its dimensions")
        operands, terms, out = _operands(node), found[:-1], found[-1]
        values = [(n, t) for n, t in zip(operands, terms, strict=True) if at.program.parameter(n) is None]
        weights = [(n, t) for n, t in zip(operands, terms, strict=True) if at.program.parameter(n) is not None]
        if any(t[:1] != out[:1] or out[0] in t[1:] for _, t in values) or any(out[0] in t for _, t in weights):
            return Declined("the batch is not in front")
        places = [at.at(n) for n, _ in values]
        names = tuple(at.program.parameter(n) or "" for n, _ in weights)
        if any(isinstance(p, Local) for p in places):
            return Declined("a product with what every rank has for its own rows")
        if all(isinstance(p, Owned) and p == places[0] for p in places):
            assert isinstance(places[0], Owned)
            return with_owner(at, places[0], [n for n, _ in weights])
        if len(places) == 1 and isinstance(places[0], Partial | Disjoint):
            return Placed(Partial(ranks_of(places[0]), has_local(places[0])), replicated=names)
        first = places[0]
        if not all(isinstance(p, Shard) and isinstance(first, Shard) and p.segments == first.segments for p in places):
            return Declined("pairs of values with different owners")
        assert isinstance(first, Shard)
        letter = values[0][1][first.dim]
        for (_, t), p in zip(values, places, strict=True):
            assert isinstance(p, Shard)
            if t[p.dim] != letter or t.count(letter) != 1:
                return Declined("pairs of values with different owners")
        pieces, whole = {}, []
        for (n, t), name in zip(weights, names, strict=True):
            if letter not in t:
                whole.append(name)
            elif at.colocatable(n) is None or t.count(letter) != 1:
                return Declined("the weight is used elsewhere too, so it can't be cut to follow its input")
            else:
                shape = tuple(at.program.parameters[name].shape)
                pieces[name] = Pieces(shape, t.index(letter), ranges_of(first.segments), at.ranks)
        result = Shard(out.index(letter), first.segments) if letter in out else Partial(first.ranks, first.local)
        return Placed(result, pieces, tuple(whole))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        tensors = [part.operand(n) if part.program.parameter(n) is None else part.weight(n) for n in _operands(node)]
        if node.target is aten.einsum.default:
            return part.call(aten.einsum.default, node.args[0], tensors)
        return part.call(node.target, *tensors, *node.args[2:], **node.kwargs)


def _operands(node: fx.Node) -> list[fx.Node]:
    found = node.args[1] if node.target is aten.einsum.default else node.args[:2]
    return list(found)  # type: ignore[arg-type]


def letters(node: fx.Node) -> tuple[str, ...] | None:
    """A term of letters for each operand, and for the result; None if there is none (an ellipsis, a broadcast)."""
    shapes = [[*map(str, shape_of(n))] for n in _operands(node)]
    if node.target is aten.einsum.default:
        equation = str(node.args[0]).replace(" ", "")
        if "->" not in equation or "." in equation:
            return None
        terms, out = equation.split("->")
        return (*terms.split(","), out)
    a, b = (len(s) for s in shapes)
    if node.target is aten.tensordot.default:
        dims: Sequence[Sequence[int]] = node.args[2:4]  # type: ignore[assignment]
        over_a, over_b = [d % a for d in dims[0]], [d % b for d in dims[1]]
        x, y = list(string.ascii_lowercase[:a]), list(string.ascii_uppercase[:b])
        for i, j in zip(over_a, over_b, strict=True):
            y[j] = x[i]
        out_a = [c for d, c in enumerate(x) if d not in over_a]
        return "".join(x), "".join(y), "".join(out_a + [c for d, c in enumerate(y) if d not in over_b])
    if a < 2 or b < 1:
        return None
    if b == 1:
        x = list(string.ascii_lowercase[:a])
        return "".join(x), x[-1], "".join(x[:-1])
    # matmul: leading dimensions are aligned at their ends
    lead = max(a, b) - 2
    names = string.ascii_lowercase[:lead]
    x, y = [*names[lead - (a - 2) :], "M", "K"], [*names[lead - (b - 2) :], "K", "N"]
    for d in range(1, min(a, b) - 1):
        if shapes[0][-2 - d] != shapes[1][-2 - d]:
            return None
    return "".join(x), "".join(y), "".join([*names, "M", "N"])

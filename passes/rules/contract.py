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
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.nodes import aten, shape_of
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import Disjoint, Local, Partial, Shard, has_local, ranks_of
from descompiler.region.rule import Declined, Part, Placed, Situation


@dataclass(frozen=True)
class Contract:
    name: str = "contract"
    targets: ClassVar[frozenset[Any]] = frozenset(
        {aten.einsum.default, aten.bmm.default, aten.matmul.default, aten.tensordot.default}
    )

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        found = letters(node)
        if found is None:
            return Declined("no letters for its dimensions")
        terms, out = dict(zip(_operands(node), found[:-1], strict=False)), found[-1]
        if len(terms) < len(found) - 1 and not all(n in at.placements for n in terms):
            return Declined("a weight times itself")
        values = [n for n in _operands(node) if n in at.placements]
        first = at.at(values[0])
        assert not isinstance(first, Local)
        for n, t in zip(_operands(node), found[:-1], strict=True):
            if n not in at.placements and not at.given(n, first):
                return Declined("a product with what each rank has for its own rows only")
            constant = n in at.givens.constants
            if out[0] in t if constant else (t[:1] != out[:1] or out[0] in t[1:]):
                return Declined("the batch is not in front")
        weights = [n for n in terms if n not in at.placements]
        if len(values) == 1 and isinstance(first, Partial | Disjoint):
            names = tuple(name for n in weights for name in at.givens.parameters(n))
            return Placed(Partial(ranks_of(first), has_local(first)), replicated=names)
        letter = _letter(node, at)
        if letter is None or not isinstance(first, Shard):
            return Declined("products of what different ranks have")
        pieces: dict[str, Pieces] = {}
        whole: list[str] = []
        for n in weights:
            if letter not in terms[n]:
                whole += at.givens.parameters(n)
                continue
            cut, rest = at.along(n, terms[n].index(letter), first)
            pieces.update(cut)
            whole += rest
        result = Shard(out.index(letter), first.segments) if letter in out else Partial(first.ranks, first.local)
        return Placed(result, pieces, tuple(dict.fromkeys(whole)))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        letter, found = _letter(node, part), letters(node)
        assert found is not None
        placement = next(part.at(n) for n in _operands(node) if n in part.placements)
        tensors = []
        for n, t in zip(_operands(node), found[:-1], strict=True):
            if n not in part.placements and letter is not None and letter in t and isinstance(placement, Shard):
                tensors.append(part.share(n, t.index(letter), placement))
            else:
                tensors.append(part.argument(n))
        if node.target is aten.einsum.default:
            return part.call(aten.einsum.default, node.args[0], tensors)
        return part.call(node.target, *tensors, *node.args[2:], **node.kwargs)


def _letter(node: fx.Node, at: Situation | Part) -> str | None:
    """The letter that ranks divide, alike in all values of the region; None if there is none."""
    found = letters(node)
    assert found is not None
    values = [(at.at(n), t) for n, t in zip(_operands(node), found, strict=False) if n in at.placements]
    divided = {(p.segments, t[p.dim]) for p, t in values if isinstance(p, Shard)}
    if len(divided) != 1 or not all(isinstance(p, Shard) for p, _ in values):
        return None
    letter = next(iter(divided))[1]
    return letter if all(t.count(letter) <= 1 for t in found) else None


def _operands(node: fx.Node) -> list[fx.Node]:
    found = node.args[1] if node.target is aten.einsum.default else node.args[:2]
    return list(found)  # type: ignore[arg-type]


def letters(node: fx.Node) -> tuple[str, ...] | None:
    """A term of letters for each operand, and for the result; None if there is none (an ellipsis)."""
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
        one, two = shapes[0][-2 - d], shapes[1][-2 - d]
        if one != two:  # a dimension of size 1 is repeated: a letter of its own, which the result has not
            (x if one == "1" else y)[-2 - d] = string.ascii_uppercase[-d]
    return "".join(x), "".join(y), "".join([*names, "M", "N"])

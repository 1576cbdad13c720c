"""contract: ``einsum("bfd,bgd->bfg", gather_2(x_r), gather_2(y_r))  -->  sum_r(einsum(x_r, y_r))``

Products of tensors, as einsum writes them: `einsum`, `bmm`, `matmul`, `tensordot`. Each dimension has a letter. If a
letter is divided, alike in all values that have it, each rank contracts its share: the result is divided by that
letter, or, if it is summed over, a sum of terms. A parameter that has the letter is cut along it (co-located); one
that has it not is used whole. It pays where the result is narrower than the operands: attention scores, inner products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from descompiler.graph.contractions import Contraction, contraction
from descompiler.graph.nodes import aten
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import Disjoint, Local, Partial, Shard, has_local, ranks_of
from descompiler.region.rule import Declined, Part, Placed, Situation
from descompiler.region.sliced import place_slices


@dataclass(frozen=True)
class Contract:
    name: str = "contract"
    targets: ClassVar[frozenset[Any]] = frozenset(
        {aten.einsum.default, aten.bmm.default, aten.matmul.default, aten.tensordot.default}
    )

    def place(self, node: fx.Node, at: Situation) -> Placed | Declined:
        found = contraction(node)
        if found is None:
            return Declined("no letters for its dimensions")
        terms, out = dict(found.factors), found.out
        if len(terms) < len(found.factors) and not all(n in at.placements for n in terms):
            return Declined("a weight times itself")
        values = [n for n, _ in found.factors if n in at.placements]
        first = at.at(values[0])
        assert not isinstance(first, Local)
        for n, t in found.factors:
            if n not in at.placements and not at.given(n, first):
                return Declined("a product with what each rank has for its own rows only")
            constant = n in at.givens.constants
            if out[0] in t if constant else (t[:1] != out[:1] or out[0] in t[1:]):
                return Declined("the batch is not in front")
        weights = [n for n in terms if n not in at.placements]
        if len(values) == 1 and isinstance(first, Partial | Disjoint):
            names = tuple(name for n in weights for name in at.givens.parameters(n))
            return Placed(Partial(ranks_of(first), has_local(first)), replicated=names)
        letter = _letter(found, at)
        if letter is None or not isinstance(first, Shard):
            return Declined("products of what different ranks have")
        if letter in out:
            return place_slices(node, at)
        pieces: dict[str, Pieces] = {}
        whole: list[str] = []
        for n in weights:
            if letter not in terms[n]:
                whole += at.givens.parameters(n)
                continue
            cut, rest = at.along(n, terms[n].index(letter), first)
            pieces.update(cut)
            whole += rest
        return Placed(Partial(first.ranks, first.local), pieces, tuple(dict.fromkeys(whole)))

    def emit(self, node: fx.Node, part: Part) -> fx.Node:
        found = contraction(node)
        assert found is not None
        letter, placement = _letter(found, part), next(part.at(n) for n, _ in found.factors if n in part.placements)
        tensors = []
        for n, t in found.factors:
            if n not in part.placements and letter is not None and letter in t and isinstance(placement, Shard):
                tensors.append(part.share(n, t.index(letter), placement))
            else:
                tensors.append(part.argument(n))
        if node.target is aten.einsum.default:
            return part.call(aten.einsum.default, node.args[0], tensors)
        return part.call(node.target, *tensors, *node.args[2:], **node.kwargs)


def _letter(found: Contraction, at: Situation | Part) -> str | None:
    """The letter that ranks divide, alike in all values of the region; None if there is none."""
    values = [(at.at(n), t) for n, t in found.factors if n in at.placements]
    divided = {(p.division, t[p.dim]) for p, t in values if isinstance(p, Shard)}
    if len(divided) != 1 or not all(isinstance(p, Shard) for p, _ in values):
        return None
    letter = next(iter(divided))[1]
    return letter if all(t.count(letter) <= 1 for t in (found.out, *(t for _, t in found.factors))) else None

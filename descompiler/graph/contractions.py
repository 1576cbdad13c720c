"""Products of tensors as einsum writes them: each dimension has a letter, and what has one letter is one dimension.

A letter that is in the result stays a dimension of it; one that is not is summed over.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from descompiler.graph.nodes import aten, shape_of, signature

SUMS = frozenset({aten.addmm.default, aten._sparse_addmm.default})

CONTRACTIONS = SUMS | {
    aten.einsum.default,
    aten.tensordot.default,
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten._sparse_mm.default,
}


@dataclass(frozen=True)
class Contraction:
    """A product, and what is added to it.

    Attributes
    ----------
    factors : tuple of (node, str)
        What is multiplied, with the letters of its dimensions.
    addend : (node, str) or None
        A bias: it is repeated along the letters that it has not.
    out : str
        The letters of the result.
    """

    factors: tuple[tuple[fx.Node, str], ...]
    out: str
    addend: tuple[fx.Node, str] | None = None

    @property
    def terms(self) -> tuple[tuple[fx.Node, str], ...]:
        """All operands."""
        return self.factors if self.addend is None else (*self.factors, self.addend)


def contraction(node: fx.Node) -> Contraction | None:
    """A node as a product; None if letters don't say what it is (an ellipsis, matrices without rows)."""
    args = signature(node)
    if node.target is aten.einsum.default:
        equation = args["equation"].replace(" ", "")
        if "->" not in equation or "." in equation:
            return None
        terms, out = equation.split("->")
        return Contraction(tuple(zip(args["tensors"], terms.split(","), strict=True)), out)
    tensors = [a for a in args.values() if isinstance(a, fx.Node)]
    if node.target in SUMS:
        addend, a, b = tensors
        return _with_addend(_matmul(a, b), addend, shape_of(node))
    if node.target is aten.linear.default:
        x, weight, *bias = tensors
        lead, matrix = string.ascii_lowercase[: len(shape_of(x)) - 1], len(shape_of(weight)) == 2
        found = Contraction(((x, f"{lead}K"), (weight, "NK" if matrix else "K")), f"{lead}N" if matrix else lead)
        return _with_addend(found, bias[0], shape_of(node)) if bias else found
    a, b = tensors
    if node.target is aten.tensordot.default:
        return _tensordot(a, b, args["dims_self"], args["dims_other"])
    return _matmul(a, b)


def _tensordot(a: fx.Node, b: fx.Node, over_a: Sequence[int], over_b: Sequence[int]) -> Contraction:
    x, y = list(string.ascii_lowercase[: len(shape_of(a))]), list(string.ascii_uppercase[: len(shape_of(b))])
    over = [(i % len(x), j % len(y)) for i, j in zip(over_a, over_b, strict=True)]
    for i, j in over:
        y[j] = x[i]
    summed = {x[i] for i, _ in over}
    return Contraction(((a, "".join(x)), (b, "".join(y))), "".join(c for c in x + y if c not in summed))


def _matmul(one: fx.Node, two: fx.Node) -> Contraction | None:
    """Leading dimensions are aligned at their ends."""
    shapes = [[*map(str, shape_of(n))] for n in (one, two)]
    a, b = map(len, shapes)
    if a < 2 or b < 1:
        return None
    if b == 1:
        x = string.ascii_lowercase[:a]
        return Contraction(((one, x), (two, x[-1])), x[:-1])
    lead = max(a, b) - 2
    names = string.ascii_lowercase[:lead]
    left, right = [*names[lead - (a - 2) :], "M", "K"], [*names[lead - (b - 2) :], "K", "N"]
    for d in range(1, min(a, b) - 1):
        mine, theirs = shapes[0][-2 - d], shapes[1][-2 - d]
        if mine != theirs:  # a dimension of size 1 is repeated: a letter of its own, which the result has not
            (left if mine == "1" else right)[-2 - d] = string.ascii_uppercase[-d]
    return Contraction(((one, "".join(left)), (two, "".join(right))), "".join([*names, "M", "N"]))


def _with_addend(product: Contraction | None, addend: fx.Node, result: Sequence[Any]) -> Contraction | None:
    if product is None:
        return None
    shape = shape_of(addend)
    letters = product.out[len(product.out) - len(shape) :]
    sizes = zip(letters, shape, result[len(result) - len(shape) :], strict=True)
    own = "".join(c if size == whole else string.ascii_uppercase[-1 - i] for i, (c, size, whole) in enumerate(sizes))
    return Contraction(product.factors, product.out, (addend, own))

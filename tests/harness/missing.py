"""Missing rules: placements that would be right, and that no rule offers; docs/rules.md lists them.

What would be right is found by trying: the operator itself runs on what each rank has, given operands whole or cut like
the divided value, and its results are put together in every way that a placement can say. As terms: f of a rank's part,
less f of nothing; f of nothing is the term of own rows. Rules may do more than that (a mean of what is divided is a
sum, then a division), so a placement that is not found here may still be right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from descompiler.layout.placement import LOCAL, Disjoint, Partial, Region, Shard, has_local
from descompiler.region.rule import Declined
from tests.harness.calls import BUFFER, KNOWN_TO_ONE, OWN, PARAMETER, SHARED, WITH_ROWS, Call, Operand, Site, site_of
from tests.harness.family import family, placed_values
from tests.harness.parts import BATCH, RANKS, Held, support
from tests.harness.rules import Placements, answer, held_by_ranks

FILE = Path(__file__).resolve().parents[2] / "docs" / "rules.md"

STRENGTH = ("Owned", "Shard", "Disjoint", "Partial", "Partial+local")
"""Kinds of results, from what more operators can follow to what fewer can."""


@dataclass(frozen=True, order=True)
class Missing:
    """An operator that would stay inside, or would in a stronger placement.

    Attributes
    ----------
    right : str
        The kind of placement that its result would have.
    operands : str
        What kinds it takes.
    reason : str
        Why the rules decline, or what they offer instead.
    """

    right: str
    operands: str
    reason: str
    operator: str


def missing(calls: Iterable[Call]) -> set[Missing]:
    """All that some calls show."""
    found: set[Missing] = set()
    for call in calls:
        site = site_of(call)
        if not _is_rowwise(site):
            continue
        for at in placed_values(call):
            said, _ = answer(site, at)
            offered = None if isinstance(said, Declined) else kind_of(said.placement)
            best = _right(site, at, STRENGTH[: STRENGTH.index(offered)] if offered else STRENGTH)
            if best is not None:
                reason = said.reason if isinstance(said, Declined) else f"the rule says {offered}"
                if any(has_local(p) for p in at.values()):  # the result's is then no news
                    best = best.removesuffix("+local")
                found.add(Missing(best, _operands(site, at), reason, call.name))
    return found


def kind_of(placement: Region) -> str:
    """A placement's kind, without dimensions, sizes and ranks."""
    return type(placement).__name__ + ("+local" if isinstance(placement, Partial) and placement.local else "")


def _operands(site: Site, at: Placements) -> str:
    """The kinds of a call's values, then those of what is given."""
    values = dict.fromkeys(type(p).__name__ for p in at.values())
    weights = {PARAMETER: "weights", SHARED: "weights", BUFFER: "weights"}
    givens = dict.fromkeys(weights.get(x.kind, x.kind) for x in site.call.operands if x not in at)
    return ", ".join([*sorted(values), *givens])


def _is_rowwise(site: Site) -> bool:
    """Whether the result has one row of numbers per row of the batch, made of that row alone."""
    result = site.result
    if not result.is_floating_point() or not result.dim() or result.shape[0] != BATCH:
        return False
    order = torch.arange(BATCH).flip(0)
    turned = {x: t[order] if x.kind in WITH_ROWS else t.clone() for x, t in site.numbers.items()}
    try:
        return _same(site.call(turned), result[order])
    except RuntimeError:  # a size that is the batch's
        return False


def _right(site: Site, at: Placements, kinds: Sequence[str]) -> str | None:
    """The strongest of some kinds of placements that the result has; None if it has none of them."""
    found = {kind for cuts in _cuts(site, at) for kind in Trial(site, at, cuts).kinds()}
    return next((kind for kind in kinds if kind in found), None)


def _cuts(site: Site, at: Placements) -> Iterator[dict[Operand, int]]:
    """Ways to cut given operands like the divided value: along a dimension of its size, or not at all."""
    divided = next((p for p in at.values() if isinstance(p, Shard)), None)
    size = sum(divided.widths.values()) if divided is not None else 0
    given = [x for x in site.call.operands if x not in at]
    ways = [[None, *(d for d, n in enumerate(site.numbers[x].shape) if n == size)] for x in given]
    for some in product(*ways):
        yield {x: dim for x, dim in zip(given, some, strict=True) if dim is not None}


class Trial:
    """A call on what owners have: ranks for the global batch, and `LOCAL` for own rows, all ranks' together.

    ``cuts``: the dimension in which given operands are cut like the divided value.
    """

    def __init__(self, site: Site, at: Placements, cuts: Mapping[Operand, int]):
        self.site, self.at, self.cuts = site, at, cuts
        self.divided = next((p for p in at.values() if isinstance(p, Shard)), None)
        self.held = held_by_ranks(site, at)

    def kinds(self) -> list[str]:
        """The kinds of placements in which owners' results are the whole one."""
        return [*self._side_by_side(), *self._summed()]

    def _has(self, owner: int) -> dict[Operand, Tensor]:
        """Those operands that an owner has."""
        found = {}
        for x, numbers in self.site.numbers.items():
            if x in self.at:
                parts = self.held[x].own if owner == LOCAL else self.held[x].whole
                if owner == LOCAL and parts:
                    found[x] = torch.cat([parts[r].detach() for r in range(RANKS)])
                elif owner in parts:
                    found[x] = parts[owner].detach()
            elif owner == LOCAL or not (x.kind == OWN or (x.kind == KNOWN_TO_ONE and owner != 0)):
                found[x] = self._share(x, numbers.clone(), owner)
        return found

    def _share(self, x: Operand, numbers: Tensor, owner: int) -> Tensor:
        """An operand cut as the owner's part of the divided value is; as the first rank's, if it has none."""
        place = self.at.get(x, self.divided if x in self.cuts else None)
        if not isinstance(place, Shard):
            return numbers
        like = owner if place.width(owner) else place.ranks[0]
        return numbers.index_select(self.cuts.get(x, place.dim), torch.tensor(place.positions(like)))

    def _run(self, owner: int, has: Mapping[Operand, Tensor]) -> Tensor | None:
        """The operator, with zeros for what an owner has not; None where shapes don't fit."""
        rest = {x: t for x, t in self.site.numbers.items() if x not in has}
        zeros = {x: torch.zeros_like(self._share(x, t, owner)) for x, t in rest.items()}
        try:
            return self.site.call({**has, **zeros})
        except (RuntimeError, IndexError):
            return None

    def _side_by_side(self) -> Iterator[str]:
        """`Owned` or `Shard`, if results of owners that have all operands are slices of the whole."""
        every = {owner: self._has(owner) for owner in (*range(RANKS), LOCAL)}
        tried = {o: self._run(o, has) for o, has in every.items() if len(has) == len(self.site.numbers)}
        results = {o: x for o, x in tried.items() if x is not None}
        if len(results) == 1 and LOCAL not in results and _same(next(iter(results.values())), self.site.result):
            yield "Owned"
        elif set(results) - {LOCAL} and any(
            _tiles(results, self.site.result, d) for d in range(1, self.site.result.dim())
        ):
            yield "Shard"

    def _summed(self) -> Iterator[str]:
        """`Disjoint` or `Partial`, if what ranks' parts add to f of nothing, and f of own rows, are the whole."""
        terms: dict[int, Tensor] = {}
        leaves: list[Tensor] = []
        for rank in range(RANKS):
            has = self._has(rank)
            parts = [has[x].requires_grad_() for x in self.at if x in has]
            if not parts:
                continue
            leaves += parts
            got, nothing = self._run(rank, has), self._run(rank, {x: t for x, t in has.items() if x not in self.at})
            if got is None or nothing is None or got.shape != self.site.result.shape:
                return
            terms[rank] = got - nothing
        own = self._run(LOCAL, self._has(LOCAL))
        if own is None or own.shape != self.site.result.shape:
            return
        total = sum(terms.values()) + own
        if not _same(total, self.site.result):
            return
        if total.requires_grad:
            slopes = torch.autograd.grad(total.sum(), leaves, materialize_grads=True)
            if not all(g.isfinite().all() for g in slopes):  # of zeros, where another rank has the row
                return
        if own.any():
            yield "Partial+local"
        elif any(isinstance(p, Disjoint) for p in self.at.values()) and support(Held(terms), own.dim()) is not None:
            yield "Disjoint"
        else:
            yield "Partial"


def _tiles(results: Mapping[int, Tensor], whole: Tensor, dim: int) -> bool:
    """Whether each slice of the whole along a dimension is the next one of some owner, and all are used."""
    if any(r.dim() != whole.dim() for r in results.values()):
        return False
    taken = dict.fromkeys(results, 0)
    for i in range(whole.shape[dim]):
        slices = {o: r.select(dim, taken[o]) for o, r in results.items() if taken[o] < r.shape[dim]}
        owner = next((o for o, x in slices.items() if _same(x, whole.select(dim, i))), None)
        if owner is None:
            return False
        taken[owner] += 1
    return all(taken[o] == r.shape[dim] for o, r in results.items())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9)


PAGE = """# Rules, and what they leave out

Generated by `make rules` (`python -m tests.harness.missing`); do not edit.

A rule (`passes/rules/`) says where an operator's result is, given where its operands are, and emits each rank's
part. What it owes is checked by numbers (`tests/test_rule_validator.py`): {calls} calls of a family of operators, in
{placements} placements of their operands, in one process.

- **The result.** The parts that ranks compute, put together as the placement says, are what the operator computes of
  the whole. The same of gradients: of operands' parts, and of weights.
- **Weights.** What is cut is named in `pieces`, and what is used whole on the global batch in `replicated`: else its
  gradient is averaged wrongly, or waited for.
- **`Disjoint`.** In each position of the first `lead` dimensions one rank at most is not zero. What other ranks have
  there is zeros, so a function has to be 0 of 0, with a finite slope.
- **`Disjoint.key`.** Two values with equal placements and shapes are non-zero on the same rank everywhere, since their
  product is taken rank by rank. A rule that moves, drops, repeats or joins elements of the first `lead` dimensions
  makes a new key, of the old ones and of all that says where elements went: positions, orders, sizes.

## Placements that would be right, and that no rule offers

Found by trying: the operator itself on what each rank has, with weights whole or cut like the divided value. Where the
result is a sum, a rank's term is f of its part less f of zeros, and `Partial+local` has f of zeros as the term of own
rows. Few of these would pay: a `Partial` of a wide value sends as much as what it is made of. *weights*: parameters and
constants; *known*: computed from ids that the ranks get; *own rows*: what each rank has for its own rows alone.

| operators | operands | would be right | what the rules say |
|---|---|---|---|
{rows}
"""


def page() -> str:
    """The text of docs/rules.md."""
    calls = family()
    operators = defaultdict(list)
    for m in sorted(missing(calls)):
        operators[m.right, m.operands, m.reason].append(f"`{m.operator.removeprefix('aten.')}`")
    rows = [
        f"| {', '.join(names)} | {operands} | {right} | {reason} |"
        for (right, operands, reason), names in operators.items()
    ]
    placements = sum(1 for call in calls for _ in placed_values(call))
    return PAGE.format(calls=len(calls), placements=f"{placements:,}", rows="\n".join(rows))


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")

"""`Cost`: what something sends, computes and keeps, per rank and step, in symbols.

    bytes    = sum over collectives of sent_bytes(S, N)        `Cost.sent_bytes`
    messages = sum over collectives of calls · messages(N)     `Cost.messages`
    seconds  = sum over collectives of (start + messages α) calls + sent_bytes β, and flops γ      `Cost.seconds`

with the algorithms of `descompiler.cost_models.collectives` for a backend. A cost holds S, the bytes that a collective
is given, and not what an algorithm makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy

from descompiler.cost_models import collectives
from descompiler.cost_models.symbols import N, alpha, beta, g, gamma, start

ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class Cost:
    """What something costs.

    Attributes
    ----------
    payload : mapping of str to sympy.Expr
        By collective: S of `descompiler.cost_models.collectives`, summed over its calls.
    calls : mapping of str to sympy.Expr
        By collective.
    flops : sympy.Expr
        Floating point operations of a rank.
    memory : sympy.Expr
        Bytes that a rank keeps.

    Examples
    --------
    >>> from descompiler.cost_models.symbols import S
    >>> two = Cost({"all_reduce": S}, {"all_reduce": 1}) + Cost({"all_gather": S}, {"all_gather": 1})
    >>> two.sent_bytes()
    3*S*(N - 1)/N
    >>> two.messages()
    3*N - 3
    """

    payload: Mapping[str, Any] = field(default_factory=dict, hash=False)
    calls: Mapping[str, Any] = field(default_factory=dict, hash=False)
    flops: Any = ZERO
    memory: Any = ZERO

    def __add__(self, other: Cost) -> Cost:
        """One after the other."""
        return self._merge(other, lambda a, b: a + b)

    def __mul__(self, times: Any) -> Cost:
        """Several that are alike, in the same calls: a table's cost, times tables."""
        payload = {c: times * x for c, x in self.payload.items()}
        return Cost(payload, self.calls, times * self.flops, times * self.memory)

    __rmul__ = __mul__

    def _merge(self, other: Cost, calls: Any) -> Cost:
        names = dict.fromkeys((*self.payload, *other.payload))
        return Cost(
            {c: self.payload.get(c, ZERO) + other.payload.get(c, ZERO) for c in names},
            {c: calls(self.calls.get(c, ZERO), other.calls.get(c, ZERO)) for c in names},
            self.flops + other.flops,
            self.memory + other.memory,
        )

    def sent_bytes(self, backend: str = "nccl") -> sympy.Expr:
        """Bytes that a rank sends, the mean over ranks."""
        of = collectives.BACKENDS[backend]
        return sympy.factor_terms(sum((of[c].sent_bytes(x, N) for c, x in self.payload.items()), ZERO))

    def messages(self, backend: str = "nccl") -> sympy.Expr:
        """Messages of a rank, one after the other."""
        of = collectives.BACKENDS[backend]
        return sympy.expand(sum((n * of[c].messages(N) for c, n in self.calls.items()), ZERO))

    def seconds(self, backend: str = "nccl", *, two_level: bool = False) -> sympy.Expr:
        """Seconds: collectives and computation one after the other.

        Parameters
        ----------
        two_level : bool
            With links inside nodes of g ranks and links between nodes; else all links are alike ("inter").
        """
        of = collectives.BACKENDS[backend]
        total = self.flops * gamma
        for c, x in self.payload.items():
            total += collectives.seconds(
                c,
                of[c].sent_bytes(x, N),
                self.calls.get(c, ZERO),
                ranks=N,
                ranks_per_node=g if two_level else None,
                start=start(c, "inter"),
                alpha=(alpha(c, "intra"), alpha(c, "inter")),
                beta=(beta(c, "intra"), beta(c, "inter")),
                backend=backend,
                maximum=sympy.Max,
            )
        return total


def fused(costs: Iterable[Cost]) -> Cost:
    """Costs that share each collective's calls.

    >>> fused([Cost({"all_reduce": 8}, {"all_reduce": 1}), Cost({"all_reduce": 4}, {"all_reduce": 1})]).calls
    {'all_reduce': 1}
    """
    total = Cost()
    for c in costs:
        total = total._merge(c, lambda a, b: sympy.Max(a, b))
    return total

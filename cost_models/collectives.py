"""What collectives send and how long they take, by algorithm.

With N ranks and S the bytes of the whole tensor (all-reduce, broadcast: the tensor; reduce-scatter: its input;
all-gather: its output; all-to-all: what one rank gives in), a rank sends, in that many messages one after the other:

    ring all-reduce                      2 (N-1)/N S     2 (N-1)       `RING_ALL_REDUCE`
    ring reduce-scatter, all-gather        (N-1)/N S        N-1        `RING`
    recursive doubling all-reduce          log2(N) S     log2(N)       `RECURSIVE_DOUBLING`
    recursive halving and doubling       2 (N-1)/N S   2 log2(N)       `HALVING_DOUBLING`
    double binary tree all-reduce          2 (N-1)/N S 2 log2(N)       `TREE_ALL_REDUCE`, pipelined; mean over ranks
    pairwise all-to-all                    (N-1)/N S        N-1        `PAIRWISE`
    binomial tree broadcast            (root) log2(N) S   log2(N)      `BINOMIAL`
    pipelined ring broadcast                     S          N-1        `PIPELINE`

(Thakur, Rabenseifner, Gropp, Optimization of Collective Communication Operations in MPICH, 2005; Patarasuk and Yuan,
Bandwidth optimal all-reduce algorithms, 2009; for the trees Sanders, Speck, Träff, 2009.)

A call takes ``start + messages α + bytes β`` (`seconds`). With g ranks a node, flat algorithms: a ring crosses each
node's link once, so that 2 (N/g - 1) of its messages (all-reduce) are between nodes, and its bytes go at the slower
link's rate; an all-to-all sends (N-g)/(N-1) of its bytes over the node's link, which g ranks share. What aggregating
inside the nodes first sends is `two_level_all_reduce`.

Every function takes numbers or symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy


@dataclass(frozen=True)
class Algorithm:
    """How a collective is done.

    Attributes
    ----------
    sent_bytes : callable
        ``(S, N)``: bytes that a rank sends (the busiest, if they differ).
    messages : callable
        ``(N)``: messages one after the other.
    """

    name: str
    sent_bytes: Callable[[Any, Any], Any]
    messages: Callable[[Any], Any]


def log2(n: Any) -> Any:
    """Rounds of a doubling algorithm: log2, rounded up for numbers.

    >>> log2(5)
    3
    """
    if isinstance(n, int):
        return (n - 1).bit_length()
    return sympy.log(n, 2)


def _share(S: Any, N: Any) -> Any:
    return S * (N - 1) / N


RING_ALL_REDUCE = Algorithm("ring", lambda S, N: 2 * _share(S, N), lambda N: 2 * (N - 1))
RING = Algorithm("ring", _share, lambda N: N - 1)
RECURSIVE_DOUBLING = Algorithm("recursive doubling", lambda S, N: log2(N) * S, log2)
HALVING_DOUBLING = Algorithm("recursive halving and doubling", lambda S, N: 2 * _share(S, N), lambda N: 2 * log2(N))
TREE_ALL_REDUCE = Algorithm("double binary tree", lambda S, N: 2 * _share(S, N), lambda N: 2 * log2(N))
PAIRWISE = Algorithm("pairwise", _share, lambda N: N - 1)
BINOMIAL = Algorithm("binomial tree", lambda S, N: log2(N) * S, log2)
PIPELINE = Algorithm("pipelined ring", lambda S, N: S, lambda N: N - 1)

GLOO: dict[str, Algorithm] = {
    "all_reduce": RING_ALL_REDUCE,
    # measured: gloo's reduce-scatter moves what its all-reduce moves; the runtime sends partial sums by all-to-all
    "reduce_scatter": Algorithm("ring all-reduce", RING_ALL_REDUCE.sent_bytes, RING_ALL_REDUCE.messages),
    "all_gather": RING,
    "all_to_all": PAIRWISE,
    "broadcast": BINOMIAL,
}
"""What gloo does (its ``allreduce.cc``, ``allgather.cc``, ``alltoallv.cc``, ``broadcast.cc``)."""

NCCL: dict[str, Algorithm] = {
    "all_reduce": RING_ALL_REDUCE,  # or `TREE_ALL_REDUCE` where that is faster: the same bytes
    "reduce_scatter": RING,
    "all_gather": RING,
    "all_to_all": PAIRWISE,  # grouped sends and receives
    "broadcast": PIPELINE,
}
"""What NCCL does (``src/graph/tuning.cc``, which has the same messages and start times)."""

BACKENDS: dict[str, dict[str, Algorithm]] = {"gloo": GLOO, "nccl": NCCL}


def seconds(
    collective: str,
    sent_bytes: Any,
    calls: Any = 1,
    *,
    ranks: Any,
    ranks_per_node: Any = None,
    start: Any,
    alpha: tuple[Any, Any],
    beta: tuple[Any, Any],
    backend: str = "gloo",
    maximum: Callable[..., Any] = max,
) -> Any:
    """Seconds of ``calls`` calls of a collective in which a rank sends ``sent_bytes`` in all.

    Parameters
    ----------
    ranks_per_node : optional
        None: all ranks share one class of links, the second of each pair.
    start : number or symbol
        Seconds of a call, whatever the ranks.
    alpha, beta : pair
        Seconds a message, seconds a byte: inside a node, and between nodes (of the node's whole link).
    maximum : callable
        ``max``, or ``sympy.Max`` for symbols.

    >>> seconds("all_to_all", 1e6, ranks=4, start=0, alpha=(0, 1e-5), beta=(0, 1e-8))
    0.01003
    """
    messages = BACKENDS[backend][collective].messages(ranks)
    if ranks_per_node is None:
        return calls * (start + messages * alpha[1]) + sent_bytes * beta[1]
    nodes = ranks / ranks_per_node
    if collective == "all_to_all":
        between, inside = ranks - ranks_per_node, ranks_per_node - 1
        time = maximum(
            sent_bytes * inside / (ranks - 1) * beta[0],
            sent_bytes * between / (ranks - 1) * ranks_per_node * beta[1],
        )
    else:
        between = messages * (nodes - 1) / (ranks - 1)  # of the ring, or the tree, these go between nodes
        inside = messages - between
        time = sent_bytes * maximum(beta[0], beta[1])
    return calls * (start + inside * alpha[0] + between * alpha[1]) + time


def two_level_all_reduce(S: Any, N: Any, g: Any) -> tuple[Any, Any]:
    """Bytes that a rank sends inside its node and between nodes: reduce-scatter, all-reduce, all-gather.

    Inside each node a reduce-scatter and an all-gather of S bytes; between nodes each of the g ranks all-reduces its
    S/g with its peers of the other N/g - 1 nodes.

    >>> two_level_all_reduce(1024, 16, 4)
    (1536.0, 384.0)
    """
    nodes = N / g
    return 2 * (g - 1) / g * S, 2 * (nodes - 1) / nodes * S / g

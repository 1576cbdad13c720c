"""Minimum cuts of networkx graphs: whose capacities are whole numbers, and unlimited where an edge has none.

A graph may have several minimum cuts. A solver gives that whose source's side is the largest (there is one), so that
plans do not depend on who solves. docs/planner.md has the measurements that decide which is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import networkx as nx

from descompiler.registry import Registry

SOURCE, SINK = "source", "sink"
"""The nodes of a graph that a cut parts."""

Found = tuple[int, set[Any]]
"""A cut's capacity, and the nodes on the source's side."""


def solve(graph: nx.DiGraph, solver: str) -> Found | None:
    """The minimum cut between ``SOURCE`` and ``SINK``, with the largest side of the source; None if none is finite.

    Parameters
    ----------
    solver : str
        The name of one of `SOLVERS`.

    Examples
    --------
    >>> graph = nx.DiGraph()
    >>> graph.add_edge("source", "a", capacity=3)
    >>> graph.add_edge("a", "b")  # unlimited
    >>> graph.add_edge("b", "sink", capacity=2)
    >>> solve(graph, "networkx") == solve(graph, "dinic") == (2, {"source", "a", "b"})
    True
    """
    try:
        return SOLVERS.named(solver).solve(graph)
    except nx.NetworkXUnbounded:
        return None


def by_networkx(graph: nx.DiGraph) -> Found:
    """By networkx, with Boykov and Kolmogorov's algorithm, of its own the steadiest on our graphs."""
    flow_func = nx.algorithms.flow.boykov_kolmogorov
    value, (side, _) = nx.minimum_cut(graph, SOURCE, SINK, flow_func=flow_func)
    return value, side


def by_dinic(graph: nx.DiGraph) -> Found:
    """By Dinic's algorithm (Dinitz, 1970), over lists."""
    index: dict[Hashable, int] = {name: i for i, name in enumerate(graph)}
    source, sink = index[SOURCE], index[SINK]
    edges: list[list[int]] = [[] for _ in index]  # of each node: numbers of edges; edge e ^ 1 is e's reverse
    to: list[int] = []
    left: list[Any] = []  # capacity that is not used
    for a, following in graph.adjacency():
        x = index[a]
        for b, attributes in following.items():
            y, e = index[b], len(to)
            edges[x].append(e)
            edges[y].append(e + 1)
            to += (y, x)
            left += (attributes.get("capacity"), 0)
    unlimited = sum(c for c in left if c is not None) + 1
    left = [unlimited if c is None else c for c in left]
    flow = 0
    while True:
        level = [-1] * len(edges)
        level[source] = 0
        queue = [source]
        for x in queue:
            for e in edges[x]:
                if left[e] and level[to[e]] < 0:
                    level[to[e]] = level[x] + 1
                    queue.append(to[e])
        if level[sink] < 0:
            break
        position = [0] * len(edges)
        path: list[int] = []
        x = source
        while True:
            if x == sink:
                pushed = min(left[e] for e in path)
                flow += pushed
                if flow >= unlimited:
                    raise nx.NetworkXUnbounded("no cut is finite")
                for e in path:
                    left[e] -= pushed
                    left[e ^ 1] += pushed
                cut = next(n for n, e in enumerate(path) if not left[e])
                x = to[path[cut] ^ 1]
                del path[cut:]
                continue
            while position[x] < len(edges[x]):
                e = edges[x][position[x]]
                if left[e] and level[to[e]] == level[x] + 1:
                    break
                position[x] += 1
            if position[x] < len(edges[x]):
                path.append(e)
                x = to[e]
            elif path:
                e = path.pop()
                x = to[e ^ 1]
                position[x] += 1
            else:
                break
    reaches = [False] * len(edges)
    reaches[sink] = True
    stack = [sink]
    while stack:
        for e in edges[stack.pop()]:
            if left[e ^ 1] and not reaches[to[e]]:
                reaches[to[e]] = True
                stack.append(to[e])
    return flow, {name for name, i in index.items() if not reaches[i]}


@dataclass(frozen=True)
class Solver:
    """What finds the minimum cut of a graph, or raises ``networkx.NetworkXUnbounded``."""

    name: str
    solve: Callable[[nx.DiGraph], Found]


SOLVERS: Registry[Solver] = Registry("solver", [Solver("dinic", by_dinic), Solver("networkx", by_networkx)])
"""That ``solver=`` may name; the first is the default."""

DEFAULT = SOLVERS.names[0]

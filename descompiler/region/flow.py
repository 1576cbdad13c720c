"""Minimum cuts of networkx graphs: whose capacities are whole numbers, and unlimited where an edge has none.

A graph may have several minimum cuts. A solver gives that whose source's side is the largest (there is one), so that
plans do not depend on who solves. docs/planner.md has the measurements that decide which is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
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


def reduced(graph: nx.DiGraph, kept: Iterable[Hashable]) -> nx.DiGraph:
    """A smaller graph with the same minimum cuts between the nodes ``kept``, whatever edges these get besides.

    A node that no cheapest cut, with the largest side of the source, parts from another is one with it: around a cycle
    of unlimited edges, behind an unlimited edge that is the only one into it, before one that is the only one out of
    it. A node between two edges is an edge that has the lesser of their capacities; one that nothing enters, or that
    nothing leaves, has no say.

    Examples
    --------
    >>> graph = nx.DiGraph()
    >>> graph.add_edge("source", "a")  # unlimited
    >>> graph.add_edge("a", "b", capacity=3)
    >>> graph.add_edge("b", "sink", capacity=2)
    >>> list(reduced(graph, ()).edges(data="capacity"))
    [('source', 'sink', 2)]
    """
    kept = {SOURCE, SINK, *kept}
    small = nx.DiGraph()
    small.add_nodes_from(graph)
    for a, b, capacity in graph.edges(data="capacity"):
        add(small, a, b, capacity)
    unlimited = nx.DiGraph([(a, b) for a, b, c in graph.edges(data="capacity") if c is None])
    for together in nx.strongly_connected_components(unlimited):
        first, *others = sorted(together, key=lambda n: n not in kept)
        for n in others:
            if n not in kept:
                _merge(small, n, first)
    waiting = [n for n in small if n not in kept]
    while waiting:
        n = waiting.pop()
        if n not in small:
            continue
        near = {*small.pred[n], *small.succ[n]}
        before, after = (list(edges[n].items()) for edges in (small.pred, small.succ))
        if not before or not after:
            small.remove_node(n)
        elif len(after) == 1 and after[0][1].get("capacity") is None:
            _merge(small, n, after[0][0])
        elif len(before) == 1 and before[0][1].get("capacity") is None:
            _merge(small, n, before[0][0])
        elif len(before) == len(after) == 1:
            (a, x), (b, y) = before[0], after[0]
            small.remove_node(n)
            if a != b:
                add(small, a, b, min(x["capacity"], y["capacity"]))
        else:
            continue
        waiting += (m for m in near if m in small and m not in kept)
    return small


def add(graph: nx.DiGraph, a: Hashable, b: Hashable, capacity: int | None) -> None:
    """One more edge; two between the same nodes are one that has both capacities. None is unlimited.

    >>> graph = nx.DiGraph()
    >>> add(graph, "source", "a", 3)
    >>> add(graph, "source", "a", 2)
    >>> add(graph, "a", "sink", None)
    >>> list(graph.edges(data="capacity"))
    [('source', 'a', 5), ('a', 'sink', None)]
    """
    if graph.has_edge(a, b):
        other = graph.edges[a, b].pop("capacity", None)
        capacity = None if capacity is None or other is None else capacity + other
    graph.add_edge(a, b, **({} if capacity is None else {"capacity": capacity}))


def _merge(graph: nx.DiGraph, node: Hashable, into: Hashable) -> None:
    edges = [*graph.in_edges(node, data="capacity"), *graph.out_edges(node, data="capacity")]
    graph.remove_node(node)
    for a, b, capacity in edges:
        a, b = into if a == node else a, into if b == node else b
        if a != b:
            add(graph, a, b, capacity)


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

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
    small = _Edges(graph)
    for a, b, capacity in graph.edges(data="capacity"):
        small.add(a, b, capacity)
    unlimited = nx.DiGraph([(a, b) for a, b, c in graph.edges(data="capacity") if c is None])
    for together in nx.strongly_connected_components(unlimited):
        first, *others = sorted(together, key=lambda n: n not in kept)
        for n in others:
            if n not in kept:
                small.merge(n, first)
    waiting = [n for n in small.after if n not in kept]
    while waiting:
        n = waiting.pop()
        if n not in small.after:
            continue
        before, after = small.before[n], small.after[n]
        (a, x), (b, y) = (next(iter(edges.items()), (n, 0)) for edges in (before, after))
        if not before or not after:
            small.remove(n)
        elif len(after) == 1 and y is None:
            small.merge(n, b)
        elif len(before) == 1 and x is None:
            small.merge(n, a)
        elif len(before) == len(after) == 1:
            assert x is not None and y is not None
            small.remove(n)
            if a != b:
                small.add(a, b, min(x, y))
        else:
            continue
        waiting += (m for m in {*before, *after} if m in small.after and m not in kept)
    found = nx.DiGraph()
    found.add_nodes_from(small.after)
    for a, following in small.after.items():
        for b, capacity in following.items():
            add(found, a, b, capacity)
    return found


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
        capacity = _of_both(capacity, graph.edges[a, b].pop("capacity", None))
    graph.add_edge(a, b, **({} if capacity is None else {"capacity": capacity}))


def _of_both(one: int | None, other: int | None) -> int | None:
    """What two edges between the same nodes can take together."""
    return None if one is None or other is None else one + other


class _Edges:
    """A graph that gets smaller, as dicts: capacities of edges by their ends, None where they are unlimited."""

    def __init__(self, nodes: Iterable[Hashable]):
        self.after: dict[Hashable, dict[Hashable, int | None]] = {n: {} for n in nodes}
        self.before: dict[Hashable, dict[Hashable, int | None]] = {n: {} for n in self.after}

    def add(self, a: Hashable, b: Hashable, capacity: int | None) -> None:
        if b in self.after[a]:
            capacity = _of_both(capacity, self.after[a][b])
        self.after[a][b] = self.before[b][a] = capacity

    def remove(self, node: Hashable) -> tuple[dict[Hashable, int | None], dict[Hashable, int | None]]:
        """Without a node; returns the edges that it had, from others and to others."""
        before, after = self.before.pop(node), self.after.pop(node)
        for a in before:
            self.after.get(a, {}).pop(node, None)
        for b in after:
            self.before.get(b, {}).pop(node, None)
        return before, after

    def merge(self, node: Hashable, into: Hashable) -> None:
        """A node is one with another: its edges are that one's."""
        before, after = self.remove(node)
        for a, capacity in before.items():
            if a not in (node, into):
                self.add(a, into, capacity)
        for b, capacity in after.items():
            if b not in (node, into):
                self.add(into, b, capacity)


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

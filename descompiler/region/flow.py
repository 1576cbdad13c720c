"""Minimum cuts of networks with integer capacities, by Dinic's algorithm (Dinitz, 1970).

Planning a model solves hundreds of cuts of some hundred nodes; a general graph library takes twenty times as long.
"""

from __future__ import annotations

from collections.abc import Hashable


class Network:
    """A directed network, edge by edge.

    Examples
    --------
    >>> network = Network("source", "sink")
    >>> network.add("source", "a", 3)
    >>> network.add("a", "b")  # unlimited
    >>> network.add("b", "sink", 2)
    >>> network.minimum_cut() == (2, {"source", "a", "b"})
    True
    """

    def __init__(self, source: Hashable, sink: Hashable):
        self._index: dict[Hashable, int] = {source: 0, sink: 1}
        self._edges: list[list[int]] = [[], []]  # of each node: numbers of edges; edge e ^ 1 is e's reverse
        self._to: list[int] = []
        self._capacity: list[int | None] = []

    def _node(self, name: Hashable) -> int:
        if name not in self._index:
            self._index[name] = len(self._edges)
            self._edges.append([])
        return self._index[name]

    def add(self, a: Hashable, b: Hashable, capacity: int | None = None) -> None:
        """An edge from a to b; without a capacity it is unlimited."""
        x, y = self._node(a), self._node(b)
        for start, end, c in ((x, y, capacity), (y, x, 0)):
            self._edges[start].append(len(self._to))
            self._to.append(end)
            self._capacity.append(c)

    def minimum_cut(self) -> tuple[int, set[Hashable]] | None:
        """The cut's capacity and the source's side, as large as it can be; None if no cut is finite."""
        edges, to = self._edges, self._to
        unlimited = sum(c for c in self._capacity if c is not None) + 1
        left = [unlimited if c is None else c for c in self._capacity]
        flow = 0
        while True:
            level = [-1] * len(edges)
            level[0] = 0
            queue = [0]
            for x in queue:
                for e in edges[x]:
                    if left[e] and level[to[e]] < 0:
                        level[to[e]] = level[x] + 1
                        queue.append(to[e])
            if level[1] < 0:
                break
            position = [0] * len(edges)
            path: list[int] = []
            x = 0
            while True:
                if x == 1:
                    pushed = min(left[e] for e in path)
                    flow += pushed
                    if flow >= unlimited:
                        return None
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
        reaches[1] = True
        stack = [1]
        while stack:
            for e in edges[stack.pop()]:
                if left[e ^ 1] and not reaches[to[e]]:
                    reaches[to[e]] = True
                    stack.append(to[e])
        return flow, {name for name, i in self._index.items() if not reaches[i]}

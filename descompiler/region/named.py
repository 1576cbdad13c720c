"""The cut's graph for people: nodes named by the program's canonical text, and what is known of them as attributes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import networkx as nx
from torch import fx

from descompiler.graph.nodes import user_line
from descompiler.graph.program import Program
from descompiler.graph.text import named_lines
from descompiler.region.cut import Candidates, Weights, cut_graph
from descompiler.region.flow import SINK, SOURCE


def named_cut_graph(program: Program, candidates: Candidates, w: Weights, inside: Collection[fx.Node]) -> nx.DiGraph:
    """The graph of `descompiler.region.cut.cut_graph`, as `descompiler.planning.plan.Plan.cut_graph` describes it.

    Parameters
    ----------
    inside : collection of node
        The nodes that a plan keeps inside.
    """
    graph = cut_graph(program, candidates, w)
    lines = named_lines(program.graph, program.sources)
    names: dict[Any, str] = {}
    for v in candidates.placed:
        name, text = lines[v]
        names[v], names[v, "out"] = name, f"{name} out"
        rule = candidates.rules.get(v)
        described = {"text": text, "placement": str(candidates.placed[v].placement), "line": user_line(v)}
        described["rule"] = "lookup" if rule is None else rule.name
        leaves = any(u not in inside for u in v.users)
        graph.nodes[v].update(kind="value", inside=v in inside, **described)
        graph.nodes[v, "out"].update(kind="out", inside=v in inside and not leaves, **described)
    graph.nodes[SOURCE].update(kind="source", inside=True)
    graph.nodes[SINK].update(kind="sink", inside=False)
    side = graph.nodes(data="inside")
    graph.graph["cost"] = sum(c for a, b, c in graph.edges(data="capacity") if side[a] and not side[b])
    return nx.relabel_nodes(graph, names)

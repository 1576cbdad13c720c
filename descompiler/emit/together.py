"""Lookups that need nothing of each other are one operator: dozens of tables cost as many calls as one."""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import fx

from descompiler.ops.local import lookup_rows, lookups_rows


def look_up_together(graph: fx.Graph, kind_of: Callable[[fx.Node], object]) -> None:
    """Make one `lookups_rows` of several `lookup_rows` whose ids are there in front of the first of them.

    Parameters
    ----------
    kind_of
        Of the node of a weight: those of one kind, of one dtype and as many columns, may be looked up together.
    """
    position = {n: i for i, n in enumerate(graph.nodes)}
    latest: dict[object, list[fx.Node]] = {}
    groups: list[list[fx.Node]] = []
    for n in graph.nodes:
        if n.target is not lookup_rows:
            continue
        kind = kind_of(n.args[0]), n.args[4:]
        group = latest.get(kind)
        if group is None or any(position[x] > position[group[0]] for x in n.all_input_nodes):
            group = latest[kind] = []
            groups.append(group)
        group.append(n)
    for group in groups:
        if len(group) == 1:
            continue
        weights, ids, starts, paddings = (list(x) for x in zip(*(n.args[:4] for n in group), strict=True))
        with graph.inserting_before(group[0]):
            found = graph.call_function(lookups_rows, (weights, ids, starts, paddings, *group[0].args[4:]))
            for i, n in enumerate(group):
                value = graph.call_function(operator.getitem, (found, i))
                value.meta.update(n.meta)
                n.replace_all_uses_with(value)
        for n in group:
            graph.erase_node(n)

"""Lookups that need nothing of each other are one operator: dozens of tables cost as many calls as one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from descompiler.graph.nodes import aten, shares_memory
from descompiler.ops.local import lookup, lookup_rows, lookups_rows
from descompiler.ops.together import lookups, stacked
from descompiler.runtime.fetch import stacked_takes, takes
from descompiler.runtime.runtime import Runtime


def look_up_together(
    graph: fx.Graph,
    kind_of: Callable[[fx.Node], object],
    checked: Collection[fx.Node],
    taken: Mapping[fx.Node, int] | None = None,
) -> None:
    """Make one operator of several lookups whose ids are there in front of the first of them.

    `lookups_rows` of `lookup_rows`, and, of ids that were ``checked`` and tables with sparse gradients, `lookups` of
    `lookup`: where tables are one table, an id of none of its rows would be one of another's. In rows that were
    fetched, `takes` of `take`.

    Parameters
    ----------
    kind_of
        Of the node of a weight: those of one kind, of one dtype and as many columns, may be looked up together.
    taken
        Lookups in rows that were fetched, and the class of these.
    """
    position = {n: i for i, n in enumerate(graph.nodes)}
    returned = _returned(graph)
    calls: dict[fx.Node, _Call] = {}
    latest: dict[object, list[fx.Node]] = {}
    groups: list[list[fx.Node]] = []
    for n in graph.nodes:
        call = _taken(n, taken) if taken and n in taken else _call(n, checked, kind_of)
        if call is None or (n in returned and call.target in STACKED):
            continue
        calls[n] = call
        kind = call.kind, call.target, call.options
        group = latest.get(kind)
        if group is None or any(position[x] > position[group[0]] for x in n.all_input_nodes):
            group = latest[kind] = []
            groups.append(group)
        group.append(n)
    for group in groups:
        if len(group) == 1:
            continue
        first = calls[group[0]]
        each = map(list, zip(*(calls[n].each for n in group), strict=True))
        with graph.inserting_before(group[0]):
            found = graph.call_function(first.target, (*first.rows, *each, *first.options))
            for i, n in enumerate(group):
                value = graph.call_function(operator.getitem, (found, i))
                value.meta.update(n.meta)
                n.replace_all_uses_with(value)
        for n in group:
            graph.erase_node(n)
        if first.target in STACKED:
            _stack(graph, found, len(group))


STACKED: dict[Any, Callable[..., Any]] = {lookups: stacked, takes: stacked_takes}
"""Operators whose results are views of one tensor, and what makes a stack of them instead."""


def _stack(graph: fx.Graph, found: fx.Node, count: int) -> None:
    """Lookups that are nothing but stacked, as a model with a table a field does, are stacked as they are made."""
    results = list(found.users)
    readers = {reader for x in results for reader in x.users}
    if len(readers) != 1 or len(results) != count:
        return
    (reader,) = readers
    if reader.target is not aten.stack.default or reader.args != (results, 1):
        return
    with graph.inserting_before(found):
        value = graph.call_function(STACKED[found.target], found.args)
    value.meta.update(reader.meta)
    reader.replace_all_uses_with(value)
    for n in (reader, *results, found):
        graph.erase_node(n)


def _returned(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory is that of outputs, which users may change in place: autograd lets nobody change views of
    which one function returns several."""
    result: set[fx.Node] = set()
    waiting = [n for o in graph.nodes if o.op == "output" for n in o.all_input_nodes]
    while waiting:
        n = waiting.pop()
        if n not in result:
            result.add(n)
            if shares_memory(n) or (n.op == "call_method" and n.target == Runtime.output.__name__):
                waiting += n.all_input_nodes
    return result


@dataclass(frozen=True)
class _Call:
    """A lookup as one of several: what is its own, and what it has in common with those that it may be joined with."""

    target: Callable[..., Any]
    kind: object
    each: tuple[Any, ...]
    options: tuple[Any, ...] = ()
    rows: tuple[Any, ...] = ()


def _taken(n: fx.Node, taken: Mapping[fx.Node, int]) -> _Call:
    fetching, rows, index, _ = n.args
    return _Call(takes, (fetching, taken[n]), (index,), rows=(fetching, rows))


def _call(n: fx.Node, checked: Collection[fx.Node], kind_of: Callable[[fx.Node], object]) -> _Call | None:
    given: tuple[Any, ...] = n.args
    if n.target is lookup_rows:
        return _Call(lookups_rows, kind_of(given[0]), given[:4], given[4:])
    if n.target is lookup:
        given = (*given, *(-1, False)[len(given) - 2 :])
    elif n.target is aten.embedding.default:
        weight, ids, padding, by_frequency, sparse = given + (-1, False, False)[len(given) - 2 :]
        given = (weight, ids, padding, sparse and not by_frequency)
    else:
        return None
    weight, ids, padding, sparse = given
    if not sparse or ids not in checked:
        return None
    return _Call(lookups, kind_of(weight), (weight, ids, padding))

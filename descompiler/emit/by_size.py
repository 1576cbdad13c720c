"""A program for a step in which ranks' inputs have other sizes than each other: histories of another length.

    enter_wait  -> region, on the global batch                -> exit_start        becomes
    run_regions -> for the rows of each size a region of its own -> exit_start

Outside the region each rank computes with its own sizes. Inside, the rows of ranks whose inputs have one size go
through the region of the program for that size: no value is padded, and what is computed of a row is what it would be
on that row's rank. Behind a batch norm, which takes its statistics of all rows, the region is one again, for the global
batch.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from descompiler.classify.scope import GLOBAL, OWN_ROWS, scope_of
from descompiler.emit.emit import Emitted, is_collective
from descompiler.errors import UnsupportedError
from descompiler.graph.arguments import training_norm
from descompiler.graph.nodes import Source, aten, is_tensor, shape_of
from descompiler.graph.program import Program
from descompiler.graph.rewrite import ancestors, descendants, eliminate_dead_code

BATCH_SUMS = frozenset({aten.sum.default, aten.sum.dim_IntList})
"""Ranks' terms of these are summed, of however many elements they are."""


@dataclass(frozen=True)
class RegionOfSize:
    """The region of a program, up to where values leave it or mix rows.

    Attributes
    ----------
    module : torch.fx.GraphModule
        ``module(runtime, rows, ids, *values)``, values in the order of ``sources``; returns the values of `_front`.
    """

    module: fx.GraphModule
    sources: tuple[Source, ...]


def mixed_sizes(program: Program) -> dict[str, str]:
    """By node that mixes rows, the sizes of what it mixes: they have to be the same on all ranks."""
    result = {}
    for n in program.graph.nodes:
        scope = scope_of(n)
        norm = scope.kind == OWN_ROWS and training_norm(n) is not None
        if norm or (scope.kind == GLOBAL and not scope.sized):
            taken = [n] if scope.reduced and n.target in BATCH_SUMS else [n, *n.all_input_nodes]
            shapes = [shape_of(x) for x in taken if is_tensor(x) and scope_of(x).kind in (GLOBAL, OWN_ROWS)]
            result[n.name] = str([[_told(s, program.batch) for s in shape] for shape in shapes])
    return result


def _told(size: int | sympy.Expr, batch: sympy.Symbol | None) -> str:
    """A size, with the same names in every graph; what depends on values has none."""
    if isinstance(size, int):
        return str(size)
    return str(size.subs({s: sympy.Symbol("rows" if s == batch else "any") for s in size.free_symbols}))


def region_of_size(emitted: Emitted) -> RegionOfSize | None:
    """The region of a program as a function; None if it has none.

    Raises
    ------
    UnsupportedError
        If it takes what this rank does not know of other ranks' rows.
    """
    graph = emitted.module.graph
    if (wait := _waits(graph)) is None:
        return None
    runtime, *places = [n for n in graph.nodes if n.op == "placeholder"]
    source_of = dict(zip(places, emitted.sources, strict=True))
    result, sources = fx.Graph(), list[Source]()
    given = {runtime: "runtime", emitted.total: "rows", wait: "ids"}
    found = {n: result.placeholder(name) for n, name in given.items()}
    front = _front(graph, wait)
    needed = ancestors(front, stop=found)
    for n in graph.nodes:
        if n not in needed or n in found:
            continue
        if n.op == "call_method" or (n in source_of and source_of[n].kind == "input"):
            raise UnsupportedError(f"the region takes {n.name!r}, which a rank does not know of the rows of others")
        if n in source_of:
            sources.append(source_of[n])
        found[n] = result.placeholder(n.name) if n in source_of else result.node_copy(n, found.__getitem__)
    result.output([found[n] for n in front])
    return RegionOfSize(fx.GraphModule(torch.nn.Module(), result), tuple(sources))


def with_regions(emitted: Emitted) -> fx.GraphModule:
    """The program, with `Runtime.run_regions` in place of its own region."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(emitted.module.graph, {}))
    if (wait := _waits(graph)) is not None:
        front, mixing = _front(graph, wait), _mixing(graph, wait)
        with graph.inserting_after(wait):
            last = runs = graph.call_method("run_regions", wait.args)
        for i, n in enumerate(front):
            with graph.inserting_after(last):
                last = values = graph.call_function(operator.getitem, (runs, i))
            if any(user in mixing for user in n.users):
                with graph.inserting_after(last):
                    last = graph.call_method("in_rank_order", (wait.args[0], values))
                n.replace_all_uses_with(last, delete_user_cb=mixing.__contains__)
            n.replace_all_uses_with(values)
        eliminate_dead_code(graph, keep=is_collective)
        graph.erase_node(wait)
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)


def _waits(graph: fx.Graph) -> fx.Node | None:
    """Where ids have entered the region; None if the program has none."""
    return next((n for n in graph.nodes if n.op == "call_method" and n.target == "enter_wait"), None)


def _leaves(graph: fx.Graph) -> fx.Node:
    found: list[fx.Node] = [n for n in graph.nodes if n.op == "call_method" and n.target == "exit_start"]
    return found[0]


def _inside(graph: fx.Graph, wait: fx.Node) -> set[fx.Node]:
    leaves = _leaves(graph)
    return ancestors([leaves]) & descendants(graph, [wait]) - {leaves}


def _mixing(graph: fx.Graph, wait: fx.Node) -> set[fx.Node]:
    """Of the region, what mixes rows, and what is made of it."""
    inside = _inside(graph, wait)
    mixing = {n for n in inside if n.op == "call_method"}
    return mixing | inside & descendants(graph, mixing)


def _front(graph: fx.Graph, wait: fx.Node) -> list[fx.Node]:
    """The last values of the region that are made of each row alone: they leave it, or are mixed."""
    mixing = _mixing(graph, wait)
    ends = mixing | {_leaves(graph)}
    inside = _inside(graph, wait) - mixing
    return [n for n in graph.nodes if n in inside and any(u in ends for u in n.users)]

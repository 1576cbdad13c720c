"""Walks over programs: passes, calls put in and taken out, values computed again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any, Protocol

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from descompiler.errors import DescompilerError
from descompiler.graph.leaf import Leaf
from descompiler.graph.nodes import aten, mutates, value
from descompiler.graph.program import Program


class Pass(Protocol):
    """A transformation of programs; its fields are its options."""

    @property
    def name(self) -> str: ...

    def __call__(self, program: Program) -> Program: ...


def run_passes(program: Program, passes: tuple[Pass, ...]) -> Program:
    """Apply passes in order, checking the graph after each and naming the one that broke it."""
    for p in passes:
        program = p(program)
        try:
            program.graph.lint()
            missing = {n.name for n in program.graph.nodes if n.op == "placeholder"} - set(program.sources)
            if missing:
                raise ValueError(f"placeholders without a source: {sorted(missing)}")
        except (RuntimeError, ValueError) as error:
            raise DescompilerError(f"pass {p.name!r} broke the graph: {error}") from error
    return program


def copy_program(program: Program) -> Program:
    """A program with its own graph, for passes that edit it in place."""
    graph = fx.Graph()
    result = graph.graph_copy(program.graph, {})
    graph.output(result)
    return replace(program, graph=graph, journal=list(program.journal))


def ancestors(nodes: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Nodes and all that they are computed from; of those in ``stop``, what they are computed from is left out."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        n = stack.pop()
        if n not in found:
            found.add(n)
            stack.extend(() if n in stop else n.all_input_nodes)
    return found


def descendants(graph: fx.Graph, nodes: Collection[fx.Node]) -> set[fx.Node]:
    """What is computed from any of some nodes."""
    found: set[fx.Node] = set()
    for n in graph.nodes:
        if any(a in nodes or a in found for a in n.all_input_nodes):
            found.add(n)
    return found


def propagate(graph: fx.Graph) -> None:
    """Compute the fake values of operators anew, from those of the placeholders; opaque modules keep theirs."""
    fakes = (value(n) for n in graph.nodes if n.op == "placeholder")
    mode = next(x.fake_mode for x in fakes if isinstance(x, FakeTensor))
    for node in graph.nodes:
        if node.op == "call_function" and not isinstance(node.target, Leaf):
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            with mode:
                node.meta["val"] = node.target(*args, **kwargs)


def insert_call(before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A call in front of a node, with its fake value and that node's line."""
    with before.graph.inserting_before(before):
        new = before.graph.call_function(target, args, kwargs)
    new.meta = {k: v for k, v in before.meta.items() if k == "stack_trace"}
    fake_args, fake_kwargs = fx.map_arg((args, kwargs), value)
    like = next(x for x in pytree.tree_leaves((fake_args, fake_kwargs, value(before))) if isinstance(x, FakeTensor))
    with like.fake_mode:
        new.meta["val"] = target(*fake_args, **fake_kwargs)
    return new


def eliminate_dead_code(graph: fx.Graph, keep: Callable[[fx.Node], bool] = lambda n: False) -> int:
    """Erase calls that nobody uses, that change nothing and that are not kept; returns how many."""
    erased = 0
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users or keep(node):
            continue
        if mutates(node) or node.target is aten.batch_norm.default:
            continue
        graph.erase_node(node)
        erased += 1
    return erased


def interpret(program: Program, values: dict[str, Any], override: Any = None) -> tuple[list[Any], dict[fx.Node, Any]]:
    """Run a program's graph.

    Parameters
    ----------
    values : dict
        Placeholder name to value.
    override : callable, optional
        ``override(node, args, kwargs)`` may return a value to use in place of the call's, or NotImplemented.

    Returns
    -------
    list, dict
        The flat outputs, and the value of every node.
    """
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = values[node.name]
        elif node.op == "output":
            return list(fx.map_arg(node.args[0], lambda n: env[n])), env
        else:
            args = fx.map_arg(node.args, lambda n: env[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
            result = NotImplemented if override is None else override(node, args, kwargs)
            env[node] = node.target(*args, **kwargs) if result is NotImplemented else result
    raise DescompilerError("the graph has no output")

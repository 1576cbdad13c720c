"""A model as a pure graph: what passes take and return.

The graph holds ATen operators (torch.export's training IR). Its placeholders are the model's parameters, buffers and
constants (by their original names, in `Program.sources`) and the tensors that the user passes to forward.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from descompiler.attributes import Place
from descompiler.errors import LIBRARIES, DescompilerError
from descompiler.leaf import Leaf
from descompiler.sparse import parts_of

aten = torch.ops.aten

DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default})
FLAGS = ("train", "training")
"""Arguments of batch norms and recurrent layers that say in which mode they run."""


@dataclass(frozen=True)
class Source:
    """Where a placeholder's value comes from: ``kind`` is parameter, buffer, constant or input."""

    kind: str
    name: str


@dataclass(frozen=True)
class Failure:
    """A rung of the ladder that did not capture the model, and why."""

    rung: str
    reason: str

    def __str__(self) -> str:
        return f"{self.rung}: {self.reason}"


@dataclass
class Program:
    """A captured model.

    Attributes
    ----------
    graph : torch.fx.Graph
        Output is a flat list of tensors.
    sources : dict of str to Source
        By placeholder name.
    constants : dict of str to Tensor
        Values of the constants, by the name of their source.
    parameters : dict of str to Tensor
        The original parameters by name, on the meta device: shapes, dtypes and `requires_grad`.
    batch : sympy.Symbol or None
        The symbol of the batch size in the shapes of ``node.meta["val"]``.
    recipes : dict of str to callable
        How constants that a pass computed are computed again, from other constants.
    journal : list of str
        What the passes did.
    rung : str
        The tracer that captured it (`descompiler.capture.RUNGS`).
    failures : tuple of Failure
        The tracers that were tried before, and why they failed.
    idle : tuple of str
        Parameters that have no gradient in the model on some batch, and one of zeros here (leaves reach all they hold).
    left_behind : tuple of str
        Attributes of the model in which its forward leaves values with a history; the graph does not.
    reads : frozenset of (str, str)
        Numbers and flags that forward reads: a module's path, and its attribute's name. The graph has their values.
    """

    graph: fx.Graph
    sources: dict[str, Source]
    constants: dict[str, Tensor]
    parameters: dict[str, Tensor]
    training: bool
    batch: sympy.Symbol | None
    journal: list[str] = field(default_factory=list)
    recipes: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    rung: str = ""
    failures: tuple[Failure, ...] = ()
    idle: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    reads: frozenset[Place] = frozenset()

    def source(self, node: Any) -> Source | None:
        """The source of a placeholder node; None for any other node."""
        if isinstance(node, fx.Node) and node.op == "placeholder":
            return self.sources[node.name]
        return None

    def parameter(self, node: Any) -> str | None:
        """Name of the parameter that a node is, or None."""
        source = self.source(node)
        return source.name if source is not None and source.kind == "parameter" else None

    def constant(self, name: str) -> Tensor:
        """A constant's value, computed anew in the arithmetic that is in force (see `descompiler.double`)."""
        return self.recipes[name]() if name in self.recipes else self.constants[name]

    def note(self, text: str) -> None:
        self.journal.append(text)

    def fingerprint(self) -> str:
        """Equal exactly if the same operators are applied to the same parameters and constants.

        The batch size, dropout, the training flags of operators and the counters that batch norms keep do not count.
        """
        digest = hashlib.sha256()
        names: dict[fx.Node, str] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                source = self.sources[node.name]
                names[node] = f"{source.kind}:{source.name}"
                if source.kind == "input":
                    names[node] += f" {tail(node)} {value(node).dtype}"
                elif source.kind != "parameter" and source.name in self.constants:  # by value: names depend on flags
                    c = self.constants[source.name].detach().cpu()
                    content = hashlib.sha256(f"{c.dtype} {tuple(c.shape)}".encode())
                    for part in parts_of(c):
                        content.update(part.contiguous().numpy().tobytes())
                    names[node] = content.hexdigest()
                continue
            if node.target in DROPOUTS:
                names[node] = names[node.args[0]]
                continue
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable and not node.users:
                continue
            args = list(node.args)
            if schema is not None:
                args = [a for a, x in zip(args, schema.arguments, strict=False) if x.name not in FLAGS]
            parts = [target_name(node), *(_text(a, names) for a in args)]
            # a plan made on a laptop's CPU is for the cluster's GPUs
            kwargs = {k: v for k, v in node.kwargs.items() if k not in FLAGS and not isinstance(v, torch.device)}
            parts += [f"{k}={_text(v, names)}" for k, v in kwargs.items()]
            names[node] = hashlib.sha256(" ".join(parts).encode()).hexdigest()
            if node.op == "output":
                digest.update(names[node].encode())
        for name, p in self.parameters.items():
            digest.update(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}".encode())
        return digest.hexdigest()[:16]


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


def value(node: Any) -> Any:
    """The fake value of a node: a FakeTensor, a SymInt, or a tuple of them."""
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def is_tensor(node: Any) -> bool:
    return isinstance(value(node), Tensor)


def size_of(size: int | torch.SymInt) -> int | sympy.Expr:
    """An int if it is one, though a tracer divided it by the batch size to find it; else a sympy expression."""
    if isinstance(size, int):
        return size
    return int(size.node.expr) if size.node.expr.is_number else size.node.expr


def shape_of(node: fx.Node) -> list[int | sympy.Expr]:
    """Shape with ints where static and sympy expressions where the batch size enters."""
    return [size_of(s) for s in value(node).shape]


def rowwise(program: Program, node: Any) -> bool:
    """Whether the node is a tensor whose dim 0 is exactly the batch and whose other dims are static."""
    if not is_tensor(node):
        return False
    shape = shape_of(node)
    return bool(shape) and shape[0] == program.batch and all(isinstance(s, int) for s in shape[1:])


def tail(node: fx.Node) -> tuple[int, ...]:
    """Static shape after the batch dimension."""
    return tuple(int(s) for s in value(node).shape[1:])


def elements_per_row(node: fx.Node) -> int:
    """Elements of a tensor per row of the batch, wherever the batch lies in it."""
    shape = shape_of(node)
    static = prod(s for s in shape if isinstance(s, int))
    sizes = [s for s in shape if not isinstance(s, int)]
    if len(sizes) == 1 and sizes[0].is_Symbol:  # nearly all, and substituting is slow
        return static
    one, two = (prod(int(s.subs(dict.fromkeys(s.free_symbols, n))) for s in sizes) * static for n in (1, 2))
    return two - one


def signature(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen call by the names of its schema, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    found: dict[str, Any] = {}
    for i, a in enumerate(schema.arguments):
        if a.name in node.kwargs:
            found[a.name] = node.kwargs[a.name]
        elif i < len(node.args):
            found[a.name] = node.args[i]
        elif a.has_default_value():
            found[a.name] = a.default_value
    return found


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        n = stack.pop()
        if n not in found:
            found.add(n)
            stack.extend(n.all_input_nodes)
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


UNTAGGED_POINTWISE = frozenset(
    {
        aten.to.dtype,
        aten._to_copy.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.log_sigmoid.default,
        aten.hardswish.default,
    }
)
"""Elementwise operators that torch does not tag so."""


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result is made of the operands' at its place, by no chance."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not is_tensor(node) or is_random(node):
        return False
    return torch.Tag.pointwise in target.tags or target in UNTAGGED_POINTWISE


def is_random(node: fx.Node) -> bool:
    """Whether the operator draws random numbers (dropout of nothing does not)."""
    target = node.target
    if isinstance(target, Leaf):
        return target.call.drops
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    args = signature(node)
    rate = args.get("p", args.get("dropout_p", args.get("dropout", 1.0)))
    return bool(args.get("train", True)) and rate != 0


def mutates(node: fx.Node) -> bool:
    """Whether an operator writes to an operand."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.to.other})
"""Operators that return their operand in another dtype or place, or itself if it is so already."""


def is_view(node: fx.Node) -> bool:
    """Whether what an operator returns shares memory with an operand."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(r.alias_info is not None for r in schema.returns):
        return False
    if node.target not in CASTS:
        return True
    new: torch.dtype = value(node).dtype
    old: torch.dtype = value(node.args[0]).dtype
    # one of floating point to another is a copy too, except in float64, where capture compares graph and model
    return bool(new == old or (new.is_floating_point and old.is_floating_point))


def is_pure(node: fx.Node) -> bool:
    """Whether a call is known to change nothing: no buffer, no running statistics, no state of a user's forward."""
    return not (mutates(node) or node.target is aten.batch_norm.default or isinstance(node.target, Leaf))


def user_line(node: fx.Node) -> str:
    """``file:line`` of the user's code that made this node; empty if unknown."""
    lines = [x.strip() for x in (node.meta.get("stack_trace") or "").splitlines() if x.strip().startswith("File")]
    for line in reversed(lines):
        path = line.split('"')[1]
        if not path.startswith(LIBRARIES):
            return f"{path}:{line.split('line ')[1].split(',')[0]}"
    return ""


def where(node: fx.Node) -> str:
    """The node for an error text: operator and user's line."""
    line = user_line(node)
    return f"{target_name(node)}" + (f" at {line}" if line else "")


def target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def canonical(program: Program, annotate: dict[fx.Node, Any] | None = None) -> str:
    """Graph text with renumbered names, shapes and (``annotate``) placements; equal for equal graphs."""
    return canonical_graph(program.graph, program.sources, annotate)


def canonical_graph(graph: fx.Graph, sources: dict[str, Source], annotate: dict[fx.Node, Any] | None = None) -> str:
    names: dict[fx.Node, str] = {}
    lines = []
    calls = 0

    for node in graph.nodes:
        if node.op == "placeholder":
            source = sources.get(node.name)
            names[node] = f"{source.kind}:{source.name}" if source else node.name
            if not node.users:
                continue
            lines.append(f"{names[node]}{_shape_text(node)}")
        elif node.op == "output":
            lines.append(f"return {_text(node.args[0], names)}")
        else:
            names[node] = f"%{calls}"
            calls += 1
            args = [_text(a, names) for a in node.args]
            args += [f"{k}={_text(v, names)}" for k, v in node.kwargs.items()]
            mark = f"  # {annotate[node]}" if annotate and node in annotate else ""
            lines.append(f"{names[node]}{_shape_text(node)} = {target_name(node)}({', '.join(args)}){mark}")
    return "\n".join(lines) + "\n"


def _text(x: Any, names: Mapping[fx.Node, str]) -> str:
    """An argument, nodes by their names."""
    if isinstance(x, fx.Node):
        return names[x]
    if isinstance(x, list | tuple):
        return "[" + ", ".join(_text(y, names) for y in x) + "]"
    return x.type if isinstance(x, torch.device) else str(x)  # ranks have GPUs of different numbers


def _shape_text(node: fx.Node) -> str:
    if not is_tensor(node):
        return ""
    return (
        "[" + ",".join(str(s) if isinstance(s, int) else "b" if s.is_Symbol else str(s) for s in shape_of(node)) + "]"
    )


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


PURE_PYTHON = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.getitem}

"""Tracers: the rungs of the ladder. Each makes a `Program` of a probe, or says why it can't.

export   torch.export, non-strict, with a dynamic batch dimension
dynamo   Dynamo's full graph of torch functions (Python's control flow on sizes, ``len(tensor)`` and numpy are its
         strength), replayed into torch.export
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import _trace
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, ShapeEnv

from descompiler.dynamic.stand_in import named_stand_ins
from descompiler.errors import CaptureError, innermost
from descompiler.graph.nodes import Source, aten
from descompiler.graph.program import Program
from descompiler.model.probe import Flat
from descompiler.model.sparse import register_compressed
from descompiler.ops.local import differentiable


def trace_export(traced: Flat, tensors: list[Tensor], template: nn.Module) -> Program:
    """`torch.export`, non-strict, with a dynamic batch dimension.

    Raises
    ------
    CaptureError
        If tracing fails.
    """
    with traceable_len(traced):
        return export_program(traced, traced, tensors, template)


def trace_dynamo(traced: Flat, tensors: list[Tensor], template: nn.Module) -> Program:
    """Dynamo's full graph, exported.

    Raises
    ------
    CaptureError
        If there is a graph break, or the graph can't be exported.
    """
    graphs: list[fx.GraphModule] = []
    calls: list[tuple[Any, ...]] = []

    def backend(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)

        def run(*values: Any) -> Any:
            calls.append(values)
            return graph(*values)

        return run

    inputs = [t.clone() for t in tensors]  # each its own object: they are told apart by identity
    for t in inputs:
        torch._dynamo.mark_dynamic(t, 0)
    options = {
        "reorderable_logging_functions": {print},
        "allow_rnn": True,
        "capture_scalar_outputs": True,
        "capture_dynamic_output_shape_ops": True,
    }
    code = Flat.forward.__code__.replace()  # Dynamo's cache, and its limit, belong to a code object
    forward = types.FunctionType(code, Flat.forward.__globals__)
    try:
        with torch._dynamo.config.patch(options), _quiet(), _sizes_stay_symbols() as fixed:
            torch.compile(forward, backend=backend, fullgraph=True, dynamic=False)(traced, *inputs)
    except Exception as error:  # a tracer raises whatever the user's code and torch do; it is reported
        raise CaptureError(fixed[0] if fixed else first_line(error)) from error
    if len(graphs) != 1 or len(calls) != 1:
        raise CaptureError(f"forward became {len(graphs)} graphs")
    replay = _Replay(traced.model, graphs[0], calls[0], inputs)
    program = export_program(replay, traced, tensors, template, guarded=True)
    return replace(program, guards=(*program.guards, *_dynamo_guards(graphs[0], program.batch)))


def _dynamo_guards(graph: fx.GraphModule, batch: sympy.Symbol | None) -> list[sympy.Basic]:
    """What Dynamo has assumed of the batch size: its graph has one way through each branch on it."""
    values = (n.meta.get("example_value") for n in graph.graph.nodes if n.op == "placeholder")
    sizes: list[Any] = [s for x in values if isinstance(x, Tensor) for s in x.shape]
    nodes = [s.node for s in sizes if isinstance(s, torch.SymInt)]
    return _guards_of(nodes[0].shape_env, batch, {s for n in nodes for s in n.expr.free_symbols}) if nodes else []


def _guards_of(env: ShapeEnv, batch: sympy.Symbol | None, symbols: set[sympy.Symbol]) -> list[sympy.Basic]:
    """Conditions on the batch size; ``symbols`` are all that stand for it."""
    found = [g.expr for g in env.guards if g.expr.free_symbols <= symbols]
    return [g for g in (x.subs(dict.fromkeys(x.free_symbols, batch)) for x in found) if g not in (True, sympy.true)]


class _Replay(nn.Module):
    """Runs a graph whose placeholders were the model's parameters and buffers, the inputs, and their sizes."""

    def __init__(self, model: nn.Module, graph: fx.GraphModule, values: tuple[Any, ...], inputs: list[Tensor]):
        super().__init__()
        self.model = model
        self.training = model.training
        state = {id(p): n for n, p in model.named_parameters()} | {id(b): n for n, b in model.named_buffers()}
        position = {id(t): i for i, t in enumerate(inputs)}
        placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        sizes: dict[str, tuple[int, int]] = {}
        for node, value in zip(placeholders, values, strict=True):
            if id(value) in position:
                for dim, size in enumerate(node.meta["example_value"].shape):
                    sizes.setdefault(str(size), (position[id(value)], dim))
        self.kinds: list[tuple[str, Any]] = []
        for node, value in zip(placeholders, values, strict=True):
            if id(value) in position:
                self.kinds.append(("input", position[id(value)]))
            elif id(value) in state:
                self.kinds.append(("state", state[id(value)]))
            elif isinstance(value, Tensor):
                self.kinds.append(("constant", value))
            elif str(node.meta["example_value"]) in sizes:
                self.kinds.append(("size", sizes[str(node.meta["example_value"])]))
            else:
                raise CaptureError(f"the graph takes {node.name}, which is no tensor of the model or of its inputs")
        self._graph = [graph]  # no submodule: it holds no state

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        state = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        values = []
        for kind, what in self.kinds:
            if kind == "input":
                values.append(tensors[what])
            elif kind == "state":
                values.append(state[what])
            elif kind == "size":
                values.append(tensors[what[0]].shape[what[1]])
            else:
                values.append(what)
        with fx.traceback.preserve_node_meta():  # the user's lines, not those of Dynamo's graph
            return list(fx.Interpreter(self._graph[0]).run(*values))


def export_program(
    module: nn.Module, traced: Flat, tensors: list[Tensor], template: nn.Module, *, guarded: bool = False
) -> Program:
    """Export; ``guarded``: conditions on the batch size are the program's guards, and no failure.

    Raises
    ------
    CaptureError
        Whatever export raises.
    """
    batch = torch.export.Dim("batch", min=2)
    registered = register_compressed(traced.model)
    try:
        with _quiet(), _remembering_no_operator(), _sizes_stay_symbols() as fixed, _conditions(guarded) as environments:
            exported = torch.export.export(
                module, tuple(tensors), dynamic_shapes=(tuple({0: batch} for _ in tensors),), strict=False
            )
    except Exception as error:  # as above
        raise CaptureError(fixed[0] if fixed else first_line(error)) from error
    program = _program_of(exported, template, traced, registered)
    guards = [g for env in environments for g in _guards_of(env, program.batch, set(env.var_to_val))]
    return replace(program, guards=tuple(guards))


def _remembering_no_operator() -> Any:
    """A trace's sizes are symbols of its own: torch would look for operators that it has seen, and find few of them.

    A quarter of the time of an export, of 4 tables and of 100.
    """
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)


@contextlib.contextmanager
def _conditions(kept: bool) -> Iterator[list[ShapeEnv]]:
    """Export goes on where forward branches on the batch size; the environments that have the conditions."""
    environments: list[ShapeEnv] = []
    solve = _trace.produce_guards_and_solve_constraints

    def solving(fake_mode: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return solve(fake_mode, *args, **kwargs)
        except ConstraintViolationError as error:
            if not kept or "specialized it to be a constant" in str(error):
                raise
            environments.append(fake_mode.shape_env)

    _trace.produce_guards_and_solve_constraints = solving
    try:
        yield environments
    finally:
        _trace.produce_guards_and_solve_constraints = solve


@contextlib.contextmanager
def traceable_len(model: nn.Module) -> Iterator[None]:
    """In the code of the model's classes, ``len(tensor)`` is the traced size: Python's has to be an int."""

    def traceable(x: Any) -> Any:
        return x.shape[0] if isinstance(x, Tensor) and x.dim() else len(x)

    classes = {c for m in model.modules() for c in type(m).__mro__}
    functions = [f for c in classes for f in vars(c).values() if isinstance(f, types.FunctionType)]
    spaces = {id(f.__globals__): f.__globals__ for f in functions}  # not all of a module: some are made by exec
    ours = ("torch.", "descompiler.")
    mine = [s for s in spaces.values() if "len" not in s and not str(s.get("__name__")).startswith(ours)]
    try:
        for space in mine:
            space["len"] = traceable
        yield
    finally:
        for space in mine:
            del space["len"]


@contextlib.contextmanager
def _sizes_stay_symbols() -> Iterator[list[str]]:
    """A trace ends where the batch size becomes a number: torch would go on, and say so without the user's line.

    What it goes on with is long where a list is made of a batch's values.

    Raises
    ------
    CaptureError
        With the line, in what is yielded too: torch and the user's code may raise another one from it, or go on.
    """
    reasons: list[str] = []
    unwatched = ShapeEnv._set_replacement

    def watching(env: ShapeEnv, symbol: Any, target: Any, message: str) -> None:
        if getattr(target, "is_Integer", False) and symbol in env.var_to_val:  # no size that depends on values
            stack = torch._guards.TracingContext.extract_stack() or traceback.extract_stack()  # Dynamo runs no code
            place = innermost(stack)
            reasons.append(
                f"the batch size becomes a number{f' at {place}' if place else ''}: forward depends on it "
                "(int(x.shape[0]), x.tolist(), a shape with a number in it); take sizes from the inputs as they are"
            )
            raise CaptureError(reasons[0])
        unwatched(env, symbol, target, message)

    ShapeEnv._set_replacement = watching  # type: ignore[assignment,method-assign]
    try:
        yield reasons
    finally:
        ShapeEnv._set_replacement = unwatched  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A tracer that fails is followed by the next: what it prints and logs of that is not the user's business."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def first_line(error: Exception) -> str:
    """The kind of an error and the first lines of its text that say something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:400]


def _copy_inline(source: fx.GraphModule, graph: fx.Graph, found: dict[fx.Node, Any], *, grad: bool = True) -> Any:
    """Copy a graph, the regions in it that are graphs of their own inlined; returns what it returns.

    Those of ``torch.no_grad`` return values that send no gradient back.
    """
    regions = torch.ops.higher_order
    for node in source.graph.nodes:
        if node in found:
            continue
        if node.op == "output":
            return fx.map_arg(node.args[0], lambda n: found[n])
        if node.op == "get_attr" and isinstance(getattr(source, str(node.target), None), fx.GraphModule):
            found[node] = getattr(source, str(node.target))
        elif node.target is regions.wrap_with_set_grad_enabled or node.target is regions.wrap_with_autocast:
            count = 2 if node.target is regions.wrap_with_set_grad_enabled else 5
            settings, arguments = node.args[: count - 1], node.args[count - 1 :]
            inner = found[arguments[0]]
            if count == 5 and settings[2]:
                raise CaptureError("autocast chooses dtypes in forward")
            if count == 2 and settings[0] and not grad:
                raise CaptureError("gradients are enabled within torch.no_grad")
            places = [n for n in inner.graph.nodes if n.op == "placeholder"]
            given = dict(zip(places, fx.map_arg(arguments[1:], lambda n: found[n]), strict=True))
            still = grad and (count == 5 or bool(settings[0]))
            found[node] = _copy_inline(inner, graph, given, grad=still)
            if grad and not still:
                found[node] = fx.map_arg(found[node], lambda n: _detached(graph, n))
        elif node.target is operator.getitem and not isinstance(found[node.args[0]], fx.Node):
            found[node] = found[node.args[0]][node.args[1]]
        else:
            found[node] = graph.node_copy(node, lambda n: found[n])
    raise CaptureError("the graph returns nothing")


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if not isinstance(node.meta.get("val"), Tensor) or not differentiable(node.meta["val"]):
        return node
    detached = graph.call_function(aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached


def _program_of(exported: Any, template: nn.Module, traced: Flat, registered: set[str]) -> Program:
    """Name the placeholders; constants that share a parameter's storage are that parameter.

    ``registered``: buffers of the traced copy that the model holds as plain attributes, so that they are constants.

    Non-strict export lifts parameters that a module holds in a plain list as constants: right values, lost gradients.
    """
    by_pointer = {p.data_ptr(): n for n, p in traced.model.named_parameters() if p.numel()}
    first = {id(p): n for n, p in traced.model.named_parameters()}
    canonical = {n: first[id(p)] for n, p in traced.model.named_parameters(remove_duplicate=False)}  # tied parameters
    buffers = dict(traced.model.named_buffers())
    sources: dict[str, Source] = {}
    constants: dict[str, Tensor] = {}
    kinds = torch.export.graph_signature.InputKind
    for spec in exported.graph_signature.input_specs:
        name, target = spec.arg.name, spec.target
        if spec.kind == kinds.USER_INPUT:
            sources[name] = Source("input", name)
        elif spec.kind == kinds.PARAMETER:
            sources[name] = Source("parameter", canonical[target.removeprefix("model.")])
        elif spec.kind == kinds.BUFFER and target.removeprefix("model.") in registered:
            sources[name] = Source("constant", target)
            constants[target] = buffers[target.removeprefix("model.")].detach().clone()
        elif spec.kind == kinds.BUFFER:
            sources[name] = Source("buffer", target.removeprefix("model."))
        elif spec.kind == kinds.CONSTANT_TENSOR:
            tensor = exported.constants[target]
            strided = tensor.layout is torch.strided  # a sparse one has no storage of its own
            if strided and tensor.is_floating_point() and tensor.data_ptr() in by_pointer:
                sources[name] = Source("parameter", by_pointer[tensor.data_ptr()])
            else:
                sources[name] = Source("constant", target)
                constants[target] = tensor.detach().clone()
        else:
            raise CaptureError(f"the graph has an input of kind {spec.kind}, which is not supported")
    graph = fx.Graph()
    out = _copy_inline(exported.graph_module, graph, {})
    graph.output(list(out) if isinstance(out, tuple | list) else [out])
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:  # says what dtype the trace saw, in front of a cast
            graph.erase_node(node)
    # Integer buffers (offsets of fields, masks) are read as constants by passes; the module keeps them as buffers.
    for name, b in buffers.items():
        if not b.is_floating_point() and b.layout is torch.strided and b.numel() <= 1 << 16 and not b.is_complex():
            constants[name] = b.detach().clone()
    batch = next(
        (
            s.node.expr
            for n in graph.nodes
            if n.op == "placeholder" and sources[n.name].kind == "input"
            for s in n.meta["val"].shape[:1]
            if not isinstance(s, int)
        ),
        None,
    )
    if batch is None:
        raise CaptureError("the batch size was specialised while tracing: forward depends on its value")
    parameters = {n: p.detach().requires_grad_(p.requires_grad) for n, p in template.named_parameters()}
    dynamic = frozenset(name for name, _ in named_stand_ins(template))
    return Program(graph, sources, constants, parameters, traced.training, batch, dynamic=dynamic)

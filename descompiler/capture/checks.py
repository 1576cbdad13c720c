"""Checks of a captured graph: it reproduces the model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from descompiler.errors import CaptureError
from descompiler.graph.leaf import Leaf
from descompiler.graph.program import Program
from descompiler.graph.rewrite import copy_program, interpret
from descompiler.model.float64 import widen
from descompiler.model.folded import has_own_values
from descompiler.model.probe import Flat, run_eager
from descompiler.model.random_state import seed_torch
from descompiler.model.reach import reached
from descompiler.model.sparse import equal
from descompiler.ops.local import real_parts

CAPTURE_TOLERANCE = 1e-9
"""Relative error allowed between the module and its captured graph: operators are the same, their order may not be."""


CAPTURE_ROUNDING = 64 * torch.finfo(torch.float64).eps
"""Share of the model's largest gradient below which a gradient is rounding: a bias in front of a batch norm has
gradient zero, a sum of terms that cancel."""


class CannotRunError(CaptureError):
    """The captured graph raised."""


def probe_values(program: Program, probe: Flat, tensors: list[Tensor]) -> dict[str, Any]:
    """A value for each placeholder, parameters and buffers from a probe."""
    params = dict(probe.model.named_parameters(remove_duplicate=False))
    buffers = dict(probe.model.named_buffers(remove_duplicate=False))
    queue = iter(tensors)
    values: dict[str, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            source = program.sources[node.name]
            if source.kind == "input":
                values[node.name] = next(queue).clone()  # forward may change it in place
            elif source.kind == "parameter":
                values[node.name] = params[source.name]
            elif source.kind == "buffer":
                values[node.name] = buffers[source.name].clone()
            else:
                values[node.name] = program.constant(source.name)
    return values


def asks_for(program: Program, dtypes: Collection[torch.dtype]) -> bool:
    """Whether an operator is told to make tensors of one of these dtypes: the code may have asked a tensor for its."""
    return any(
        isinstance(x, torch.dtype) and x in dtypes
        for n in program.graph.nodes
        for x in pytree.tree_leaves((n.args, n.kwargs))
    )


def program_in_float64(program: Program) -> Program:
    """A copy that makes and holds float64 where the program makes and holds float32; nodes keep their names."""
    copied = copy_program(program)

    def wide(x: Any) -> Any:
        wider = {torch.float32: torch.float64, torch.complex64: torch.complex128}
        return wider.get(x, x) if isinstance(x, torch.dtype) else x

    for node in copied.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), wide)
    constants = {n: widen(c) for n, c in program.constants.items()}
    return replace(copied, constants=constants, recipes={})


def renew_leaves(program: Program) -> None:
    """Let opaque leaves begin anew, as after no run."""
    for node in program.graph.nodes:
        if isinstance(node.target, Leaf):
            node.target.renew()


def check_reproduces(program: Program, probe: Flat, tensors: list[Tensor]) -> None:
    """Compare a graph with its model on one batch.

    A gradient of zeros is as good as none: leaves of a graph reach all that they hold, until it is emitted.

    Raises
    ------
    CaptureError
        For the first output or gradient that differs.
    """
    trained = {n: p for n, p in probe.model.named_parameters() if p.requires_grad}
    params = {n: p for n, p in trained.items() if has_own_values(p)}
    large = {n: p for n, p in trained.items() if n not in params}
    with probe.arithmetic():
        values = probe_values(program, probe, tensors)  # clones the buffers before eager changes them
    state = {n: b.clone() for n, b in probe.model.named_buffers()}
    try:
        eager = run_eager(probe, tensors)
    except Exception as error:  # whatever the user's forward raises
        raise CaptureError(
            f"the model itself can't run on {len(tensors[0])} rows: {type(error).__name__}: {error}"
        ) from error
    eager_gradients, eager_reach = _weighted_gradients(eager, list(params.values())), reached(eager, large)
    left = {n: b.clone() for n, b in probe.model.named_buffers()}
    for n, b in probe.model.named_buffers():
        b.copy_(state[n])
    seed_torch(11)
    try:
        with probe.arithmetic():
            graph, _ = interpret(program, values)
    except Exception as error:  # whatever an operator raises
        raise CannotRunError(
            f"the captured graph can't run on {len(tensors[0])} rows: {type(error).__name__}: {error}"
        ) from error
    if len(eager) != len(graph):
        raise CaptureError(f"the captured graph returns {len(graph)} tensors, the model {len(eager)}")
    graph_gradients = _weighted_gradients(graph, list(params.values()))
    if differing := sorted(eager_reach ^ reached(graph, large)):
        raise CaptureError(f"the captured graph does not reproduce whether {differing[0]!r} gets a gradient")
    for i, (a, b) in enumerate(zip(eager, graph, strict=True)):
        if a.shape != b.shape or relative_error(a, b) > CAPTURE_TOLERANCE:
            raise CaptureError(
                f"the captured graph does not reproduce output {i} of the model on {len(tensors[0])} rows"
            )
    written = {s.name: values[name] for name, s in program.sources.items() if s.kind == "buffer" and name in values}
    for name, buffer in left.items():
        by_graph = written.get(name, state[name])
        if not equal(buffer, by_graph) and relative_error(buffer.to_dense(), by_graph.to_dense()) > CAPTURE_TOLERANCE:
            raise CaptureError(f"the captured graph does not leave buffer {name!r} as the model does")
    sizes = [float(g.to_dense().nan_to_num().abs().max()) for g in eager_gradients if g is not None and g.numel()]
    rounding = CAPTURE_ROUNDING * max(sizes, default=0.0)
    for name, before, after in zip(params, eager_gradients, graph_gradients, strict=True):
        dense = [torch.zeros_like(params[name]) if g is None else g.to_dense() for g in (before, after)]
        near = torch.allclose(dense[0], dense[1], rtol=0.0, atol=rounding)
        if not near and relative_error(dense[0], dense[1]) > CAPTURE_TOLERANCE:
            raise CaptureError(f"the captured graph does not reproduce the gradient of parameter {name!r}")


def _weighted_gradients(outputs: list[Tensor], params: list[Tensor]) -> list[Tensor | None]:
    terms = [(o * weights_like(o)).sum() for o in map(real_parts, outputs) if o.requires_grad]
    if not terms or not params:
        return [None] * len(params)
    return list(torch.autograd.grad(sum(terms[1:], terms[0]), params, allow_unused=True))


def weights_like(x: Tensor) -> Tensor:
    """Weights of a tensor's elements for a sum whose gradient is checked: the same for each size, at random.

    Their mean is not zero: what a backward makes of the mean of a gradient would not be seen.
    """
    generator = torch.Generator().manual_seed(x.numel())
    return (0.5 + torch.randn(x.shape, generator=generator, dtype=torch.float64)).to(x)


def relative_error(a: Tensor, b: Tensor) -> float:
    if not a.numel() and not b.numel():
        return 0.0
    a, b = real_parts(a), real_parts(b)
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    if not torch.equal(a.isfinite(), b.isfinite().expand_as(a) if b.shape != a.shape else b.isfinite()):
        return float("inf")
    a, b = a.detach().nan_to_num(), b.detach().nan_to_num()
    return float((a - b).abs().max() / max(float(a.abs().max()), float(b.abs().max()), 1e-30))

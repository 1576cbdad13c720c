"""Tracers: each makes a `Program` of a probe."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from descompiler.errors import CaptureError, UnsupportedError
from descompiler.probe import Flat
from descompiler.program import Program, Source, aten


def trace_export(traced: Flat, tensors: list[Tensor], template: nn.Module) -> Program:
    """`torch.export`, non-strict, with a dynamic batch dimension.

    Raises
    ------
    CaptureError
        If tracing fails.
    """
    batch = torch.export.Dim("batch", min=2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                traced, tuple(tensors), dynamic_shapes=(tuple({0: batch} for _ in tensors),), strict=False
            )
    except UnsupportedError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CaptureError(
            f"torch.export could not capture the model: {type(error).__name__}: {first}. The model's forward must not "
            "branch on values of tensors, dim 0 of every input must be the batch, and its size must stay symbolic: "
            "x.shape[0], not len(x) or int(x.shape[0])"
        ) from error
    return _program_of(exported, template, traced)


def _program_of(exported: Any, template: nn.Module, traced: Flat) -> Program:
    """Name the placeholders; constants that share a parameter's storage are that parameter.

    Non-strict export lifts parameters that a module holds in a plain list as constants: right values, lost gradients.
    """
    by_pointer = {p.data_ptr(): n for n, p in traced.model.named_parameters() if p.numel()}
    first = {id(p): n for n, p in traced.model.named_parameters()}
    canonical = {n: first[id(p)] for n, p in traced.model.named_parameters(remove_duplicate=False)}  # tied parameters
    sources: dict[str, Source] = {}
    constants: dict[str, Tensor] = {}
    kinds = torch.export.graph_signature.InputKind
    for spec in exported.graph_signature.input_specs:
        name, target = spec.arg.name, spec.target
        if spec.kind == kinds.USER_INPUT:
            sources[name] = Source("input", name)
        elif spec.kind == kinds.PARAMETER:
            sources[name] = Source("parameter", canonical[target.removeprefix("model.")])
        elif spec.kind == kinds.BUFFER:
            sources[name] = Source("buffer", target.removeprefix("model."))
        elif spec.kind == kinds.CONSTANT_TENSOR:
            tensor = exported.constants[target]
            if tensor.is_floating_point() and tensor.data_ptr() in by_pointer:
                sources[name] = Source("parameter", by_pointer[tensor.data_ptr()])
            else:
                sources[name] = Source("constant", target)
                constants[target] = tensor.detach().clone()
        else:
            raise CaptureError(f"the graph has an input of kind {spec.kind}, which is not supported")
    graph = fx.Graph()
    out = graph.graph_copy(exported.graph, {})
    graph.output(list(out) if isinstance(out, tuple | list) else [out])
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:  # says what dtype the trace saw, in front of a cast
            graph.erase_node(node)
    # Integer buffers (offsets of fields, masks) are read as constants by passes; the module keeps them as buffers.
    for name, b in traced.model.named_buffers():
        if not b.is_floating_point() and b.numel() <= 1 << 16 and not b.is_complex():
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
    return Program(graph, sources, constants, parameters, traced.training, batch)

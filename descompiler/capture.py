"""Capture: from a user's module to a `Program`, accepted only after it reproduces the module.

The model is copied without its weights (`blueprint`), so that tables of any size can be captured anywhere. Tracing is
`torch.export`, non-strict, with a dynamic batch dimension. The graph then has to give the module's outputs and
gradients in float64, on the example batch and on a batch of another size with other values, and has to treat the rows
of a batch independently (batch norm and dropout aside), since each rank will see its own rows only.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from descompiler.errors import CaptureError, InputError, UnsupportedError
from descompiler.program import Pass, Program, Source, aten, interpret, is_tensor, rowwise, run_passes, shape_of, where

LARGE_ELEMENTS = 1 << 22
"""Parameters with more elements than this are probed through an overlapping view and without gradients."""

TOLERANCE_FLOAT64 = 1e-9
"""Relative error allowed between the module and its captured graph: operators are the same, their order may not be."""


@dataclass(frozen=True)
class Signature:
    """How forward is called: the nesting of its inputs, and of its outputs."""

    inputs: pytree.TreeSpec
    outputs: pytree.TreeSpec
    statics: tuple[Any, ...]  # non-tensor leaves by position, `Ellipsis` where a tensor goes

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Tensor leaves of a call, in the order of the graph's inputs.

        Raises
        ------
        InputError
            If the nesting differs from the example inputs', a non-tensor argument has another value, or the tensors
            disagree about the batch size (dim 0).
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.inputs:
            raise InputError(
                f"forward was compiled for inputs nested as {self.inputs}, and was called with {spec}; "
                "call it as in example_inputs, or compile again"
            )
        tensors: list[Tensor] = []
        for i, (leaf, static) in enumerate(zip(leaves, self.statics, strict=True)):
            if static is Ellipsis:
                if not isinstance(leaf, Tensor):
                    raise InputError(f"input {i} must be a tensor, as in example_inputs; it is {type(leaf).__name__}")
                tensors.append(leaf)
            elif leaf != static:
                raise InputError(f"input {i} was {static!r} when the model was compiled and is {leaf!r}: compile again")
        sizes = [t.shape[0] if t.dim() else None for t in tensors]
        if len(set(sizes)) > 1:
            raise InputError(f"dim 0 of every input is the batch; the inputs' sizes there are {sizes}")
        return tensors


def normalise_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as (args, kwargs): a tuple is positional, a dict of argument names is keyword."""
    if (
        isinstance(example_inputs, tuple)
        and len(example_inputs) == 2
        and (isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], dict))
    ):
        return example_inputs
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def blueprint(model: nn.Module) -> nn.Module:
    """A copy of the module whose parameters are on the meta device; buffers keep their values.

    Raises
    ------
    UnsupportedError
        If a buffer's values are not known because it is on the meta device, batch statistics aside.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    result = copy.deepcopy(model, memo)
    for prefix, module in result.named_modules():
        lost = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
        if not lost:
            continue
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for name, b in lost.items():
                module._buffers[name] = torch.empty_like(b, device="cpu")
            module.reset_running_stats()
        else:
            name = f"{prefix}.{next(iter(lost))}".lstrip(".")
            raise UnsupportedError(
                f"buffer {name!r} is on the meta device, so its values are not known; "
                "create it with device='cpu' (it is only the parameters that may be on meta)"
            )
    return result


def _probe_tensor(p: Tensor, device: torch.device, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random values of a parameter's shape; a large table is W[i, j] = base[i + j], which needs one column's memory."""
    if p.numel() <= LARGE_ELEMENTS or p.dim() != 2:
        return (0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(device, dtype)
    rows, cols = p.shape
    base = 0.3 * torch.randn(rows + cols, generator=generator, dtype=torch.float64)
    return base.to(device, dtype).as_strided((rows, cols), (1, 1))


def materialise(template: nn.Module, device: torch.device, *, double: bool) -> nn.Module:
    """A blueprint with random parameters, to trace and to probe."""
    generator = torch.Generator().manual_seed(20190904)
    memo: dict[int, Any] = {}
    for p in template.parameters():
        dtype = torch.float64 if double and p.is_floating_point() else p.dtype
        memo[id(p)] = nn.Parameter(_probe_tensor(p, device, generator, dtype), requires_grad=p.requires_grad)
    result = copy.deepcopy(template, memo)
    for module in result.modules():
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = b.to(device, torch.float64 if double and b.is_floating_point() else b.dtype)
    return result


class _Flat(nn.Module):
    """Calls the user's module from a flat list of tensors and flattens what it returns."""

    def __init__(self, model: nn.Module, spec: pytree.TreeSpec, statics: Sequence[Any]):
        super().__init__()
        self.model, self.spec, self.statics = model, spec, statics
        self.out_spec: pytree.TreeSpec | None = None

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        queue = iter(tensors)
        leaves = [next(queue) if s is Ellipsis else s for s in self.statics]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        out, self.out_spec = pytree.tree_flatten(self.model(*args, **kwargs))
        for i, o in enumerate(out):
            if not isinstance(o, Tensor):
                raise UnsupportedError(f"output {i} of forward is a {type(o).__name__}; every output must be a tensor")
        return out


def capture(
    template: nn.Module,
    example_inputs: Any,
    *,
    training: dict[str, bool] | None = None,
    passes: tuple[Pass, ...] = (),
) -> tuple[Program, Signature]:
    """Capture a module (a `blueprint`) as a program.

    Parameters
    ----------
    template : torch.nn.Module
        From `blueprint`.
    example_inputs : tuple or dict
        Inputs of one forward; at least one row.
    training : dict of str to bool, optional
        The ``training`` flag of each module by name; the template's own if not given.
    passes : tuple of Pass, optional
        Applied to the graph before it has to reproduce the module.

    Returns
    -------
    Program, Signature

    Raises
    ------
    CaptureError
        If tracing fails, or the graph does not reproduce the module.
    UnsupportedError
        If an operator mixes the rows of a batch.
    InputError
        If the example inputs can't be run.
    """
    args, kwargs = normalise_inputs(example_inputs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    statics = tuple(Ellipsis if isinstance(x, Tensor) else x for x in leaves)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    tensors = _at_least_two_rows(tensors)
    device = tensors[0].device

    def flat(double: bool) -> _Flat:
        model = materialise(template, device, double=double)
        for name, module in model.named_modules():
            module.training = module.training if training is None else training[name]
        result = _Flat(model, spec, statics)
        result.training = model.training
        return result

    probe = flat(double=True)
    try:
        _run_eager(probe, _double(tensors))
    except UnsupportedError:
        raise
    except Exception as error:
        raise InputError(
            f"the model can't run example_inputs ({type(error).__name__}: {error}); pass what its forward takes"
        ) from error

    traced = flat(double=False)
    dims = torch.export.Dim("batch", min=2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                traced, tuple(tensors), dynamic_shapes=(tuple({0: dims} for _ in tensors),), strict=False
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
    assert probe.out_spec is not None  # from the eager run: export undoes what forward writes to its module
    program = run_passes(_program_of(exported, template, traced), passes)
    signature = Signature(spec, probe.out_spec, statics)
    for batch in (tensors, _other_batch(tensors)):
        _check_reproduces(program, probe, _double(batch))
    _check_rows_independent(program, probe, _double(tensors))
    return program, signature


def _at_least_two_rows(tensors: list[Tensor]) -> list[Tensor]:
    if not tensors:
        raise InputError("example_inputs holds no tensor")
    sizes = [t.shape[0] if t.dim() else 0 for t in tensors]
    if len(set(sizes)) != 1 or not sizes[0]:
        raise InputError(f"dim 0 of every example input is the batch, at least 1; the sizes there are {sizes}")
    return [torch.cat([t, t]) for t in tensors] if sizes[0] == 1 else list(tensors)


def _double(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().double() if t.is_floating_point() else t.detach() for t in tensors]


def _other_batch(tensors: list[Tensor]) -> list[Tensor]:
    """Another size and other values: rows drawn from the example's, each input on its own."""
    rows = tensors[0].shape[0]
    generator = torch.Generator().manual_seed(7)
    size = 2 * rows + 1 if rows < 64 else rows // 2 + 1
    return [t[torch.randint(rows, (size,), generator=generator).to(t.device)] for t in tensors]


def _run_eager(probe: _Flat, tensors: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(11)
    return probe(*tensors)


def _program_of(exported: Any, template: nn.Module, traced: _Flat) -> Program:
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


def probe_values(program: Program, probe: _Flat, tensors: list[Tensor]) -> dict[str, Any]:
    """A value for each placeholder, parameters and buffers from a probe."""
    params = dict(probe.model.named_parameters(remove_duplicate=False))
    buffers = dict(probe.model.named_buffers(remove_duplicate=False))
    queue = iter(tensors)
    values: dict[str, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            source = program.sources[node.name]
            if source.kind == "input":
                values[node.name] = next(queue)
            elif source.kind == "parameter":
                values[node.name] = params[source.name]
            elif source.kind == "buffer":
                values[node.name] = buffers[source.name].clone()
            else:
                values[node.name] = program.constants[source.name]
    return values


def _check_reproduces(program: Program, probe: _Flat, tensors: list[Tensor]) -> None:
    params = {n: p for n, p in probe.model.named_parameters() if p.requires_grad and p.numel() <= LARGE_ELEMENTS}
    for p in probe.model.parameters():
        if p.numel() > LARGE_ELEMENTS:
            p.requires_grad_(False)
    values = probe_values(program, probe, tensors)  # clones the buffers before eager changes them
    state = {n: b.clone() for n, b in probe.model.named_buffers()}
    eager = _run_eager(probe, tensors)
    eager_gradients = _gradients(eager, list(params.values()))
    for n, b in probe.model.named_buffers():
        b.copy_(state[n])
    torch.manual_seed(11)
    graph, _ = interpret(program, values)
    graph_gradients = _gradients(graph, list(params.values()))
    for i, (a, b) in enumerate(zip(eager, graph, strict=True)):
        if a.shape != b.shape or _relative_error(a, b) > TOLERANCE_FLOAT64:
            raise CaptureError(
                f"the captured graph does not reproduce output {i} of the model on {len(tensors[0])} rows"
            )
    for name, before, after in zip(params, eager_gradients, graph_gradients, strict=True):
        dense = [torch.zeros(()) if g is None else g.to_dense() for g in (before, after)]
        if _relative_error(dense[0], dense[1]) > TOLERANCE_FLOAT64:
            raise CaptureError(f"the captured graph does not reproduce the gradient of parameter {name!r}")


def _gradients(outputs: list[Tensor], params: list[Tensor]) -> list[Tensor | None]:
    terms = [(o * torch.linspace(-1, 1, o.numel()).to(o).reshape(o.shape)).sum() for o in outputs if o.requires_grad]
    if not terms or not params:
        return [None] * len(params)
    return list(torch.autograd.grad(sum(terms[1:], terms[0]), params, allow_unused=True))


def _relative_error(a: Tensor, b: Tensor) -> float:
    if not a.numel() and not b.numel():
        return 0.0
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    if not torch.equal(a.isfinite(), b.isfinite().expand_as(a) if b.shape != a.shape else b.isfinite()):
        return float("inf")
    a, b = a.detach().nan_to_num(), b.detach().nan_to_num()
    return float((a - b).abs().max() / max(float(a.abs().max()), float(b.abs().max()), 1e-30))


RANDOM = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}


def _check_rows_independent(program: Program, probe: _Flat, tensors: list[Tensor]) -> None:
    """Run the graph on a batch and on its two halves; the first node whose halves do not add up is named.

    Batch norm is computed by the compiler's own operator over the global batch, and dropout draws independently for
    each row, so both pass their input on here.
    """
    for node in program.graph.nodes:
        if node.op == "output":
            for i, o in enumerate(node.args[0]):
                if not (is_tensor(o) and shape_of(o) and shape_of(o)[0] == program.batch):
                    raise UnsupportedError(
                        f"output {i} of forward ({where(o)}) has no batch dimension in front: it combines the rows of "
                        "a batch. Return one value per row and reduce them in the loss"
                    )

    def override(node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target in RANDOM or (node.target is aten.batch_norm.default and args[5]):
            return args[0].clone()
        return NotImplemented

    rows = len(tensors[0])
    cut = (rows + 1) // 2
    with torch.no_grad():
        runs = [
            interpret(program, probe_values(program, probe, part), override)
            for part in (tensors, [t[:cut] for t in tensors], [t[cut:] for t in tensors])
        ]
    (whole, env), (first, env1), (second, env2) = runs

    def differs(a: Tensor, b: Tensor, c: Tensor) -> bool:
        both = torch.cat([b, c])
        return both.shape != a.shape or _relative_error(a.double(), both.double()) > TOLERANCE_FLOAT64

    if not any(differs(*x) for x in zip(whole, first, second, strict=True)):
        return
    for node in program.graph.nodes:
        if node.op != "call_function" or not is_tensor(node):
            continue
        if not rowwise(program, node):
            if any(not isinstance(s, int) for s in shape_of(node)[1:]):
                raise _coupled(node)
        elif differs(env[node], env1[node], env2[node]):
            raise _coupled(node)
    raise UnsupportedError("an operator of the model mixes the rows of a batch")


def _coupled(node: fx.Node) -> UnsupportedError:
    return UnsupportedError(
        f"{where(node)} mixes the rows of a batch, so each rank's own rows would give another result than the global "
        "batch; move it into the loss, or out of the model"
    )

"""Programs as text: canonical, so that equal graphs print alike, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from descompiler.graph.nodes import (
    DROPOUT_OPERATORS,
    MODE_ARGUMENTS,
    Source,
    is_tensor,
    shape_of,
    tail,
    target_name,
    value,
)
from descompiler.graph.program import Program
from descompiler.model.sparse import parts_of


def canonical(program: Program, annotate: dict[fx.Node, Any] | None = None) -> str:
    """Graph text with renumbered names, shapes and (``annotate``) placements; equal for equal graphs."""
    return canonical_graph(program.graph, program.sources, annotate)


def canonical_graph(graph: fx.Graph, sources: dict[str, Source], annotate: dict[fx.Node, Any] | None = None) -> str:
    lines = named_lines(graph, sources, annotate)
    return "\n".join(line for n, (_, line) in lines.items() if n.op != "placeholder" or n.users) + "\n"


def named_lines(
    graph: fx.Graph, sources: dict[str, Source], annotate: dict[fx.Node, Any] | None = None
) -> dict[fx.Node, tuple[str, str]]:
    """Each node's name, and its line, in canonical text; the output's name is empty."""
    names: dict[fx.Node, str] = {}
    lines: dict[fx.Node, tuple[str, str]] = {}
    calls = 0

    for node in graph.nodes:
        if node.op == "placeholder":
            source = sources.get(node.name)
            names[node] = f"{source.kind}:{source.name}" if source else node.name
            line = f"{names[node]}{_shape_text(node)}"
        elif node.op == "output":
            names[node], line = "", f"return {_text(node.args[0], names)}"
        else:
            names[node] = f"%{calls}"
            calls += 1
            args = [_text(a, names) for a in node.args]
            args += [f"{k}={_text(v, names)}" for k, v in node.kwargs.items()]
            mark = f"  # {annotate[node]}" if annotate and node in annotate else ""
            line = f"{names[node]}{_shape_text(node)} = {target_name(node)}({', '.join(args)}){mark}"
        lines[node] = names[node], line
    return lines


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


def fingerprint(program: Program) -> str:
    """Equal exactly if the same operators are applied to the same parameters and constants.

    The batch size, dropout, the training flags of operators and the counters that batch norms keep do not count.
    """
    digest = hashlib.sha256()
    names: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            source = program.sources[node.name]
            names[node] = f"{source.kind}:{source.name}"
            if source.kind == "input":
                names[node] += f" {tail(node)} {value(node).dtype}"
            elif source.kind != "parameter" and source.name in program.constants:  # by value: names depend on flags
                c = program.constants[source.name].detach().cpu()
                content = hashlib.sha256(f"{c.dtype} {tuple(c.shape)}".encode())
                for part in parts_of(c):
                    content.update(part.contiguous().numpy().tobytes())
                names[node] = content.hexdigest()
            continue
        if node.target in DROPOUT_OPERATORS:
            names[node] = names[node.args[0]]
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and not node.users:
            continue
        args = list(node.args)
        if schema is not None:
            args = [a for a, x in zip(args, schema.arguments, strict=False) if x.name not in MODE_ARGUMENTS]
        parts = [target_name(node), *(_text(a, names) for a in args)]
        # a plan made on a laptop's CPU is for the cluster's GPUs
        kwargs = {k: v for k, v in node.kwargs.items() if k not in MODE_ARGUMENTS and not isinstance(v, torch.device)}
        parts += [f"{k}={_text(v, names)}" for k, v in kwargs.items()]
        names[node] = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        if node.op == "output":
            digest.update(names[node].encode())
    for name, p in program.parameters.items():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}".encode())
    return digest.hexdigest()[:16]

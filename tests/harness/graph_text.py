"""Programs from their canonical text, so that a test of a pass can say which graph it is about.

The text is what `descompiler.graph.text.canonical` prints, and a little more about what the graph is given:

    input:x[b,4]                             floating point, with a gradient
    input:ids[b,2] < 6                       integers, from 0
    input:mask[b] bool
    parameter:table.weight[6,4]              a buffer likewise
    constant:offsets[2] = [0, 6]
    %0[b,2] = aten.add.Tensor(input:ids, constant:offsets)
    return [%0]

The shapes of calls may be left out; ``b`` is the batch size. All floating point is float64.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from descompiler.graph.nodes import PURE_PYTHON, Source, value
from descompiler.graph.program import Program
from descompiler.graph.rewrite import interpret
from descompiler.graph.text import canonical
from descompiler.ops.local import bag
from descompiler.ops.vocabulary import vocabulary

FUNCTIONS = {f.__name__: f for f in (*PURE_PYTHON, bag, vocabulary)}
"""What a graph may call besides ATen's operators."""

NAME = re.compile(r"%\d+|\b(?:input|parameter|buffer|constant):[\w.]+")
DECLARED = re.compile(r"(\w+):([\w.]+)\[(.*?)\](?: < (\d+)| (bool)| = (.*))?")


class GraphText:
    """A program that a text describes, and numbers for it.

    Attributes
    ----------
    program : Program
    said : dict of str to str
        What the text says of a placeholder behind its shape, by the name that it has there.
    limits : dict of str to int
        Below what a placeholder's integers are, by the name of its node.
    """

    def __init__(self, text: str) -> None:
        self.said: dict[str, str] = {}
        self.limits: dict[str, int] = {}
        self._mode = FakeTensorMode(shape_env=ShapeEnv())
        self._mode.cache_enabled = False  # to keep what a call gives takes longer than the call
        dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        self._batch = self._mode.from_tensor(torch.empty(7), symbolic_context=dynamic).shape[0]
        self.program = Program(fx.Graph(), {}, {}, {}, True, self._batch.node.expr)
        nodes: dict[str, fx.Node] = {}
        for line in text.strip().splitlines():
            if line.startswith("return"):
                self.program.graph.output(self._parse(line.removeprefix("return "), nodes))
            elif line.startswith("%"):
                name, _, call = line.partition(" = ")
                nodes[name.partition("[")[0]] = self._call(call, nodes)
            else:
                self._declare(line, nodes)

    def _declare(self, line: str, nodes: dict[str, fx.Node]) -> None:
        """A placeholder, with its fake value."""
        found = DECLARED.fullmatch(line)
        if found is None:
            raise ValueError(f"no placeholder, call or return: {line}")
        kind, name, sizes, limit, boolean, numbers = found.groups()
        node = self.program.graph.placeholder(name.replace(".", "_"))
        self.program.sources[node.name] = Source(kind, name)
        shape = [self._batch if s == "b" else int(s) for s in sizes.split(",") if s]
        dtype = torch.bool if boolean else torch.int64 if limit else torch.float64
        if numbers:
            c = torch.tensor(ast.literal_eval(numbers))
            self.program.constants[name] = c = c.double() if c.is_floating_point() else c
            dtype = c.dtype
        with self._mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        if kind == "parameter":
            self.program.parameters[name] = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        if limit:
            self.limits[node.name] = int(limit)
        nodes[f"{kind}:{name}"] = node
        self.said[f"{kind}:{name}"] = line.partition("]")[2]

    def _call(self, text: str, nodes: dict[str, fx.Node]) -> fx.Node:
        """A call, with its fake value."""
        name, _, rest = text.partition("(")
        args, kwargs = self._parse(f"_({rest}", nodes)
        node = self.program.graph.call_function(_function(name), tuple(args), kwargs)
        fake_args, fake_kwargs = fx.map_arg((node.args, node.kwargs), value)
        with self._mode:
            node.meta["val"] = node.target(*fake_args, **fake_kwargs)  # type: ignore[operator]
        return node

    def _parse(self, text: str, nodes: dict[str, fx.Node]) -> Any:
        """The value of an expression; of a call, its arguments."""
        found: list[str] = []

        def renamed(match: re.Match[str]) -> str:
            found.append(match[0])
            return f"node_{len(found) - 1}"

        def read(x: ast.expr) -> Any:
            match x:
                case ast.Call(args=args, keywords=keywords):
                    return [read(a) for a in args], {str(k.arg): read(k.value) for k in keywords}
                case ast.List(elts=elements):
                    return [read(e) for e in elements]
                case ast.Attribute(attr=name):  # torch.float64
                    return getattr(torch, name)
                case ast.Name(id=name) if name.startswith("node_"):
                    return nodes[found[int(name.removeprefix("node_"))]]
                case ast.Name(id=name):  # canonical text has no quotes
                    return name
            return ast.literal_eval(x)

        return read(ast.parse(NAME.sub(renamed, text), mode="eval").body)

    def print(self, program: Program, without: tuple[str, ...] = ()) -> str:
        """A program in this notation, except for some lines."""
        lines = []
        for line in canonical(program).splitlines():
            line = re.sub(rf"\b{program.batch}\b", "b", line)
            if not line.startswith(("%", "return")):
                name = line.partition("[")[0]
                constant = program.constants.get(name.removeprefix("constant:"))
                line += self.said[name] if constant is None else f" = {constant.tolist()}"
            lines.append(line)
        return "".join(f"{line}\n" for line in lines if line not in without)

    def numbers(self, rows: int) -> dict[str, Tensor]:
        """A value for each placeholder of the text; always the same."""
        generator = torch.Generator().manual_seed(0)
        result: dict[str, Tensor] = {}
        for node in self.program.graph.find_nodes(op="placeholder"):
            source, fake = self.program.sources[node.name], value(node)
            shape = [s if isinstance(s, int) else rows for s in fake.shape]
            if source.kind == "constant":
                result[node.name] = self.program.constants[source.name]
            elif fake.dtype.is_floating_point:
                x = torch.randn(shape, dtype=torch.float64, generator=generator)
                result[node.name] = x.requires_grad_(source.kind != "buffer")
            else:
                top = self.limits.get(node.name, 2)
                result[node.name] = torch.randint(top, shape, generator=generator).to(fake.dtype)
        return result


def _function(name: str) -> Any:
    """What a call's name stands for."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    _, operator, *overload = name.split(".")
    return getattr(getattr(torch.ops.aten, operator), overload[0] if overload else "default")


def run(program: Program, numbers: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A program's outputs, and the gradients of what has one; a program may know more constants than the numbers."""
    inputs = {k: x.detach().clone().requires_grad_(x.requires_grad) for k, x in numbers.items()}
    own = {k: program.constant(s.name) for k, s in program.sources.items() if s.kind == "constant"}
    torch.manual_seed(0)  # for dropout
    outputs, _ = interpret(program, inputs | own)
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for x in outputs:
        if x.requires_grad:
            total = total + (x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum()
    trained = [x for x in inputs.values() if x.requires_grad]
    if not (trained and total.requires_grad):
        return outputs, []
    return outputs, list(torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True))

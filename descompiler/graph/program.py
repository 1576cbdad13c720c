"""A model as a pure graph: what passes take and return.

The graph holds ATen operators (torch.export's training IR). Its placeholders are the model's parameters, buffers and
constants (by their original names, in `Program.sources`) and the tensors that the user passes to forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from descompiler.graph.nodes import Source, is_tensor, sizes_of, value
from descompiler.model.attributes import Place
from descompiler.ops.local import differentiable, widest


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
        The tracer that captured it (`descompiler.capture.ladder.RUNGS`).
    failures : tuple of Failure
        The tracers that were tried before, and why they failed.
    left_behind : tuple of str
        Attributes of the model in which its forward leaves values with a history; the graph does not.
    reads : frozenset of (str, str)
        Numbers and flags that forward reads: a module's path, and its attribute's name. The graph has their values.
    guards : tuple of sympy.Basic
        Conditions on the rows of the global batch, in ``batch``: forward branches on it, and the graph has one way.
    dynamic : frozenset of str
        The parameters that stand in for the rows of dynamic tables.
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
    left_behind: tuple[str, ...] = ()
    reads: frozenset[Place] = frozenset()
    guards: tuple[sympy.Basic, ...] = ()
    dynamic: frozenset[str] = frozenset()

    def accepts(self, rows: int) -> bool:
        """Whether the graph is that of batches of so many rows; of one as of two, which it was traced on at least."""
        return all(bool(g.subs(self.batch, max(rows, 2))) for g in self.guards)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The model's: the one that holds the numbers of all parameters."""
        return widest(self.parameters.values())

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """A dtype in which something crosses, as layouts say it: None if it is the model's."""
        return None if dtype == self.dtype else dtype

    def other_dtypes(self) -> set[torch.dtype]:
        """Those of parameters and values that can have gradients and are not of the model's dtype."""
        values = (value(n) for n in self.graph.nodes if is_tensor(n))
        return {x.dtype for x in (*self.parameters.values(), *values) if differentiable(x)} - {self.dtype}

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
        """A constant's value, computed anew in the arithmetic that is in force (see `descompiler.model.float64`)."""
        return self.recipes[name]() if name in self.recipes else self.constants[name]

    def note(self, text: str) -> None:
        self.journal.append(text)


def rowwise(program: Program, node: Any) -> bool:
    """Whether the node is a tensor whose dim 0 is exactly the batch and whose other dims are static."""
    if not is_tensor(node):
        return False
    shape = sizes_of(node)
    return bool(shape) and shape[0] == program.batch and all(isinstance(s, int) for s in shape[1:])

"""What is the same in all partitions of a program: the planner makes one for every choice that it tries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import fx

from descompiler.classify.behind import Behind
from descompiler.classify.scope import coupled_nodes
from descompiler.graph.nodes import elements_per_row, is_tensor, is_view, value
from descompiler.graph.program import Program, rowwise
from descompiler.layout.pieces import Pieces
from descompiler.region.cut import product_flops
from descompiler.tables.totals import Total, find_totals


@dataclass(frozen=True, eq=False)
class Known:
    """Of a program whose graph stays as it is; each found once, and only when asked."""

    program: Program

    @cached_property
    def behind(self) -> Behind:
        """What is behind each output."""
        return Behind(self.program)

    @cached_property
    def _replicated(self) -> dict[int, dict[str, Pieces]]:
        return {}

    def replicated(self, ranks: int) -> dict[str, Pieces]:
        """Every parameter whole on so many ranks; not to be changed."""
        if ranks not in self._replicated:
            parameters = self.program.parameters.items()
            self._replicated[ranks] = {n: Pieces.replicate(tuple(p.shape), ranks) for n, p in parameters}
        return self._replicated[ranks]

    @property
    def trained(self) -> frozenset[str]:
        """Parameters that get a gradient."""
        return self.behind.trained

    @cached_property
    def totals(self) -> list[Total]:
        """Sums over whole parameters."""
        return find_totals(self.program)

    @cached_property
    def activations(self) -> list[tuple[fx.Node, int, bool]]:
        """Values of floating point that are no view: elements a row, and whether they are rows of the batch."""
        return [
            (n, elements_per_row(n), rowwise(self.program, n))
            for n in self.program.graph.nodes
            if n.op == "call_function" and is_tensor(n) and value(n).is_floating_point() and not is_view(n)
        ]

    @cached_property
    def _flops(self) -> dict[int, dict[fx.Node, int]]:
        return {}

    def flops(self, rows: int) -> dict[fx.Node, int]:
        """Of matrix products on so many rows, forward and backward; not to be changed."""
        if rows not in self._flops:
            calls = (n for n in self.program.graph.nodes if n.op == "call_function")
            self._flops[rows] = {n: flops for n in calls if (flops := product_flops(n, rows))}
        return self._flops[rows]

    @cached_property
    def coupled(self) -> set[fx.Node]:
        """Nodes whose values for own rows need those of the global batch, or an exchange."""
        return coupled_nodes(self.program)

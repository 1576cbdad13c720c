"""Where to aggregate: a minimum vertex cut.

Given the splits of the tables, every node that a rule can place is either inside the substituted region (on the global
batch) or outside (own rows). Let I be the set inside. With B(v) the bytes, over all ranks and both directions, that v
takes to leave the region, S(v) the bytes that v saves inside (the all-reduce of gradients of co-located weights, the
statistics of batch norms), and W(v) the extra work of v inside, in bytes of equal time (`work_bytes`):

    minimise   sum of B(v) for v in I with a user outside        (`exit_bytes`; a tensor is sent once)
             + sum of S(v) for v not in I                        (`saved_bytes`)
             + sum of W(v) for v in I                            (`work_bytes`)
    such that  every lookup of a split table is in I;  if v is in I, so are its placed operands.

As a cut of a networkx graph (`cut_graph`): v becomes v -> (v, "out") with capacity B(v); (v, "out") -> u is unlimited
for each user u (if v is inside and u is not, v itself must be cut); u -> v is unlimited for operands v of u (closure);
source -> v has capacity S(v), unlimited for lookups; v -> sink has capacity W(v). v is inside if the node v is on the
source's side. `descompiler.region.named` gives the same graph to people.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import networkx as nx
import torch
from torch import fx

from descompiler.cost_models.operators import extra_flops, linear_flops
from descompiler.graph.arguments import operand, training_norm
from descompiler.graph.nodes import aten, is_tensor, shape_on, tail, value
from descompiler.graph.program import Program
from descompiler.layout.border import Exit
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import LOCAL, Local, Placement, Region, Shard, ranks_of
from descompiler.layout.spans import alike, spans_of
from descompiler.layout.transfer import narrow_size
from descompiler.region import flow
from descompiler.region.rule import Givens, Placed, Rule

SHAPED = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.unflatten.int,
        aten.expand.default,
    }
)
"""Operators whose numbers are sizes of the result: a part's follow from the part."""


@dataclass(frozen=True)
class Weights:
    """What the cut weighs: rows per rank, bytes per element of the model's dtype, and work that is worth a byte.

    Attributes
    ----------
    flops_per_byte : float
        Floating point operations that take as long as sending one byte: by default of a core of a CPU beside an
        Ethernet of 10 Gbit/s (some 50 GFlop/s and 1.25 GB/s); a calibrated cluster says its own.
    backward : bool
        Whether gradients are sent back.
    wire_dtype : torch.dtype or None
        As `descompiler.layout.layout.Layout` has it.
    global_ids : bool
        Whether every rank is given the global batch of what lookups read.
    """

    ranks: int
    rows: int
    itemsize: int = 4
    flops_per_byte: float = 40.0
    backward: bool = True
    wire_dtype: torch.dtype | None = None
    global_ids: bool = False

    def size_of(self, wire_dtype: torch.dtype | None) -> int:
        """Bytes of an element that crosses in a dtype; None: in the model's."""
        return self.itemsize if wire_dtype is None else wire_dtype.itemsize

    def narrow_size_of(self, wire_dtype: torch.dtype | None) -> int:
        """As `size_of`, of what may be rounded to cross."""
        return narrow_size(self.itemsize, wire_dtype, self.wire_dtype)

    def worth(self, flops_per_byte: float | None) -> Weights:
        """With the work that is worth a byte on a cluster, if it is known."""
        return self if flops_per_byte is None else replace(self, flops_per_byte=flops_per_byte)


@dataclass
class Candidates:
    """All nodes that rules can place, with the reasons of those that they can't (and that touch the region).

    Attributes
    ----------
    rules : dict of node to Rule
        That placed it.
    confined : frozenset of node
        Lists, masks, values without the batch in front: they can't leave the region, only what is made from them.
    """

    placed: dict[fx.Node, Placed]
    lookups: set[fx.Node]
    declined: dict[fx.Node, str]
    rules: dict[fx.Node, Rule]
    givens: Givens
    confined: frozenset[fx.Node]

    def placements(self) -> dict[fx.Node, Placement]:
        return {n: p.placement for n, p in self.placed.items()}


@dataclass(frozen=True)
class Cut:
    """A choice of aggregation points."""

    inside: frozenset[fx.Node]
    cost: int
    exits: tuple[fx.Node, ...] = field(default=())


def exit_of(program: Program, node: fx.Node, placement: Region) -> Exit:
    """What a node sends when it leaves the region."""
    whole, wire_dtype = tail(node), program.wire_dtype(value(node).dtype)
    if not isinstance(placement, Shard):
        return Exit(node.name, alike(ranks_of(placement), whole), wire_dtype=wire_dtype)
    before, behind = whole[: placement.dim - 1], whole[placement.dim :]
    tails = spans_of((r, (*before, placement.width(r), *behind)) for r in placement.ranks)
    return Exit(node.name, tails, placement.dim, placement.division, wire_dtype)


def exit_bytes(program: Program, node: fx.Node, placement: Region, w: Weights) -> int:
    """Bytes over all ranks that a node takes to leave the region, and its gradient to come back."""
    elements = prod(tail(node))
    if isinstance(placement, Shard):
        size = sum(placement.widths.values())
        sent = elements // size * (size - placement.width(LOCAL))
    else:
        sent = elements * len(ranks_of(placement))
    itemsize = w.narrow_size_of(program.wire_dtype(value(node).dtype))
    return (2 if w.backward else 1) * sent * (w.ranks - 1) * w.rows * itemsize


def saved_bytes(program: Program, node: fx.Node, answer: Placed, w: Weights) -> int:
    """Bytes over all ranks that a node does not need inside: all-reduces of co-located weights, batch norms' sums."""
    saved = 0
    for name, pieces in answer.pieces.items():
        if program.parameters[name].requires_grad:
            size = pieces.shape[pieces.dim] if pieces.shape else 1
            own = prod(pieces.shape) // max(size, 1) * (size - pieces.shared_size())
            saved += 2 * (w.ranks - 1) * own * w.size_of(program.wire_dtype(program.parameters[name].dtype))
    return (saved if w.backward else 0) + _saved_by_norm(program, node, w)


def _saved_by_norm(program: Program, node: fx.Node, w: Weights) -> int:
    """Of a batch norm: means, variances and counts of all ranks, and sums back, less running statistics that move."""
    norm = training_norm(node)
    if norm is None:
        return 0
    channels = tail(node)[0]
    outside = w.ranks * (2 * channels + 1) + (4 * channels if w.backward else 0)
    saved = outside * w.size_of(program.wire_dtype(norm.dtype))
    if norm.statistics[0] is not None:
        saved -= 2 * channels * w.size_of(program.wire_dtype(value(norm.statistics[0]).dtype))
    return (w.ranks - 1) * saved


def product_flops(node: fx.Node, rows: int) -> int:
    """Of an operator's matrix products on ``rows`` rows, forward and backward; 0 for operators without."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or not is_tensor(x):
        return 0
    shape = shape_on(x, rows)
    inner = shape[-1] if shape else 1
    if node.target in (aten.linear.default, aten.bmm.default, aten.matmul.default):
        return int(linear_flops(1, inner, prod(shape_on(node, rows))))
    if node.target in (aten.gru.input, aten.lstm.input):
        weights = [value(n).numel() for n in node.all_input_nodes if value(n).dim() == 2]
        return int(linear_flops(1, prod(shape) // max(inner, 1), sum(weights)))
    if node.target is aten.scaled_dot_product_attention.default:
        return int(2 * linear_flops(1, shape[-2], prod(shape_on(operand(node, 1), rows))))
    return 0


def work_bytes(node: fx.Node, placement: Region, at: Mapping[fx.Node, Placement], w: Weights) -> int:
    """Extra time of a node inside, against outside, as bytes over all ranks that take as long to send.

    Outside, each rank works on its own rows; inside, the slowest rank works on all rows with its share. Counted for
    matrix products only: they are what costs.
    """
    flops = product_flops(node, w.rows)
    if not flops:
        return 0
    x = at.get(operand(node), Local())
    if isinstance(x, Shard):
        size = sum(x.widths.values())
        share = max(x.width(r) for r in x.ranks) / size
        local = x.width(LOCAL) / size
    else:
        share, local = 1.0, 0.0
    return max(0, round(w.ranks * extra_flops(flops, w.ranks, share, local) / w.flops_per_byte))


def _forced(candidates: Candidates, colocated: Mapping[str, Pieces] | None) -> set[fx.Node]:
    cut = {n for n, p in candidates.placed.items() if p.pieces and colocated is not None}
    return candidates.lookups | cut


def cut_graph(
    program: Program, candidates: Candidates, w: Weights, colocated: Mapping[str, Pieces] | None = None
) -> nx.DiGraph:
    """The graph whose minimum cut is the cheapest legal set (see the module's text).

    An edge's ``purpose`` says what it is for: "lookup" or "colocated" (its node must be inside), "saved", "work",
    "leaves", "used" and "needed".
    """
    placements = candidates.placements()
    graph = nx.DiGraph()
    graph.add_nodes_from((flow.SOURCE, flow.SINK))
    forced = _forced(candidates, colocated)
    for v, answer in candidates.placed.items():
        if v in forced:
            graph.add_edge(flow.SOURCE, v, purpose="lookup" if v in candidates.lookups else "colocated")
        elif saved := saved_bytes(program, v, answer, w):
            graph.add_edge(flow.SOURCE, v, purpose="saved", capacity=saved)
        if work := work_bytes(v, answer.placement, placements, w):
            graph.add_edge(v, flow.SINK, purpose="work", capacity=work)
        out = (v, "out")
        if v in candidates.confined:
            graph.add_edge(v, out, purpose="leaves")
        else:
            graph.add_edge(v, out, purpose="leaves", capacity=exit_bytes(program, v, answer.placement, w))
        for u in v.users:
            graph.add_edge(out, u if u in candidates.placed else flow.SINK, purpose="used")
            if u in candidates.placed:
                graph.add_edge(u, v, purpose="needed")
    return graph


def minimum_cut(
    program: Program,
    candidates: Candidates,
    w: Weights,
    colocated: Mapping[str, Pieces] | None = None,
    solver: str = flow.DEFAULT,
) -> Cut:
    """The cheapest legal set, by maximum flow; of several the largest, whoever solves."""
    if not candidates.lookups:
        return Cut(frozenset(), 0)
    found = flow.solve(cut_graph(program, candidates, w, colocated), solver)
    assert found is not None  # aggregation at the lookups is finite
    cost, side = found
    return _cut(candidates, frozenset(v for v in candidates.placed if v in side), cost)


def cut_as(candidates: Candidates, names: Collection[str]) -> Cut | None:
    """The cut of another graph of the model, whose nodes inside have these names; None if this one can't have it."""
    inside = frozenset(v for v in candidates.placed if v.name in names)
    if len(inside) < len(names) or not candidates.lookups <= inside:
        return None
    return _cut(candidates, inside, 0)


def _cut(candidates: Candidates, inside: frozenset[fx.Node], cost: int) -> Cut:
    exits = tuple(v for v in candidates.placed if v in inside and any(u not in inside for u in v.users))
    return Cut(inside, cost, exits)


def at_lookups(candidates: Candidates) -> Cut:
    """Aggregation at the tables themselves: what looks them up is all that is inside."""
    exits = tuple(v for v in candidates.placed if v in candidates.lookups and v.users)
    return Cut(frozenset(candidates.lookups), 0, exits)

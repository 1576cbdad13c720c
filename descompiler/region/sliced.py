"""Divided values in the region: what `descompiler.graph.slicing` says of an operator, as a rule's answer and its part.

Where all values of the region are divided alike and the operator works on each slice by itself, its result is divided
in the same way. Weights that have the divided dimension are cut along it, others are used whole on the global batch.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from descompiler.graph.nodes import is_tensor
from descompiler.graph.slicing import follow
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import Shard
from descompiler.region.rule import Declined, Part, Placed, Situation


def place_slices(node: fx.Node, at: Situation, why: str = "it mixes what different ranks have") -> Placed | Declined:
    """Where the result of a divided value and of given ones is; ``why`` not, if it is of no slices."""
    values = {n: p for n in node.all_input_nodes if (p := at.placements.get(n)) is not None}
    first = next(iter(values.values()))
    dims = {n: p.dim for n, p in values.items() if isinstance(p, Shard)}
    assert isinstance(first, Shard)
    if any(not isinstance(p, Shard) or p.division != first.division for p in values.values()):
        return Declined("it combines values that are divided differently")
    tensors = [n for n in node.all_input_nodes if is_tensor(n)]
    step, rows = follow(node, dims), follow(node, {n: 0 for n in tensors if n not in at.givens.constants})
    if step is None:
        return Declined(why)
    if rows is None or rows.dim != 0 or rows.narrowed:
        return Declined("it mixes the rows of the batch, or moves them")
    pieces: dict[str, Pieces] = {}
    replicated: list[str] = []
    for n in tensors:
        if n in values:
            continue
        if not at.given(n, first):
            return Declined("it combines what is divided with what each rank has for its own rows only")
        cut, whole = at.along(n, step.narrowed[n], first) if n in step.narrowed else ({}, at.givens.parameters(n))
        pieces.update(cut)
        replicated += whole
    return Placed(Shard(step.dim, first.division), pieces, tuple(dict.fromkeys(replicated)))


def emit_slices(node: fx.Node, part: Part) -> fx.Node:
    """This part of a result that `place_slices` has placed."""
    placement = part.at(node)
    dims = {n: p.dim for n in node.all_input_nodes if isinstance(p := part.at(n), Shard)}
    step = follow(node, dims)
    assert isinstance(placement, Shard) and step is not None
    slices = step.narrowed

    def argument(n: fx.Node) -> Any:
        return part.share(n, slices[n], placement) if n in slices else part.argument(n)

    args, kwargs = fx.map_arg((step.resized(node.args, part.width(placement)), node.kwargs), argument)
    return part.call(node.target, *args, **kwargs)

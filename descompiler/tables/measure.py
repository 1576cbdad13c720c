"""Measuring ids: batches of a user's samples, as the program's own lookups see them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from descompiler.errors import InputError
from descompiler.graph.arguments import LookupCall
from descompiler.layout.id_checks import Check
from descompiler.layout.statistics import ZIPF, Measured, Statistics

if TYPE_CHECKING:
    from torch import fx

    from descompiler.graph.program import Program
    from descompiler.tables.tables import Lookup, Operator


def measure(
    program: Program, operators: Sequence[Operator], samples: Iterable[Sequence[Tensor]], zipf: float = ZIPF
) -> Statistics:
    """Statistics of the ids of sample batches: runs only the part of the graph that ids are computed by.

    Parameters
    ----------
    samples : iterable of sequence of Tensor
        Each one batch: the tensors of its inputs, in the order of the graph
        (`descompiler.model.inputs.Signature.flatten`). One rank's batches, or any other size: unique ids are
        extrapolated. No sample is kept.
    zipf : float
        Assumed of tables whose ids are computed from weights, which are not known here.

    Returns
    -------
    Statistics
        Whose ``source`` says how many batches and rows were measured, and which tables were not.

    Raises
    ------
    InputError
        If there is no sample, or ids are out of range.
    """
    wanted = {o.name: [_counted(x) for x in o.lookups if x.computed is None] for o in operators}
    order = _computable(program, [n for nodes in wanted.values() for n in nodes])
    tables = [o for o in operators if wanted[o.name] and all(n in order for n in wanted[o.name])]
    gathered: dict[str, list[tuple[int, np.ndarray, int]]] = {o.name: [] for o in tables}
    batches = rows = 0
    for tensors in samples:
        values = _evaluate(program, order, tensors)
        size = len(tensors[0])
        batches, rows = batches + 1, rows + size
        for o in tables:
            parts = [values[n] for n in wanted[o.name]]
            check = Check(o.name, o.rows, None, o.line)
            if problem := next(filter(None, map(check.problem, parts)), None):
                raise InputError(f"sample {batches - 1}: {problem}")
            drawn = np.concatenate([x.reshape(-1).cpu().numpy() for x in parts]).astype(np.int64)
            gathered[o.name].append((size, drawn, int((drawn == o.padding_idx).sum())))
    return statistics_of(operators, gathered, batches, rows, zipf)


def _counted(x: Lookup) -> fx.Node:
    """What tells the rows of a lookup: its ids, or the rows that a dynamic table's stand-in has for them."""
    return x.ids if x.dynamic is None else LookupCall(x.node).ids


def statistics_of(
    operators: Sequence[Operator],
    gathered: Mapping[str, list[tuple[int, np.ndarray, int]]],
    batches: int,
    rows: int,
    zipf: float = ZIPF,
) -> Statistics:
    """Statistics of ids that were seen.

    Parameters
    ----------
    gathered : mapping of str to list of (int, ndarray, int)
        By table, for each batch: its rows, the ids that it drew, and how many of them are padding.
    batches, rows : int
        How many there were.
    """
    if not batches:
        raise InputError("samples has no batch: give at least one, or leave samples out to assume Zipf ids")
    measured = {o.name: _measured(o.rows, gathered[o.name]) for o in operators if rows and o.name in gathered}
    source = f"measured on {batches} batches, {rows:,} rows"
    if left := [o.name for o in operators if o.name not in measured]:
        source += f"; assumed Zipf({zipf}) for {', '.join(left[:3])}{' and others' if len(left) > 3 else ''}"
    return Statistics({o.name: o.table for o in operators}, measured, zipf, source)


def _measured(table_rows: int, batches: list[tuple[int, np.ndarray, int]]) -> Measured:
    """One table's numbers; batches of one size are also taken two, four, ... together."""
    ids, counts = np.unique(np.concatenate([drawn for _, drawn, _ in batches]), return_counts=True)
    sizes: dict[int, list[tuple[int, int]]] = {}
    together = [(size, drawn) for size, drawn, _ in batches if size]
    while together:
        for size, drawn in together:
            sizes.setdefault(size, []).append((len(drawn), len(np.unique(drawn))))
        pairs = zip(together[::2], together[1::2], strict=False)
        together = [(a[0] + b[0], np.concatenate([a[1], b[1]])) for a, b in pairs]
    rows = sum(size for size, _, _ in batches)
    used = sum(len(drawn) - padding for _, drawn, padding in batches)
    means = tuple(
        (size, float(np.mean([d for d, _ in x])), float(np.mean([u for _, u in x])))
        for size, x in sorted(sizes.items())
    )
    return Measured(table_rows, ids, counts, means, used / max(rows, 1))


def _computable(program: Program, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What those of the nodes are computed by that need inputs and constants only, in the order of the graph."""
    known: set[fx.Node] = set()
    for n in program.graph.nodes:
        source = program.source(n)
        if source is not None:
            if source.kind == "input" or source.name in program.constants:
                known.add(n)
        elif n.op == "call_function" and all(p in known for p in n.all_input_nodes):
            known.add(n)
    needed: set[fx.Node] = set()
    stack = [n for n in nodes if n in known]
    while stack:
        n = stack.pop()
        if n not in needed:
            needed.add(n)
            stack.extend(n.all_input_nodes)
    return [n for n in program.graph.nodes if n in needed]


def _evaluate(program: Program, order: Sequence[fx.Node], tensors: Sequence[Tensor]) -> dict[fx.Node, Any]:
    queue = iter(tensors)
    inputs = {n: next(queue) for n in program.graph.nodes if (s := program.source(n)) and s.kind == "input"}
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for n in order:
            source = program.source(n)
            if source is not None:
                values[n] = inputs[n] if source.kind == "input" else program.constants[source.name]
            else:
                args, kwargs = torch.fx.map_arg((n.args, n.kwargs), lambda m: values[m])
                target: Any = n.target
                values[n] = target(*args, **kwargs)
    return values

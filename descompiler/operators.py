"""Weights-rich operators: the tables of a program, how they are used, and how each can be split."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from descompiler.errors import PlanError, UnsupportedError
from descompiler.layout import Check
from descompiler.pieces import Pieces, Range, even_sizes
from descompiler.placement import Disjoint, Owned, Partial, Region, Segment, shard
from descompiler.program import Program, aten, rowwise, signature, tail, user_line, where
from descompiler.runtime import bag

FORMS = ("replicate", "field", "row", "column")
"""Replicate: every rank holds the table. Field: whole tables (or fields of an offsets table) to ranks. Row, column:
contiguous ranges of rows or columns to ranks."""


@dataclass(frozen=True)
class Lookup:
    """One use of a table: ``node = table[ids]``, pooled over dim 1 if ``mode`` is given."""

    node: fx.Node
    ids: fx.Node
    mode: str | None = None


@dataclass(frozen=True)
class Operator:
    """A table and all that the graph does with it.

    Attributes
    ----------
    starts : tuple of int or None
        First row of each field, if ids are ``x + offsets``.
    refusals : dict of str to str
        Forms that this operator can't take, and why.
    """

    name: str
    rows: int
    dim: int
    dtype: torch.dtype
    lookups: tuple[Lookup, ...]
    padding_idx: int
    sparse: bool
    starts: tuple[int, ...] | None
    refusals: dict[str, str] = field(hash=False)
    line: str = ""
    trained: bool = True

    @property
    def size_bytes(self) -> int:
        return self.rows * self.dim * self.dtype.itemsize

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.dim)

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that it can take."""
        return tuple(f for f in FORMS if f not in self.refusals)

    def check(self, *, by_field: bool) -> Check:
        return Check(self.name, self.rows, self.starts if by_field else None, self.line)


@dataclass(frozen=True)
class Split:
    """How one operator is divided.

    >>> print(Split("column", Pieces.by_sizes((10, 4), 1, [2, 2], 2)))
    column: E[10,4] -> cat_1(E[10,2]@0, E[10,2]@1)
    """

    form: str
    pieces: Pieces

    def __str__(self) -> str:
        p = self.pieces
        if self.form == "replicate":
            return f"replicate: E{list(p.shape)} on all {p.ranks} ranks".replace(", ", ",")
        shapes = []
        for r in p.ranges[:8]:
            shape = list(p.shape)
            shape[p.dim] = r.size
            shapes.append(f"E{shape}@{r.owner}".replace(", ", ","))
        more = ", ..." if len(p.ranges) > 8 else ""
        whole = f"E{list(p.shape)}".replace(", ", ",")
        return f"{self.form}: {whole} -> cat_{p.dim}({', '.join(shapes)}{more})"

    def placement(self, operator: Operator, lookup: Lookup) -> Region | None:
        """Placement of a lookup's result; None where the lookup stays outside the region."""
        owners = self.pieces.owners
        if self.form == "replicate":
            return None
        if self.form == "column":
            last = len(tail(lookup.node))
            return shard(last, [Segment(r.size, r.owner) for r in self.pieces.ranges])
        if self.form == "row":
            if lookup.mode is not None:
                return Partial(owners) if len(owners) > 1 else Owned(owners[0])
            if len(owners) == 1:
                return Owned(owners[0])
            ranges = tuple((r.start, r.stop, r.owner) for r in self.pieces.ranges)
            return Disjoint(owners, (lookup.ids.name, ranges), 1 + len(tail(lookup.ids)))
        if len(owners) == 1:
            return Owned(owners[0])
        return shard(1, [Segment(1, r.owner) for r in self.pieces.ranges])

    def columns(self, operator: Operator, lookup: Lookup, rank: int) -> tuple[int, ...] | None:
        """Columns (dim 1) of the ids that a rank needs; None: all, (): none."""
        if rank not in self.pieces.owners:
            return ()
        if self.form == "field" and len(self.pieces.owners) > 1:
            return tuple(i for i, r in enumerate(self.pieces.ranges) if r.owner == rank)
        return None

    @property
    def by_field(self) -> bool:
        """Whether fields of one table have different owners."""
        return self.form == "field" and len(self.pieces.owners) > 1


def find_operators(program: Program) -> list[Operator]:
    """All tables that the program looks up, in the order of the model's parameters.

    Raises
    ------
    UnsupportedError
        For ``max_norm`` (it writes to the table in forward) and ``scale_grad_by_freq`` (it counts ids in the batch).
    """
    found: dict[str, list[Lookup]] = {}
    uses: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target is aten.embedding_renorm_.default:
            raise UnsupportedError(
                f"embedding with max_norm ({where(node)}, table {program.parameter(node.args[0])!r}): it changes rows "
                "in forward, which differs between ranks; normalise the looked-up vectors instead"
            )
        lookup = _lookup(node)
        if lookup is not None and (name := program.parameter(node.args[0])) is not None:
            if _counts_frequency(node):
                raise UnsupportedError(
                    f"embedding with scale_grad_by_freq ({where(node)}, table {name!r}): it counts ids within one "
                    "rank's batch; leave it out, or scale the loss"
                )
            found.setdefault(name, []).append(lookup)
        for n in node.all_input_nodes:
            if (name := program.parameter(n)) is not None:
                uses.setdefault(name, []).append(node)
    order = {name: i for i, name in enumerate(program.parameters)}
    depends = _depends_on_lookups(program, [x for xs in found.values() for x in xs])
    result = []
    for name in sorted(found, key=lambda n: order[n]):
        lookups, parameter = tuple(found[name]), program.parameters[name]
        result.append(
            Operator(
                name=name,
                rows=parameter.shape[0],
                dim=parameter.shape[1],
                dtype=parameter.dtype,
                lookups=lookups,
                padding_idx=_padding(lookups[0].node),
                sparse=_sparse(lookups[0].node),
                starts=_starts(program, lookups),
                refusals=_refusals(program, lookups, uses[name], depends, _starts(program, lookups)),
                line=user_line(lookups[0].node),
                trained=parameter.requires_grad,
            )
        )
    return result


def _lookup(node: fx.Node) -> Lookup | None:
    if node.target is aten.embedding.default:
        return Lookup(node, node.args[1])  # type: ignore[arg-type]
    if node.target is bag:
        return Lookup(node, node.args[1], node.args[2])  # type: ignore[arg-type]
    return None


def _counts_frequency(node: fx.Node) -> bool:
    if node.target is bag:
        return bool(node.kwargs.get("scale_grad_by_freq"))
    return bool(signature(node)["scale_grad_by_freq"])


def _padding(node: fx.Node) -> int:
    padding = node.args[3] if node.target is bag else signature(node)["padding_idx"]
    return -1 if padding is None else int(str(padding))


def _sparse(node: fx.Node) -> bool:
    return bool(node.args[4] if node.target is bag else signature(node)["sparse"])


def _starts(program: Program, lookups: Sequence[Lookup]) -> tuple[int, ...] | None:
    """Offsets of the fields if the ids are ``x + offsets`` in every lookup."""
    starts: set[tuple[int, ...]] = set()
    for x in lookups:
        found = None
        if x.ids.target is aten.add.Tensor and rowwise(program, x.ids) and len(tail(x.ids)) == 1 and x.mode is None:
            for a in x.ids.args:
                source = program.source(a)
                if source is not None and source.name in program.constants and source.kind != "parameter":
                    values = program.constants[source.name].reshape(-1).tolist()
                    if len(values) == tail(x.ids)[0]:
                        found = tuple(int(v) for v in values)
        if found is None or found[0] != 0 or any(a >= b for a, b in itertools.pairwise(found)):
            return None
        starts.add(found)
    return starts.pop() if len(starts) == 1 else None


def _depends_on_lookups(program: Program, lookups: list[Lookup]) -> set[fx.Node]:
    sources = {x.node for x in lookups}
    result: set[fx.Node] = set()
    for node in program.graph.nodes:
        if any(n in sources or n in result for n in node.all_input_nodes):
            result.add(node)
    return result


def _refusals(
    program: Program,
    lookups: tuple[Lookup, ...],
    uses: list[fx.Node],
    depends: set[fx.Node],
    starts: tuple[int, ...] | None,
) -> dict[str, str]:
    split_forms = ("field", "row", "column")
    nodes = {x.node for x in lookups}
    other = [u for u in uses if u not in nodes]
    if other:
        return dict.fromkeys(split_forms, f"the table is also used by {where(other[0])}")
    for x in lookups:
        if not rowwise(program, x.ids) or not rowwise(program, x.node):
            return dict.fromkeys(split_forms, "its ids are not one row per row of the batch")
        if x.ids in depends:
            return dict.fromkeys(split_forms, "its ids are computed from another lookup")
    refusals: dict[str, str] = {}
    if any(x.mode == "max" for x in lookups):
        refusals["row"] = "the maximum over a bag is not a sum of ranks' terms"
    return refusals


def splits_of(
    operator: Operator, form: str, ranks: int, *, owner: int = 0, field_owners: Sequence[int] | None = None
) -> Split:
    """The split of an operator in a form.

    Parameters
    ----------
    owner : int
        For form "field": the rank of a whole table.
    field_owners : sequence of int, optional
        For form "field" of an offsets table: the rank of each field.

    Raises
    ------
    PlanError
        If the operator can't take that form.
    """
    if form not in FORMS:
        raise PlanError(f"table {operator.name!r}: no form {form!r}; the forms are {', '.join(FORMS)}")
    if form in operator.refusals:
        raise PlanError(f"table {operator.name!r} can't be split by {form}: {operator.refusals[form]}")
    shape = operator.shape
    if form == "replicate":
        return Split(form, Pieces.replicate(shape, ranks))
    if form == "row":
        return Split(form, Pieces.by_sizes(shape, 0, even_sizes(operator.rows, ranks), ranks))
    if form == "column":
        return Split(form, Pieces.by_sizes(shape, 1, even_sizes(operator.dim, ranks), ranks))
    if operator.starts is not None and field_owners is not None:
        stops = (*operator.starts[1:], operator.rows)
        ranges = tuple(Range(a, b, o) for a, b, o in zip(operator.starts, stops, field_owners, strict=True))
        return Split(form, Pieces(shape, 0, ranges, ranks))
    return Split(form, Pieces.whole(shape, owner, ranks))

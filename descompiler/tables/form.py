"""What a form is: one way to divide a weights-rich operator among ranks.

A form answers, for an operator (a table and its lookups): can it be divided so, and why not (`Form.refuses`)? What does
each rank hold (`Form.split`)? Where is a lookup's result (`Form.placement`): in the substituted region, for the global
batch, or outside of it, for each rank's own rows? What does this rank's program do for a lookup (`Form.emit`)? What
does it send (`Form.costs`)? Each form is one frozen dataclass in ``passes/forms``, made of `descompiler.tables.blocks`;
`descompiler.passes.FORMS` lists them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import sympy
from torch import Tensor, fx

from descompiler.cost_models.table import Table
from descompiler.errors import PlanError
from descompiler.graph.program import Program
from descompiler.layout.border import Columns
from descompiler.layout.id_checks import Check
from descompiler.layout.pieces import ALL, Pieces
from descompiler.layout.placement import Region
from descompiler.layout.spans import Spans
from descompiler.layout.statistics import Statistics
from descompiler.registry import Registry
from descompiler.tables.aliases import ALIASES
from descompiler.tables.tables import Lookup, Operator, find_operators


@dataclass(frozen=True)
class Choice:
    """What a planner may decide about a split besides its form.

    Attributes
    ----------
    owner : int
        Of a form with owners (`Form.has_owners`): the rank of a whole table.
    field_owners : tuple of int, optional
        Of a form with owners, for an offsets table: the rank of each field.
    sizes : tuple of int, optional
        Of a form that divides rows: consecutive rows of each rank; even by default.
    hot : tuple of (int, int), optional
        Of a form that tells frequent rows from others: ranges ``[start, stop)`` of rows that every rank holds.
    """

    owner: int = 0
    field_owners: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None
    hot: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Split:
    """How one operator is divided: the name of its form, and which rank holds what.

    Attributes
    ----------
    gathered : bool
        Whether ranks exchange the gradients of rows that all of them hold row by row, those that were looked up; else
        they are all-reduced.
    whole : bool
        Whether ranks gather the table before they use it, so that everything is as if it were replicated.

    >>> print(Split("column_wise", Pieces.by_sizes((10, 4), 1, [2, 2], 2)))
    column_wise: E[10,4] -> cat_1(E[10,2]@0, E[10,2]@1)
    """

    form: str
    pieces: Pieces
    gathered: bool = False
    whole: bool = False

    @property
    def at_hand(self) -> bool:
        """Whether every rank has all rows when the table is used."""
        return self.whole or self.pieces.is_replicated

    def __str__(self) -> str:
        p = self.pieces
        if p.is_replicated:
            return f"{self.form}: E{list(p.shape)} on all {p.ranks} ranks".replace(", ", ",")
        shapes = []
        for r in islice(p.division, 8):
            shape = list(p.shape)
            shape[p.dim] = r.size
            shapes.append(f"E{shape}@{'all' if r.owner == ALL else r.owner}".replace(", ", ","))
        more = ", ..." if p.division.count > 8 else ""
        whole = f"E{list(p.shape)}".replace(", ", ",")
        return f"{self.form}: {whole} -> cat_{p.dim}({', '.join(shapes)}{more})"

    def placement(self, operator: Operator, lookup: Lookup) -> Region | None:
        """Placement of a lookup's result; None where the lookup stays outside the region."""
        return form_named(self.form).placement(self, operator, lookup)

    def columns(self, operator: Operator, lookup: Lookup) -> Spans[Columns]:
        """Columns (dim 1) of the ids that ranks need; None: all of them."""
        return form_named(self.form).columns(self, operator, lookup)


@dataclass(frozen=True)
class LookupPart:
    """What a form sees when it emits a lookup on one rank.

    Attributes
    ----------
    graph : torch.fx.Graph
        This rank's program, to add nodes to.
    runtime : torch.fx.Node
        The `descompiler.runtime.runtime.Runtime` that the program is called with.
    weight : torch.fx.Node
        This rank's piece of the table.
    ids : torch.fx.Node
        Of the global batch, reduced to `Form.columns`, if the lookup is placed in the region; else of own rows.
    constants : mapping of str to torch.fx.Node
        By the names of `Form.constants`.
    """

    graph: fx.Graph
    runtime: fx.Node
    rank: int
    ranks: int
    operator: Operator
    lookup: Lookup
    split: Split
    weight: fx.Node
    ids: fx.Node
    constants: Mapping[str, fx.Node]

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def runtime_call(self, method: str, *args: Any) -> fx.Node:
        return self.graph.call_method(method, (self.runtime, *args))


class Form(Protocol):
    """One way to divide a weights-rich operator. A frozen dataclass whose fields are its options.

    What the planner asks of a form's nature, `descompiler.tables.blocks.Plain` answers with no: say what is different.
    """

    @property
    def name(self) -> str: ...

    @property
    def fallback(self) -> bool:
        """Whether any table can take it, every rank holding all: for one rank, and where nothing else is possible."""
        ...

    @property
    def has_owners(self) -> bool:
        """Whether the planner deals tables in this form to ranks.

        Whole ones, or the fields of one, balanced over all tables (`Choice.owner`, `Choice.field_owners`).
        """
        ...

    @property
    def takes_dynamic(self) -> bool:
        """Whether rows may come and go: who holds one knows of all that look it up. A dynamic table can take it."""
        ...

    @property
    def by_columns(self) -> bool:
        """Whether ranks have columns of a table.

        So they can have columns of what is computed of whole tables (`descompiler.tables.computed`), if all of these
        take the form.
        """
        ...

    @property
    def needs_statistics(self) -> bool:
        """Whether nothing but measured ids says how a table is best divided so: else it is only pinned."""
        ...

    @property
    def in_part(self) -> str | None:
        """The form that stands for this one where the user's own forward runs (`descompiler.eager`); None if none."""
        ...

    @property
    def curve(self) -> sympy.Expr | None:
        """What a rank sends for a dense table, in symbols of this table alone.

        None where other tables or the frequencies of ids decide, or another form has the same.
        """
        ...

    def refuses(self, program: Program, operator: Operator) -> str | None:
        """Why the operator can't be divided so; None if it can."""
        ...

    def choose(
        self,
        operator: Operator,
        ranks: int,
        statistics: Statistics,
        batch_rows: int,
        by_memory: bool = False,
        itemsize: int | None = None,
    ) -> Choice:
        """What is best for one rank's batches of ``batch_rows`` rows; with ``by_memory``, what the ranks hold is
        balanced, not what they are asked for; elements of rows cross in ``itemsize`` bytes (None: their own)."""
        ...

    def split(self, operator: Operator, ranks: int, choice: Choice) -> Split:
        """What each rank holds."""
        ...

    def placement(self, split: Split, operator: Operator, lookup: Lookup) -> Region | None:
        """Where a lookup's result is; None where it stays outside the region, for own rows."""
        ...

    def columns(self, split: Split, operator: Operator, lookup: Lookup) -> Spans[Columns]:
        """Columns (dim 1) of the ids that ranks need, if the lookup is in the region; None: all of them."""
        ...

    def fetches(self, split: Split) -> bool:
        """Whether lookups outside the region go through `descompiler.runtime.fetch`; `emit` is for one rank then."""
        ...

    def check(self, split: Split, operator: Operator) -> Check:
        """What ids have to be."""
        ...

    def constants(self, split: Split, rank: int) -> Mapping[str, Tensor]:
        """Tensors that a rank's program needs for this table."""
        ...

    def emit(self, part: LookupPart) -> fx.Node:
        """This rank's part of a lookup."""
        ...

    def costs(self, table: Table) -> Mapping[str, sympy.Expr]:
        """Bytes that a rank sends in a step for a table, the mean over ranks, as formulas of `descompiler.cost_models`,
        by what is sent."""
        ...

    def least_bytes(
        self, operator: Operator, ranks: int, statistics: Statistics, batch_rows: int, itemsize: int
    ) -> float | None:
        """What all ranks together send at least, in any division in this form, for lookups outside the region.

        None where `costs` say it.
        """
        ...


FORMS: Registry[Form] = Registry("form", reserved=ALIASES)
"""All forms; ``passes/`` adds the built-in ones. Where two cost the same, the first is taken."""


def form_named(name: str) -> Form:
    """The form with a name.

    Raises
    ------
    PlanError
        If there is none: a plan from a file may have one that this process was not given.
    """
    try:
        return FORMS.named(name)
    except PlanError as error:
        raise PlanError(
            f"{error}; one from outside has to be installed, or given: des.plan(..., forms=[...])"
        ) from None


ROWS_THAT_GO = "rows of a dynamic table come and go, so who holds one has to know of all that look it up"
"""Why a dynamic table can't take most forms."""


def fallback() -> Form:
    """The form that every table can take."""
    return next(f for f in FORMS if f.fallback)


def split_as(operator: Operator, form: str, ranks: int, choice: Choice | None = None) -> Split:
    """The split of an operator in a form.

    Raises
    ------
    PlanError
        If there is no such form, or the operator can't take it.
    """
    found = form_named(form)
    if form in operator.refusals and not (ranks == 1 and found.fallback):
        raise PlanError(f"table {operator.name!r} can't be split by {form}: {operator.refusals[form]}")
    return found.split(operator, ranks, Choice() if choice is None else choice)


def _refuses(form: Form, program: Program, operator: Operator) -> str | None:
    """Why an operator can't be divided by a form on several ranks; None if it can."""
    if operator.dynamic is not None and not form.takes_dynamic:
        others = ", ".join(f.name for f in FORMS if f.takes_dynamic)
        return f"{ROWS_THAT_GO}: take {others}"
    return form.refuses(program, operator)


def find_tables(program: Program, forms: Iterable[Form] = FORMS) -> list[Operator]:
    """All tables of a program, each with those of ``forms`` that it can take, and why it can't take the others.

    Raises
    ------
    UnsupportedError
        As `find_operators`.
    """
    result = []
    for operator in find_operators(program):
        answers = {f.name: _refuses(f, program, operator) for f in forms}
        refused = {name: reason for name, reason in answers.items() if reason is not None}
        possible = tuple(name for name in answers if name not in refused)
        result.append(replace(operator, forms=possible, refusals=refused))
    return result

"""Placing: which operators can stay in the substituted region, by the rules, and what they are given there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from descompiler.classify.scope import CONSTANT, OWN_ROWS, SIZE, scope_of
from descompiler.graph.nodes import is_pure, is_tensor, value
from descompiler.graph.program import Program, rowwise
from descompiler.layout.pieces import Pieces
from descompiler.layout.placement import Placement
from descompiler.region.cut import SHAPED, Candidates
from descompiler.region.rule import NO_RULE, Declined, Givens, Placed, Rule, Situation
from descompiler.tables.form import Split
from descompiler.tables.tables import Operator


def place(
    program: Program,
    operators: Sequence[Operator],
    splits: Mapping[str, Split],
    rules: Sequence[Rule],
    ranks: int,
    colocated: Mapping[str, Pieces] | None = None,
) -> Candidates:
    """Place every node that a rule can place, assuming that its placed operands are inside.

    Parameters
    ----------
    colocated : mapping of str to Pieces, optional
        Weights that are already cut (by the plan of the training graph): others stay whole, these must be used so.
    """
    placed: dict[fx.Node, Placed] = {}
    lookups: set[fx.Node] = set()
    declined: dict[fx.Node, str] = {}
    placements: dict[fx.Node, Placement] = {}
    placed_by: dict[fx.Node, Rule] = {}
    of_tables: set[fx.Node] = set()  # the forms' business
    for op in operators:
        of_tables.update((*(x.node for x in op.lookups), *(x.node for x in op.outputs)))
        for x in op.lookups:
            placement = splits[op.name].placement(op, x)
            if placement is not None:
                lookups.add(x.node)
                whole = op.group.replicated if op.group is not None and x.computed is not None else ()
                placed[x.node] = Placed(placement, replicated=whole)
                placements[x.node] = placement
    situation = Situation(program, ranks, placements, _givens(program, operators, splits))
    for node in program.graph.nodes:
        if node.op != "call_function" or node in placed:
            continue
        if not any(n in placements for n in node.all_input_nodes):
            continue
        if node in of_tables or scope_of(node).drawn:
            declined[node] = "it draws random numbers" if scope_of(node).drawn else NO_RULE
            continue
        if scope_of(node).kind != OWN_ROWS:
            declined[node] = "it mixes the rows of the batch"
            continue
        answer, rule = ask(node, rules, situation)
        if isinstance(answer, Placed) and colocated is not None:
            if any(colocated.get(name) != pieces for name, pieces in answer.pieces.items()):
                answer = Declined("its weight is not cut that way by the training graph")
            elif any(name in colocated for name in answer.replicated):
                answer = Declined("its weight is cut by the training graph")
        if isinstance(answer, Declined):
            declined[node] = answer.reason
        else:
            placed[node], placed_by[node] = answer, rule
            placements[node] = answer.placement
    confined = frozenset(n for n in placed if not may_leave(program, n))
    return Candidates(placed, lookups, declined, placed_by, situation.givens, confined)


def may_leave(program: Program, node: fx.Node) -> bool:
    """Whether a value can cross: a tensor of floating point with the batch in front."""
    return rowwise(program, node) and value(node).is_floating_point()


def ask(node: fx.Node, rules: Sequence[Rule], at: Situation) -> tuple[Placed | Declined, Rule]:
    """The first rule that places a node; if none does, the reason of the one that is most about its operator."""
    reasons: list[tuple[tuple[bool, bool], Declined, Rule]] = []
    numbers = [n for n in node.all_input_nodes if not is_tensor(n) and n not in at.placements]
    sized = at.givens.sized.issuperset(numbers)
    plain = all(may_leave(at.program, n) for n in (node, *at.placements.keys() & set(node.all_input_nodes)))
    for rule in rules:
        named = rule.targets is not None
        if rule.targets is not None and node.target not in rule.targets:
            continue
        if not sized or (numbers and named and node.target not in SHAPED):
            answer: Placed | Declined = Declined("it depends on the batch size")
        elif named and not plain:
            answer = Declined("its result is not one row per row of the batch")
        else:
            answer = rule.place(node, at)
        if isinstance(answer, Placed):
            return answer, rule
        reasons.append(((not named, answer.reason == NO_RULE), answer, rule))
    return min(reasons, key=lambda r: r[0])[1:]


def _givens(program: Program, operators: Sequence[Operator], splits: Mapping[str, Split]) -> Givens:
    """What rules may use inside besides the region's values."""
    tables = frozenset(o.name for o in operators)
    constants: dict[fx.Node, tuple[str, ...]] = {}
    known: dict[fx.Node, set[int]] = {}
    sized: set[fx.Node] = set()
    for o in operators:
        for x in o.lookups:
            if splits[o.name].placement(o, x) is not None:
                ranks_of_ids = known.setdefault(x.ids, set())
                for first, stop, columns in splits[o.name].columns(o, x):
                    if columns is None:
                        ranks_of_ids.update(range(first, stop))
    for node in program.graph.nodes:
        source, operands, scope = program.source(node), node.all_input_nodes, scope_of(node)
        if source is not None and source.kind != "input":
            if source.name not in tables:
                constants[node] = (source.name,) if source.kind == "parameter" else ()
            continue
        if node.op != "call_function" or scope.drawn or not is_pure(node):
            continue
        if scope.kind == SIZE or (scope.sized and is_tensor(node)):
            if scope.kind == SIZE or all(a in sized or constants.get(a) == () for a in operands):
                sized.add(node)  # made of no parameter: nobody sends it a gradient
        elif scope.kind == CONSTANT and all(a in constants for a in operands):
            constants[node] = tuple(dict.fromkeys(name for a in operands for name in constants[a]))
        elif scope.kind == OWN_ROWS and node not in known and any(a in known for a in operands):
            rest = [a for a in operands if a not in known and a not in sized]
            if not any(constants.get(a, ("unknown",)) for a in rest):
                known[node] = set.intersection(*(known[a] for a in operands if a in known))
    return Givens(constants, {n: frozenset(r) for n, r in known.items() if r}, frozenset(sized), tables)

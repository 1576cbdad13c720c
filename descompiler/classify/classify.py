"""Classification: which values each rank can compute from its own rows, and which mix the rows of the batch.

Every node gets its `Scope`. Structure decides first: what depends on the batch and has no batch dimension, or has it
twice, is global; so is an operator along the batch dimension. Then numbers: the graph runs on a whole batch and on its
parts, where every node is given what the distributed program would give it, and what does not reproduce is global.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from descompiler.classify.backward import backward_mixes
from descompiler.classify.batch_values import (
    CHECK_ROWS,
    MOST_CHECK_ROWS,
    BatchValues,
    assembles,
    batch_splits,
    check_batch,
    detach,
    element,
)
from descompiler.classify.decisions import Decisions, decides_for_others
from descompiler.classify.operator_kinds import DRAWN_BY_ROW, DROPPING, HEAVY, SEARCHED, SUM_OPERATORS
from descompiler.classify.scope import (
    CONSTANT,
    GLOBAL,
    OWN,
    OWN_ROWS,
    SIZE,
    SIZED,
    WHOLE,
    Scope,
    polynomial,
    symbols,
    symbols_of,
)
from descompiler.classify.spare_row import OnSpareRow, reached_without_rows
from descompiler.graph.arguments import LookupCall, operand, training_norm
from descompiler.graph.leaf import Leaf
from descompiler.graph.nodes import aten, is_random, is_tensor, signature, value
from descompiler.graph.program import Program
from descompiler.graph.slicing import MIXES, along
from descompiler.layout.rows import Rows
from descompiler.model.attributes import held_tensors
from descompiler.model.random_state import seed_torch

JUDGED = ("scope", "spare_row")
"""What a node's meta has of it: a `Scope`, and an `OnSpareRow` where it can't run on no rows."""


def classify(
    program: Program,
    values_of: Callable[[list[Tensor]], dict[str, Any]],
    tensors: Sequence[Tensor],
    trained: Collection[int] = (),
) -> None:
    """Give every node of a program its `Scope`, as ``node.meta["scope"]``.

    Parameters
    ----------
    values_of : callable
        The value of each placeholder, by name, for given inputs; parameters are random, in float64.
    tensors : sequence of Tensor
        Example inputs, dim 0 the batch.
    trained : collection of int
        Positions of the inputs that require a gradient.
    """
    near = (*range(CHECK_ROWS, MOST_CHECK_ROWS), *range(CHECK_ROWS - 1, 1, -1))
    rows = next((n for n in near if program.accepts(n)), tensors[0].shape[0])
    try:
        _Classifier(program, values_of(check_batch(tensors, rows, move=True)), rows, trained).run()
    except (RuntimeError, IndexError, ValueError):  # the model does not run on such features
        _Classifier(program, values_of(check_batch(tensors, rows, move=False)), rows, trained).run()


class _Classifier:
    def __init__(self, program: Program, values: dict[str, Any], rows: int, trained: Collection[int]):
        self.program, self.given, self.batch = program, values, BatchValues(batch_splits(rows))
        self.scopes: dict[fx.Node, Scope] = {}
        self.generator = torch.Generator().manual_seed(29)
        inputs = [n for n, source in program.sources.items() if source.kind == "input"]
        self.trained = {n for i, n in enumerate(inputs) if i in trained}
        # sizes of inputs; a size with any other symbol depends on the values of data
        self.known = {s for n in program.graph.nodes if n.op == "placeholder" for s in symbols(value(n))}

    def run(self) -> None:
        with torch.random.fork_rng(), torch.enable_grad():
            seed_torch(31)
            for node in self.program.graph.nodes:
                if node.op == "placeholder":
                    self._placeholder(node)
                elif node.op == "call_function":
                    self._judge(node)
            (output,) = (n for n in self.program.graph.nodes if n.op == "output")
            received = self.batch.received(output.all_input_nodes)
        for node, scope in self.scopes.items():
            node.meta["scope"] = Scope(**{**vars(scope), "grad": node in received})

    def _candidates(self, fake: Any) -> list[Rows]:
        """The ways in which a batch can lie in the one dimension of a fake tensor that depends on the batch size."""
        if not isinstance(fake, Tensor) or not symbols(fake) <= self.known:
            return []
        dims = [d for d, size in enumerate(fake.shape) if self.program.batch in symbols_of(size)]
        if len(dims) != 1:
            return []
        size: Any = fake.shape[dims[0]]
        multiple = size.node.expr / self.program.batch
        if not multiple.is_Integer or multiple < 1:
            return []
        m = int(multiple)
        return [Rows(dims[0], m // inner, inner) for inner in range(m, 0, -1) if m % inner == 0]

    # ---- values

    def _placeholder(self, node: fx.Node) -> None:
        source, x = self.program.sources[node.name], self.given[node.name]
        if source.kind == "parameter":
            self.batch.add_parameter(node, x, trained=self.program.parameters[source.name].requires_grad)
        else:
            self.batch.whole[node] = x.detach().requires_grad_() if node.name in self.trained else x
        if source.kind == "input":
            self._set_local(node, Rows(), ())
        else:
            self._set_same(node, Scope(CONSTANT))

    def _set_same(self, node: fx.Node, scope: Scope) -> None:
        """The parts see the whole's value."""
        self.scopes[node] = scope
        self.batch.set_same(node)

    def _set_local(self, node: fx.Node, rows: Any, uses: tuple[str, ...], *, drawn: bool = False) -> None:
        """The parts see their rows of the whole's value; ``rows`` is a list if the value is one."""
        self.scopes[node] = Scope(OWN_ROWS, rows[0] if isinstance(rows, list) else rows, uses, drawn=drawn)
        self.batch.slice_parts(node, rows)

    def _global(self, node: fx.Node, *, reduced: bool = False, drawn: bool = False) -> None:
        operands = node.all_input_nodes
        sized = not drawn and all(self.scopes[a].kind in (CONSTANT, SIZE) or self.scopes[a].sized for a in operands)
        rows = next((c for c in self._candidates(value(node)) if c.multiple == 1), None)
        use = OWN if reduced else WHOLE
        uses = tuple(OWN if self.scopes[a].kind == CONSTANT and reduced else use for a in operands)
        if rows is None:
            self._set_same(node, Scope(GLOBAL))
        else:
            self.batch.slice_parts(node, rows)
        self.scopes[node] = Scope(GLOBAL, rows, uses, sized=sized, reduced=reduced, drawn=drawn)
        if sized:
            self.batch.set_sized(node)

    # ---- judgement

    def _judge(self, node: fx.Node) -> None:
        kinds = {a: self.scopes[a].kind for a in node.all_input_nodes}
        random = is_random(node)
        number = isinstance(value(node), torch.SymInt | torch.SymFloat | torch.SymBool)
        if number and not random and self._size(node, kinds):
            return
        if (lookup := LookupCall.of(node)) is not None and self._lookup(lookup, kinds):
            return
        self.batch.whole[node] = self._whole_value(node)
        drops = random and _only_drops(node) and any(k != CONSTANT for k in kinds.values())
        if random and not drops:
            self._random(node, kinds)
        elif all(k == CONSTANT for k in kinds.values()):
            self._set_same(node, Scope(CONSTANT, uses=(OWN,) * len(kinds)))
        elif node.target is operator.getitem and not is_tensor(node.args[0]) and kinds[operand(node)] == GLOBAL:
            self._global(node)
        elif training_norm(node) is not None and self._batch_norm(node, kinds):
            pass
        elif OWN_ROWS in kinds.values() and self._is_sum(node):
            self._global(node, reduced=True)
        elif self._may_be_local(node, kinds) and (found := self._reproducing(node, kinds)):
            rows, uses, parts = found
            versions = dict(zip(kinds, uses, strict=True))
            if (
                not self._run_without_rows(node, versions, rows)
                or self._backward_mixes(node, versions, rows)
                or self._decides_for_others(node, versions, rows)
            ):
                self._global(node, drawn=drops)
                return
            self.scopes[node] = Scope(OWN_ROWS, rows[0], uses, drawn=drops)
            self.batch.set_parts(node, parts)
        else:
            self._global(node, drawn=drops)

    def _lookup(self, call: LookupCall, kinds: dict[fx.Node, str]) -> bool:
        """Rows of a table, by ids of own rows: replaced by random ones, so that they differ where the ids repeat."""
        node, ids = call.node, call.ids
        if self.program.parameter(call.weight) is None or kinds[ids] != OWN_ROWS:
            return False
        like = self.batch.call(node, lambda a: detach(self.batch.whole[a]))
        dtype = torch.complex128 if like.is_complex() else torch.float64
        drawn = torch.randn(like.shape, generator=self.generator, dtype=dtype).to(like)
        self.batch.whole[node] = self.batch.reaching(drawn, [call.weight])
        rows = self.scopes[ids].rows
        assert rows is not None
        pooled = like.dim() == self.batch.whole[ids].dim() and call.mode is not None
        self._set_local(node, Rows() if pooled else rows, (OWN, OWN))
        return True

    def _whole_value(self, node: fx.Node) -> Any:
        if (norm := training_norm(node)) is not None:
            return self.batch.reaching(self.batch.whole[norm.x].clone(), [a for a in norm.affine if a is not None])
        result = self.batch.call(node, lambda a: self.batch.whole[a])
        if isinstance(node.target, Leaf):  # all that it takes gets a gradient, zeros perhaps: other rows may use more
            return [self.batch.reaching(x, node.all_input_nodes) if x.requires_grad else x for x in result]
        return result

    def _size(self, node: fx.Node, kinds: dict[fx.Node, str]) -> bool:
        """A number made from the batch size: the parts see it for their rows."""
        expr = value(node).node.expr
        if not expr.free_symbols <= self.known:
            return False
        if node.target is aten.sym_size.int and not polynomial(expr, self.program):
            return False
        if node.target is not aten.sym_size.int and not all(k in (CONSTANT, SIZE) for k in kinds.values()):
            return False
        self.batch.whole[node] = self.batch.call(node, lambda a: self.batch.whole[a])
        self.scopes[node] = Scope(SIZE)
        for sizes, parts in zip(self.batch.splits, self.batch.parts, strict=True):
            for size, part in zip(sizes, parts, strict=True):
                if node.target is aten.sym_size.int:
                    depends = self.program.batch in expr.free_symbols
                    part[node] = int(expr.subs(self.program.batch, size)) if depends else self.batch.whole[node]
                else:
                    part[node] = self.batch.call(node, part.__getitem__)
        return True

    def _random(self, node: fx.Node, kinds: dict[fx.Node, str]) -> None:
        operands = [self.scopes[a] for a in node.all_input_nodes]
        by_row = self._draws_by_row(node) and all(s.kind != GLOBAL for s in operands)
        rows = [s.rows for s in operands if s.kind == OWN_ROWS]
        several = isinstance(value(node), tuple | list)
        layouts = [self._candidates(x) for x in (value(node) if several else [value(node)])]
        if by_row and all(layouts):
            found = [next((r for r in rows if r in candidates), candidates[0]) for candidates in layouts]
            self._set_local(node, found if several else found[0], (OWN,) * len(operands), drawn=True)
            return
        self._global(node, drawn=True)

    def _draws_by_row(self, node: fx.Node) -> bool:
        """Whether a row's draw is independent of the others, and from numbers that are a rank's as the batch's."""
        args = signature(node) if node.target in DRAWN_BY_ROW else {}
        of_size = any(isinstance(a := args.get(n), fx.Node) and self.scopes[a].kind == SIZE for n in ("low", "high"))
        if node.target is not aten.multinomial.default:
            return node.target in DRAWN_BY_ROW and not of_size
        own = self.scopes[operand(node)].rows  # of which each row is a distribution
        return bool(args["replacement"]) if own is None else own.dim == 0 and value(operand(node)).dim() == 2

    def _batch_norm(self, node: fx.Node, kinds: dict[fx.Node, str]) -> bool:
        """Statistics over the global batch from the ranks' own: `Runtime.batch_norm`."""
        x, *rest = node.all_input_nodes
        rows = self.scopes[x].rows
        if kinds[x] != OWN_ROWS or rows is None or rows.dim != 0 or any(kinds[a] != CONSTANT for a in rest):
            return False
        self._set_local(node, rows, (OWN,) * len(kinds))
        return True

    def _is_sum(self, node: fx.Node) -> bool:
        if node.target not in SUM_OPERATORS:
            return False
        rows = self.scopes[operand(node)].rows
        return rows is not None and rows.dim in along(node)

    def _may_be_local(self, node: fx.Node, kinds: dict[fx.Node, str]) -> bool:
        """What structure says: whether own rows may suffice."""
        if node.target not in HEAVY and OWN_ROWS not in kinds.values():
            return False
        if OWN_ROWS not in kinds.values() and not any(
            self.scopes[a].rows is not None and not self.scopes[a].sized for a in kinds
        ):
            return False
        results = value(node) if isinstance(value(node), tuple | list) else [value(node)]
        if not all(self._candidates(x) for x in results):
            return False
        if (lookup := LookupCall.of(node)) is not None and kinds[lookup.weight] != CONSTANT:
            return False
        if node.target in SEARCHED and self._searches_rows(node):
            return False
        if node.target in MIXES:
            rows = self.scopes[node.all_input_nodes[0]].rows
            if rows is not None and rows.dim in along(node):
                return False
        return not (node.target is aten.index.Tensor and self._indexes_rows(node))

    def _searches_rows(self, node: fx.Node) -> bool:
        """Whether elements are looked for in what other rows have, too."""
        found = signature(node)[SEARCHED[node.target]]
        if not isinstance(found, fx.Node) or self.scopes[found].kind == CONSTANT:
            return False
        by_row = node.target in (aten.searchsorted.Tensor, aten.searchsorted.Scalar) and value(found).dim() > 1
        return not by_row

    def _indexes_rows(self, node: fx.Node) -> bool:
        """Whether data of the batch choose rows of the batch."""
        indices: Any = node.args[1]
        rows = self.scopes[operand(node)].rows
        index = indices[rows.dim] if rows is not None and rows.dim < len(indices) else None
        return isinstance(index, fx.Node) and not self.scopes[index].sized

    def _reproducing(self, node: fx.Node, kinds: dict[fx.Node, str]) -> Any:
        """(rows, versions of the operands, values of the parts) for which the parts are the whole; None if none."""
        choices: list[tuple[str, ...]] = []
        for a, kind in kinds.items():
            if kind == SIZE:
                choices.append((OWN, WHOLE))
            elif self.scopes[a].sized and self.scopes[a].rows is not None:
                choices.append((OWN, SIZED))
            else:
                choices.append((OWN,))
        whole = self.batch.whole[node]
        wanted = list(whole) if isinstance(whole, tuple | list) else [whole]
        fakes = list(value(node)) if isinstance(whole, tuple | list) else [value(node)]
        for uses in itertools.islice(itertools.product(*choices), 32):
            versions = dict(zip(kinds, uses, strict=True))
            try:
                parts = self.batch.on_parts(node, versions)
            except (RuntimeError, IndexError, ValueError):
                continue  # it does not run on these versions
            layouts = []
            for i, x in enumerate(wanted):
                candidates = self._candidates(fakes[i])
                results = [[element(p, i, whole) for p in division] for division in parts]
                layouts.append(next((c for c in candidates if all(assembles(c, r, x) for r in results)), None))
            if all(c is not None for c in layouts):
                return layouts, uses, parts
        return None

    def _run_without_rows(self, node: fx.Node, versions: dict[fx.Node, str], results: Sequence[Rows]) -> bool:
        """Let a local operator run on ranks without rows: as it is, or on a spare one, which the node then has."""
        if isinstance(node.target, Leaf) or node.target is operator.getitem or SIZED in versions.values():
            return True

        def taken(a: fx.Node) -> Any:
            """Of no rows, and what one row would be; None if that is the same."""
            scope, x = self.scopes[a], detach(self.batch.whole[a])
            if versions[a] == OWN and isinstance(x, int):
                size, batch = value(a).node.expr, self.program.batch
                return tuple(int(size.subs(batch, n)) if batch in size.free_symbols else x for n in (0, 1))
            if scope.rows is None or versions[a] == WHOLE:
                return x, None
            return scope.rows.narrow(x, 0, 0), (scope.rows, scope.rows.narrow(x, 0, 1))

        leaves, spec = pytree.tree_flatten((list(node.args), dict(node.kwargs)))
        found = [taken(a) if isinstance(a, fx.Node) else (a, None) for a in leaves]
        args, kwargs = pytree.tree_unflatten([x for x, _ in found], spec)
        whole = self.batch.whole[node]
        wholes = whole if isinstance(whole, tuple | list) else [whole]
        shapes = [tuple(r.narrow(x, 0, 0).shape) for r, x in zip(results, wholes, strict=True)]
        target: Any = node.target
        reached = reached_without_rows(target, args, kwargs, shapes)
        if reached is not None and all(reached):
            return True
        spare = OnSpareRow(target, [row for _, row in found], results)
        reached_beside = reached_without_rows(spare, args, kwargs, shapes)
        if reached_beside not in (None, reached):
            node.meta["spare_row"] = spare
        return reached is not None or reached_beside is not None

    def _backward_mixes(self, node: fx.Node, versions: dict[fx.Node, str], rows: Sequence[Rows]) -> bool:
        """Whether a leaf, whose backward may be the user's own, makes other gradients of parts than of the whole."""
        if not isinstance(node.target, Leaf) or is_random(node):
            return False
        wholes = {a: self.batch.whole[a] for a in versions}
        parts = [
            [{a: self.batch.operand(a, d, k, kind) for a, kind in versions.items()} for k in range(len(sizes))]
            for d, sizes in enumerate(self.batch.splits)
        ]
        layouts = {a: self.scopes[a].rows for a, kind in versions.items() if kind == OWN}
        return backward_mixes(lambda given: self.batch.call(node, given.__getitem__), wholes, parts, layouts, rows)

    def _decides_for_others(self, node: fx.Node, versions: dict[fx.Node, str], rows: Sequence[Rows]) -> bool:
        """Whether Python in a leaf branches for all rows by the values, or the number, of some."""
        leaf: Any = node.target
        if not isinstance(leaf, Leaf) or is_random(node) or SIZED in versions.values():
            return False
        layouts = {a: self.scopes[a].rows for a, version in versions.items() if version == OWN}
        cut = {a: layout for a, layout in layouts.items() if layout is not None}

        def run(index: Tensor, seen: Decisions) -> Sequence[Tensor]:
            given = {a: detach(self.batch.whole[a]) for a in versions}
            given |= {a: r.restore(r.lead(given[a])[index.to(given[a].device)]) for a, r in cut.items()}
            held = (x for _, _, x in held_tensors(leaf.module))
            seen.watch((given[a] for a in cut), apart=(*(given[a] for a in given if a not in cut), *held))
            with torch.no_grad(), seen:
                result: Sequence[Tensor] = self.batch.call(node, given.__getitem__)
            return result

        def reproduces(whole: Sequence[Tensor], parts: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> bool:
            return all(assembles(r, x, w) for r, w, *x in zip(rows, whole, *parts, strict=True))

        return bool(decides_for_others(run, reproduces, sum(self.batch.splits[0])))


def _only_drops(node: fx.Node) -> bool:
    return node.target in DROPPING or isinstance(node.target, Leaf)

"""Batch coupling: which values each rank can compute from its own rows, and how the others stay exact.

Every node of a program gets a `Scope`:

    constant   depends on no batch: parameters, buffers, constants
    size       a number made from the batch size: the rank's rows, or the global batch's, as its users need
    local      own rows suffice: rows lie along one dimension (`Rows`), and ranks' results side by side are the whole
    global     mixes rows, or has no batch dimension: means over the batch, in-batch negatives, sorted batches

Structure decides first: what depends on the batch and has no batch dimension, or has it twice, is global; so is an
operator along the batch dimension. Then numbers: the graph runs on a whole batch and on its parts, where every node is
given what the distributed program would give it, and what does not reproduce is global.

Global values form one computation that every rank repeats, with equal values *and equal gradients*, so that only its
borders cross the wire:

    gather   local -> global    forward: every rank's rows to all; backward: own rows of the gradient, nothing is sent
    reduce   a sum over the batch: forward: an all-reduce of the ranks' terms; backward: nothing is sent
    slice    global -> local    forward: own rows, nothing is sent; backward: every rank's rows of the gradient to all
    spread   global -> local, no batch dimension: backward: an all-reduce of the gradient
"""

from __future__ import annotations

import itertools
import operator
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from descompiler.errors import UnsupportedError
from descompiler.layout import Exchange
from descompiler.leaf import Leaf
from descompiler.program import (
    Program,
    aten,
    descendants,
    is_random,
    is_tensor,
    signature,
    target_name,
    user_line,
    value,
    where,
)
from descompiler.rows import Rows
from descompiler.runtime import bag
from descompiler.vocabulary import vocabulary

Demand = tuple[fx.Node, str]
"""A node, and the version of it that is needed."""

CONSTANT, SIZE, LOCAL, GLOBAL = "constant", "size", "local", "global"

OWN, WHOLE, SIZED = "own", "whole", "sized"
"""Versions of a value: of the rank's own rows, of the global batch, or made from the number of own rows alone."""

TOLERANCE_FLOAT64 = 1e-9
"""Relative error allowed between a whole batch's value and its parts', in float64."""

CHECK_ROWS = 7
SPLITS = ((3, 4), (5, 2))
"""The numbers are compared on a batch of 7 rows in two different uneven divisions."""

LOOKUPS = frozenset({aten.embedding.default, bag})
HEAVY = LOOKUPS | {
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.gru.input,
    aten.lstm.input,
    aten.scaled_dot_product_attention.default,
    vocabulary,
}
"""Operators worth computing for own rows only, also where every rank has the global batch's operands."""

SUMS = frozenset({aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim})
ALONG = frozenset(
    {
        aten.softmax.int,
        aten.log_softmax.int,
        aten._softmax.default,
        aten._log_softmax.default,
        aten.cumsum.default,
        aten.cumprod.default,
        aten.logcumsumexp.default,
        aten.cummax.default,
        aten.cummin.default,
        aten.sort.default,
        aten.sort.stable,
        aten.argsort.default,
        aten.argsort.stable,
        aten.topk.default,
        aten.flip.default,
        aten.roll.default,
        aten.index_select.default,
        aten.gather.default,
        aten.scatter.src,
        aten.scatter.value,
        aten.scatter_add.default,
        aten.scatter_reduce.two,
        aten.index_add.default,
        aten.index_copy.default,
        aten.renorm.default,
    }
)
"""Operators that work along dimensions, which they name in ``dim`` or ``dims``: along the batch they mix rows."""

DROPPING = frozenset(
    {
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
        aten.gru.input,
        aten.lstm.input,
        aten.scaled_dot_product_attention.default,
    }
)
"""Random operators that only drop: judged as if they dropped nothing, by the numbers."""

DRAWN_BY_ROW = frozenset(
    {
        aten.bernoulli.default,
        aten.bernoulli.p,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.randint_like.default,
        aten.randint_like.low_dtype,
        aten.rrelu.default,
        aten.multinomial.default,
        aten.rand.default,
        aten.randn.default,
        aten.randint.default,
        aten.randint.low,
    }
)
"""Random operators that draw independently for each row of their operand, or of their shape."""

SHAPE_ONLY = frozenset({aten.expand_as.default, aten.view_as.default, aten.reshape_as.default, aten.type_as.default})
"""Operators that take the shape or dtype of their second argument, and send it no gradient."""


@dataclass(frozen=True)
class Scope:
    """Where a node is computed, and from which versions of its operands.

    Attributes
    ----------
    kind : {"constant", "size", "local", "global"}
    rows : Rows or None
        How the batch lies in the value, where ranks have own rows of it.
    uses : tuple of str
        The version of each operand (in the order of ``node.all_input_nodes``) that the node takes.
    sized : bool
        A global value made from the batch size alone.
    reduced : bool
        A sum or mean over the batch, computed from the ranks' terms.
    drawn : bool
        A random draw.
    grad : bool
        Whether the outputs send it a gradient.
    """

    kind: str
    rows: Rows | None = None
    uses: tuple[str, ...] = ()
    sized: bool = False
    reduced: bool = False
    drawn: bool = False
    grad: bool = False


def scope_of(node: fx.Node) -> Scope:
    """The scope that `classify` gave to a node; nodes made by later passes are local."""
    return node.meta.get("scope") or Scope(LOCAL, Rows())


def _symbols_of(size: Any) -> set[sympy.Symbol]:
    return set() if isinstance(size, int) else set(size.node.expr.free_symbols)


def _symbols(x: Any) -> set[sympy.Symbol]:
    return set().union(*map(_symbols_of, x.shape)) if isinstance(x, Tensor) else set()


# ---------------------------------------------------------------------------------------------------------------------
# Classification


def classify(program: Program, values_of: Callable[[list[Tensor]], dict[str, Any]], tensors: Sequence[Tensor]) -> None:
    """Give every node of a program its `Scope`, as ``node.meta["scope"]``.

    Parameters
    ----------
    values_of : callable
        The value of each placeholder, by name, for given inputs; parameters are random, in float64.
    tensors : sequence of Tensor
        Example inputs, dim 0 the batch.
    """
    try:
        _Classifier(program, values_of(_check_batch(tensors, move=True))).run()
    except (RuntimeError, IndexError, ValueError):  # the model does not run on such features
        _Classifier(program, values_of(_check_batch(tensors, move=False))).run()


def _check_batch(tensors: Sequence[Tensor], *, move: bool) -> list[Tensor]:
    """Rows drawn from the example's, each input on its own; ``move``: features that are no integers differ."""
    rows, generator = tensors[0].shape[0], torch.Generator().manual_seed(23)
    result = []
    for t in tensors:
        if rows >= CHECK_ROWS:
            index = torch.randperm(rows, generator=generator)[:CHECK_ROWS]
        else:
            index = torch.randint(rows, (CHECK_ROWS,), generator=generator)
        t = t.detach()[index.to(t.device)]
        if move and t.is_floating_point() and not torch.equal(t, t.round()):
            t = t * (1 - 0.1 * torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t))
        result.append(t)
    return result


class _Classifier:
    def __init__(self, program: Program, values: dict[str, Any]):
        self.program, self.values = program, values
        self.whole: dict[fx.Node, Any] = {}
        # by division and part of it
        self.parts = [[dict[fx.Node, Any]() for _ in s] for s in SPLITS]
        self.sized = [[dict[fx.Node, Any]() for _ in s] for s in SPLITS]
        self.scopes: dict[fx.Node, Scope] = {}
        self.generator = torch.Generator().manual_seed(29)
        # sizes of inputs; a size with any other symbol depends on the values of data
        self.known = {s for n in program.graph.nodes if n.op == "placeholder" for s in _symbols(value(n))}

    def run(self) -> None:
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(31)
            for node in self.program.graph.nodes:
                if node.op == "placeholder":
                    self._placeholder(node)
                elif node.op == "call_function":
                    self._judge(node)
            received = self._gradients()
        for node, scope in self.scopes.items():
            node.meta["scope"] = Scope(**{**vars(scope), "grad": node in received})

    def _candidates(self, fake: Any) -> list[Rows]:
        """The ways in which a batch can lie in the one dimension of a fake tensor that depends on the batch size."""
        if not isinstance(fake, Tensor) or not _symbols(fake) <= self.known:
            return []
        dims = [d for d, size in enumerate(fake.shape) if self.program.batch in _symbols_of(size)]
        if len(dims) != 1:
            return []
        multiple = fake.shape[dims[0]].node.expr / self.program.batch  # type: ignore[attr-defined]
        if not multiple.is_Integer or multiple < 1:
            return []
        m = int(multiple)
        return [Rows(dims[0], m // inner, inner) for inner in range(m, 0, -1) if m % inner == 0]

    # ---- values

    def _placeholder(self, node: fx.Node) -> None:
        source, x = self.program.sources[node.name], self.values[node.name]
        if source.kind == "input":
            self.whole[node] = x
            self._set_local(node, Rows(), ())
            return
        if source.kind == "parameter":
            x = x.detach().requires_grad_(self.program.parameters[source.name].requires_grad)
        self.whole[node] = x
        self._set_same(node, Scope(CONSTANT))

    def _set_same(self, node: fx.Node, scope: Scope) -> None:
        """The parts see the whole's value."""
        self.scopes[node] = scope
        for part in itertools.chain(*self.parts):
            part[node] = _detach(self.whole[node])

    def _set_local(self, node: fx.Node, rows: Any, uses: tuple[str, ...], *, drawn: bool = False) -> None:
        """The parts see their rows of the whole's value; ``rows`` is a list if the value is one."""
        self.scopes[node] = Scope(LOCAL, rows[0] if isinstance(rows, list) else rows, uses, drawn=drawn)
        self._slice_parts(node, rows)

    def _slice_parts(self, node: fx.Node, rows: Any) -> None:
        whole = _detach(self.whole[node])
        for sizes, parts in zip(SPLITS, self.parts, strict=True):
            for first, size, part in zip((0, sizes[0]), sizes, parts, strict=True):
                if isinstance(rows, list):
                    part[node] = tuple(r.narrow(x, first, size) for r, x in zip(rows, whole, strict=True))
                else:
                    part[node] = rows.narrow(whole, first, size)

    def _call(self, node: fx.Node, find: Callable[[fx.Node], Any]) -> Any:
        args, kwargs = fx.map_arg((list(node.args), dict(node.kwargs)), find)
        target: Any = node.target
        if isinstance(target, Leaf):
            return target.judged(*args)  # type: ignore[arg-type]
        if target in DROPPING:
            for i, a in enumerate(target._schema.arguments):
                if a.name in ("p", "dropout", "dropout_p") and (a.name in kwargs or i >= len(args)):
                    kwargs = {**kwargs, a.name: 0.0}
                elif a.name in ("p", "dropout", "dropout_p"):
                    args = [*args[:i], 0.0, *args[i + 1 :]]
        return target(*args, **kwargs)

    def _global(self, node: fx.Node, *, reduced: bool = False, drawn: bool = False) -> None:
        operands = node.all_input_nodes
        sized = not drawn and all(self.scopes[a].kind in (CONSTANT, SIZE) or self.scopes[a].sized for a in operands)
        rows = next((c for c in self._candidates(value(node)) if c.multiple == 1), None)
        use = OWN if reduced else WHOLE
        uses = tuple(OWN if self.scopes[a].kind == CONSTANT and reduced else use for a in operands)
        if rows is None:
            self._set_same(node, Scope(GLOBAL))
        else:
            self._slice_parts(node, rows)
        self.scopes[node] = Scope(GLOBAL, rows, uses, sized=sized, reduced=reduced, drawn=drawn)
        if sized:
            for parts, alone in zip(self.parts, self.sized, strict=True):
                for part, values in zip(parts, alone, strict=True):
                    values[node] = self._call(node, ChainMap(values, part).__getitem__)

    # ---- judgement

    def _judge(self, node: fx.Node) -> None:
        kinds = {a: self.scopes[a].kind for a in node.all_input_nodes}
        random = is_random(node)
        number = isinstance(value(node), torch.SymInt | torch.SymFloat | torch.SymBool)
        if number and not random and self._size(node, kinds):
            return
        if node.target in LOOKUPS and self._lookup(node, kinds):
            return
        self.whole[node] = self._whole_value(node)
        drops = random and _only_drops(node) and any(k != CONSTANT for k in kinds.values())
        if random and not drops:
            self._random(node, kinds)
        elif all(k == CONSTANT for k in kinds.values()):
            self._set_same(node, Scope(CONSTANT, uses=(OWN,) * len(kinds)))
        elif node.target is operator.getitem and not is_tensor(node.args[0]) and kinds[node.args[0]] == GLOBAL:  # type: ignore[index]
            self._global(node)
        elif node.target is aten.batch_norm.default and node.args[5] and self._batch_norm(node, kinds):
            pass
        elif LOCAL in kinds.values() and self._is_sum(node):
            self._global(node, reduced=True)
        elif self._may_be_local(node, kinds) and (found := self._reproducing(node, kinds)):
            rows, uses, parts = found
            self.scopes[node] = Scope(LOCAL, rows, uses, drawn=drops)
            for division, results in zip(self.parts, parts, strict=True):
                for part, result in zip(division, results, strict=True):
                    part[node] = result
        else:
            self._global(node, drawn=drops)

    def _lookup(self, node: fx.Node, kinds: dict[fx.Node, str]) -> bool:
        """Rows of a table, by ids of own rows: replaced by random ones, so that they differ where the ids repeat."""
        weight, ids = node.args[:2]
        name = self.program.parameter(weight)
        if name is None or kinds[ids] != LOCAL:  # type: ignore[index]
            return False
        like = self._call(node, lambda a: _detach(self.whole[a]))
        drawn = torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(like)
        self.whole[node] = drawn.requires_grad_(self.program.parameters[name].requires_grad)
        rows = self.scopes[ids].rows  # type: ignore[index]
        assert rows is not None
        pooled = like.dim() == self.whole[ids].dim() and node.target is bag  # type: ignore[index]
        self._set_local(node, Rows() if pooled else rows, (OWN, OWN))
        return True

    def _whole_value(self, node: fx.Node) -> Any:
        if node.target is aten.batch_norm.default and node.args[5]:
            return self.whole[node.args[0]].clone()  # type: ignore[index]
        return self._call(node, lambda a: self.whole[a])

    def _size(self, node: fx.Node, kinds: dict[fx.Node, str]) -> bool:
        """A number made from the batch size: the parts see it for their rows."""
        expr = value(node).node.expr
        if not expr.free_symbols <= self.known:
            return False
        if node.target is aten.sym_size.int and not _polynomial(expr, self.program.batch):
            return False
        if node.target is not aten.sym_size.int and not all(k in (CONSTANT, SIZE) for k in kinds.values()):
            return False
        self.whole[node] = self._call(node, lambda a: self.whole[a])
        self.scopes[node] = Scope(SIZE)
        for sizes, parts in zip(SPLITS, self.parts, strict=True):
            for size, part in zip(sizes, parts, strict=True):
                if node.target is aten.sym_size.int:
                    depends = self.program.batch in expr.free_symbols
                    part[node] = int(expr.subs(self.program.batch, size)) if depends else self.whole[node]
                else:
                    part[node] = self._call(node, part.__getitem__)
        return True

    def _random(self, node: fx.Node, kinds: dict[fx.Node, str]) -> None:
        operands = [self.scopes[a] for a in node.all_input_nodes]
        by_row = node.target in DRAWN_BY_ROW and all(s.kind != GLOBAL for s in operands)
        rows = [s.rows for s in operands if s.kind == LOCAL]
        several = isinstance(value(node), tuple | list)
        layouts = [self._candidates(x) for x in (value(node) if several else [value(node)])]
        if by_row and all(layouts):
            found = [next((r for r in rows if r in candidates), candidates[0]) for candidates in layouts]
            self._set_local(node, found if several else found[0], (OWN,) * len(operands), drawn=True)
            return
        self._global(node, drawn=True)

    def _batch_norm(self, node: fx.Node, kinds: dict[fx.Node, str]) -> bool:
        """Statistics over the global batch from the ranks' own: `Runtime.batch_norm`."""
        x, *rest = node.all_input_nodes
        rows = self.scopes[x].rows
        if kinds[x] != LOCAL or rows is None or rows.dim != 0 or any(kinds[a] != CONSTANT for a in rest):
            return False
        self._set_local(node, rows, (OWN,) * len(kinds))
        return True

    def _is_sum(self, node: fx.Node) -> bool:
        if node.target not in SUMS:
            return False
        rows = self.scopes[node.args[0]].rows  # type: ignore[index]
        dims = signature(node).get("dim")
        count = value(node.args[0]).dim()
        return rows is not None and (not dims or rows.dim in [d % count for d in dims])

    def _may_be_local(self, node: fx.Node, kinds: dict[fx.Node, str]) -> bool:
        """What structure says: whether own rows may suffice."""
        if node.target not in HEAVY and LOCAL not in kinds.values():
            return False
        if LOCAL not in kinds.values() and not any(
            self.scopes[a].rows is not None and not self.scopes[a].sized for a in kinds
        ):
            return False
        results = value(node) if isinstance(value(node), tuple | list) else [value(node)]
        if not all(self._candidates(x) for x in results):
            return False
        if node.target in LOOKUPS and kinds[node.args[0]] != CONSTANT:  # type: ignore[index]
            return False
        if node.target in ALONG:
            args = signature(node)
            dims = args.get("dims", args.get("dim"))
            if dims is None or dims == []:
                return False  # flattened
            operand = next(a for a in node.all_input_nodes)
            rows, count = self.scopes[operand].rows, value(operand).dim()
            if rows is not None and rows.dim in [d % count for d in (dims if isinstance(dims, list) else [dims])]:
                return False
        return not (node.target is aten.index.Tensor and self._indexes_rows(node))

    def _indexes_rows(self, node: fx.Node) -> bool:
        """Whether data of the batch choose rows of the batch."""
        x, indices = node.args
        rows = self.scopes[x].rows  # type: ignore[index]
        index = indices[rows.dim] if rows is not None and rows.dim < len(indices) else None  # type: ignore[index,arg-type]
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
        whole = self.whole[node]
        wanted = list(whole) if isinstance(whole, tuple | list) else [whole]
        fakes = list(value(node)) if isinstance(whole, tuple | list) else [value(node)]
        for uses in itertools.islice(itertools.product(*choices), 32):
            versions = dict(zip(kinds, uses, strict=True))
            parts = []
            try:
                with torch.no_grad():
                    for division in range(len(SPLITS)):
                        parts.append([self._part(node, division, k, versions) for k in range(len(SPLITS[division]))])
            except (RuntimeError, IndexError, ValueError):
                continue  # it does not run on these versions
            layouts = []
            for i, x in enumerate(wanted):
                candidates = self._candidates(fakes[i])
                results = [[_element(p, i, whole) for p in division] for division in parts]
                layouts.append(next((c for c in candidates if all(_assembles(c, r, x) for r in results)), None))
            if all(c is not None for c in layouts):
                return layouts[0], uses, parts
        return None

    def _part(self, node: fx.Node, division: int, part: int, versions: dict[fx.Node, str]) -> Any:
        def find(a: fx.Node) -> Any:
            if versions[a] == WHOLE:
                return _detach(self.whole[a])
            return (self.sized if versions[a] == SIZED else self.parts)[division][part][a]

        return self._call(node, find)

    def _gradients(self) -> set[fx.Node]:
        """The nodes that get a gradient from the outputs."""
        output = next(n for n in self.program.graph.nodes if n.op == "output")
        ends = [self.whole[o] for o in output.args[0]]
        ends = [x for x in ends if isinstance(x, Tensor) and x.requires_grad]
        nodes = [
            n for n, x in self.whole.items() if n.op != "placeholder" and isinstance(x, Tensor) and x.requires_grad
        ]
        if not ends or not nodes:
            return set()
        total = sum((x.double().sum() for x in ends[1:]), ends[0].double().sum())
        found = torch.autograd.grad(total, [self.whole[n] for n in nodes], allow_unused=True)
        received = {n for n, g in zip(nodes, found, strict=True) if g is not None}
        several = [n for n, x in self.whole.items() if isinstance(x, tuple | list)]  # their elements are nodes too
        return received | {n for n in several if any(u in received for u in n.users)}


def _only_drops(node: fx.Node) -> bool:
    return node.target in DROPPING or isinstance(node.target, Leaf)


def _polynomial(expr: Any, batch: Any) -> tuple[int, ...] | None:
    """Integer coefficients of an expression in the batch size, constant term first; None if it is none."""
    if not sympy.sympify(expr).is_polynomial(batch):
        return None
    found = tuple(sympy.Poly(expr, batch).all_coeffs()[::-1])
    return tuple(int(c) for c in found) if all(c.is_Integer for c in found) else None


def _detach(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach()
    return type(x)(_detach(y) for y in x) if isinstance(x, tuple | list) else x


def _element(x: Any, i: int, whole: Any) -> Any:
    return x[i] if isinstance(whole, tuple | list) else x


def _assembles(rows: Rows, parts: Sequence[Any], whole: Tensor) -> bool:
    """Whether parts are the rows of the whole, in order."""
    if not all(isinstance(p, Tensor) and p.dim() == whole.dim() for p in parts):
        return False
    multiple = rows.outer * rows.inner
    if any(p.shape[rows.dim] % multiple for p in parts) or whole.shape[rows.dim] % multiple:
        return False
    leading = [rows.lead(p) for p in parts]
    if len({x.shape[1:] for x in leading}) > 1:
        return False
    both, expected = torch.cat(leading), rows.lead(whole.detach())
    if both.shape != expected.shape or both.dtype != expected.dtype:
        return False
    if not both.is_floating_point():
        return bool(torch.equal(both, expected))
    if not torch.equal(both.isfinite(), expected.isfinite()):
        return False
    both, expected = both.nan_to_num(), expected.nan_to_num()
    if not both.numel():
        return True
    return bool((both - expected).abs().max() <= TOLERANCE_FLOAT64 * max(float(expected.abs().max()), 1e-30))


# ---------------------------------------------------------------------------------------------------------------------
# What crosses


@dataclass(frozen=True)
class Stage:
    """Values that are gathered, or reduced, in one collective."""

    kind: str  # "gather" or "reduce"
    members: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Coupling:
    """Which versions of which nodes a program computes, and what crosses for it.

    Attributes
    ----------
    demands : mapping of (node, version) to tuple of (node, version)
        What is needed, in the order of the graph, and what it is made from.
    stages : tuple of Stage
    slices, spreads : frozenset of node
        Global values that local nodes, or the user, take.
    exchanges : tuple of Exchange
    free : frozenset of node
        Local nodes whose value for the global batch is computed from their operands' and not gathered.
    """

    demands: dict[Demand, tuple[Demand, ...]]
    stages: tuple[Stage, ...]
    slices: frozenset[fx.Node]
    spreads: frozenset[fx.Node]
    exchanges: tuple[Exchange, ...]
    free: frozenset[fx.Node]

    @property
    def backward(self) -> bool:
        """Whether gradients cross the borders of the global computation."""
        return any(e.kind in ("slice", "spread") for e in self.exchanges)

    def before(self, stage: Stage) -> list[Demand]:
        """All that the members of a stage are made from, in the order of the graph."""
        members = {(n, WHOLE) for n in stage.members}
        needed: set[Demand] = set()
        for demand in reversed(self.demands):  # a value is made from values before it
            if demand in members or demand in needed:
                needed.update(self.demands[demand])
        return [d for d in self.demands if d in needed and d[0].op == "call_function"]


def couple(program: Program, inside: frozenset[fx.Node]) -> Coupling:
    """What has to be computed and exchanged, given the nodes in the substituted region."""
    return _Coupler(program, inside).run()


class _Coupler:
    def __init__(self, program: Program, inside: frozenset[fx.Node]):
        self.program, self.inside = program, inside
        self.free: set[fx.Node] = set()
        self.after = inside | descendants(program.graph, inside)
        candidates = []
        for n in program.graph.nodes:
            scope = scope_of(n)
            once = n in inside or scope.drawn or n.target in LOOKUPS | {vocabulary} or isinstance(n.target, Leaf)
            once |= n.target is aten.batch_norm.default
            if n.op == "call_function" and scope.kind == LOCAL and not once:
                candidates.append(n)
        for n in candidates:
            # a list of values is not gathered, but made again
            if not is_tensor(n) or all(self._everywhere(a) for a in n.all_input_nodes):
                self.free.add(n)
        light = [n for n in candidates if n.target not in HEAVY]
        while True:
            gathered = {n for n, version in self._demands() if version == WHOLE and self._exchanges(n)}
            made = {n for n in light if n in gathered and all(self._known(a, gathered) for a in n.all_input_nodes)}
            if not made:
                break
            self.free |= made

    def _everywhere(self, a: fx.Node) -> bool:
        return scope_of(a).kind in (CONSTANT, SIZE, GLOBAL) or a in self.free

    def _known(self, a: fx.Node, gathered: set[fx.Node]) -> bool:
        return self._everywhere(a) or (a in gathered and not scope_of(a).reduced)

    def run(self) -> Coupling:
        demands = self._demands()
        depths: dict[Demand, int] = {}
        for (n, version), needs in demands.items():
            exchanged = version == WHOLE and self._exchanges(n)
            depths[n, version] = int(exchanged) + max((depths[d] for d in needs), default=0)
        groups: dict[Any, list[fx.Node]] = {}
        slices: list[fx.Node] = []
        spreads: list[fx.Node] = []
        for n, version in demands:
            scope = scope_of(n)
            dtype = str(value(n).dtype) if is_tensor(n) else ""
            if version == WHOLE and self._exchanges(n):
                kind = "reduce" if scope.reduced else "gather"
                groups.setdefault((n in self.after, depths[n, version], kind, dtype), []).append(n)
            elif version == OWN and scope.kind == GLOBAL and is_tensor(n):
                (spreads if scope.rows is None else slices).append(n)
        stages = [Stage(key[2], tuple(members)) for key, members in sorted(groups.items(), key=lambda g: g[0])]
        exchanges = [self._exchange(s.kind, n, int(i == 0)) for s in stages for i, n in enumerate(s.members)]
        exchanges += [self._exchange("slice", n) for n in slices if self._sends_back(n, demands)]
        exchanges += [self._exchange("spread", n) for n in spreads if self._sends_back(n, demands)]
        return Coupling(
            demands,
            tuple(stages),
            frozenset(slices),
            frozenset(spreads),
            tuple(exchanges),
            frozenset(self.free),
        )

    def _exchanges(self, n: fx.Node) -> bool:
        """Whether the value for the global batch is gathered, or reduced, from the ranks'."""
        scope = scope_of(n)
        return scope.reduced or (scope.kind == LOCAL and n not in self.free)

    def _demands(self) -> dict[Demand, tuple[Demand, ...]]:
        """The versions that are needed, in the order of the graph, each after those that it is made from."""
        wanted: dict[fx.Node, set[str]] = {}
        needs: dict[Demand, tuple[Demand, ...]] = {}
        for n in reversed(self.program.graph.nodes):
            versions = wanted.setdefault(n, set())
            if n.op == "output":
                starts = [(o, OWN) for o in n.args[0]]
            elif n in self.inside:
                starts = [(a, OWN) for a in n.all_input_nodes]
            else:
                starts = []
                if n.op == "call_function" and _writes(n):
                    versions.add(WHOLE if scope_of(n).kind == GLOBAL else OWN)
            for a, v in starts:
                wanted.setdefault(a, set()).add(self._plain(a, v))
            for version in (OWN, WHOLE, SIZED, OWN, WHOLE):  # a version may need another one of the same node
                if version in versions and (n, version) not in needs:
                    needs[n, version] = tuple((a, self._plain(a, v)) for a, v in self._needs(n, version))
                    for a, v in needs[n, version]:
                        wanted.setdefault(a, set()).add(v)
        order = {n: i for i, n in enumerate(self.program.graph.nodes)}

        def position(d: Demand) -> tuple[int, bool]:
            own_last = scope_of(d[0]).kind == GLOBAL
            return order[d[0]], (d[1] == OWN) == own_last

        return {d: needs[d] for d in sorted(needs, key=position)}

    def _plain(self, n: fx.Node, version: str) -> str:
        """Constants have one version."""
        return OWN if scope_of(n).kind == CONSTANT else version

    def _needs(self, n: fx.Node, version: str) -> Iterable[Demand]:
        """What a version of a node is made from."""
        scope, operands = scope_of(n), n.all_input_nodes
        if version == OWN and (n.op == "placeholder" or n in self.inside):
            return []
        if scope.kind == CONSTANT:
            return [(a, OWN) for a in operands]
        if scope.kind == SIZE:
            return self._size_needs(n, version)
        if version == SIZED:
            return [(a, SIZED if scope_of(a).sized else OWN) for a in operands]
        if scope.kind == GLOBAL and version == OWN:
            return [(n, WHOLE)]
        if scope.kind == LOCAL and version == WHOLE:
            return [(a, WHOLE) for a in operands] if n in self.free else [(n, OWN)]
        return list(zip(operands, scope.uses, strict=True))

    def _size_needs(self, n: fx.Node, version: str) -> list[Demand]:
        if n.target is not aten.sym_size.int:
            return [(a, version) for a in n.all_input_nodes]
        if size_terms(self.program, n) is not None:
            return []
        x = n.all_input_nodes[0]
        return [(x, WHOLE if scope_of(x).kind == GLOBAL else OWN)]

    def _sends_back(self, n: fx.Node, demands: Mapping[Demand, Any]) -> bool:
        """Whether a gradient comes to a global value from local nodes or from the user."""
        if not scope_of(n).grad:
            return False
        for u in n.users:
            if u.op == "output":
                return True
            scope = scope_of(u)
            if u in self.inside:
                return True
            shape_only = u.target in SHAPE_ONLY and u.args[1] is n and u.args[0] is not n
            if (u, OWN) in demands and scope.kind == LOCAL and scope.grad and not shape_only:
                return True
        return False

    def _exchange(self, kind: str, n: fx.Node, calls: int = 1) -> Exchange:
        scope, fake = scope_of(n), value(n)
        itemsize = None if fake.is_floating_point() and fake.dtype == self._float() else fake.dtype.itemsize
        if kind in ("gather", "slice"):
            assert scope.rows is not None
            shape = [s if isinstance(s, int) else s.node.expr for s in fake.shape]
            del shape[scope.rows.dim]
            if not all(isinstance(s, int) for s in shape):
                raise UnsupportedError(f"{where(n)}: rows of a size that depends on data are used across the batch")
            terms: tuple[tuple[int, ...], ...] = ((scope.rows.outer * scope.rows.inner * torch.Size(shape).numel(),),)
        else:
            found = [_polynomial(s if isinstance(s, int) else s.node.expr, self.program.batch) for s in fake.shape]
            if None in found:
                raise UnsupportedError(f"{where(n)}: a gradient of a size that depends on data crosses between ranks")
            terms = tuple(f for f in found if f is not None)
        return Exchange(kind, n.name, terms, itemsize, calls)

    def _float(self) -> torch.dtype:
        return next((p.dtype for p in self.program.parameters.values() if p.is_floating_point()), torch.float32)


def is_coupled(program: Program) -> bool:
    """Whether any node mixes rows."""
    return any(scope_of(n).kind == GLOBAL for n in program.graph.nodes)


def coupled_nodes(program: Program) -> set[fx.Node]:
    """Nodes whose values for own rows need the rows of the global batch, or an exchange."""
    mixing = {n for n in program.graph.nodes if scope_of(n).kind == GLOBAL or WHOLE in scope_of(n).uses}
    return mixing | descendants(program.graph, mixing)


def size_terms(program: Program, n: fx.Node) -> tuple[int, ...] | None:
    """Coefficients of a ``sym_size`` in the batch size; None if it does not depend on it."""
    expr = value(n).node.expr
    return _polynomial(expr, program.batch) if program.batch in expr.free_symbols else None


def _writes(n: fx.Node) -> bool:
    schema = getattr(n.target, "_schema", None)
    return (schema is not None and schema.is_mutable) or (n.target is aten.batch_norm.default and bool(n.args[5]))


EXCHANGED = {
    "gather": "every rank's rows go to all",
    "reduce": "a sum over the batch is one over ranks' terms",
    "slice": "the gradient of every rank's rows goes to all",
    "spread": "the gradient is a sum over ranks",
    "total": "a sum over a whole table is one over the owners' terms",
    "total back": "the gradient is a mean over ranks",
}


def notes_of(program: Program, exchanges: Sequence[Exchange]) -> list[str]:
    """For people: what mixes the rows of the batch and crosses, and what is drawn at random."""
    nodes = {n.name: n for n in program.graph.nodes}
    notes = []
    for e in exchanges:
        n = nodes[e.name]
        size = "x".join(_polynomial_text(t) for t in e.terms) or "1"
        what = f"{size} elements" + (" a row" if e.kind in ("gather", "slice") else "")
        name = f"input {n.name}" if n.op == "placeholder" else target_name(n)
        notes.append(f"{e.kind} {name}, {what}: {EXCHANGED[e.kind]}  {user_line(n)}".rstrip())
    for n in program.graph.nodes:
        if n.op == "call_function" and scope_of(n).drawn:
            each = "one draw, equal on all ranks" if scope_of(n).kind == GLOBAL else "each rank draws for its own rows"
            notes.append(f"random {target_name(n)}: {each}  {user_line(n)}".rstrip())
    return notes


def _polynomial_text(coefficients: Sequence[int]) -> str:
    """A polynomial in the rows B of the global batch.

    >>> _polynomial_text((1, 2))
    '1+2B'
    """
    terms = [
        f"{c if c != 1 or not i else ''}{'B' * (i > 0)}{'^' + str(i) if i > 1 else ''}"
        for i, c in enumerate(coefficients)
        if c
    ]
    return "+".join(terms) or "0"

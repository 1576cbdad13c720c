"""The rungs ``fx`` and ``leaf``: torch.export's fx trace with opaque leaves (`descompiler.graph.leaf`).

Where tracing fails, the innermost module of the user's that it failed in becomes a leaf, and the trace begins anew; if
a leaf can't be one (its results have sizes that depend on values), the module around it is tried. The rung ``leaf`` is
one leaf that is all of forward. Within a leaf only the ids of its lookups are traced: forward runs up to its last
lookup for them, or what computes them in eager runs is done again (`descompiler.capture.tape`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from descompiler.capture.leaf_runs import (
    WHOLE_FORWARD,
    DrawSeen,
    NotALeafError,
    Seen,
    batch_dim,
    flat_of,
    parts_held,
    sizes_of,
    tables_of,
)
from descompiler.capture.tape import NoRecipeError, Tape, TapeStep, same
from descompiler.capture.tracers import export_program, first_line, traceable_len
from descompiler.errors import CaptureError
from descompiler.graph.leaf import Leaf, LeafCall, Lookups, Quiet, Result
from descompiler.graph.nodes import mutates, storage_roots
from descompiler.graph.program import Program
from descompiler.graph.rewrite import eliminate_dead_code
from descompiler.model.attributes import plain_attributes, set_attributes
from descompiler.model.inputs import unflatten_with
from descompiler.model.probe import Flat, other_batch

ATTEMPTS = 8
"""Traces of one model, each with other leaves."""


EXAMPLE_ROWS = 4
"""Rows of the example that a leaf is also run on alone, to see what depends on values."""


WHOLE_MODEL = "forward"
"""The name of a leaf that is all of the model."""


_LIBRARY = torch.library.Library("descompiler", "FRAGMENT")


_LIBRARY.define("enter(Tensor[] tensors) -> Tensor")


_LIBRARY.define("leaf(int key, Tensor token, Tensor[] tensors, Tensor[] rows, Tensor[] state) -> Tensor[]")


_CALLS: list[LeafCall] = []
"""The calls of leaves in the trace under way, by key."""


@torch.library.register_fake("descompiler::enter", lib=_LIBRARY)
def _enter(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(())


@torch.library.register_fake("descompiler::leaf", lib=_LIBRARY)
def _leaf(key: int, token: Tensor, tensors: list[Tensor], rows: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    call = _CALLS[key]
    batch = next(x.shape[d] for x, d in zip(tensors, call.rows, strict=True) if d is not None)
    return [token.new_empty([s.of(batch) for s in r.shape], dtype=r.dtype) for r in call.results]


class _Done(BaseException):
    """The last lookup of a leaf has been traced; no Exception, which forward might catch."""


def trace_leaves(traced: Flat, tensors: list[Tensor], template: nn.Module) -> Program:
    """`torch.export`'s fx trace, with modules as opaque leaves where it fails.

    Raises
    ------
    CaptureError
        If forward itself can't be traced around its modules; the reasons of every attempt.
    """
    leaves: list[str] = []
    reasons: list[str] = []
    for _ in range(ATTEMPTS):
        work = copy.deepcopy(traced)  # a trace that fails may leave it broken
        names = {id(m): n for n, m in work.named_modules()}
        try:
            return _Trace(work, leaves, tensors, template).run()
        except CaptureError as error:
            refused = next((e for e in _chain(error) if isinstance(e, NotALeafError)), None)
            reasons.append(str(refused or error))
            name = refused.name if refused is not None else _innermost(error, names)
            # a leaf that can't be one, or not be traced around
            if inside := [leaf for leaf in leaves if _within(name, leaf)]:
                name = inside[0].rpartition(".")[0]
        if name in (WHOLE_FORWARD, "model") or (refused is not None and refused.final):
            break
        leaves = [leaf for leaf in leaves if not _within(leaf, name)] + [name]
    raise CaptureError("; ".join(dict.fromkeys(reasons)))


def trace_whole(traced: Flat, tensors: list[Tensor], template: nn.Module) -> Program:
    """All of forward as one opaque leaf: only its lookups are part of the graph.

    Raises
    ------
    CaptureError
        If ids can't be traced, or what forward returns has no sizes that the rows tell.
    """
    try:
        return _Trace(copy.deepcopy(traced), [WHOLE_FORWARD], tensors, template).run()
    except CaptureError as error:
        refused = next((e for e in _chain(error) if isinstance(e, NotALeafError)), None)
        if refused is None or refused is error:
            raise
        raise CaptureError(str(refused)) from error


def _within(name: str, scope: str) -> bool:
    return scope == WHOLE_FORWARD or name == scope or name.startswith(f"{scope}.")


def _chain(error: BaseException) -> list[BaseException]:
    """An error, and what it was raised from."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    return chain


def _innermost(error: BaseException, names: dict[int, str]) -> str:
    """The innermost module of the model that an error was raised in; all of forward if it was raised after it."""
    for e in reversed(_chain(error)):
        found, trace = None, e.__traceback__
        while trace is not None:
            module = trace.tb_frame.f_locals.get("self")
            found = names.get(id(module), found)
            trace = trace.tb_next
        if found is not None:
            return found
    return WHOLE_FORWARD


class _Trace:
    """One trace with given leaves."""

    def __init__(self, work: Flat, names: Sequence[str], tensors: list[Tensor], template: nn.Module):
        self.work, self.names, self.tensors, self.template = work, names, tensors, template
        self.modules = {n: work.get_submodule(n) for n in names}
        self.forwards = {n: m.forward for n, m in self.modules.items()}
        self.attributes = plain_attributes(work)
        self.leaves: dict[str, list[Leaf]] = {}
        self.traced: list[Leaf] = []
        self.recipes: dict[Leaf, list[TapeStep | None]] = {}  # of what its lookups return, for any batch

    def run(self) -> Program:
        if self.names:
            self._observe()
        with self._patched(lambda name: partial(self._enter, name, iter(self.leaves[name]))):
            try:
                with traceable_len(self.work):
                    program = export_program(self.work, self.work, self.tensors, self.template, guarded=True)
            finally:
                _CALLS.clear()
        self._finish(program.graph)
        return program

    @contextlib.contextmanager
    def _patched(self, forward_of: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
        own = {n: "forward" in vars(m) for n, m in self.modules.items()}
        try:
            for name, module in self.modules.items():
                module.forward = forward_of(name)
            yield
        finally:
            for name, module in self.modules.items():
                del module.forward
                if own[name]:
                    module.forward = self.forwards[name]

    # ---- what leaves do

    def _observe(self) -> None:
        """Run the model, and see how the leaves are called."""
        rows = self.tensors[0].shape[0]
        batches = [self.tensors, other_batch(self.tensors)]
        alone = [[t[i : i + 1] for t in self.tensors] for i in range(min(rows, EXAMPLE_ROWS))]
        seen: list[tuple[int, dict[str, list[Seen]]]] = []
        for i, batch in enumerate([*batches, *alone]):
            try:
                seen.append((len(batch[0]), self._run(batch)))
            except NotALeafError:
                raise
            except Exception as error:  # whatever forward raises
                if i < len(batches):
                    raise CaptureError(f"forward fails on {len(batch[0])} rows: {first_line(error)}") from error
        set_attributes(self.work, self.attributes)  # leaves begin as the model does
        for name in self.names:
            counts = {len(calls[name]) for _, calls in seen}
            if counts == {0}:
                raise NotALeafError(name, "it is not called")
            if len(counts) > 1:
                raise NotALeafError(name, "how often it is called depends on values")
            self.leaves[name] = [self._make(name, [(n, c[name][k]) for n, c in seen]) for k in range(counts.pop())]

    def _run(self, batch: list[Tensor]) -> dict[str, list[Seen]]:
        seen: dict[str, list[Seen]] = {n: [] for n in self.names}
        set_attributes(self.work, self.attributes)
        with self._patched(lambda name: partial(self._record, name, seen[name])), torch.no_grad():
            self.work(*[t.clone() for t in batch])
        return seen

    def _record(self, name: str, seen: list[Seen], *args: Any, **kwargs: Any) -> Any:
        lookups: list[tuple[str, Tensor, TapeStep | None]] = []

        def answer(table: str, func: Any, args: Any, kwargs: Any) -> Tensor:
            try:
                recipe = tape.call(func, args, kwargs)
            except NoRecipeError:
                recipe = None
            lookups.append((table, func(*args, **kwargs), recipe))
            return lookups[-1][1]

        module = self.modules[name]
        tensors, statics, spec = flat_of(name, (args, kwargs))
        known: dict[int, int | str] = {id(x): n for n, x in parts_held(module).items()}
        tape = Tape(known | {id(x): i for i, x in enumerate(tensors)})
        before = [x.clone() for x in tensors]
        buffers = [b.clone() for b in module.buffers()]
        with DrawSeen() as random, Quiet() as quiet, Lookups(tables_of(module), answer) as seeing, tape:
            out = self.forwards[name](*args, **kwargs)
        if [id(x) for x in flat_of(name, (args, kwargs))[0]] != [id(x) for x in tensors]:
            raise NotALeafError(name, "it replaces what is in a list or dict that it is given")
        if random.drawn:
            raise NotALeafError(name, f"it draws random numbers ({random.drawn})")
        if not all(map(torch.equal, tensors, before)):
            raise NotALeafError(name, "it writes to its arguments in place")
        outputs, out_statics, out_spec = flat_of(name, out)
        writes = quiet.trains_norm or not all(map(torch.equal, module.buffers(), buffers))
        given, returned = (before, statics, spec), (outputs, out_statics, out_spec)
        seen.append(Seen(*given, *returned, lookups, seeing.otherwise, quiet.drops, quiet.trains_norm, writes))
        return out

    def _make(self, name: str, found: list[tuple[int, Seen]]) -> Leaf:
        """The leaf of one call, as it is for any batch."""
        first = found[0][1]
        for _, other in found[1:]:
            if (other.statics, other.spec) != (first.statics, first.spec):
                raise NotALeafError(name, "it is called with numbers or a nesting that depend on values")
            if (other.out_statics, other.out_spec) != (first.out_statics, first.out_spec):
                raise NotALeafError(name, "it returns numbers or a nesting that depend on values")
            if [t for t, *_ in other.lookups] != [t for t, *_ in first.lookups]:
                raise NotALeafError(name, "which lookups it makes depends on values", final=name == WHOLE_FORWARD)
        if not first.outputs:
            raise NotALeafError(name, "it returns no tensor")
        rows = tuple(batch_dim([(n, x.inputs[i]) for n, x in found]) for i in range(len(first.inputs)))
        if all(d is None for d in rows):
            raise NotALeafError(name, "no dimension of its arguments is the batch")
        results = tuple(
            Result(sizes_of(name, [(n, x.outputs[i]) for n, x in found]), first.outputs[i].dtype)
            for i in range(len(first.outputs))
        )
        looked_up = range(len(first.lookups))
        lookup_rows = tuple(batch_dim([(n, x.lookups[i][1]) for n, x in found]) for i in looked_up)
        alone = next((x for n, x in found if n == 1), None)  # one that forward runs on
        example = [x if d is None else x.narrow(d, 0, 1) for x, d in zip((alone or first).inputs, rows, strict=True)]
        example_rows = [x if alone else x[:1] for _, x, _ in (alone or first).lookups]
        call = LeafCall(
            first.spec, first.statics, first.out_spec, first.out_statics, results, rows,
            tuple(t for t, *_ in first.lookups), lookup_rows, tuple(x.clone() for x in example),
            tuple(x.clone() for x in example_rows), first.drops, first.trains_norm, first.writes,
        )  # fmt: skip
        module = self.modules[name]
        only_looked_up = set(call.lookups) - set().union(*(x.otherwise for _, x in found))
        held = parts_held(module)
        state = {n: x for n, x in held.items() if n not in only_looked_up}
        leaf = Leaf(
            name.removeprefix("model.") or WHOLE_MODEL, module, call, list(state), double=self.work.means_double
        )
        try:
            leaf.check_empty(list(state.values()))
        except CaptureError as error:
            raise NotALeafError(name, str(error)) from error
        every = [[r for *_, r in x.lookups] for _, x in found]
        self.recipes[leaf] = [rs[0] if all(same(rs[0], r) for r in rs) else None for rs in zip(*every, strict=True)]
        return leaf

    # ---- the trace

    def _enter(self, name: str, leaves: Iterator[Leaf], *args: Any, **kwargs: Any) -> Any:
        leaf = next(leaves)
        call, module = leaf.call, self.modules[name]
        tensors, statics, spec = flat_of(name, (args, kwargs))
        if (statics, spec) != (call.statics, call.spec):
            raise NotALeafError(name, "it is called with numbers or a nesting that depend on the batch")
        token = torch.ops.descompiler.enter(tensors)
        rows = self._look_up(name, leaf, tensors, args, kwargs)
        held = parts_held(module)
        _CALLS.append(call)
        self.traced.append(leaf)
        state = [held[n] for n in leaf.state]
        out = torch.ops.descompiler.leaf(len(_CALLS) - 1, token, tensors, rows, state)
        return unflatten_with(out, call.out_spec, call.out_statics)

    def _look_up(self, name: str, leaf: Leaf, tensors: list[Tensor], args: Any, kwargs: Any) -> list[Tensor]:
        """The rows that a leaf's lookups return, as part of the trace."""
        rows: list[Tensor] = []
        if not leaf.call.lookups:
            return rows

        def answer(table: str, func: Any, args: Any, kwargs: Any) -> Tensor:
            rows.append(func(*args, **kwargs))
            if len(rows) == len(leaf.call.lookups):
                raise _Done
            return rows[-1]

        try:
            with _untracked_calls(), Lookups(tables_of(self.modules[name]), answer):
                self.forwards[name](*args, **kwargs)
        except _Done:
            return rows
        except Exception as error:  # whatever tracing raises
            given: dict[int | str, Tensor] = dict(enumerate(tensors))
            given.update(parts_held(self.modules[name]))
            for table, recipe in zip(leaf.call.lookups[len(rows) :], self.recipes[leaf][len(rows) :], strict=True):
                if recipe is None:
                    table = table.removeprefix("model.")
                    why = f"the ids of its lookup in {table!r} can't be traced: {first_line(error)}"
                    raise NotALeafError(name, why, final=True) from error
                rows.append(recipe.run(given))
            return rows
        raise NotALeafError(name, "which lookups it makes depends on values", final=True)

    def _finish(self, graph: fx.Graph) -> None:
        """Put the leaves where the trace has markers, without what only traced their ids."""
        for node in list(graph.nodes):
            if node.target is not torch.ops.descompiler.leaf.default:
                continue
            key, token, *arguments = node.args
            _erase_between(graph, token, node)
            node.target, node.args = self.traced[key], tuple(arguments)
            graph.erase_node(token)
        eliminate_dead_code(graph)


@contextlib.contextmanager
def _untracked_calls() -> Iterator[None]:
    """Calls of modules are not the tracer's: it can't be left in the middle of one."""
    call = nn.Module.__call__
    nn.Module.__call__ = nn.Module._wrapped_call_impl  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]


def _erase_between(graph: fx.Graph, first: fx.Node, last: fx.Node) -> None:
    """Erase what was traced between two nodes and is not needed for the second."""
    roots = storage_roots(graph)
    between, node = [], first.next
    while node is not last:
        between.append(node)
        node = node.next
    needed: set[fx.Node] = set()
    stack = list(last.all_input_nodes)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
            written = [w for w in between if mutates(w) and roots[w.args[0]] is roots[node]]  # type: ignore[index]
            stack.extend(written)
    for node in reversed(between):
        if node not in needed and not node.users:
            graph.erase_node(node)

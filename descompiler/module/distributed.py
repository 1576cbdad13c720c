"""The distributed module: the original's names and calls, this rank's pieces and program."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from descompiler.eager.dynamic import DynamicParameter, substitute_dynamic
from descompiler.eager.exchange import PieceExchange
from descompiler.eager.functions import Finish
from descompiler.eager.gradients import GradientSync
from descompiler.eager.parameters import numbers_of_batch, serve, substitute, weigh_outside
from descompiler.emit.emit import Emitted
from descompiler.errors import CaptureError, InputError, UnsupportedError
from descompiler.graph.nodes import Source
from descompiler.layout.rows import Rows
from descompiler.layout.step import DenseGradients, UsedOutputs
from descompiler.model.attributes import BARE, AttributeWatch
from descompiler.model.calls import Signature
from descompiler.model.kept import copies_of
from descompiler.model.kinds import Kinds
from descompiler.module.ahead import Waiting
from descompiler.module.contents import Contents, Moment
from descompiler.module.global_ids import OTHER_SIZES, given_ids
from descompiler.module.parts import Parts, UsersForward
from descompiler.module.programs import ChoosesPrograms
from descompiler.module.reports import Reports
from descompiler.module.sizes import Programs
from descompiler.module.standard import StandardCalls, has_its_own, watch_loading, with_extra_state
from descompiler.module.structure import Structure
from descompiler.ops.local import differentiable, plain, widest
from descompiler.planning.plan import Plan
from descompiler.runtime.agreement import NotAheadError, OtherProgramError
from descompiler.runtime.ahead import Ahead
from descompiler.runtime.backward import Used, behind
from descompiler.runtime.gradients import Reducer
from descompiler.runtime.untraced import untraced

OF_A_STEP = frozenset(("_given", "_ids", "_used", "_planned", "_told", "_latest", "_looked", "_of_step"))
"""What a forward sets: no part of the module."""


class DistributedModule(StandardCalls, ChoosesPrograms, Reports):
    """This rank's part of a model; called, trained and moved as the original.

    Parameters keep the original names; each is this rank's piece (0 rows or columns where it owns nothing).

    Attributes
    ----------
    plan : Plan
        What was chosen, and why.
    """

    plan: Plan
    predicts_traffic = True
    """Whether `Plan.traffic` is exact, not an estimate."""

    def __init__(
        self,
        parts: Parts,
        signature: Signature | None = None,
        program_for: Callable[..., Emitted] | None = None,
        forward_for: Callable[..., UsersForward] | None = None,
    ):
        super().__init__()
        runtime, host, plan = parts.runtime, parts.host, parts.plan
        object.__setattr__(self, "plan", plan)
        vars(self)["_host"] = host  # no submodule: its parts are this module's own
        vars(self)["_original"] = parts.template if parts.original is None else parts.original
        self._runtime, self._coverage, self._in_place = runtime, parts.coverage, parts.in_place
        self._signature, self._program_for, self._forward_for = signature, program_for, forward_for
        self._advise, self._first = parts.advise, list[Any]()
        self._programs = Programs()
        self._forwards: dict[tuple[bool, ...], UsersForward] = {}  # by training flags
        self._flags = [name for name, _ in parts.template.named_modules()]
        self._frozen = frozenset(n for n, p in parts.template.named_parameters() if not p.requires_grad)
        self._divided = frozenset(n for n, x in parts.plan.pieces.items() if not x.is_replicated)
        self._sparse: frozenset[str] = frozenset()  # tables whose gradients are, though the original's are dense
        self._fused: list[torch.optim.Optimizer] = []  # they live as long as their hooks
        self._given: Kinds | None = None  # of the latest forward's inputs
        self._ahead: list[Waiting] = []  # batches of which something has gone ahead, in order
        self._ids: dict[int, Tensor] = {}  # of the global batch, by position among them
        self._planned = True  # the latest forward's program
        self._used = self._told = Used()  # of the outputs of the forward that runs, and of the latest one
        self._reducer: Reducer | None = None
        self._reducer_key: Any = None
        self._reduced: dict[str, nn.Parameter] = {}  # of the latest step, by the reducer
        parts.fill(self)
        runtime.tables = {name: table._table for name, table in parts.tables.items()}
        self._latest: Contents | None = None
        self._looked = False
        self._of_step: Moment | None = None
        runtime.wire_dtype, self._dtypes = widest(self.parameters()), self._moment().dtypes
        face = parts.face(self)
        self._attributes = AttributeWatch(face)
        self._gradients = GradientSync(runtime, in_part=not self.predicts_traffic)
        me = weakref.ref(self)
        self._exchange = PieceExchange(self._gradients, lambda: () if (module := me()) is None else module.buffers())
        self._exchange.weighs = runtime.loss != "rank_mean" and runtime.ranks > 1
        for name, p in self.named_parameters():
            if name in runtime.tables:
                if runtime.ranks > 1 and not isinstance(p, DynamicParameter):
                    substitute_dynamic(p, name, plan.pieces[name], runtime.tables[name], runtime)
                if runtime.ranks > 1 and not self.predicts_traffic:
                    serve(p, self._exchange)
            elif not plan.pieces[name].is_replicated:
                substitute(p, name, plan.pieces[name], self._exchange)
            elif self._in_place and self._exchange.weighs:
                weigh_outside(p, self._exchange)
        # a program looks itself whether a dynamic table's weight is its own; where none runs nobody averages other ones
        reduced = self.predicts_traffic and not self._in_place  # by a reducer, which looks what is there now
        kept = self._divided - runtime.tables.keys() if reduced else plan.pieces.keys()
        self._structure = Structure(self, kept if runtime.ranks > 1 else ())
        if self._in_place:
            self._watch()
        for loaded in (self, host) if self._in_place and host is not None else (self,):
            watch_loading(loaded, self)
        vars(self)["_face"] = face  # from here on users' attributes are the face's; before, all are this module's
        if has_its_own(face, "get_extra_state"):
            self.__class__ = with_extra_state(type(self))

    def _watch(self) -> None:
        """Average the gradients of replicated parameters at the end of backward, whatever code used them."""
        left_out = self.plan.sparse if self.predicts_traffic else set()  # an emitted program sums sparse ones itself
        self._gradients.watch(
            [p for n, p in self.named_parameters() if self.plan.pieces[n].is_replicated and n not in left_out]
        )
        self._gradients.caught.close_with(self._structure)  # which no other object holds

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OF_A_STEP:  # what it is no module looks at each time
            vars(self)[name] = value
        elif self._is_users(name, value):
            setattr(vars(self)["_face"], name, value)
        elif self._collides(name):
            raise UnsupportedError(
                f"{name!r} is an attribute of the model, and {type(self).__name__}.{name} is the compiled module's: "
                "give the model's another name, or set it before des.compile"
            )
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        face = vars(self).get("_face")
        if face is not None and (name in vars(face) or isinstance(getattr(type(face), name, None), property)):
            return getattr(face, name)
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> Self:
        """As ``torch.nn.Module.train``, or as the original's own: it may leave a batch norm in evaluation."""
        super().train(mode)
        self._as_the_original("train", mode)
        return self

    def eval(self) -> Self:
        """As ``torch.nn.Module.eval``, or as the original's own."""
        super().eval()
        self._as_the_original("eval")
        return self

    def _as_the_original(self, method: str, *args: Any) -> None:
        face = vars(self).get("_face")
        if face is not None and not self._in_place and has_its_own(face, method):
            getattr(face, method)(*args)  # on the same parts and parameters
            self.training = face.training

    def __delattr__(self, name: str) -> None:
        own = vars(self)
        if name not in own and name in vars(face := own.get("_face", self)):
            delattr(face, name)
        else:
            super().__delattr__(name)

    def _collides(self, name: str) -> bool:
        face = vars(self).get("_face")
        if face is None or name in BARE or not hasattr(type(self), name):
            return False
        return name in vars(face).keys() - {"forward"} or self._asks(name)

    def _asks(self, name: str) -> bool:
        """Whether the model's forward asks for an attribute that the model does not have itself."""
        return self._attributes.asks(("", name))

    def _is_users(self, name: str, value: Any) -> bool:
        """Whether it is a plain attribute of the original, or what its forward may ask for, and none of this module."""
        own = vars(self)
        if "_face" not in own or name in own or hasattr(type(self), name):
            return False
        if name in vars(face := own["_face"]) or self._asks(name):
            return True
        if not self.predicts_traffic and not isinstance(value, nn.Module | Tensor):
            return True  # the user's forward runs, and may ask for anything
        return hasattr(type(face), name) and name not in own["_modules"]

    # ---- calls

    @untraced
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward on this rank's rows: outputs for them."""
        try:
            return self._step(args, kwargs)
        finally:
            self._looked = False

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        runtime = self._runtime
        self._refuse_wrapped()
        runtime.new_step()
        self._gradients.begin()
        self._same_flags()
        try:
            self._structure.check(self)
            self._moment()
            self._looked = True  # once a step: what modules hold changes between them
            self._structure.check_tensors(self, self._now())
            assert self._signature is not None
            own, self._ids = given_ids(self.plan.layout.given, args, kwargs, self._signature, runtime)
            tensors, other = self._signature.call_of(*own)
            self._given = Kinds.of(tensors, self._programs.known(other))
            try:
                emitted = self._program_for_inputs(tensors)
            except CaptureError as error:
                if self._given.called is not None:  # of the example alone it is known what forward's outputs are
                    raise
                users = self._users_forward(error)
                runtime.started = True  # the users' forward tells the other ranks what fails in it
                return users.follow(self, args, kwargs)
            changes = self._changes()  # of what the program is known to read by now
            runtime.call = self._call_of(changes).with_sizes(self._given.sizes)
            runtime.layout, runtime.checks, runtime.accepts = emitted.layout, emitted.checks, emitted.accepts
            runtime.device = next(iter(self._now().parameters.values())).device
            if (dtypes := self._moment().dtypes) != self._dtypes:
                self._cast(dtypes, emitted)
            runtime.ahead = self._gone_ahead(emitted, tensors)
            try:
                outputs = self._run_taking_ahead(tensors, emitted)
            except OtherProgramError:
                if self._ids:
                    runtime.raise_everywhere(OTHER_SIZES, InputError)
                emitted, graph = self._begin_again(tensors)
                outputs = self._run(tensors, emitted, graph)
        except Exception as error:
            if runtime.started:
                if not runtime.failed and runtime.channels is not None:  # the others go on
                    runtime.channels.watch.failed(error)
                raise
            # the other ranks wait for this one's header: tell them, then everyone raises
            text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            runtime.header(0, text)
            raise
        assert emitted.signature is not None
        self._planned = emitted.planned
        outputs = self._noticing(self._finishing(outputs) if self._in_place else outputs, emitted.outputs)
        emitted.signature.update(args, kwargs, outputs)
        self._remember(*own)
        self._attributes.set(emitted.signature.sets)
        return emitted.signature.unflatten(outputs)

    def _begin(self, emitted: Emitted) -> None:
        """Begin a forward that runs a program."""
        runtime, trained = self._runtime, torch.is_grad_enabled() and self._runtime.ranks > 1
        reduced = trained and emitted.layout.of(DenseGradients) and not self._in_place
        if reduced and (reducer := self._reducer_of(emitted)) is not None:
            reducer.begin()
        runtime.seen = {}
        self._used = Used(trained and bool(emitted.layout.of(UsedOutputs)), emitted.behind, runtime.seen)

    def _refuse_changed(self) -> None:
        """Raise if the module is another one than was compiled, in what no program follows."""
        self._structure.check(self)
        self._structure.check_tensors(self, self._now())

    def _now(self) -> Contents:
        """What this module holds."""
        if self._latest is None or not (self._looked or self._latest.is_current()):
            self._latest = Contents(self, self._flags)
        return self._latest

    def _moment(self) -> Moment:
        """What a step's program depends on; asked once in a step."""
        if not self._looked or self._of_step is None:
            self._of_step = self._now().moment()
        return self._of_step

    def _cast(self, dtypes: tuple[torch.dtype, ...], emitted: Emitted) -> None:
        """The parameters are of other dtypes now: other bytes cross, and the plan says so."""
        dtype, plan = widest(self.parameters()), self.plan
        several = max(len(set(x)) for x in (dtypes, self._dtypes)) > 1
        # of one dtype, all that crosses was cast; of several, the graph that was captured anew knows what is of which
        layout, labels = (emitted.layout, emitted.labels) if several else (plan.layout, plan.labels)
        self._runtime.wire_dtype, self._dtypes = dtype, dtypes
        object.__setattr__(self, "plan", replace(plan, itemsize=dtype.itemsize, layout=layout, labels=labels))

    def _noticing(self, outputs: Sequence[Tensor], rows: Sequence[Rows | None]) -> list[Tensor]:
        """The outputs, so that ranks agree which gradients a backward is asked for; ``rows``: of each."""
        me, r = weakref.ref(self), self._runtime
        parameters = lambda: [] if (module := me()) is None else [*module._now().parameters.items()]  # noqa: E731
        used, self._used = self._used, Used()  # what it has of this forward is the graph's
        used.divided = self._divided
        if not used.ends:
            self._told = used
        noticed = behind(r, r.asked, r.forwards, outputs, parameters, used)
        return numbers_of_batch(noticed, [x is not None for x in rows], self._exchange)

    def _finishing(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, so that every rank's backward ends with the exchange of gradients."""
        outputs = list(outputs)
        if torch.is_grad_enabled() and self._runtime.ranks > 1:
            # on every rank, also where an empty batch or a branch left an output without a gradient
            floating = [i for i, x in enumerate(outputs) if differentiable(x)]
            anchor = torch.zeros((), device=self._runtime.device, requires_grad=True)
            with torch._C.DisableTorchFunctionSubclass():
                sharded = self._gradients.watch_sharded()
                chosen = (outputs[i] for i in floating)
                step = self._gradients, self._used, floating, anchor
                finished = Finish.apply(*step, len(sharded), *sharded, *chosen)
            for i, x in zip(floating, finished, strict=True):
                outputs[i] = x
        return outputs

    def _run(self, tensors: Any, emitted: Emitted, module: nn.Module) -> list[Tensor]:
        values = self._values(emitted, emitted.sources, tensors)
        with torch._C.DisableTorchFunctionSubclass():  # the program knows that it holds pieces
            outputs: list[Tensor] = module(self._runtime, *values)
        self._runtime.settle()
        return outputs

    def _run_taking_ahead(self, tensors: Sequence[Tensor], emitted: Emitted) -> list[Tensor]:
        """The outputs of a program; with what has gone ahead of its batch, if every rank takes it."""
        program = self._compilable(emitted)
        self._begin(emitted)
        try:
            return self._run(tensors, emitted, program)
        except NotAheadError:
            self._runtime.leave_ahead()
            self._runtime.call = self._runtime.call.begun_alike()
        self._begin(emitted)
        return self._run(tensors, emitted, program)

    def _gone_ahead(self, emitted: Emitted, tensors: Sequence[Tensor]) -> Ahead | None:
        """What was sent of these very inputs for this program, which is taken once."""
        found = next((w for w in self._ahead if w.is_of(self._runtime.call, emitted, self._now(), tensors)), None)
        if found is None:
            return None
        self._ahead.remove(found)
        found.begin(self._now())
        return found.ahead

    def _values(self, emitted: Emitted, sources: Sequence[Source], tensors: Sequence[Tensor] = ()) -> list[Tensor]:
        now, used = self._now(), self._used
        parameters, buffers = now.every_parameter, now.every_buffer
        used.watch_hooks(tensors)
        tables = self._runtime.tables
        queue = iter(self._runtime.inputs([self._ids.get(i, x) for i, x in enumerate(tensors)]))
        values: list[Tensor] = []
        for s in sources:  # nothing is called for a table
            if s.kind == "input":
                value = next(queue)
            elif s.kind == "constant":
                value = emitted.constant(s.name, self._runtime.device)
            else:
                value = parameters[s.name] if s.kind == "parameter" else buffers[s.name]
                if tables and s.name in tables:
                    tables[s.name].check_weight(value)
            if used.told and s.kind in ("input", "parameter"):
                value = used.gate(s.name, value)
            values += (value,)
        return values

    def _same_flags(self) -> None:
        """This module and its host are one module under two names; users switch one of them to evaluation."""
        host = vars(self)["_host"]
        if self._in_place:
            self.training = host.training
        elif host is not None:
            host.training = self.training

    def _replicas(self, program: Emitted) -> dict[str, nn.Parameter]:
        """The parameters whose gradients the reducer averages: whole on every rank, trained, and used."""
        now = self._now()
        moment = self._moment()
        of, replicas = moment.known.get("replicas", (None, {}))
        if of is not program:
            pieces, splits = self.plan.pieces, self.plan.splits
            used = {s.name for s in program.sources if s.kind == "parameter"} - program.untrained
            gathered = {n for n, s in splits.items() if s.gathered}
            replicas = {
                n: p
                for (n, p), trained in zip(now.parameters.items(), moment.trained, strict=True)
                if trained and n in used and n not in gathered and pieces[n].is_replicated
            }
            moment.known["replicas"] = program, replicas
        return replicas

    def _reducer_of(self, program: Emitted) -> Reducer | None:
        """The reducer of replicated parameters' gradients, made anew when parameters changed under it."""
        replicas = self._replicas(program)
        if self._reducer is not None and self._reduced is replicas:
            return self._reducer
        if not replicas:  # users freeze them
            return None
        key = tuple((n, id(p), p.dtype, p.device) for n, p in replicas.items())
        if self._reducer is None or self._reducer_key != key:
            if self._reducer is not None:
                self._reducer.caught.close()
            assert self._runtime.channels is not None
            # its own group: its all-reduces run in any order with respect to the exchange
            self._reducer = Reducer(self._runtime, self._runtime.channels.reducer, replicas)
            self._reducer_key = key
            self._reducer.caught.close_with(self._structure)
        self._reduced = replicas
        return self._reducer

    # ---- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> DistributedModule:
        """A copy on the same ranks, with values of its own: an average of weights, a target network."""
        if self._in_place:
            raise UnsupportedError(
                "a model that was compiled in place can't be copied: copy it before it is compiled, compile the copy, "
                "and load des.full_state_dict(model) into it"
            )
        if tables := sorted(self._runtime.tables):
            raise UnsupportedError(
                f"a compiled module with dynamic tables ({', '.join(tables)}) can't be copied: parameters of copies "
                "are averaged slot by slot, and a slot has other ids' rows there. des.to_single(module) gives the "
                "model as it is; des.load_full_state_dict takes des.full_state_dict(module) into another module"
            )
        self._refuse_changed()  # the copy would be without it, and silent
        result = self._copied(memo)
        pairs = zip(self.parameters(), result.parameters(), strict=True)
        memo.update({id(self): result, **{id(p): q for p, q in pairs}})
        return result

    def _copied(self, memo: dict[int, Any]) -> DistributedModule:
        values = {n: plain(p).detach().clone() for n, p in self.named_parameters()}
        buffers = copies_of(dict(self.named_buffers(remove_duplicate=False)), torch.clone)
        runtime, original = self._runtime.anew(), vars(self)["_original"]
        parts = Parts(self, self.plan, runtime, values, buffers, self._coverage, original=original, advise=self._advise)
        result = DistributedModule(parts, self._signature, self._program_for, self._forward_for)
        result._frozen, result._dtypes, result._sparse = self._frozen, self._dtypes, self._sparse
        result._attributes.begin_as(self._attributes)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "a compiled module belongs to its process group and can't be pickled: save des.full_state_dict(module) and "
            "module.plan, compile again, and load them with des.load_full_state_dict and plan="
        )

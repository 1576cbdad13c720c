"""Which program a forward of a module runs: by what it is given, and what the module holds now."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.emit.emit import Emitted
from descompiler.emit.stages import staged
from descompiler.errors import CaptureError, InputError, OtherShapesError, warn
from descompiler.graph.nodes import Source
from descompiler.model.attributes import AttributeWatch, Place
from descompiler.model.calls import Signature
from descompiler.model.kinds import Kinds
from descompiler.module.contents import Contents, Moment
from descompiler.module.global_ids import told_ids
from descompiler.module.parts import UsersForward
from descompiler.module.sizes import SAMPLE_ROWS, Programs, Sized, Sizes, begin_again
from descompiler.ops.local import plain
from descompiler.planning.plan import Plan
from descompiler.runtime.agreement import Call, Kind
from descompiler.runtime.runtime import Runtime
from descompiler.runtime.untraced import is_compiled


class ChoosesPrograms(nn.Module):
    """The programs of a `descompiler.DistributedModule`: which one a forward runs, and what it tells of it."""

    plan: Plan
    _runtime: Runtime
    _signature: Signature | None
    _program_for: Callable[..., Emitted] | None
    _forward_for: Callable[..., UsersForward] | None
    _programs: Programs
    _forwards: dict[tuple[bool, ...], UsersForward]
    _flags: list[str]
    _frozen: frozenset[str]
    _sparse: frozenset[str]
    _given: Kinds | None
    _ids: Mapping[int, Tensor]
    _dtypes: tuple[torch.dtype, ...]
    _attributes: AttributeWatch

    def _now(self) -> Contents:
        raise NotImplementedError

    def _moment(self) -> Moment:
        raise NotImplementedError

    def _same_flags(self) -> None:
        raise NotImplementedError

    def _values(self, emitted: Emitted, sources: Sequence[Source], tensors: Sequence[Tensor] = ()) -> list[Tensor]:
        raise NotImplementedError

    def _begin(self, emitted: Emitted) -> None:
        raise NotImplementedError

    def _call_of(self, changes: Sequence[tuple[Place, Any]]) -> Call:
        """Which program this forward runs."""
        given, grads = () if self._given is None else self._given.told, torch.is_grad_enabled()
        given = (*given, *told_ids(self._ids, self.plan.layout))
        moment = self._moment()
        said = repr((changes, given, sorted(self._sparse)))  # a program is another one for inputs of other dtypes
        key = said, grads
        call: Call
        of, call = moment.known.get("call", (None, Call()))
        if of != key:
            number = zlib.crc32(bytes((*moment.flags, *self._trained())) + said.encode())
            name = ", ".join(["training" if self.training else "evaluation", self._gradients_mode(), *given])
            if changes:
                name += f", {self._attributes.told(changes)}"
            call = Call(Kind.PROGRAM, 2 * number + grads, name)
            moment.known["call"] = key, call
        return call

    def _users_forward(self, error: CaptureError) -> UsersForward:
        """What runs the user's own forward, where the graph for these training flags was not captured.

        Raises
        ------
        CaptureError
            If gradients are on: those of the pieces are the other graph's business.
        OtherShapesError
            If they are on, and it is for these sizes of inputs that there is no graph.
        """
        if torch.is_grad_enabled():
            if isinstance(error, OtherShapesError):
                raise error
            raise CaptureError(
                f"the model was captured in other training flags (dtypes, sizes) only, not in these ({error}). Its own "
                "forward can run in these with gradients off: call it within torch.no_grad()",
                error.failures,
            ) from error
        key = self._training_flags()
        if key not in self._forwards:
            assert self._forward_for is not None
            warn(
                "the model was not captured as a graph in these training flags; its own forward runs, and fetches or "
                f"gathers what it uses of split parameters. {error}"
            )
            values = {n: plain(p).detach() for n, p in self.named_parameters()}
            self._forwards[key] = self._forward_for(
                dict(zip(self._flags, key, strict=True)), values, dict(self.named_buffers(remove_duplicate=False))
            )
        return self._forwards[key]

    def _program_for_inputs(self, tensors: Sequence[Tensor]) -> Emitted:
        """The program; captured on these inputs, if the example's can't be given their sizes."""
        try:
            return self._sized().emitted
        except OtherShapesError:
            raise
        except InputError:
            return self._sized([x[:SAMPLE_ROWS] for x in tensors]).emitted

    def _begin_again(self, tensors: Sequence[Tensor]) -> tuple[Emitted, nn.Module]:
        """What this rank runs where ranks' inputs have other sizes, or their rows are others. Collective."""
        mine = self._given

        def program(sizes: Sizes, rows: int, sample: Sequence[Tensor] | None) -> Sized:
            assert mine is not None
            self._given = replace(mine, sizes=sizes, rows=rows)
            return self._sized(sample)

        try:
            return begin_again(self._runtime, tensors, program, self._values, self._begin)
        finally:
            self._given = mine

    def _compilable(self, emitted: Emitted) -> nn.Module:
        """What a forward runs: in stages, if it is called within `torch.compile`."""
        if not is_compiled():
            return emitted.module
        if self._runtime.ranks == 1 and len({x for x in emitted.behind.possible if x}) > 1:  # on several they tell
            warn(
                "torch.compile: this model runs uncompiled on one rank, as some parameters are behind some of its "
                "outputs only, and where a loss ignores one a compiled graph gives them zeros in place of no gradient"
            )
            return emitted.module
        return staged(emitted.module)

    def _trained(self) -> list[bool]:
        """By parameter, whether this forward's backward gives it a gradient: the same on every rank."""
        trained = self._moment().trained
        return trained if torch.is_grad_enabled() else [False] * len(trained)

    def _gradients_mode(self) -> str:
        if not torch.is_grad_enabled():
            return "gradients off"
        return f"gradients on, {self._trained().count(False)} parameters frozen"

    def _training_flags(self) -> tuple[bool, ...]:
        return self._moment().flags

    def _sized(self, sample: Sequence[Tensor] | None = None) -> Sized:
        found = self._program_now(sample)
        if self._attributes.add(found.emitted.reads):
            found = self._program_now(sample)  # it is the first, or the first in these training flags
        return found

    def _changes(self) -> tuple[tuple[Place, Any], ...]:
        """What users changed of the plain attributes that forward reads."""
        return self._attributes.changes()

    def _program_key(self) -> tuple[Any, ...]:
        """What programs are told apart by, sizes aside."""
        now = self._now()
        moment = self._moment()
        if "thawed" not in moment.known:
            known = zip(now.parameters, moment.trained, strict=True)
            moment.known["thawed"] = tuple(n for n, trained in known if trained and n in self._frozen)
        given = self._given and (self._given.dtypes, self._given.called, self._given.trained)
        return moment.flags, moment.held, moment.known["thawed"], self._changes(), given, self._sparse

    def _program_now(self, sample: Sequence[Tensor] | None) -> Sized:
        key, now = self._program_key(), self._now()
        flags, held_now, thawed, changes, *_ = key

        def make() -> Emitted:
            assert self._program_for is not None
            if changes:
                warn(
                    f"{self._attributes.told(changes)}: the model is captured anew, as it will be for every other "
                    "value. A buffer may change without that"
                )
            training = dict(zip(self._flags, flags, strict=True))
            held = dict(zip((*now.parameters, *now.buffers), held_now, strict=True))
            return self._program_for(training, self._sparse, held, thawed, changes, self._given, sample)

        return self._programs.get(key, self._given, make)

    def _known_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Sized, Call] | None:
        """Inputs, program and call of a forward on this batch now; None if nothing has been run so before."""
        assert self._signature is not None
        self._same_flags()
        tensors, other = self._signature.call_of(args, kwargs)
        before, self._given = self._given, Kinds.of(tensors, self._programs.known(other))
        try:
            found = self._programs.find(self._program_key(), self._given)
            call = self._call_of(self._changes()).with_sizes(self._given.sizes)
        finally:
            self._given = before
        if found is None or self._moment().dtypes != self._dtypes:
            return None
        return tensors, found, call

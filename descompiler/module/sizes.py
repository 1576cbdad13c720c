"""Steps in which ranks' inputs have other sizes than each other: which program each rank runs, and whose regions.

Ranks learn it from the header. Then each tells its sizes; all have the programs for all of them, captured as they come,
and begin the step again. See `descompiler.emit.by_size` for what they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from descompiler.emit.ahead import Beginning, beginning_of
from descompiler.emit.by_size import RegionOfSize, region_of_size, with_regions
from descompiler.emit.emit import Emitted
from descompiler.errors import InputError, warn
from descompiler.graph.nodes import Source
from descompiler.model.calls import OtherCall
from descompiler.model.kinds import MOST_KEPT, Kinds
from descompiler.runtime.agreement import say, settle
from descompiler.runtime.runtime import Regions, Runtime

Sizes = tuple[tuple[int, ...], ...]
"""Of each input, beyond the rows."""


SAMPLE_ROWS = 8
"""Rows of a batch on which a program is captured, where the example can't be given its sizes."""


MOST_BRANCHES = 8
"""Programs of one size that are kept, each for other rows of the global batch."""


MANY_SIZES = 8
"""Sizes of inputs, and ways to call forward, from which on users are told what each costs."""


@dataclass(frozen=True)
class Sized:
    """A program for inputs of some sizes."""

    emitted: Emitted

    @cached_property
    def region(self) -> RegionOfSize | None:
        return region_of_size(self.emitted)

    @cached_property
    def beginning(self) -> Beginning | None:
        return beginning_of(self.emitted)

    @cached_property
    def module(self) -> fx.GraphModule:
        return with_regions(self.emitted)


class Programs:
    """What a module has captured so far: by training flags, dtypes, parameters that were frozen, and sizes."""

    def __init__(self) -> None:
        self._programs: dict[Any, list[Sized]] = {}
        self._calls: list[OtherCall] = []

    def __iter__(self) -> Iterator[Emitted]:
        return (sized.emitted for programs in self._programs.values() for sized in programs)

    def known(self, called: OtherCall | None) -> OtherCall | None:
        """The call that is like this one, if there was one before."""
        found = None if called is None else next((c for c in self._calls if c.is_like(called)), None)
        if called is None or found is not None:
            return found
        self._calls = [*self._calls[1 - MOST_KEPT :], called]
        if len(self._calls) == MANY_SIZES:
            warn(
                f"the model was called in {MANY_SIZES} ways other than the example, the latest: {called.told}. It is "
                "captured anew for each: a number that changes from step to step had better be a tensor"
            )
        return called

    def _fitting(self, key: Any, given: Kinds | None) -> list[Sized]:
        sizes, rows = (None, None) if given is None else (given.sizes, given.rows)
        return [p for p in self._programs.get((key, sizes), []) if rows is None or p.emitted.accepts(rows)]

    def find(self, key: Any, given: Kinds | None) -> Sized | None:
        """The program that `get` has, if it need not be made."""
        return next(iter(self._fitting(key, given)), None)

    def get(self, key: Any, given: Kinds | None, make: Callable[[], Emitted]) -> Sized:
        """A program, made if there is none; of several, which are for other rows, the one that was asked for last."""
        sizes = None if given is None else given.sizes
        found, fitting = self._programs.get((key, sizes), []), self._fitting(key, given)
        if not fitting:
            if len(self._programs) == MOST_KEPT:
                del self._programs[next(iter(self._programs))]
            fitting = [Sized(make())]
            if not found and len({s for _, s in self._programs} | {sizes}) == MANY_SIZES:
                warn(
                    f"the model was captured for inputs of {MANY_SIZES} sizes, the latest {sizes}: it is captured anew "
                    "for each. Pad histories to a few lengths (8, 16, 32 ...) if that takes too long"
                )
        self._programs[key, sizes] = [fitting[0], *(p for p in found if p is not fitting[0])][:MOST_BRANCHES]
        return fitting[0]


def begin_again(
    runtime: Runtime,
    tensors: Sequence[Tensor],
    program: Callable[[Sizes, int, Sequence[Tensor] | None], Sized],
    values: Callable[[Emitted, Sequence[Source]], Sequence[Any]],
    begins: Callable[[Emitted], None],
) -> tuple[Emitted, fx.GraphModule]:
    """What this rank runs where ranks' inputs have other sizes, or their rows are others. Collective.

    The runtime is set for it.

    Parameters
    ----------
    program : callable
        The program for some sizes and the rows of all ranks, captured on a sample where the example can't be given
        them.
    values : callable
        Of what a program takes, inputs aside.
    begins : callable
        Is told which program this rank runs, before any of its values is taken.

    Raises
    ------
    InputError
        On every rank, if any can't capture a program, or what mixes rows would mix other sizes.
    """
    runtime.another_header()
    programs, every = _programs_of_all(runtime, tensors, program)
    mine = programs[every[runtime.rank]].emitted
    begins(mine)
    runtime.regions = _regions(runtime, programs, every, values) if len(programs) > 1 else None
    runtime.layout, runtime.checks, runtime.accepts = mine.layout, mine.checks, mine.accepts
    runtime.call = runtime.call.without_sizes().with_sizes(every)
    return mine, programs[every[runtime.rank]].module if len(programs) > 1 else mine.module


def _programs_of_all(
    runtime: Runtime, tensors: Sequence[Tensor], program: Callable[[Sizes, int, Sequence[Tensor] | None], Sized]
) -> tuple[dict[Sizes, Sized], list[Sizes]]:
    """The program for each of the sizes that ranks have, and the sizes of each rank."""
    told = say((Kinds.of(tensors).sizes, tensors[0].shape[0]), runtime.group, runtime.ranks)
    every, rows = [sizes for sizes, _ in told], sum(n for _, n in told)
    programs: dict[Sizes, Sized] = {}
    unlike: list[Sizes] = []
    problem = None
    for sizes in dict.fromkeys(every):
        try:
            programs[sizes] = program(sizes, rows, None)
        except InputError:
            unlike.append(sizes)
        except Exception as error:  # whatever capture and emission raise
            problem = f"{type(error).__name__}: {error}"
    lacking = [s for of_rank in say(unlike, runtime.group, runtime.ranks) for s in of_rank]
    if lacking:
        sample = [x[:SAMPLE_ROWS].cpu() for x in tensors] if every[runtime.rank] in lacking else None
        samples = say(sample, runtime.group, runtime.ranks)
        for sizes in unlike:
            try:
                programs[sizes] = program(sizes, rows, samples[every.index(sizes)])
            except Exception as error:  # as above
                problem = f"{type(error).__name__}: {error}"
    try:
        problem = problem or _mixes(programs) or _branches(programs, rows)
        settle(problem, runtime.group, runtime.ranks, InputError)
    except InputError:
        runtime.failed = True
        raise
    return programs, every


def _mixes(programs: dict[Sizes, Sized]) -> str | None:
    """What mixes rows whose sizes differ between programs; None if nothing does."""
    first, *others = programs.values()
    for other in others:
        for name in first.emitted.mixed.keys() | other.emitted.mixed.keys():
            if first.emitted.mixed.get(name) != other.emitted.mixed.get(name):
                return (
                    f"ranks' inputs have other sizes ({' and '.join(map(str, programs))}), and {name!r} of forward "
                    "mixes the rows of all ranks over them: pad to one length on all ranks"
                )
    return None


def _branches(programs: dict[Sizes, Sized], rows: int) -> str | None:
    """Which program is not that for so many rows, though it was captured on them; None if all are."""
    if all(p.emitted.accepts(rows) for p in programs.values()):
        return None
    return f"forward branches on the size of the batch, and no program for {rows} rows was captured"


def _regions(
    runtime: Runtime,
    programs: dict[Sizes, Sized],
    every: Sequence[Sizes],
    values: Callable[[Emitted, Sequence[Source]], Sequence[Any]],
) -> Regions:
    """The regions of a step in which ranks have these programs."""
    groups = [[r for r, s in enumerate(every) if s == sizes] for sizes in programs]

    def run(of_size: Sized) -> Callable[..., Any] | None:
        region = of_size.region
        if region is None:
            return None
        given = values(of_size.emitted, region.sources)
        return lambda rows, ids: region.module(runtime, rows, ids, *given)

    runs = [r for p in programs.values() if (r := run(p)) is not None]
    return Regions([programs[s].emitted.layout for s in every], groups, runs)

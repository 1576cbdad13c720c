"""Steps in which ranks' inputs have other sizes than each other: which program each rank runs, and whose regions.

Ranks learn it from the header. Then each tells its sizes; all have the programs for all of them, captured as they come,
and begin the step again. See `descompiler.emit.by_size` for what they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from descompiler.emit.by_size import RegionOfSize, region_of_size, with_regions
from descompiler.emit.emit import Emitted
from descompiler.errors import InputError, warn
from descompiler.graph.nodes import Source
from descompiler.model.inputs import MOST_KEPT, Kinds
from descompiler.runtime.agreement import say, settle
from descompiler.runtime.runtime import Regions, Runtime

Sizes = tuple[tuple[int, ...], ...]
"""Of each input, beyond the rows."""


SAMPLE_ROWS = 8
"""Rows of a batch on which a program is captured, where the example can't be given its sizes."""


MANY_SIZES = 8
"""Sizes of inputs from which on users are told what each costs."""


@dataclass(frozen=True)
class Sized:
    """A program for inputs of some sizes."""

    emitted: Emitted

    @cached_property
    def region(self) -> RegionOfSize | None:
        return region_of_size(self.emitted)

    @cached_property
    def module(self) -> fx.GraphModule:
        return with_regions(self.emitted)


class Programs:
    """What a module has captured so far: by training flags, dtypes, parameters that were frozen, and sizes."""

    def __init__(self) -> None:
        self._programs: dict[Any, Sized] = {}

    def get(self, key: Any, sizes: Sizes | None, make: Callable[[], Emitted]) -> Sized:
        """A program, made if there is none."""
        if (key, sizes) not in self._programs:
            if len(self._programs) == MOST_KEPT:
                del self._programs[next(iter(self._programs))]
            self._programs[key, sizes] = Sized(make())
            if len({s for _, s in self._programs}) == MANY_SIZES:
                warn(
                    f"the model was captured for inputs of {MANY_SIZES} sizes, the latest {sizes}: it is captured anew "
                    "for each. Pad histories to a few lengths (8, 16, 32 ...) if that takes too long"
                )
        return self._programs[key, sizes]


def begin_again(
    runtime: Runtime,
    tensors: Sequence[Tensor],
    program: Callable[[Sizes, Sequence[Tensor] | None], Sized],
    values: Callable[[Emitted, Sequence[Source]], Sequence[Any]],
) -> Sized:
    """What this rank runs where ranks' inputs have other sizes, with the runtime set for it. Collective.

    Parameters
    ----------
    program : callable
        The program for some sizes, captured on a sample where the example can't be given them.
    values : callable
        Of what a program takes, inputs aside.

    Raises
    ------
    InputError
        On every rank, if any can't capture a program, or what mixes rows would mix other sizes.
    """
    programs, every = _programs_of_all(runtime, tensors, program)
    runtime.regions = _regions(runtime, programs, every, values)
    mine = programs[every[runtime.rank]]
    runtime.layout, runtime.checks = mine.emitted.layout, mine.emitted.checks
    runtime.call = runtime.call.without_sizes().with_sizes(every)
    return mine


def _programs_of_all(
    runtime: Runtime, tensors: Sequence[Tensor], program: Callable[[Sizes, Sequence[Tensor] | None], Sized]
) -> tuple[dict[Sizes, Sized], list[Sizes]]:
    """The program for each of the sizes that ranks have, and the sizes of each rank."""
    every = say(Kinds.of(tensors).sizes, runtime.group, runtime.ranks)
    programs: dict[Sizes, Sized] = {}
    unlike: list[Sizes] = []
    problem = None
    for sizes in dict.fromkeys(every):
        try:
            programs[sizes] = program(sizes, None)
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
                programs[sizes] = program(sizes, samples[every.index(sizes)])
            except Exception as error:  # as above
                problem = f"{type(error).__name__}: {error}"
    try:
        problem = problem or _mixes(programs)
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

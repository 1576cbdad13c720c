"""State that forward carries from call to call: what one call leaves on the model, and the next one reads.

A graph holds the numbers of the first call. A leaf runs the user's code on a copy of its own, one for each graph. So a
forward whose counters, caches and flags change what it returns later is no graph: the user's own forward runs, on the
model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from descompiler.capture.checks import CAPTURE_TOLERANCE, relative_error
from descompiler.graph.leaf import Leaf
from descompiler.graph.program import Program
from descompiler.model.attributes import Place, dotted, set_attributes
from descompiler.model.probe import Flat, other_batch, run_eager
from descompiler.model.stale import left_by

AS_IF = (0, 1_000, 1_000_000)
"""Of a counter: what calls before may have left there. A flag is as the call leaves it."""


def carried_over(
    fresh: Callable[[], Flat], tensors: list[Tensor], written: Mapping[Place, Any]
) -> tuple[tuple[tuple[Place, Any], ...], str]:
    """What to leave on the model in place of its forward, and why a graph would be wrong; empty if it would not.

    Parameters
    ----------
    fresh
        Makes a model that no call has changed.
    written
        What a call has left on it.
    """
    if not written:
        return (), ""
    expected = _run(fresh(), tensors)
    counters = {at: x for at, x in written.items() if isinstance(x, int | float)}

    def after_calls(value: int) -> Flat:
        probe = fresh()
        _run(probe, tensors)  # what forward makes when it is first called is there
        set_attributes(probe.model, {at: x if isinstance(x, bool) else value for at, x in counters.items()})
        return probe

    if any(_differ(expected, _run(after_calls(value), tensors)) for value in AS_IF if counters):
        names = ", ".join(sorted(map(dotted, counters)))
        return (), f"what forward leaves on the model is read by the next call: {names}"
    other = after_calls(AS_IF[-1])
    _run(other, other_batch(tensors))
    held = {path: vars(module) for path, module in other.model.named_modules()}
    return left_by(written, {at: held[at[0]][at[1]] for at in written if at[1] in held[at[0]]}), ""


def kept_by_leaves(program: Program, fresh: Callable[[], Flat], tensors: list[Tensor]) -> str:
    """Why a program is wrong whose leaves carry tensors, lists or counters from call to call; empty if none does."""
    if not any(isinstance(n.target, Leaf) for n in program.graph.nodes):
        return ""
    once, again = fresh(), fresh()
    _run(again, other_batch(tensors))
    if _differ(_run(once, tensors), _run(again, tensors)):
        return "what forward leaves on the model is read by the next call, and would be of a rank's own rows"
    return ""


def _run(probe: Flat, tensors: list[Tensor]) -> list[Tensor] | None:
    """What it returns, its buffers as they were before; None if forward raises."""
    state = {n: b.clone() for n, b in probe.model.named_buffers()}
    try:
        return [x.detach() for x in run_eager(probe, tensors)]
    except Exception:  # whatever the user's forward raises
        return None
    finally:
        for n, b in probe.model.named_buffers():
            if n in state:
                b.copy_(state[n])


def _differ(some: Sequence[Tensor] | None, others: Sequence[Tensor] | None) -> bool:
    if some is None or others is None:
        return some is not others
    return len(some) != len(others) or any(
        a.shape != b.shape or relative_error(a, b) > CAPTURE_TOLERANCE for a, b in zip(some, others, strict=True)
    )

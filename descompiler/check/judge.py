"""The judge of one rank: what it compares of the distributed module and the original, and what it allows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from descompiler.check.dynamic import by_id, gradient
from descompiler.check.objective import output_tensors
from descompiler.errors import EquivalenceError
from descompiler.layout.rows import Rows
from descompiler.model.attributes import copied
from descompiler.model.float64 import InDouble
from descompiler.model.inputs import argument_at, by_path, flatten, split_statics, take_rows
from descompiler.model.probe import call_of
from descompiler.model.random_state import ONE_DRAW
from descompiler.model.sparse import equal
from descompiler.module.distributed import DistributedModule
from descompiler.module.dynamic import tables_of
from descompiler.module.state import full_state_dict, static_state_dict, without_extra
from descompiler.ops.local import plain

TOLERANCE_FLOAT64 = 1e-10
"""Relative error allowed in float64: sums run in another order, nothing else differs."""


ROUNDING_FLOAT64 = 64 * torch.finfo(torch.float64).eps
"""Share of the model's largest gradient (or parameter) below which a value is rounding: a bias in front of a batch norm
has gradient zero, a sum of terms that cancel. Such tensors are compared with this, and named in the report."""


SENSITIVITY_FACTOR = 8.0
"""How many times the change may be that the original's own gradient shows when its weights are rounded otherwise."""


CONDITIONED = 1e-6
"""Share of a gradient's size up to which such a change excuses a difference: two rows in a batch norm may do it."""


DRAWS_DIFFER = "values can't be compared, the model draws them"
"""What `verify` says of random numbers that each rank draws for its own rows, dropout aside."""


DIVERGED = 1e3
"""Factor by which the original's weights grow in a few steps where its training diverges, and its rounding with it."""


@dataclass
class Report:
    """What `verify` measured: the largest relative error by what was compared."""

    ranks: int
    cases: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    rounding: set[str] = field(default_factory=set)  # compared with the model's rounding, not with themselves
    conditioned: dict[str, float] = field(default_factory=dict)  # gradients that rounding of weights moves, the shares
    growth: float = 1.0  # the original's largest weight after the steps, in units of the largest before (1 at least)
    tried: set[str] = field(default_factory=set)  # trials of `thorough`, those of the next two too
    refused: dict[str, str] = field(default_factory=dict)  # trials that the module refuses by name, and its words
    left_out: set[str] = field(default_factory=set)  # trials that the original raises on, or is not finite in
    wire_dtype: torch.dtype | None = None  # that values were rounded to where they cross
    share: float = 0.0  # of what rounding may do: the largest that it did

    def see(self, what: str, error: float) -> None:
        self.worst[what] = max(self.worst.get(what, 0.0), error)

    def join(self, other: Report) -> None:
        """Take in what another rank measured of the same cases."""
        self.cases, self.growth = other.cases, max(self.growth, other.growth)
        self.rounding |= other.rounding
        self.tried |= other.tried
        self.left_out |= other.left_out
        self.refused |= other.refused
        self.share = max(self.share, other.share)
        for name, share in other.conditioned.items():
            self.conditioned[name] = max(self.conditioned.get(name, 0.0), share)
        for what, error in other.worst.items():
            self.see(what, error)

    def __str__(self) -> str:
        errors = ", ".join(f"{k} {v:.1e}" for k, v in sorted(self.worst.items()))
        text = f"{self.cases} cases on {self.ranks} ranks; largest relative errors: {errors}"
        if self.wire_dtype is not None:
            text += f"; rounded to {self.wire_dtype} to cross, which did {self.share:.0%} of what it may at most"
        text += f"; zero but for rounding: {', '.join(sorted(self.rounding))}" if self.rounding else ""
        moved = ", ".join(f"{name} {share:.1e}" for name, share in sorted(self.conditioned.items()))
        text += f"; moved by rounding the original's weights: {moved}" if moved else ""
        if self.tried:
            text += f"; {len(self.tried) - len(self.left_out)} trials"
            text += (
                f", {len(self.left_out)} left out, where the original has no finite result or gradients"
                if self.left_out
                else ""
            )
        text += "".join(f"; refused in the trial {name!r}: {words}" for name, words in sorted(self.refused.items()))
        if self.growth > DIVERGED:
            text += f"; the original's training diverges, its weights grow {self.growth:.0e} times: a weak proof"
        return text


def largest(tensors: Iterable[Tensor]) -> float:
    dense = (t.detach().to_dense() for t in tensors if t.numel())
    return max((float((t.long() if t.dtype is torch.bool else t).abs().max()) for t in dense), default=0.0)


def _touched(p: Tensor) -> Tensor:
    """Which elements of a parameter its gradient has: all of a sparse one's rows, zero or not."""
    touched = torch.zeros(p.shape, dtype=torch.bool, device=p.device)
    if p.grad is not None:
        touched[p.grad._indices()[0] if p.grad.is_sparse else slice(None)] = True
    return touched


def _near(a: Tensor, b: Tensor, difference: float) -> bool:
    return a.shape == b.shape and (not b.numel() or float((a - b).detach().abs().max()) <= difference)


def without_copying_parameters(model: nn.Module) -> nn.Module:
    kept: list[Any] = [*model.parameters(), *tables_of(model).values()]
    return copy.deepcopy(model, copied(model) | {id(x): x for x in kept})


def on_any_rank(flag: bool) -> bool:
    found = torch.tensor([int(flag)])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


@dataclass(frozen=True)
class OriginalStep:
    """What the original computes in one step, to compute it again with other weights."""

    before: nn.Module  # the original as forward found it: its parameters themselves, its other state as it was
    inputs: Any  # args, kwargs: the global batch
    rows: int
    loss: Callable[..., Tensor]  # of the outputs and the inputs
    method: str
    draws: Callable[[], AbstractContextManager[None]]

    def gradients(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the original with these weights."""
        return self.run(weights)[1]

    def run(self, weights: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Outputs, gradients, and buffers afterwards, of the original with these weights."""
        other = copy.deepcopy(self.before, copied(self.before))
        other.zero_grad()
        with torch.no_grad():
            for n, p in other.named_parameters():
                if n in weights:
                    p.copy_(weights[n])
        args, kwargs = own_rows(self.inputs, 0, self.rows)
        with self.draws(), InDouble():
            outputs = call_of(other, self.method)(*args, **kwargs)
        if (loss := self.loss(outputs, (args, kwargs))).requires_grad:  # a model may have nothing to train
            loss.backward()
        grads = {n: plain(p.grad).to_dense() for n, p in other.named_parameters() if p.grad is not None}
        return [x.detach() for x in output_tensors(outputs)], grads, dict(other.named_buffers())

    def sensitivity(self, gradients: Mapping[str, Tensor]) -> dict[str, float]:
        """By how much entries of each gradient change when the weights are rounded otherwise."""
        moved = dict.fromkeys(gradients, 0.0)
        for rounded in self.rounded(torch.finfo(torch.float64).eps):
            for n, g in self.gradients(rounded).items():
                moved[n] = max(moved[n], largest([g - gradients[n]]))
        return moved

    def rounded(self, share: float, draws: int = 3) -> Iterator[dict[str, Tensor]]:
        """The weights, each changed at random by about a share of it."""
        generator = torch.Generator().manual_seed(0)
        weights = {n: p.detach() for n, p in self.before.named_parameters()}
        for _ in range(draws):
            noise = {
                n: torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w.device)
                for n, w in weights.items()
            }
            yield {n: w * (1 + share * noise[n]) for n, w in weights.items()}


def own_rows(inputs: Any, first: int, count: int) -> Any:
    """Copies of some rows of ``(args, kwargs)``, in lists and dicts of their own: forward may change them."""
    taken = take_rows(inputs, torch.arange(first, first + count))
    for x, mine in zip(flatten(inputs)[0], flatten(taken)[0], strict=True):
        if isinstance(x, Tensor) and x.requires_grad and mine.dim():
            mine.detach_().requires_grad_()
    return taken


@dataclass
class Judge:
    """One rank's comparisons; `settle` raises on all ranks what any of them found."""

    report: Report
    title: str
    module: DistributedModule
    reference: nn.Module
    rank: int
    found: str | None = None

    def __post_init__(self) -> None:
        self.start = largest(self.reference.parameters())

    def wrong(self, text: str) -> None:
        self.found = self.found or f"{self.title}: {text}"

    def prepare(self, step: OriginalStep, expected: Any) -> None:
        """A step was computed, in which the original returned ``expected``. Collective."""

    def check_start(self) -> None:
        """Raise where there is nothing to compare, and see that training starts from the original's weights."""
        drawn = [note for note in self.module.plan.notes if note.startswith("random")]
        if apart := [note for note in drawn if ONE_DRAW not in note]:
            raise EquivalenceError(f"{self.title}: {DRAWS_DIFFER}: {'; '.join(apart)}")
        state = by_id(self.reference)
        for name, value in without_extra(full_state_dict(self.module)).items():
            if not equal(value, state[name]):
                self.wrong(f"initial {name!r} is not the original's, bit for bit")
        self.settle()

    def settle(self) -> None:
        """Collective.

        Raises
        ------
        EquivalenceError
        """
        if on_any_rank(self.found is not None):
            texts: list[str | None] = [None] * self.report.ranks
            dist.all_gather_object(texts, self.found)
            raise EquivalenceError("\n".join(t for t in texts if t is not None))

    def value(self, what: str, name: str, a: Tensor, b: Tensor, size: float, rounding: float) -> None:
        """``size``: the largest entry of the whole tensor that ``b`` is a part of; ``rounding``: absolute."""
        a, b = a.detach(), b.detach()
        if tuple(a.shape) != tuple(b.shape):
            return self.wrong(f"{what} {name!r} has shape {tuple(a.shape)}, not {tuple(b.shape)}")
        if not b.numel():
            return
        if bool(b.isnan().any()):
            return self.wrong(f"the original's own {what} {name!r} is NaN; nothing can be compared")
        difference = float((a.to(wide(a)) - b.to(wide(b))).abs().max())
        if difference <= rounding and size * TOLERANCE_FLOAT64 < rounding:
            if difference > size * TOLERANCE_FLOAT64:
                self.report.rounding.add(name)
            return
        error = difference / max(size, 1e-300)
        self.report.see(what, error)
        if not error <= TOLERANCE_FLOAT64:
            self.wrong(f"{what} {name!r} differs by {error:.1e} (allowed {TOLERANCE_FLOAT64:.0e})")

    def outputs(self, got: Any, expected: Any, layouts: Sequence[Rows | None], first: int, count: int) -> None:
        """Names and nesting, numbers among them, and this rank's rows of each tensor."""
        (leaves, nesting), (others, same) = flatten(got), flatten(expected)
        statics, expected_statics = split_statics(leaves)[1], split_statics(others)[1]
        if nesting != same or len(statics) != len(expected_statics):
            return self.wrong(f"forward returns {nesting}, the original {same}")
        for i, (x, y) in enumerate(zip(statics, expected_statics, strict=True)):
            if x is not y and x != y and (x == x or y == y):  # NaN is what it is
                self.wrong(f"output {i} is {x!r}, the original's {y!r}")
        for i, (a, b, layout) in enumerate(zip(output_tensors(got), output_tensors(expected), layouts, strict=True)):
            if a.dtype != b.dtype:
                self.wrong(f"output {i} is {a.dtype}, the original's {b.dtype}")
            part = b if layout is None else layout.narrow(b, first, count)
            self.value("output", str(i), a, part, largest([b]), 0.0)
        return None

    def arguments(self, given: Any, got: Any, before: Any, after: Any, first: int, count: int) -> None:
        """What forward replaced in the caller's lists and dicts: of the module's ``given``, now ``got``, likewise."""
        replaced = {p: x for p, x in by_path(after).items() if isinstance(x, Tensor) and before.get(p, x) is not x}
        for path, x in replaced.items():
            if (mine := argument_at(got, path)) is given[path]:
                self.wrong(f"the argument at {path} is not replaced, as the original does")
            elif x.dim() and len(x) == self.rows_of(before[path]):
                self.value("argument", str(path), mine, x[first : first + count], largest([x]), 0.0)

    @staticmethod
    def rows_of(x: Any) -> int:
        return len(x) if isinstance(x, Tensor) and x.dim() else -1

    def gradients(self, step: OriginalStep, *, strict: bool = False) -> None:
        """Of every parameter. Collective. ``strict``: of inputs at their edges, where rounding alone may decide
        what the original has; and a gradient that it has none of is none, not zero."""
        grads, found = self._gradients(strict)
        self._compare(step, grads, found, strict)

    def _gradients(self, strict: bool) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor, float]]]:
        """The original's gradients; this rank's piece of each, the original's part, and the size of the whole."""
        module, pieces, rank = self.module, self.module.plan.pieces, self.rank
        grads = {n: plain(p.grad).to_dense() for n, p in self.reference.named_parameters() if p.grad is not None}
        are_sparse = {n for n, p in self.reference.named_parameters() if p.grad is not None and p.grad.is_sparse}
        found: dict[str, tuple[Tensor, Tensor, float]] = {}
        tables = {f"{n}.weight".lstrip("."): (n, t) for n, t in tables_of(module).items()}
        for name, p in module.named_parameters():
            if name in tables:
                path, table = tables[name]
                self._gradient_of_rows(name, table, self.reference.get_submodule(path), largest([*grads.values()]))
                grads.pop(name, None)
                continue
            if name not in grads:
                if p.grad is not None and (plain(p.grad).to_dense().abs().sum() or (strict and p.numel())):
                    self.wrong(f"{name!r} has a gradient, the original has none")
                continue
            part = pieces[name].cut(grads[name], rank)
            if strict and p.grad is None and part.numel() and name not in are_sparse:
                self.wrong(f"{name!r} has no gradient, the original has one")
            own = torch.zeros_like(part) if p.grad is None else plain(p.grad).to_dense()
            if p.grad is not None and name in are_sparse and part.numel() and not p.grad.is_sparse:
                self.wrong(f"the gradient of {name!r} is not sparse any more")
            if name in are_sparse:
                touched = pieces[name].cut(_touched(self.reference.get_parameter(name)), rank)
                if not torch.equal(_touched(p), touched):  # optimisers move what has a gradient of zero too
                    self.wrong(f"the gradient of {name!r} has other rows than the original's")
            found[name] = own, part, largest([grads[name]])
        return grads, found

    def _gradient_of_rows(self, name: str, part: Any, whole: Any, most: float) -> None:
        """Of a dynamic table: the ids that have one, and what it is."""
        (ids, own), (expected_ids, expected) = gradient(part), gradient(whole, part)
        if not torch.equal(ids, expected_ids):
            return self.wrong(f"the gradient of {name!r} is of other ids than the original's")
        return self.value("gradient", name, own, expected, largest([gradient(whole)[1]]), ROUNDING_FLOAT64 * most)

    def _compare(
        self,
        step: OriginalStep,
        grads: Mapping[str, Tensor],
        found: Mapping[str, tuple[Tensor, Tensor, float]],
        strict: bool,
    ) -> None:
        module, pieces, rank = self.module, self.module.plan.pieces, self.rank
        most = largest(grads.values())
        rounding = ROUNDING_FLOAT64 * most
        allowed = {n: max(rounding, size * TOLERANCE_FLOAT64) for n, (_, _, size) in found.items()}
        far = {n for n, (own, part, _) in found.items() if not _near(own, part, allowed[n])}
        if on_any_rank(bool(far)):
            weights = without_extra(static_state_dict(module))
            for name, p in self.reference.named_parameters():
                if name not in weights:
                    continue
                self.value("weight", name, weights[name], p, largest([p]), ROUNDING_FLOAT64 * self.start)
        if far:
            there, moved = step.gradients(weights), step.sensitivity(grads)
        for name, (own, part, size) in found.items():
            if name in far:
                drift = largest([there[name] - grads[name]])
                share = max(drift, moved[name]) / max(size, 1e-300)
                least = max(CONDITIONED * size, TOLERANCE_FLOAT64 * most)
                near = max(allowed[name], SENSITIVITY_FACTOR * moved[name])
                same_weights = pieces[name].cut(there[name], rank)
                by_chance = strict and moved[name] > CONDITIONED * size  # the sign of x - mean, all x equal
                if by_chance or (share * size <= least and _near(own, same_weights, near)):
                    self.report.conditioned[name] = max(self.report.conditioned.get(name, 0.0), share)
                    continue
            self.value("gradient", name, own, part, size, rounding)

    def weights(self) -> float:
        """Parameters and buffers; the original's largest parameter. Collective."""
        weights = {n: w for n, w in by_id(self.reference).items() if w.layout is torch.strided}
        end = largest(self.reference.parameters())
        state = without_extra(full_state_dict(self.module))  # matrices are not trained
        if lost := weights.keys() - state.keys():
            self.wrong(f"the state dict lacks {', '.join(map(repr, sorted(lost)))}")
        for name in weights.keys() & state.keys():
            if weights[name].dtype is torch.int64:  # ids and counts are no measures
                if not torch.equal(state[name], weights[name]):
                    self.wrong(f"{name!r} is not the original's")
                continue
            self.value("weight", name, state[name], weights[name], largest([weights[name]]), ROUNDING_FLOAT64 * end)
        return end


def wide(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64

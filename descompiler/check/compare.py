"""One rank's comparison of the distributed module with the original: outputs, gradients, weights, bytes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from descompiler.builder import Builder
from descompiler.compiler import distribute
from descompiler.errors import EquivalenceError
from descompiler.layout.rows import Rows
from descompiler.model.attributes import copied
from descompiler.model.float64 import InDouble, double_meant
from descompiler.model.inputs import flatten, map_tensors, split_statics, take_rows
from descompiler.model.probe import CALL, blueprint, call_of
from descompiler.model.random_state import ONE_DRAW
from descompiler.model.sparse import equal
from descompiler.module.distributed import DistributedModule
from descompiler.module.state import full_state_dict
from descompiler.ops.local import real_parts
from descompiler.plugins import Kit
from descompiler.region.rule import Rule
from descompiler.tables.form import Form

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


ORIGINAL_FAILS = "nothing can be compared, the original itself can't run on"
"""What `verify` says of a model that raises on a batch that was made of the example's rows."""


DIVERGED = 1e3
"""Factor by which the original's weights grow in a few steps where its training diverges, and its rounding with it."""


OPTIMIZERS: dict[str, Any] = {  # eps as lr: the rounding of a gradient of zero enters the weight times lr / eps
    "sgd": lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, eps=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=0.01),
    "sparse_adam": lambda p: torch.optim.SparseAdam(p, lr=0.01, eps=0.01),
}


@dataclass
class Report:
    """What `verify` measured: the largest relative error by what was compared."""

    ranks: int
    cases: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    rounding: set[str] = field(default_factory=set)  # compared with the model's rounding, not with themselves
    conditioned: dict[str, float] = field(default_factory=dict)  # gradients that rounding of weights moves, the shares
    growth: float = 1.0  # the original's largest weight after the steps, in units of the largest before (1 at least)

    def see(self, what: str, error: float) -> None:
        self.worst[what] = max(self.worst.get(what, 0.0), error)

    def __str__(self) -> str:
        errors = ", ".join(f"{k} {v:.1e}" for k, v in sorted(self.worst.items()))
        text = f"{self.cases} cases on {self.ranks} ranks; largest relative errors: {errors}"
        text += f"; zero but for rounding: {', '.join(sorted(self.rounding))}" if self.rounding else ""
        moved = ", ".join(f"{name} {share:.1e}" for name, share in sorted(self.conditioned.items()))
        text += f"; moved by rounding the original's weights: {moved}" if moved else ""
        if self.growth > DIVERGED:
            text += f"; the original's training diverges, its weights grow {self.growth:.0e} times: a weak proof"
        return text


def train_and_compare(
    rank: int,
    ranks: int,
    model: nn.Module,
    inputs: Any,
    steps: int,
    plans: list[Any],
    optimizers: list[str],
    device: str,
    method: str = CALL,
    rules: Sequence[Rule] = (),
    forms: Sequence[Form] = (),
) -> Report:
    report = Report(ranks)
    model, inputs = model.to(device), map_tensors(lambda x: x.to(device), inputs)
    builder = functools.cache(
        lambda: Builder(blueprint(model), inputs, method, Kit.of(rules, forms))
    )  # one capture serves every case
    with double_meant():
        for plan in plans:
            for name in optimizers:
                module = distribute(model, builder, plan=plan, process_group=None, loss="sum", batch=None, seed=None)
                title = f"plan {plan!r}, {name}, rank {rank}"
                _case(report, model, module, inputs, steps, title, name, rank, ranks, method)
    return report


def batches(inputs: Any, step: int, ranks: int) -> tuple[Any, list[int]]:
    """A global batch drawn from the example's rows, and each rank's rows: uneven, one rank empty, then even."""
    leaves, _ = split_statics(flatten(inputs)[0])
    rows = [
        [5 + (r % 2) for r in range(ranks)],
        [0 if r == step % ranks else 4 + r for r in range(ranks)],
        [3] * ranks,
    ]
    counts = rows[step % 3]
    if sum(counts) < 4:  # a batch norm of two or three rows makes much of rounding
        counts = [6] * ranks
    index = torch.randint(len(leaves[0]), (sum(counts),), generator=torch.Generator().manual_seed(step))
    index[-1] = (index[0] + 1) % len(leaves[0])  # a batch of one row again and again has differences of 0, all rounding
    return take_rows(inputs, index), counts


def _optimizer(name: str, module: nn.Module, sparse: set[str]) -> list[torch.optim.Optimizer]:
    if name != "sparse_adam":
        return [OPTIMIZERS[name](module.parameters())]
    named = dict(module.named_parameters())
    rest = [p for n, p in named.items() if n not in sparse]
    chosen = [OPTIMIZERS[name]([p for n, p in named.items() if n in sparse])]
    return chosen + ([OPTIMIZERS["adagrad"](rest)] if rest else [])


def _output_tensors(outputs: Any) -> list[Tensor]:
    return split_statics(flatten(outputs)[0])[0]


def _loss(outputs: Any, layouts: Sequence[Rows | None], first: int) -> Tensor:
    """A loss that is a sum over rows and differs between rows; what is no row's counts once, on every rank.

    Its gradient by an output is below 1 (a pseudo-Huber loss): with squares, models that multiply embeddings diverge
    within three steps, and beside weights of 1e11 any other tensor is rounding.
    """
    total = torch.zeros((), dtype=torch.float64)
    for o, layout in zip(_output_tensors(outputs), layouts, strict=True):
        o = o if layout is None else layout.lead(o)
        x = real_parts(o.reshape(1, -1) if layout is None else o.unsqueeze(-1).flatten(1)).flatten(1)
        rows = torch.arange(x.shape[0], dtype=torch.float64, device=o.device).reshape(-1, 1)
        rows = rows if layout is None else rows + first
        if x.is_floating_point():
            total = total + (1 + (x - torch.cos(rows)) ** 2).sqrt().sum().cpu()
    return total


def _largest(tensors: Iterable[Tensor]) -> float:
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


@dataclass(frozen=True)
class _OriginalStep:
    """What the original computes in one step, to compute it again with other weights."""

    before: nn.Module  # the original as forward found it: its parameters themselves, its other state as it was
    args: Any
    kwargs: Any
    layouts: Sequence[Rows | None]
    method: str
    draws: Callable[[], AbstractContextManager[None]]

    def gradients(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the original with these weights."""
        other = copy.deepcopy(self.before, copied(self.before))
        other.zero_grad()
        with torch.no_grad():
            for n, p in other.named_parameters():
                p.copy_(weights[n])
        with self.draws(), InDouble():
            outputs = call_of(other, self.method)(*self.args, **self.kwargs)
        _loss(outputs, self.layouts, 0).backward()
        return {n: p.grad.to_dense() for n, p in other.named_parameters() if p.grad is not None}

    def sensitivity(self, gradients: Mapping[str, Tensor]) -> dict[str, float]:
        """By how much entries of each gradient change when the weights are rounded otherwise."""
        moved = dict.fromkeys(gradients, 0.0)
        generator = torch.Generator().manual_seed(0)
        weights = {n: p.detach() for n, p in self.before.named_parameters()}
        for _ in range(3):
            noise = {
                n: torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w.device)
                for n, w in weights.items()
            }
            rounded = {n: w * (1 + torch.finfo(torch.float64).eps * noise[n]) for n, w in weights.items()}
            for n, g in self.gradients(rounded).items():
                moved[n] = max(moved[n], _largest([g - gradients[n]]))
        return moved


def _without_copying_parameters(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, copied(model) | {id(p): p for p in model.parameters()})


def _on_any_rank(flag: bool) -> bool:
    found = torch.tensor([int(flag)])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def _case(
    report: Report,
    model: nn.Module,
    module: DistributedModule,
    inputs: Any,
    steps: int,
    title: str,
    optimizer: str,
    rank: int,
    ranks: int,
    method: str,
) -> None:
    drawn = [note for note in module.plan.notes if note.startswith("random")]
    if apart := [note for note in drawn if ONE_DRAW not in note]:
        raise EquivalenceError(f"{title}: {DRAWS_DIFFER}: {'; '.join(apart)}")
    reference = copy.deepcopy(model, copied(model))
    sparse = module.plan.sparse

    def compare(what: str, name: str, a: Tensor, b: Tensor, size: float, rounding: float) -> None:
        """``size``: the largest entry of the whole tensor that ``b`` is a part of; ``rounding``: absolute."""
        a, b = a.detach(), b.detach()
        if tuple(a.shape) != tuple(b.shape):
            raise EquivalenceError(f"{title}: {what} {name!r} has shape {tuple(a.shape)}, not {tuple(b.shape)}")
        if not b.numel():
            return
        if bool(b.isnan().any()):
            raise EquivalenceError(f"{title}: the original's own {what} {name!r} is NaN; nothing can be compared")
        difference = float((a.double() - b.double()).abs().max())
        if difference <= rounding and size * TOLERANCE_FLOAT64 < rounding:
            if difference > size * TOLERANCE_FLOAT64:
                report.rounding.add(name)
            return
        error = difference / max(size, 1e-300)
        report.see(what, error)
        if not error <= TOLERANCE_FLOAT64:
            raise EquivalenceError(f"{title}: {what} {name!r} differs by {error:.1e} (allowed {TOLERANCE_FLOAT64:.0e})")

    for name, value in full_state_dict(module).items():
        if not equal(value, reference.state_dict()[name]):
            raise EquivalenceError(f"{title}: initial {name!r} is not the original's, bit for bit")
    optimizers = [_optimizer(optimizer, reference, sparse), _optimizer(optimizer, module, sparse)]
    start = _largest(reference.parameters())
    for step in range(steps):
        (args, kwargs), counts = batches(inputs, step, ranks)
        first = sum(counts[:rank])
        before = _without_copying_parameters(reference)
        try:
            with module.next_draws() if drawn else nullcontext(), InDouble():
                expected = call_of(reference, method)(*args, **kwargs)
        except Exception as error:  # whatever the user's forward raises
            raise EquivalenceError(
                f"{title}: {ORIGINAL_FAILS} {sum(counts)} rows of example_inputs: {type(error).__name__}: {error}"
            ) from error
        local_args, local_kwargs = take_rows((args, kwargs), torch.arange(first, first + counts[rank]))
        got = module(*local_args, **local_kwargs)
        layouts = module.output_rows
        for outputs, offset in ((expected, 0), (got, first)):
            if (loss := _loss(outputs, layouts, offset)).requires_grad:  # a model may have nothing to train
                loss.backward()
        for i, (a, b, layout) in enumerate(zip(_output_tensors(got), _output_tensors(expected), layouts, strict=True)):
            part = b if layout is None else layout.narrow(b, first, counts[rank])
            compare("output", str(i), a, part, _largest([b]), 0.0)
        grads = {n: p.grad.to_dense() for n, p in reference.named_parameters() if p.grad is not None}
        are_sparse = {n for n, p in reference.named_parameters() if p.grad is not None and p.grad.is_sparse}
        largest = _largest(grads.values())
        rounding = ROUNDING_FLOAT64 * largest
        found: dict[str, tuple[Tensor, Tensor, float]] = {}
        for name, p in module.named_parameters():
            if name not in grads:
                if p.grad is not None and p.grad.to_dense().abs().sum():
                    raise EquivalenceError(f"{title}: {name!r} has a gradient, the original has none")
                continue
            part = module.plan.pieces[name].cut(grads[name], rank)
            own = torch.zeros_like(part) if p.grad is None else p.grad.to_dense()
            if p.grad is not None and name in are_sparse and part.numel() and not p.grad.is_sparse:
                raise EquivalenceError(f"{title}: the gradient of {name!r} is not sparse any more")
            if name in are_sparse:
                touched = module.plan.pieces[name].cut(_touched(reference.get_parameter(name)), rank)
                if not torch.equal(_touched(p), touched):  # optimisers move what has a gradient of zero too
                    raise EquivalenceError(f"{title}: the gradient of {name!r} has other rows than the original's")
            found[name] = own, part, _largest([grads[name]])
        allowed = {n: max(rounding, size * TOLERANCE_FLOAT64) for n, (_, _, size) in found.items()}
        far = {n for n, (own, part, _) in found.items() if not _near(own, part, allowed[n])}
        if _on_any_rank(bool(far)):
            weights = full_state_dict(module)
            for name, p in reference.named_parameters():
                compare("weight", name, weights[name], p, _largest([p]), ROUNDING_FLOAT64 * start)
        if far:
            again = _OriginalStep(before, args, kwargs, layouts, method, module.latest_draws if drawn else nullcontext)
            there, moved = again.gradients(weights), again.sensitivity(grads)
        for name, (own, part, size) in found.items():
            if name in far:
                drift = _largest([there[name] - grads[name]])
                share = max(drift, moved[name]) / max(size, 1e-300)
                least = max(CONDITIONED * size, TOLERANCE_FLOAT64 * largest)
                near = max(allowed[name], SENSITIVITY_FACTOR * moved[name])
                same_weights = module.plan.pieces[name].cut(there[name], rank)
                if share * size <= least and _near(own, same_weights, near):
                    report.conditioned[name] = max(report.conditioned.get(name, 0.0), share)
                    continue
            compare("gradient", name, own, part, size, rounding)
        for o in (*optimizers[0], *optimizers[1]):
            o.step()
            o.zero_grad()
        predicted, sent = module.plan.traffic(rank, counts, unique=module.unique()), module.traffic()
        if module.predicts_traffic and predicted != sent:
            raise EquivalenceError(f"{title}: predicted traffic\n{predicted}\nis not what was sent\n{sent}")
    weights = {n: w for n, w in reference.state_dict().items() if w.layout is torch.strided}  # no matrix is trained
    end = _largest(reference.parameters())
    report.growth = max(report.growth, end / max(start, 1.0))
    rounding = ROUNDING_FLOAT64 * end
    for name, value in full_state_dict(module).items():
        if name not in weights:
            continue
        compare("weight", name, value, weights[name], _largest([weights[name]]), rounding)
    report.cases += 1

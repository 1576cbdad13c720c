"""`verify`: the distributed module against the original on the global batch, on real local processes."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from descompiler.builder import Builder
from descompiler.compiler import distribute
from descompiler.double import InDouble, double_meant, widen_attributes
from descompiler.draws import ONE_DRAW
from descompiler.errors import EquivalenceError, InputError, warn
from descompiler.held import copied
from descompiler.inputs import flatten, map_tensors, normalise_inputs, split_statics, take_rows
from descompiler.module import DistributedModule
from descompiler.probe import CALL, blueprint, call_of, method_of
from descompiler.room import free_bytes
from descompiler.rows import Rows
from descompiler.smaller import smaller
from descompiler.sparse import equal
from descompiler.state import full_state_dict

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

GRACE_S = 20.0
"""How long the other ranks may still answer once one has failed."""

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


def verify(
    model: nn.Module,
    example_inputs: Any,
    *,
    ranks: int = 2,
    steps: int = 3,
    plans: Sequence[Mapping[str, str] | None] = (None,),
    optimizers: Sequence[str] = ("sgd",),
    timeout_s: float = 120.0,
    device: str = "cpu",
    method: str = CALL,
    rows: int | None = None,
    launch: Callable[..., list[Any]] | None = None,
) -> Report:
    """Prove on ``ranks`` local gloo processes that the compiled model trains as the original.

    In float64, on uneven batches, one of them empty, with repeated rows: outputs, every gradient, every weight after
    ``steps`` optimiser steps, predicted against sent bytes. Dropout is set to 0: its masks are random. Random numbers
    that are drawn once for the whole batch are given to the original too; those that each rank draws for its own rows
    can't be compared.

    A difference may be `TOLERANCE_FLOAT64` of a tensor's size. Two kinds of gradient are judged otherwise, and are no
    part of `Report.worst`: those that are zero but for rounding (`Report.rounding`), and those that small changes of
    weights move by more than that (`Report.conditioned`): the differences of rounding that the weights have by then,
    themselves within the tolerance, or rounding them once. Such a gradient has to be that of the original at the
    module's own weights, within the tolerance or `SENSITIVITY_FACTOR` times what rounding moves.

    Parameters
    ----------
    plans : sequence of mapping or None
        Forms to force, one run each; None is the compiler's own choice.
    optimizers : sequence of str
        Keys of `OPTIMIZERS`. With sparse gradients, "sparse_adam" takes those tables and Adagrad the rest.
    device : str
        Where both models are; the ranks share it if it is a GPU.
    method : str
        What is compiled, as `compile`'s: by default a call of the model, or a method such as "calculate_loss".
    rows : int, optional
        Cut tables to so many rows, and look ids up modulo their number (`descompiler.smaller`): the proof of a model
        that is too large for this machine, which may be on the meta device.
    launch : callable, optional
        Calls a function on every rank, as `on_ranks`, which is the default and starts processes for it.

    Returns
    -------
    Report

    Raises
    ------
    EquivalenceError
        With the worst parameter named.
    InputError
        Before anything is allocated, if this machine's memory does not suffice: what is missing.
    """
    if rows is not None:
        model = smaller(model, rows)
    check_memory(model, ranks, optimizers)
    model = copy.deepcopy(model, copied(model)).double()
    widen_attributes(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.AlphaDropout | nn.FeatureAlphaDropout | nn.Dropout1d):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0
    inputs = map_tensors(
        lambda x: (x.double() if x.is_floating_point() else x).cpu(),
        normalise_inputs(example_inputs, method_of(model, method)),
    )
    report = Report(ranks)
    arguments = (model.cpu(), inputs, steps, list(plans), list(optimizers), device, method)
    for other in (launch or on_ranks)(_work, ranks, *arguments, timeout_s=timeout_s):
        report.cases = other.cases
        report.rounding |= other.rounding
        report.growth = max(report.growth, other.growth)
        for name, share in other.conditioned.items():
            report.conditioned[name] = max(report.conditioned.get(name, 0.0), share)
        for what, error in other.worst.items():
            report.see(what, error)
    return report


def needed_bytes(model: nn.Module, ranks: int, optimizers: Sequence[str]) -> int:
    """Bytes that `verify` takes for a model's parameters, in float64, of all processes together.

    The caller has a copy; a rank the original, its gradients and optimiser state, the same of its pieces, and the
    whole of these once, to compare.
    """
    elements = sum(p.numel() for p in model.parameters())
    state = max((STATE_OF.get(name, 0) for name in optimizers), default=0)
    return 8 * elements * (1 + ranks * (4 + state) + 2 + state)


STATE_OF = {"sgd": 1, "adagrad": 1, "adam": 2, "sparse_adam": 2}
"""Tensors of a parameter's size that an optimiser of `OPTIMIZERS` keeps."""

TOLD_SHARE = 0.25
"""Share of the free memory from which on `verify` says what it needs."""


def check_memory(model: nn.Module, ranks: int, optimizers: Sequence[str]) -> None:
    """Say what a proof needs of memory where it is much, and refuse what there is not."""
    if on_meta := [n for n, p in model.named_parameters() if p.is_meta]:
        raise InputError(
            f"{', '.join(map(repr, on_meta[:5]))} are on the meta device, and the original needs values to be compared "
            "with: verify(..., rows=1000) draws them, for tables of so many rows"
        )
    needed, free = needed_bytes(model, ranks, optimizers), free_bytes(torch.device("cpu"))
    text = f"verify needs about {needed:,} B for the model on {ranks} ranks, and {free:,} B are free"
    if needed > free:
        raise InputError(
            f"{text}: {needed - free:,} B are missing. verify(..., rows=1000) cuts tables to so many rows, and takes "
            "ids modulo their number"
        )
    if needed > TOLD_SHARE * free:
        warn(f"{text}; verify(..., rows=1000) proves the same of smaller tables")


@functools.cache
def local_context() -> Any:
    """Processes forked from a server that has imported the package and done nothing else: no threads, no CUDA."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["descompiler"])
    return context


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call ``function(rank, ranks, *arguments)`` on local gloo processes; what each returned.

    Raises
    ------
    EquivalenceError
        With the traceback of each rank that raised, or the ranks that did not answer in time; all are ended.
    """
    context = local_context()
    answers: list[Any] = [("error", f"rank {r} did not answer within {timeout_s:.0f} s") for r in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        readers: list[Any] = []
        processes: list[Any] = []
        for rank in range(ranks):
            reader, writer = context.Pipe(duplex=False)
            arguments_of = (function, rank, ranks, folder, writer, timeout_s, arguments)
            processes.append(context.Process(target=_rank_main, args=arguments_of, daemon=True))
            processes[-1].start()
            writer.close()
            readers.append(reader)
        deadline, waiting = time.monotonic() + timeout_s, dict(zip(readers, range(ranks), strict=True))
        try:
            while waiting and (left := deadline - time.monotonic()) > 0:
                ready: list[Any] = wait(list(waiting), left)
                for reader in ready:
                    rank = waiting.pop(reader)
                    try:
                        answers[rank] = pickle.loads(reader.recv_bytes())
                    except EOFError:
                        answers[rank] = ("error", f"rank {rank} ended without an answer")
                    if answers[rank][0] == "error":  # the others may wait for it: give them time to say so
                        deadline = min(deadline, time.monotonic() + GRACE_S)
            for p in processes:
                p.join(max(0.0, deadline - time.monotonic()))
        finally:
            for p in processes:
                if p.is_alive():
                    p.kill()
    if failures := [text for kind, text in answers if kind == "error"]:
        raise EquivalenceError("\n".join(failures))
    return [result for _, result in answers]


def _rank_main(
    function: Callable[..., Any], rank: int, ranks: int, folder: str, answer: Any, timeout_s: float, arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout_s),
        )
        result = function(rank, ranks, *arguments)
        dist.barrier()
        answer.send_bytes(pickle.dumps(("ok", result)))  # by value: this process and its shared memory end
        dist.destroy_process_group()
    except Exception:  # whatever it is, the parent raises it with this rank's name
        answer.send_bytes(pickle.dumps(("error", f"rank {rank}: {traceback.format_exc()}")))


def _work(
    rank: int,
    ranks: int,
    model: nn.Module,
    inputs: Any,
    steps: int,
    plans: list[Any],
    optimizers: list[str],
    device: str,
    method: str = CALL,
) -> Report:
    report = Report(ranks)
    model, inputs = model.to(device), map_tensors(lambda x: x.to(device), inputs)
    builder = functools.cache(lambda: Builder(blueprint(model), inputs, method))  # one capture serves every case
    with double_meant():
        for plan in plans:
            for name in optimizers:
                module = distribute(model, builder, plan=plan, process_group=None, loss="sum", batch=None, seed=None)
                title = f"plan {plan}, {name}, rank {rank}"
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


def _tensors(outputs: Any) -> list[Tensor]:
    return split_statics(flatten(outputs)[0])[0]


def _loss(outputs: Any, layouts: Sequence[Rows | None], first: int) -> Tensor:
    """A loss that is a sum over rows and differs between rows; what is no row's counts once, on every rank.

    Its gradient by an output is below 1 (a pseudo-Huber loss): with squares, models that multiply embeddings diverge
    within three steps, and beside weights of 1e11 any other tensor is rounding.
    """
    total = torch.zeros((), dtype=torch.float64)
    for o, layout in zip(_tensors(outputs), layouts, strict=True):
        x = o.reshape(1, -1) if layout is None else layout.lead(o).unsqueeze(-1).flatten(1)
        rows = torch.arange(x.shape[0], dtype=torch.float64, device=o.device).reshape(-1, 1)
        rows = rows if layout is None else rows + first
        if x.is_floating_point():
            total = total + (1 + (x - torch.cos(rows)) ** 2).sqrt().sum().cpu()
    return total


def _largest(tensors: Iterable[Tensor]) -> float:
    return max((float(t.detach().to_dense().abs().max()) for t in tensors if t.numel()), default=0.0)


def _near(a: Tensor, b: Tensor, difference: float) -> bool:
    return a.shape == b.shape and (not b.numel() or float((a - b).detach().abs().max()) <= difference)


@dataclass(frozen=True)
class _Step:
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
    return copy.deepcopy(model, {id(p): p for p in model.parameters()} | copied(model))


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
        for i, (a, b, layout) in enumerate(zip(_tensors(got), _tensors(expected), layouts, strict=True)):
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
            found[name] = own, part, _largest([grads[name]])
        allowed = {n: max(rounding, size * TOLERANCE_FLOAT64) for n, (_, _, size) in found.items()}
        far = {n for n, (own, part, _) in found.items() if not _near(own, part, allowed[n])}
        if _on_any_rank(bool(far)):
            weights = full_state_dict(module)
            for name, p in reference.named_parameters():
                compare("weight", name, weights[name], p, _largest([p]), ROUNDING_FLOAT64 * start)
        if far:
            again = _Step(before, args, kwargs, layouts, method, module.latest_draws if drawn else nullcontext)
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

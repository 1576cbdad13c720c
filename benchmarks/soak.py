"""Long runs: memory, Python objects and file descriptors of training, by what is trained and how.

    python benchmarks/soak.py --steps 20000
    python benchmarks/soak.py --steps 2000 --only unique_rows partial --rows 2048 --dim 64

Two gloo ranks train a small model in each of `SCENARIOS`. Printed are the KiB that a rank's resident set grew a step
from step 500 on, beside what its C allocator has in use (which fragments of the heap are no part of), and how many
Python objects and descriptors there are more. ``ddp`` is DistributedDataParallel around the same model. A rank may grow
by 8 KiB a step.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import descompiler as des
from descompiler.check.processes import on_ranks

ITEMS = 5000
LIMIT_KIB = 8.0
WARM_UP = 500


class Towers(nn.Module):
    """Two tables, dense features, batch norm, a layer."""

    def __init__(self, dim: int, *, norm: bool = False, sparse: bool = False):
        super().__init__()
        self.user, self.item = (nn.Embedding(ITEMS, dim, sparse=sparse) for _ in range(2))
        self.norm = nn.BatchNorm1d(2 * dim) if norm else nn.Identity()
        self.top = nn.Linear(2 * dim, 1)

    def forward(self, ids: Tensor) -> Tensor:
        both = torch.cat([self.user(ids[:, 0]), self.item(ids[:, 1])], 1)
        return self.top(self.norm(both).relu()).squeeze(1)


class Wide(Towers):
    """Dense features beside the tables in one layer: every rank holds their columns of its weight."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.top = nn.Linear(2 * dim + 2, 1)

    def forward(self, ids: Tensor) -> Tensor:
        dense = (ids % 7).to(self.top.weight.dtype)
        return self.top(torch.cat([self.user(ids[:, 0]), self.item(ids[:, 1]), dense], 1)).squeeze(1)


class DynamicTowers(Towers):
    """Two tables whose rows come and go."""

    def __init__(self, dim: int):
        super().__init__(dim)
        evict = des.dynamic.Capacity(ITEMS // 2)
        self.user, self.item = (des.DynamicEmbedding(dim, name=n, evict=evict) for n in ("user", "item"))


class InBatch(Towers):
    """Negatives of the batch, a mean over it, a regulariser over a whole table."""

    def forward(self, ids: Tensor) -> Tensor:
        u, v = self.user(ids[:, 0]), self.item(ids[:, 1])
        scores = u @ v.t() - v.mean(0).sum()
        return F.cross_entropy(scores, torch.arange(len(ids))) + 1e-4 * self.item.weight.square().sum()


class Centred(Towers):
    """Rows that depend on each other: a softmax over the batch."""

    def forward(self, ids: Tensor) -> Tensor:
        return (self.user(ids[:, 0]).softmax(0) * self.item(ids[:, 1])).sum(1)


class Softmax(Towers):
    """Cross-entropy over all items; the output layer is the item table."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.user(ids[:, 0]) @ self.item.weight.t(), ids[:, 1], reduction="none")


class Normalised(Towers):
    """Lookups in a table that is computed of the table."""

    def forward(self, ids: Tensor) -> Tensor:
        return (F.normalize(self.user.weight)[ids[:, 0]] * self.item(ids[:, 1])).sum(1)


class Partial(Towers):
    """Ids that go through Python lists: the user's own forward runs."""

    def __init__(self, dim: int):
        super().__init__(dim, norm=True)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.tensor(ids.tolist()).reshape(ids.shape))


class DynamicPartial(DynamicTowers):
    """Tables whose rows come and go, and ids that go through Python lists."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.tensor(ids.tolist()).reshape(ids.shape))


class PartialMean(Towers):
    """Partial capture of a loss that is a mean over rows."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.tensor(ids.tolist()).reshape(ids.shape)).square().mean()


class Opaque(Towers):
    """A branch on values that no tracer follows: an opaque leaf behind the lookups."""

    def forward(self, ids: Tensor) -> Tensor:
        u = self.user(ids[:, 0])
        mask = ids[:, 1] == 3
        if mask.any():
            u = u.masked_fill(mask.unsqueeze(-1), 0.0)
        return self.top(torch.cat([u, self.item(ids[:, 1])], 1)).squeeze(1)


class Tasks(Towers):
    """Two outputs, of which one has a layer of its own behind it: ranks tell which of them losses use."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        u, v = self.user(ids[:, 0]), self.item(ids[:, 1])
        return self.top(torch.cat([u, v], 1)), (u * v).sum(1)


class Critic(Towers):
    """Rows that depend on each other, and on features, whose gradient is penalised."""

    def mixed(self, ids: Tensor, features: Tensor) -> Tensor:
        return self.user(ids[:, 0]) * features.sin()

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        u = self.mixed(ids, features)
        return (u * u.mean(0)).sum(1)


class CriticOfProduct(Critic):
    """A product with a table, whose gradient is not differentiated again."""

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        return F.cross_entropy(self.mixed(ids, features) @ self.item.weight.t(), ids[:, 1], reduction="none")


def loss_of(outputs: Any) -> Tensor:
    """A number that every output has a part in."""
    return sum(x.square().mean() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))


def once(module: Any, ids: Tensor) -> None:
    loss_of(module(ids)).backward()


def regularised(module: Any, ids: Tensor) -> None:
    whole = (module.user.weight @ module.item.weight[0]).sum()
    (loss_of(module(ids)) + 1e-4 * module.item.weight.square().sum() + 1e-6 * whole).backward()


def accumulated(module: Any, ids: Tensor) -> None:
    for part in ids.chunk(3):
        once(module, part)


def two_forwards(module: Any, ids: Tensor) -> None:
    first, second = (loss_of(module(part)) for part in ids.chunk(2))
    (first + second).backward()


def twice_backward(module: Any, ids: Tensor) -> None:
    loss = loss_of(module(ids))
    loss.backward(retain_graph=True)
    loss.backward()


def dropped(module: Any, ids: Tensor) -> None:
    module(ids)
    once(module, ids)


def failing_forward(module: Any, ids: Tensor) -> None:
    wrong = ids.clone()
    wrong[0, 0] = ITEMS
    with contextlib.suppress(des.DescompilerError):
        module(wrong)
    once(module, ids)


def failing_backward(module: Any, ids: Tensor) -> None:
    outputs = module(ids)
    outputs.register_hook(_raise)
    with contextlib.suppress(ZeroDivisionError):
        loss_of(outputs).backward()
    once(module, ids)


def _raise(gradient: Tensor) -> Tensor:
    raise ZeroDivisionError("a hook of the user's")


def evaluated(module: Any, ids: Tensor) -> None:
    once(module, ids)
    with torch.no_grad():
        module(ids)


def features_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids, and a feature of each row."""
    return ids, ids[:, :1].to(torch.get_default_dtype())


def penalised(module: Any, ids: Tensor) -> None:
    ids, features = features_of(ids)
    outputs = module(ids, features.requires_grad_())
    (gradient,) = torch.autograd.grad(outputs.sum(), features, create_graph=True)
    (loss_of(outputs) + gradient.square().mean()).backward()


def refused_penalty(module: Any, ids: Tensor) -> None:
    with contextlib.suppress(des.UnsupportedError):
        penalised(module, ids)
    loss_of(module(*features_of(ids))).backward()


def fused(module: Any, ids: Tensor) -> None:
    """Tables are updated in backward."""
    if not module._fused:
        des.fuse_optimizer(module, torch.optim.Adagrad)
    once(module, ids)


def ahead(module: Any, ids: Tensor) -> None:
    """A loop of steps, of which ids and rows go ahead."""
    for (batch,) in des.prefetch([(ids.clone(),) for _ in range(6)], module, rows=True):
        once(module, batch)
        module.zero_grad()


@dataclass(frozen=True)
class Scenario:
    """What is trained, how it is compiled, and a step."""

    model: Callable[[int], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    step: Callable[[Any, Tensor], None] = once
    inputs: Callable[[Tensor], tuple[Tensor, ...]] = lambda ids: (ids,)
    alone: bool = False
    """Whether each rank trains the model as it is, by itself."""


FORMS = ("row_wise", "column_wise", "table_wise", "unique_rows", "hot_rows", "sparse_all_gather", "fsdp", "replicate")

SCENARIOS: dict[str, Scenario] = {
    "auto": Scenario(Towers),
    **{f: Scenario(Towers, {"plan": {"*": f}}) for f in FORMS},
    "sparse gather": Scenario(lambda d: Towers(d, sparse=True), {"plan": {"*": "sparse_all_gather"}}),
    "together": Scenario(lambda d: Towers(d, sparse=True), {"plan": {"*": "column_wise"}}),
    "fused": Scenario(lambda d: Towers(d, sparse=True), {"plan": {"*": "column_wise"}}, fused),
    "dynamic": Scenario(DynamicTowers, {"plan": {"*": "row_wise"}}),
    "dynamic, own rows": Scenario(DynamicTowers, {"plan": {"*": "unique_rows"}}),
    "dynamic, alone": Scenario(DynamicTowers, alone=True),
    "dynamic, in part": Scenario(DynamicPartial),
    "rows ahead": Scenario(Towers, {"plan": {"*": "unique_rows"}}, ahead),
    "batch norm": Scenario(lambda d: Towers(d, norm=True), {"plan": {"*": "row_wise"}}),
    "shared columns": Scenario(Wide, {"plan": {"*": "column_wise"}, "loss": "row_mean", "cluster": "bytes"}),
    "in-batch": Scenario(InBatch, {"plan": {"*": "row_wise"}}),
    "over the batch": Scenario(Centred, {"plan": {"*": "row_wise"}}),
    "used whole": Scenario(Softmax, {"plan": {"item*": "fsdp", "user*": "unique_rows"}}),
    "vocabulary": Scenario(Softmax, {"plan": {"item*": "row_wise", "user*": "unique_rows"}}),
    "computed": Scenario(Normalised, {"plan": {"*": "row_wise"}}),
    "partial": Scenario(Partial, {"plan": {"*": "row_wise"}}),
    "regularised": Scenario(Partial, {"plan": {"*": "row_wise"}}, regularised),
    "partial mean": Scenario(PartialMean, {"plan": {"*": "row_wise"}}),
    "leaf": Scenario(Opaque, {"plan": {"*": "unique_rows"}}),
    "tasks": Scenario(Tasks, {"plan": {"*": "row_wise"}}),
    "in place": Scenario(Towers, {"plan": {"*": "row_wise"}, "in_place": True}),
    "accumulation": Scenario(Towers, {"plan": {"*": "unique_rows"}}, accumulated),
    "two forwards": Scenario(Towers, {"plan": {"*": "hot_rows"}}, two_forwards),
    "backward twice": Scenario(Towers, {"plan": {"*": "unique_rows"}}, twice_backward),
    "dropped graphs": Scenario(Towers, {"plan": {"*": "unique_rows"}}, dropped),
    "evaluation": Scenario(Towers, {"plan": {"*": "row_wise"}}, evaluated),
    "penalty": Scenario(Critic, {"plan": {"*": "row_wise"}, "loss": "sum"}, penalised, features_of),
    "refused penalty": Scenario(CriticOfProduct, {"plan": {"*": "row_wise"}}, refused_penalty, features_of),
    "errors in forward": Scenario(Towers, {"plan": {"*": "row_wise"}}, failing_forward),
    "errors in backward": Scenario(Towers, {"plan": {"*": "unique_rows"}}, failing_backward),
}


def prepared(scenario: Scenario, rows: int, dim: int) -> tuple[Any, Tensor]:
    """A scenario's module on this rank, and ids for a step."""
    torch.manual_seed(0)
    ids = torch.randint(0, ITEMS, (rows, 2))
    if scenario.alone:
        return scenario.model(dim), ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return des.compile(scenario.model(dim), scenario.inputs(ids[:8]), **scenario.options), ids


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_size_t)
        for n in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")
    ]


def memory() -> tuple[int, int]:
    """Bytes of this process's resident set, and those in use of what its C allocator holds."""
    text = Path("/proc/self/status").read_text()
    resident = int(next(x for x in text.splitlines() if x.startswith("VmRSS:")).split()[1]) * 1024
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo
    info = libc.mallinfo2()
    return resident, info.uordblks + info.hblkhd


def soak(rank: int, ranks: int, name: str, steps: int, warm_up: int, rows: int, dim: int) -> dict[str, float]:
    """Train one scenario; what grew from the end of the warm-up on, each step or in all."""
    if name == "ddp":
        torch.manual_seed(0)
        module, ids, step = nn.parallel.DistributedDataParallel(Towers(dim)), torch.randint(0, ITEMS, (rows, 2)), once
    else:
        (module, ids), step = prepared(SCENARIOS[name], rows, dim), SCENARIOS[name].step
    optimizer = torch.optim.SGD(module.parameters(), 0.01)

    def run(count: int) -> None:
        for _ in range(count):
            step(module, ids)
            optimizer.step()
            optimizer.zero_grad()

    run(warm_up)
    gc.collect()
    before, objects, files = memory(), len(gc.get_objects()), len(os.listdir("/proc/self/fd"))
    begin = time.perf_counter()
    run(steps - warm_up)
    seconds = time.perf_counter() - begin
    gc.collect()
    after = memory()
    resident, used = ((b - a) / 1024 / (steps - warm_up) for a, b in zip(before, after, strict=True))
    return {
        "resident_kib": resident,
        "used_kib": used,
        "objects": len(gc.get_objects()) - objects,
        "files": len(os.listdir("/proc/self/fd")) - files,
        "step_ms": 1000 * seconds / (steps - warm_up),
        "peak_mib": after[0] / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=64, help="of a rank's batch")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=[*SCENARIOS, "ddp"])
    args = parser.parse_args()
    good = True
    print(f"{'':20} {'KiB a step (rank 0, 1)':>24} {'in use':>15} {'objects':>9} {'files':>6} {'ms a step':>9} MiB")
    for name in args.only or [*SCENARIOS, "ddp"]:
        found = on_ranks(soak, 2, name, args.steps, WARM_UP, args.rows, args.dim, timeout_s=3600)
        both = [" ".join(f"{x[k]:.2f}" for x in found) for k in ("resident_kib", "used_kib")]
        counts = [max(x[k] for x in found) for k in ("objects", "files", "step_ms", "peak_mib")]
        well = all(x["resident_kib"] <= LIMIT_KIB and x["files"] <= 0 for x in found)
        good &= well
        print(
            f"{name:20} {both[0]:>24} {both[1]:>15} {counts[0]:>9} {counts[1]:>6} {counts[2]:>9.1f} {counts[3]:.0f}"
            + ("" if well else "  GROWS"),
            flush=True,
        )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

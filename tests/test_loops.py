"""What users' loops do around a step: schedules, accumulation, several optimisers and losses, averages, autocast."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler, swa_utils

import descompiler as des
from tests.harness.cases import cases

IDS = torch.randint(63, (12, 4), generator=torch.Generator().manual_seed(1))
LABELS = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
COUNTS = (5, 7)
STEPS = 4


class Model(nn.Module):
    """Two scores of a row; a norm without buffers, and one with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.item, self.norm, self.batch = nn.Embedding(63, 8), nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.top, self.second = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), nn.Linear(8, 1)

    def forward(self, ids):
        x = self.batch(self.norm(self.item(ids).mean(1)))
        return self.top(x)[:, 0], self.second(x)[:, 0]


def rows_of(rank):
    first = sum(COUNTS[:rank])
    return slice(first, first + COUNTS[rank])


def backward(net, rows, weight=1.0):
    """Of the loss's sum, so that ranks of other sizes give the gradients of one process; each row's loss."""
    first, second = net(IDS[rows])
    loss = F.mse_loss(first, LABELS[rows], reduction="none") + (second - first.detach()).square()
    (weight * loss.sum()).backward()
    return loss.detach()


def scheduled(net, rows):
    """Schedules of two kinds in turn, and one that looks at the loss: of all ranks' rows, gathered."""
    optimizer = torch.optim.AdamW(net.parameters(), 0.01, eps=0.01, weight_decay=0.1)
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    schedule = lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 3)], [2])
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = backward(net, rows)
        optimizer.step()
        schedule.step()
        plateau.step(float((loss if type(net) is Model else des.gather_rows(net, loss)).sum()))
    return {"rates": torch.tensor([g["lr"] for g in optimizer.param_groups], dtype=torch.float64)}


def accumulated(net, rows):
    """Two backward passes a step, the first within ``no_sync``."""
    optimizer = torch.optim.Adam(net.parameters(), 0.01, eps=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with getattr(net, "no_sync", contextlib.nullcontext)():
            backward(net, rows, 0.25)
        backward(net, rows, 0.75)
        optimizer.step()
    return {}


def several_optimizers(net, rows):
    """One for tables, which steps every other time, and one for the rest."""
    tables = torch.optim.Adagrad([net.item.weight], 0.1, eps=0.01)
    rest = torch.optim.SGD([p for p in net.parameters() if p is not net.item.weight], 0.01, momentum=0.9)
    for step in range(STEPS):
        rest.zero_grad()
        backward(net, rows)
        rest.step()
        if step % 2:
            tables.step()
            tables.zero_grad()
    return {}


def several_losses(net, rows):
    """One after another on a graph that is kept, and a gradient that is asked for by name in between."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        first, second = net(IDS[rows])
        one, two = (F.mse_loss(x, LABELS[rows], reduction="sum") for x in (first, second))
        (asked,) = torch.autograd.grad(two, [net.second.weight], retain_graph=True)
        one.backward(retain_graph=True)
        (two / (1 + asked.norm())).backward()
        optimizer.step()
    return {}


def averaged(net, rows):
    """Exponential and equal averages of weights, and the learning rate that goes with them."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    every = {
        "ema": swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True),
        "swa": swa_utils.AveragedModel(net),
    }
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(net, rows)
        optimizer.step()
        schedule.step()
        for average in every.values():
            average.update_parameters(net)
    whole = des.full_state_dict if type(net) is not Model else nn.Module.state_dict
    return {f"{name} {n}": x for name, a in every.items() for n, x in whole(a.module).items()}


LOOPS = {f.__name__: f for f in (scheduled, accumulated, several_optimizers, several_losses, averaged)}


def _trained(rank, ranks, name, form):
    """Largest difference from one process."""
    torch.set_default_dtype(torch.float64)
    reference, module = Model(), des.compile(Model(), (IDS,), plan={"item": form}, loss="sum")
    expected = LOOPS[name](reference, slice(12)) | reference.state_dict()
    found = LOOPS[name](module, rows_of(rank)) | des.full_state_dict(module)
    assert found.keys() == expected.keys()
    return max(float((found[n] - x).abs().max()) for n, x in expected.items())


@pytest.mark.long(but=1)
@pytest.mark.parametrize("form", cases(["row_wise", "column_wise", "hot_rows"], ["row_wise"]))
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_trains_as_in_one_process(name, form, on_ranks):
    assert max(on_ranks(_trained, 2, name, form)) < 1e-10


def _gradients(net, rows):
    with torch.autocast("cpu", torch.bfloat16):
        first, second = net(IDS[rows])
        loss = F.mse_loss(first.float(), LABELS[rows].float(), reduction="sum") + second.float().square().sum()
    loss.backward()
    found = {n: des.local_tensor(p.grad).clone() for n, p in net.named_parameters()}
    net.zero_grad()
    return found, first.dtype


def _autocast(rank, ranks, form):
    """This rank's gradients, its dtype of outputs, and those of one process: of all rows, and of each rank's."""
    reference, module = Model().eval(), des.compile(Model().eval(), (IDS,), plan={"item": form}, loss="sum")
    whole, _ = _gradients(reference, slice(12))
    parts = [_gradients(reference, rows_of(r))[0] for r in range(ranks)]
    found, dtype = _gradients(module, rows_of(rank))

    def cut(of):
        return {n: module.plan.pieces[n].cut(x, rank) for n, x in of.items()}

    return found, dtype, cut(whole), [cut(x) for x in parts]


@pytest.mark.parametrize(
    "form", cases(["row_wise", "column_wise", "unique_rows", "replicate"], ["row_wise", "replicate"])
)
def test_autocast_differs_by_its_rounding(form, on_ranks):
    """A product's gradient is summed over rows in float32 and rounded to bfloat16 once: in one process that of all
    rows, on ranks that of each one's. A rounding is off by 2^-9 of what it rounds; twice that is allowed. The rest of a
    row's computation is the same, so nothing else is rounded otherwise."""
    for found, dtype, whole, parts in on_ranks(_autocast, 2, form):
        assert dtype is torch.bfloat16
        for name, x in found.items():
            rounded = whole[name].abs() + sum(p[name].abs() for p in parts)
            assert bool(((x - whole[name]).abs() <= 2.0**-8 * rounded + 1e-6).all()), name

"""What forward leaves on the model, and reads in the next call, is that of one process, or raises when it is read."""

import copy

import pytest
import torch
from torch import Tensor, nn

import descompiler as des
from descompiler.captured import Captured
from descompiler.model.stale import Stale
from tests.harness.cases import cases
from tests.harness.failures import raised

IDS = torch.arange(9) * 2 % 13


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(13, 4, dtype=torch.float64)
        self.steps, self.is_fresh, self.cache = 0, False, None
        self.losses: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        return self.then(self.table(ids))


class Annealed(Model):
    def then(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x * min(1.0, self.steps / 3)


class Warm(Model):
    def then(self, x: Tensor) -> Tensor:
        first, self.is_fresh = not self.is_fresh, True
        return x * 3 if first else x


class Remembers(Model):
    def then(self, x: Tensor) -> Tensor:
        before, self.cache = self.cache, x.detach()
        return x if before is None else x + before.mean(0)


class Lists(Model):
    def then(self, x: Tensor) -> Tensor:
        self.losses.append(x.detach().sum())
        return x * torch.stack(self.losses).sum()


class MixesLater(Model):
    def then(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x - x.mean(0) if self.steps > 2 else x


def _differences(rank, ranks, model, in_place):
    """Of outputs and gradients, over training, evaluation and batches of other sizes."""
    module = des.compile(copy.deepcopy(model), (IDS,), plan={"*": "row_wise"}, loss="sum", in_place=in_place)
    pieces, worst = module.table.weight.pieces, []
    for rows, training in ((9, True), (7, True), (9, False), (5, True), (9, True)):
        own = slice(0, 2) if rank == 0 else slice(2, rows)
        for net in (model, module):
            net.train(training)
            net.zero_grad()
        expected, found = model(IDS[:rows]), module(IDS[own])
        worst.append(float((expected[own] - found).abs().max()))
        expected.pow(2).sum().backward()
        found.pow(2).sum().backward()
        expected = pieces.cut(model.table.weight.grad, rank)
        worst.append(float((expected - des.local_tensor(module.table.weight.grad)).abs().max()))
    return max(worst), module.steps == model.steps if in_place else True


CASES = [(cls, in_place) for cls in (Annealed, Warm, Remembers, Lists, MixesLater) for in_place in (True, False)]


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("cls", "in_place"), cases(CASES, [*CASES[::4], CASES[5], CASES[7]]))
def test_what_the_next_call_reads_is_carried_as_in_one_process(cls, in_place, on_ranks):
    for worst, counted in on_ranks(_differences, 2, cls(), in_place):
        assert worst < 1e-10 and counted


class Counts(Model):
    """Leaves what no call reads, and `predict` does."""

    def then(self, x: Tensor) -> Tensor:
        self.steps, self.is_fresh, self.cache = self.steps + 1, True, x.detach()
        self.losses.append(x.detach().sum())
        return x * 2

    def predict(self) -> Tensor:
        return self.cache.mean(0)


def test_flags_are_set_and_what_no_graph_computes_raises_when_it_is_read():
    model, ids = Counts(), IDS
    with pytest.warns(UserWarning, match="steps, cache, losses: the method that is compiled sets"):
        des.compile(model, (ids,), in_place=True)
    for _ in range(2):
        model(ids).sum().backward()
    assert model.is_fresh is True
    uses = {
        "a method": model.predict,
        "a number": lambda: model.steps + 1,
        "a comparison": lambda: model.steps > 1,
        "a truth": lambda: bool(model.steps),
        "a list": lambda: len(model.losses),
        "torch": lambda: torch.stack([model.cache]),
        "an attribute": lambda: model.cache.shape,
    }
    for use, call in uses.items():
        assert "is set by the method that was compiled" in raised(call), use
    assert isinstance(copy.deepcopy(model.cache), Stale) and "not set" in repr(model.cache)
    model.steps = 7  # the user's own again
    model(ids)
    assert isinstance(model.steps, Stale)


def test_what_is_carried_is_in_no_graph():
    for cls in (Annealed, Warm, Remembers, MixesLater):
        with pytest.raises(des.CaptureError, match="what forward leaves on the model is read by the next call"):
            Captured.of(cls(), (IDS,))

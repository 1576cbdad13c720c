"""What a user would not notice: state that forward keeps, numbers that it returns, names, gradients of another kind."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import descompiler as des
from descompiler.classify.backward import backward_mixes
from descompiler.layout.rows import Rows
from tests.harness.cases import cases
from tests.harness.training import Training, trained

IDS = torch.randint(0, 50, (6, 3), generator=torch.Generator().manual_seed(5))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 6), nn.Linear(18, 1)

    def features(self, ids: Tensor) -> Tensor:
        return self.table(ids).flatten(1)


class AssignedMean(Table):
    """A buffer that forward assigns, of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(18))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.features(ids)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.steps = self.steps + 1
        return self.head(x - self.mean)


class Inner(nn.Module):
    """The same in a module within, read again after it was assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = AssignedMean(), nn.Linear(1, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(ids)) + self.inner.mean.sum()


class AssignedInPart(AssignedMean):
    """In Python that no tracer goes through."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(np.sort(ids.numpy(), axis=1)))


class PaddedFromTheEnd(Table):
    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding_bag(ids, self.table.weight, mode="mean", padding_idx=-4)
        return self.head(x.repeat(1, 3))


class OtherInEvaluation(Table):
    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.features(ids)
        more = {"norm": x.pow(2).mean()} if self.training else {"first": x[:, 0], "last": x[:, -1]}
        return {"score": self.head(x), **more}


class TwoNames(nn.Module):
    """A module of two names, and one within it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 1))
        self.second = self.first
        self.third = nn.Sequential(self.first[0], nn.Linear(6, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return (self.first(ids) + self.second(ids).sin() + self.third(ids)).sum(1)


class MixingBackward(torch.autograd.Function):
    """Its forward is of each row, its backward takes the mean gradient of all."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)


class Mixing(Table):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(MixingBackward.apply(self.features(ids)))


@pytest.mark.long(but=1)
@pytest.mark.parametrize("model", [AssignedMean, Inner, AssignedInPart, PaddedFromTheEnd, OtherInEvaluation, TwoNames])
def test_it_trains_as_the_original(model, on_ranks):
    des.verify(model(), (IDS,), plans=[None, {"*": "row_wise"}, {"*": "replicate"}], launch=on_ranks)


class OneBuffer(Table):
    """A counter that two modules have, a part of it under a third name; two norms of the same statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm1d(18), nn.BatchNorm1d(18)
        for name, x in self.norm.named_buffers():
            setattr(self.other, name, x)
        self.head.register_buffer("count", torch.zeros(2))
        self.table.register_buffer("count", self.head.count)
        self.table.register_buffer("first", self.head.count[:1])

    def forward(self, ids: Tensor) -> Tensor:
        self.head.count += 1
        x = self.head(self.other(self.norm(self.features(ids)))).squeeze(1)
        return x * (1 + self.table.first + self.table.count.sum())


class OneBufferInPart(OneBuffer):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(np.ascontiguousarray(ids.numpy())))


def _one_buffer(rank, ranks, model):
    torch.set_default_dtype(torch.float64)
    original = model()
    trained(rank, ranks, original, (IDS,), {"*": "row_wise"}, Training())
    module = des.compile(copy.deepcopy(original), (IDS,))
    for net in (module, copy.deepcopy(module)):
        for x in (IDS, IDS.flip(0)):
            net(x[rank * 3 : rank * 3 + 3])
    for x in (IDS, IDS.flip(0)):
        original(x)
    state = des.full_state_dict(module)
    return [n for n, x in original.state_dict().items() if not torch.allclose(state[n], x)]


@pytest.mark.long
@pytest.mark.parametrize("model", cases([OneBuffer, OneBufferInPart], [OneBuffer]))
def test_a_buffer_of_two_names_is_one(model, on_ranks):
    assert on_ranks(_one_buffer, 2, model) == [[], []]


def _evaluated(rank, ranks, model):
    module = des.compile(model, (IDS,))
    module.eval()
    with torch.no_grad():
        return module(IDS[rank * 3 : rank * 3 + 3])


def test_evaluation_returns_what_it_returns(on_ranks):
    model = OtherInEvaluation().eval()
    expected = model(IDS)
    for rank, got in enumerate(on_ranks(_evaluated, 2, model.train())):
        assert list(got) == list(expected)
        for name, x in got.items():
            torch.testing.assert_close(x, expected[name][rank * 3 : rank * 3 + 3])


def _state(rank, ranks, model):
    module = des.compile(model, (IDS,), plan={"*": "row_wise"})
    return des.full_state_dict(module)


def test_the_whole_state_has_every_name(on_ranks):
    model = TwoNames()
    for state in on_ranks(_state, 2, model):
        assert list(state) == list(model.state_dict())
        TwoNames().load_state_dict(state)
        assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())


class Logged(Table):
    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
        x = self.head(self.features(ids)).mean()
        return x, {"loss": x.item()}


class Counted(Table):
    def forward(self, ids: Tensor) -> tuple[Tensor, int]:
        return self.head(self.features(ids)), int((ids > 25).sum())


class Nested(Table):
    def forward(self, ids: Tensor) -> list[Tensor]:
        return [self.head(self.features(ids))] * (1 + int(ids.shape[0] > 8))


class Growing(Table):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.features(ids)
        self.seen = torch.cat([self.seen, self.seen])
        return self.head(x) + self.seen.sum()


class TiedByMemory(Table):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Embedding.from_pretrained(self.table.weight.data, freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids)) + self.other(ids).sum((1, 2))[:, None]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TiedByMemory, "parameter 'table.weight' shares its memory with 'other.weight', .* assigning the module"),
        (Logged, r"a number that depends on the batch: output\[1\]\['loss'\] is .* Return the tensor"),
        (Counted, r"a number that depends on the batch: output\[1\] is \d+ for one"),
        (Nested, "forward returns 1 values for one batch and 2 for another"),
        (Growing, "gives buffer 'seen' of Growing another shape"),
    ],
)
def test_what_would_differ_is_refused(model, message):
    with pytest.raises(des.DescompilerError, match=message):
        des.compile(model(), (IDS,))


class MixingInPart(Mixing):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(np.sort(ids.numpy(), axis=1)))


class Hooked(Table):
    """A hook on a tensor of forward does the same."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.features(ids)
        if x.requires_grad:
            x.register_hook(lambda g: g - g.mean(0))
        return self.head(x)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("model", [Mixing, MixingInPart, Hooked])
def test_a_backward_that_mixes_rows_is_that_of_the_global_batch(model, on_ranks):
    des.verify(model(), (IDS,), plans=[None, {"*": "row_wise"}], launch=on_ranks)


class Clicks(nn.Module):
    """Hidden states of sessions, which forward replaces in the caller's list (GRU4Rec) and dict."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(50, 6), nn.GRUCell(6, 6), nn.Linear(6, 50)

    def forward(self, ids: Tensor, state: list[Tensor], more: dict[str, Tensor]) -> Tensor:
        state[0] = self.cell(self.table(ids), state[0])
        more["steps"] = more["steps"] + 1
        return self.head(state[0])


def _clicks(net: nn.Module, ids: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Two clicks of each session, the second with the state of the first."""
    state, more = [torch.zeros(len(ids), 6, dtype=torch.float64)], {"steps": torch.zeros(len(ids))}
    net(ids[:, 0], state, more)
    out = net(ids[:, 1], state, more)
    (out.logsumexp(1).mean() + state[0].pow(2).mean()).backward()
    return state, more


def _sessions(rank, ranks, model):
    state, more = [torch.zeros(6, 6, dtype=torch.float64)], {"steps": torch.zeros(6)}
    module = des.compile(model, (IDS[:, 0], state, more), plan={"*": "row_wise"})
    state, more = _clicks(module, IDS[rank * 3 : rank * 3 + 3])
    torch.optim.SGD(module.parameters(), 0.1).step()
    return state[0].detach(), more["steps"], des.full_state_dict(module)


def test_lists_and_dicts_that_forward_updates_are_the_callers(on_ranks):
    model = Clicks().double()
    found = on_ranks(_sessions, 2, model)
    state, more = _clicks(model, IDS)
    torch.optim.SGD(model.parameters(), 0.1).step()
    torch.testing.assert_close(torch.cat([x for x, _, _ in found]), state[0].detach())
    assert all(torch.equal(steps, more["steps"][:3]) for _, steps, _ in found)
    for name, x in model.state_dict().items():
        torch.testing.assert_close(found[0][2][name], x)


class AddsToItsInput(Table):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        batch["features"] = self.features(batch["ids"])
        return self.head(batch["features"])


def test_what_forward_adds_to_its_arguments_is_told_of():
    with pytest.warns(UserWarning, match="adds to a list or dict that it is given"):
        des.compile(AddsToItsInput(), ({"ids": IDS},))


class SqueezesItsInput(Table):
    """A branch on a shape that forward changes in place: probes must not share it."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        ids = torch.from_numpy(np.sort(ids.numpy(), axis=1))
        x = self.head(self.features(ids))
        if mask.dim() == 2:
            mask.squeeze_(-1)
            x = x * 2
        return (x * mask.unsqueeze(-1)).sum()


MASK = torch.tensor([1.0, 0, 1, 1, 0, 1])


def _squeezed(rank, ranks, model):
    module = des.compile(model, (IDS, MASK[:, None].clone()))
    mine = slice(rank * 2, 2 + rank * 4)
    return module(IDS[mine], MASK[mine, None].clone()).detach()


@pytest.mark.long
def test_probes_share_no_input_that_forward_changes(on_ranks):
    model = SqueezesItsInput()
    expected = model(IDS, MASK[:, None].clone())
    for found in on_ranks(_squeezed, 2, model):
        torch.testing.assert_close(found, expected.detach())


class Counting(Table):
    """Counts its forwards, in Python that a tracer can't go through."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.steps += 1
        rare = torch.from_numpy(np.array([float(x) for x in self.steps * np.ones(1)]))
        return self.head(self.features(ids)) * rare.to(self.head.weight.dtype)


def test_a_count_that_forward_keeps_begins_where_the_models_does():
    model = Counting()
    module = des.compile(copy.deepcopy(model), (IDS,))
    for _ in range(3):
        torch.testing.assert_close(module(IDS), model(IDS))


def test_a_gradient_that_is_zero_but_for_rounding_mixes_no_rows():
    """That of a bias in front of a softmax: what is left of it is another rounding on each part of a batch."""
    generator = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((7, 5, 4), (4,), ()))

    def attend(values):
        scores = (values["x"] @ values["w"] + values["bias"]).softmax(1)
        return (scores.unsqueeze(-1) * values["x"]).sum(1)

    divisions = [[{"x": x[a:b], "w": w, "bias": bias} for a, b in ((0, n), (n, 7))] for n in (3, 5)]
    assert not backward_mixes(attend, {"x": x, "w": w, "bias": bias}, divisions, {"x": Rows()}, [Rows()])

    def centred(values):
        y = attend(values)
        return y + (y - y.detach()).mean(0)  # in its backward alone

    assert backward_mixes(centred, {"x": x, "w": w, "bias": bias}, divisions, {"x": Rows()}, [Rows()])

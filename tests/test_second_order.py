"""Gradients of gradients: penalties on the gradient of an input, against one process's on the global batch."""

import itertools
import re

import pytest
import torch
from torch import Tensor, nn

import descompiler as des
from tests.harness.cases import cases
from tests.harness.failures import raised

GENERATOR = torch.Generator().manual_seed(3)
BATCH = torch.randint(50, (10, 3), generator=GENERATOR), torch.randn(10, 4, dtype=torch.float64, generator=GENERATOR)
SIZES = (6, 4)


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.dense, self.head = nn.Embedding(50, 6), nn.Linear(4, 5), nn.Linear(23, 6)
        self.norm = nn.BatchNorm1d(6)

    def score(self, ids: Tensor, dense: Tensor) -> Tensor:
        return self.head(torch.cat([self.table(ids).flatten(1), torch.sin(self.dense(dense))], 1))

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        return torch.tanh(self.mixed(self.score(ids, dense)))


class Centred(Critic):
    """A sum over the batch, used on own rows: reduce, and spread."""

    def mixed(self, z: Tensor) -> Tensor:
        return z - z.mean(0) * z


class Normed(Critic):
    def mixed(self, z: Tensor) -> Tensor:
        return self.norm(z) * self.norm(z * z)


class Pairs(Critic):
    """Every row with every other: gather, and slice."""

    def mixed(self, z: Tensor) -> Tensor:
        return (z @ z.T).softmax(1) @ z


class Opaque(nn.Module):
    """A branch on values keeps tracers out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z).pow(2) if (z == z).all() else z


class WithLeaf(Critic):
    def __init__(self) -> None:
        super().__init__()
        self.opaque = Opaque()

    def mixed(self, z: Tensor) -> Tensor:
        return self.opaque(z)


class Product(Critic):
    """A product with a table that ranks hold in part."""

    def mixed(self, z: Tensor) -> Tensor:
        return (z.pow(2) @ self.table.weight.T).logsumexp(1)


def penalised(model: nn.Module, ids: Tensor, dense: Tensor) -> Tensor:
    """A sum over rows of the output and of its gradient."""
    dense = dense.clone().requires_grad_()
    out = model(ids, dense)
    (gradient,) = torch.autograd.grad(out.square().sum(), dense, create_graph=True)
    return out.square().sum() + (gradient.norm(dim=1) - 1).square().sum()


def _trained(rank, ranks, cls, form):
    mine = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], None)
    module = des.compile(cls().double(), BATCH, plan=form and {"*": form})
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        (ranks * penalised(module, *(x[mine] for x in BATCH))).backward()  # gradients are means over ranks
        optimizer.step()
    return des.full_state_dict(module)


PENALISED = list(itertools.product([Centred, Normed, Pairs], [None, "row_wise", "unique_rows"]))


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("cls", "form"), cases(PENALISED, PENALISED[2:7:2]))
def test_a_penalty_on_gradients_is_that_of_the_global_batch(cls, form, on_ranks):
    model = cls().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        penalised(model, *BATCH).backward()
        optimizer.step()
    for state in on_ranks(_trained, 2, cls, form):
        for name, x in model.state_dict().items():
            torch.testing.assert_close(state[name], x, rtol=1e-9, atol=1e-11)


def _refused(rank, ranks, cls, form):
    module = des.compile(cls().double(), BATCH, plan={"*": form})
    return raised(lambda: penalised(module, *BATCH).backward())


LINE = r"\S*test_second_order.py:\d+"
"""Of the user's code, here."""


REFUSED = [
    (WithLeaf, "row_wise", rf"opaque leaf 'opaque' \({LINE}\), which is not traced, .*operators of torch"),
    (Product, "row_wise", "a product with a table that ranks hold in part, .*replicate"),
]


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("cls", "form", "what"), REFUSED)
def test_what_is_not_differentiated_twice_is_refused(cls, form, what, on_ranks):
    for error in on_ranks(_refused, 2, cls, form):
        assert re.search(f"^UnsupportedError: the gradient of {what}", error)
        assert re.search(rf"which was taken at {LINE}, is differentiated again", error)


def _with_graph(rank, ranks):
    module = des.compile(Centred().double(), BATCH)
    by = next(module.parameters())
    asks = lambda: torch.autograd.grad(module(*BATCH).sum(), by, create_graph=True)  # noqa: E731
    return raised(lambda: module(*BATCH).sum().backward(create_graph=True)), raised(asks)


def test_gradients_of_parameters_have_no_graph(on_ranks):
    for errors in on_ranks(_with_graph, 2):
        for error in errors:
            assert re.search(f"{LINE}: gradients of gradients with respect to parameters", error)


class Rater(nn.Module):
    """Ratings of items by users, whose forward differentiates in Python that no tracer goes through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.users, self.items, self.head = nn.Embedding(11, 4), nn.Embedding(50, 4), nn.Linear(4, 1)

    def features(self, users: Tensor, items: Tensor) -> Tensor:
        return torch.tanh(self.users(users).unsqueeze(1) * self.items(items))

    def errors(self, features: Tensor, ratings: Tensor, weight: Tensor) -> Tensor:
        return ((features @ weight).squeeze(-1) - ratings).square()


class Adapts(Rater):
    """Meta-learning: all weights take a step on the batch's support before they are asked."""

    def forward(self, users: Tensor, items: Tensor, ratings: Tensor) -> Tensor:
        weights = dict(self.named_parameters())
        loss = self.errors(self.features(users, items), ratings, self.head.weight.T).mean()
        asked = [weights["users.weight"], weights["head.weight"]]
        a, b = torch.autograd.grad(loss, asked, create_graph=True)
        users = torch.nn.functional.embedding(users, asked[0] - 0.5 * a)
        features = torch.tanh(users.unsqueeze(1) * self.items(items.flip(1)))
        return self.errors(features, ratings, (asked[1] - 0.5 * b).T).mean()


class AdaptsEach(Rater):
    """A step for each row, of the head alone."""

    def forward(self, users: Tensor, items: Tensor, ratings: Tensor) -> Tensor:
        weight = self.head.weight.T.expand(len(users), 4, 1)
        loss = self.errors(self.features(users, items), ratings, weight).sum()
        (step,) = torch.autograd.grad(loss, weight, create_graph=True)
        return self.errors(self.features(users, items.flip(1)), ratings, weight - 0.5 * step).sum(1)


class Adversarial(Rater):
    """Embeddings are moved to where the error grows fastest."""

    def forward(self, users: Tensor, items: Tensor, ratings: Tensor) -> Tensor:
        x = self.features(users, items)
        (g,) = torch.autograd.grad(self.errors(x, ratings, self.head.weight.T).sum(), x, retain_graph=True)
        return self.errors(x + 0.5 * torch.nn.functional.normalize(g, dim=-1), ratings, self.head.weight.T).sum(1)


class Smooth(Rater):
    """A penalty on the gradient of a table."""

    def forward(self, users: Tensor, items: Tensor, ratings: Tensor) -> Tensor:
        loss = self.errors(self.features(users, items), ratings, self.head.weight.T).mean()
        (g,) = torch.autograd.grad(loss, self.users.weight, create_graph=True)
        return loss + g.square().sum()


class CallsBackward(Rater):
    def forward(self, users: Tensor, items: Tensor, ratings: Tensor) -> Tensor:
        loss = self.errors(self.features(users, items), ratings, self.head.weight.T)
        loss.sum().backward(retain_graph=True)
        return loss.sum(1) * self.head.weight.grad.norm()


RATED = (
    torch.randint(11, (8,), generator=GENERATOR),
    torch.randint(50, (8, 3), generator=GENERATOR),
    torch.rand(8, 3, dtype=torch.float64, generator=GENERATOR),
)


@pytest.mark.long
@pytest.mark.parametrize("model", cases([Adapts, AdaptsEach, Adversarial, Smooth], [AdaptsEach, Smooth]))
def test_a_forward_that_differentiates(model, on_ranks):
    des.verify(model(), RATED, plans=[None, {"items*": "row_wise"}], launch=on_ranks)


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    ("model", "plan", "message"),
    [
        (Smooth, {"users*": "row_wise"}, "forward differentiates by 'users.weight', of which each rank holds a part"),
        (CallsBackward, None, "forward calls backward, which adds .* take them with torch.autograd.grad"),
    ],
)
def test_what_a_forward_may_not_differentiate_is_refused(model, plan, message, on_ranks):
    with pytest.raises(des.DescompilerError, match=message):
        des.verify(model(), RATED, plans=[plan], launch=on_ranks)

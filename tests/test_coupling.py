"""Operators that mix the rows of the batch: exact on real ranks, uneven and empty ones too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import descompiler as des

SPLITS = [None, *({"*": form} for form in ("replicate", "field", "row", "column"))]


class TwoTower(nn.Module):
    """Users and items; ``f`` is what mixes their rows."""

    def __init__(self, **options):
        super().__init__()
        self.user, self.item = nn.Embedding(9, 4, **options), nn.Embedding(7, 4, **options)
        self.linear = nn.Linear(4, 4)

    def forward(self, users, items, x):
        return self.f(self.linear(self.user(users)), self.item(items), x)

    def f(self, u, v, x):
        raise NotImplementedError


class InBatchSoftmax(TwoTower):
    def f(self, u, v, x):
        return F.cross_entropy(u @ v.T, torch.arange(u.shape[0]))


class Contrastive(TwoTower):
    """Two views of each row, concatenated along the batch (SimCLR's NT-Xent)."""

    def f(self, u, v, x):
        z = F.normalize(torch.cat([u, v], 0), dim=1)
        n = u.shape[0]
        similar = z @ z.T / 0.5
        similar = similar - 1e9 * torch.eye(2 * n, dtype=z.dtype)
        target = torch.cat([torch.arange(n) + n, torch.arange(n)])
        return F.cross_entropy(similar, target)


class Centred(TwoTower):
    def f(self, u, v, x):
        return ((u - u.mean(0)) * v).sum(1)


class ColumnNorm(TwoTower):
    def f(self, u, v, x):
        return u / u.norm(dim=0) + F.normalize(v, dim=0)


class SoftmaxOverBatch(TwoTower):
    def f(self, u, v, x):
        return torch.softmax((u * v).sum(1), 0), torch.log_softmax(u, 0).sum(1)


class Losses(TwoTower):
    """As a library's ``calculate_loss``: everything is in the model, a scalar comes out."""

    def f(self, u, v, x):
        score = (u * v).sum(1)
        bpr = -F.logsigmoid(score - x).mean()
        rest = F.mse_loss(score, x) + F.binary_cross_entropy_with_logits(score, x, reduction="sum")
        return bpr + rest + 0.01 * self.linear.weight.norm() + F.smooth_l1_loss(u, v) + F.l1_loss(u, v.relu())


class SeveralOutputs(TwoTower):
    def f(self, u, v, x):
        score = (u * v).sum(1)
        return {"score": score, "loss": score.square().mean(), "all": u @ v.T, "largest": x.max()}


class Cumulative(TwoTower):
    def f(self, u, v, x):
        return torch.cumsum(u, 0) * v


class Listwise(TwoTower):
    """Sorted by score over the batch (ListMLE)."""

    def f(self, u, v, x):
        score = (u * v).sum(1)
        ordered = score[torch.argsort(x, descending=True)]
        return (torch.logcumsumexp(ordered.flip(0), 0).flip(0) - ordered).mean()


class BatchSize(TwoTower):
    def f(self, u, v, x):
        n = x.shape[0]
        return (u * v).sum(1) / n + torch.arange(n).to(u) / (2 * n + 1)


MODELS = [
    InBatchSoftmax,
    Contrastive,
    Centred,
    ColumnNorm,
    SoftmaxOverBatch,
    Losses,
    SeveralOutputs,
    Cumulative,
    Listwise,
    BatchSize,
]


def inputs():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(9, (8,), generator=generator),
        torch.randint(7, (8,), generator=generator),
        torch.rand(8, generator=generator),
    )


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks(model):
    torch.manual_seed(0)
    report = des.verify(model(), inputs(), ranks=2, plans=SPLITS)
    assert report.cases == len(SPLITS)

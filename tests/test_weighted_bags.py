"""Bags whose ids have weights, of the batch or learned, and attention that drops nothing."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import descompiler as des
from tests.harness.cases import cases

GENERATOR = torch.Generator().manual_seed(5)
BATCH = torch.randint(0, 50, (7, 3), generator=GENERATOR), torch.rand(7, 3, generator=GENERATOR)
PLANS = [None, {"*": "row_wise"}, {"*": "column_wise"}, {"*": "unique_rows"}]


class Given(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(50, 6, mode="sum", **options), nn.Linear(6, 1)

    def weights(self, ids: Tensor, given: Tensor) -> Tensor:
        return given

    def forward(self, ids: Tensor, given: Tensor) -> Tensor:
        return self.head(self.bag(ids, per_sample_weights=self.weights(ids, given)))


class Padded(Given):
    def __init__(self) -> None:
        super().__init__(padding_idx=int(BATCH[0][0, 0]))


class Learned(Given):
    """By id, of another table (factorisation machines with one weight for each feature)."""

    def __init__(self) -> None:
        super().__init__(padding_idx=int(BATCH[0][0, 0]))
        self.importance = nn.Embedding(50, 1)

    def weights(self, ids: Tensor, given: Tensor) -> Tensor:
        return self.importance(ids).squeeze(-1).sigmoid()


class Computed(Given):
    """By position, by a layer, of the batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def weights(self, ids: Tensor, given: Tensor) -> Tensor:
        return self.layer(given).softmax(1)


class Functional(Given):
    def forward(self, ids: Tensor, given: Tensor) -> Tensor:
        weights = torch.cat([given, given[:, :1]], 1)
        ids = torch.cat([ids, ids[:, :1]], 1)
        padding = int(BATCH[0][0, 0]) - 50  # whose row is not zero
        x = F.embedding_bag(ids, self.bag.weight, mode="sum", per_sample_weights=weights, padding_idx=padding)
        return self.head(x)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("model", cases([Padded, Learned, Computed, Functional], [Learned, Functional]))
def test_they_train_as_the_original_and_stay_divided(model, on_ranks):
    model = model()
    des.verify(model, BATCH, plans=PLANS, launch=on_ranks)
    plan = des.plan(model, BATCH, ranks=2, pins={"*": "row_wise"})
    assert not plan.layout.wholes and not plan.pieces["bag.weight"].is_replicated


class Attention(nn.Module):
    """Only an opaque leaf: a branch on values."""

    def forward(self, x: Tensor) -> Tensor:
        if not (x == x).all():
            return x
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.0)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.attention, self.head = nn.Embedding(50, 6), Attention(), nn.Linear(6, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.attention(self.table(ids)).sum(1))


def _rung(rank, ranks):
    return des.compile(Attending(), BATCH[:1]).coverage().rung


@pytest.mark.long
def test_attention_that_drops_nothing_is_not_random(on_ranks):
    assert on_ranks(_rung, 2) == ["fx", "fx"]
    des.verify(Attending(), BATCH[:1], launch=on_ranks)

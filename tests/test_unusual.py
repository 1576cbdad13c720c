"""Models and calls of unusual kinds: they train as the original, or are refused by name."""

import pytest
import torch
from torch import Tensor, nn

import descompiler as des

IDS = torch.randint(0, 50, (6, 3), generator=torch.Generator().manual_seed(5))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 6), nn.Linear(18, 1)

    def features(self, ids: Tensor) -> Tensor:
        return self.table(ids).flatten(1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.features(ids))


class SequenceFirst(nn.Module):
    """A GRU that is not ``batch_first``: ids, and what is looked up, have the batch in dim 1."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.gru = nn.Embedding(50, 6), nn.GRU(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.gru(self.table(ids.T))[0].transpose(0, 1)


class TopOfBatch(Table):
    """The best of the batch, which no rank has rows enough for."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(ids).squeeze(1)
        best, which = scores.topk(4)
        return best, (self.features(ids)[which] * best.unsqueeze(1)).sum()


@pytest.mark.parametrize("model", [SequenceFirst, TopOfBatch])
def test_it_trains_as_the_original(model, on_ranks):
    des.verify(model(), (IDS,), launch=on_ranks)

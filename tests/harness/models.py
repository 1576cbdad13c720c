"""Small models that several tests compile, and a batch for them."""

import torch
from torch import nn

IDS = torch.randint(9, (8, 3), generator=torch.Generator().manual_seed(0))
LABELS = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Model(nn.Module):
    """A table and a tower, without a forward."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.top = nn.Linear(4, 1)


class Recurrent(Model):
    """A recurrent layer in between; an assertion about the batch size."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, ids):
        assert int(ids.shape[0]) > 0
        return self.top(self.gru(self.table(ids))[0].sum(1))


class ThroughLists(nn.Module):
    """A table and two layers; what forward embeds goes through Python lists."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(9, 4, padding_idx=2)
        self.top = nn.Linear(4, 1)
        self.other = nn.Linear(4, 1)

    def embed(self, ids):
        """The ids go through Python lists: no tracer follows them."""
        return self.table(torch.tensor(ids.tolist()).reshape(ids.shape)).sum(1)


class Branch(ThroughLists):
    """Rows with an odd first id go through another layer: shapes and unused layers depend on values."""

    def forward(self, ids):
        e = self.embed(ids)
        odd = ids[:, 0] % 2 == 1
        out = e.new_zeros(len(ids))
        if odd.any():
            out[odd] = self.other(e[odd]).squeeze(1)
        if (~odd).any():
            out[~odd] = self.top(e[~odd]).squeeze(1).tanh()
        return out


class Recommender(nn.Module):
    """As RecBole's models: ``calculate_loss`` trains, ``predict`` serves, a regulariser in between."""

    data_dependent = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(9, 4)
        self.top = nn.Linear(4, 1)
        self.penalised = [self.table.weight, self.top.weight]  # the same objects, outside of the modules

    def forward(self, batch):
        e = self.table(batch["ids"]).sum(1)
        if self.data_dependent and (batch["ids"] == 3).any():
            e = e + self.table.weight[batch["ids"][:, 0]] * (batch["ids"][:, :1] == 3)
        return self.top(e).squeeze(1)

    def calculate_loss(self, batch):
        return (self.forward(batch) - batch["label"]).square().mean()

    def regularization_loss(self):
        return sum(0.1 * p.square().sum() for p in self.penalised) + 0.01 * self.penalised[0].norm()

    def predict(self, batch):
        with torch.no_grad():
            return self(batch).sigmoid()


def batch_of(rows):
    """What `Recommender` takes: these rows of `IDS` and `LABELS`."""
    return {"ids": IDS[rows], "label": LABELS[rows]}

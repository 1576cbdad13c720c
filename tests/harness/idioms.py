"""What people write in forward, each idiom as a small model."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

IDS = torch.randint(9, (6, 4), generator=torch.Generator().manual_seed(0))


class Idiom(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.other = nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.top, self.cell = nn.Linear(4, 1), nn.GRUCell(4, 4)
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
        self.layers = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.weight = nn.Parameter(torch.randn(9, 4))
        self.device, self.offsets, self.seen = "cpu", np.array([0, 1, 2, 0]), 0


class LoopOverPositions(Idiom):
    def forward(self, ids):
        h = torch.zeros(len(ids), 4)
        for t in range(ids.size(1)):
            h = self.cell(self.table(ids[:, t]), h)
        return self.top(h)


class BatchSizeAsInt(Idiom):
    def forward(self, ids):
        b = int(ids.shape[0])
        return self.top(self.table(ids).sum(1) + torch.zeros(b, 4)).view(b)


class IndexedByArange(Idiom):
    def forward(self, ids):
        return self.top(self.table(ids)[torch.arange(ids.size(0)), ids[:, 0] % 4])


class NumpyOffsets(Idiom):
    def forward(self, ids):
        return self.top(self.table(ids % 7 + ids.new_tensor(self.offsets).unsqueeze(0)).sum(1).to(self.device))


class BranchOnAny(Idiom):
    def forward(self, ids):
        mask, x = ids == 3, self.table(ids)
        if mask.any():
            x = x.masked_fill(mask.unsqueeze(-1), 0.0)
        return self.top(x.sum(1))


class AssertsAndPrints(Idiom):
    def forward(self, ids):
        assert (ids < 9).all(), "unknown id"
        print(f"a batch of {ids.shape}")
        return {"score": self.top(self.table(ids).sum(1)).squeeze(-1), "name": "score"}


class FormatsValues(Idiom):
    def forward(self, ids):
        x = self.table(ids).sum(1)
        self.message = f"mean {x.mean():.3f}"
        return self.top(x)


class NoGradient(Idiom):
    def forward(self, ids):
        with torch.no_grad():
            w = torch.softmax(self.other(ids).sum(-1), 1)
        return self.top((self.table(ids) * w.unsqueeze(-1)).sum(1))


class NoAutocast(Idiom):
    def forward(self, ids):
        with torch.autocast("cpu", enabled=False):
            return self.top(self.table(ids).sum(1))


class Data(Idiom):
    def forward(self, ids):
        x = self.table(ids).sum(1)
        return self.top(x + 2 * x.data) * self.weight.data.norm()


class WritesInPlace(Idiom):
    def forward(self, ids):
        x = self.table(ids)
        x[:, 0] = 0
        x[ids == 2] *= 2
        return self.top(x.sum(1).relu_())


class FillsColumns(Idiom):
    def forward(self, ids):
        out = torch.zeros(ids.shape[0], 2)
        for i, table in enumerate((self.table, self.other)):
            out[:, i] = self.top(table(ids).sum(1)).squeeze(1)
        return out


class Containers(Idiom):
    def forward(self, ids):
        x = self.table(ids).sum(1)
        for p in self.scales:
            x = x * p
        for layer in self.layers.values():
            x = layer(x).relu()
        return self.top(checkpoint(self.layers["a"], x, use_reentrant=False))


@torch.jit.script
def scripted(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * y).relu() + x


class Scripted(Idiom):
    def forward(self, ids):
        a, b, c, d = ids.T
        return self.top(scripted(self.table(a) + self.table(c), self.other(b) - self.other(d)))


class OneHot(Idiom):
    def forward(self, ids):
        return self.top((F.one_hot(ids, 9).float() @ self.weight).sum(1))


class ListOfSizes(Idiom):
    def forward(self, ids):
        b, n = list(ids.shape)
        return self.top(self.table(ids.view(b * n)).view(b, n, 4).sum(1)) * ids.numel() / ids.shape[0]


class RowsOfAMask(Idiom):
    def forward(self, ids):
        x, m = self.table(ids), ids > 2
        return self.top(torch.zeros(ids.shape[0], 4, dtype=x.dtype).index_add(0, m.nonzero()[:, 0], x[m]))


class KeepsATensor(Idiom):
    def forward(self, ids):
        if self.seen == 0:
            self.mask = torch.tril(torch.ones(4, 4))
        self.seen += 1
        return self.top((self.mask @ self.table(ids)).sum(1))


class Frequencies(Idiom):
    """Fourier transforms and quantiles don't run on a batch without rows."""

    def forward(self, ids):
        x = self.table(ids).transpose(0, 1)
        filtered = torch.fft.irfft(torch.fft.rfft(x, dim=0) * torch.complex(*self.scales), n=4, dim=0)
        same = torch.eye(4, dtype=x.dtype)  # baked: a graph of float32 is checked as a copy
        return self.top(filtered.sum(0) * x.quantile(0.8, dim=0) - x.quantile(0.3, dim=0) @ same)


class BiasOfAttention(Idiom):
    """Of no rows, torch gives the mask no gradient."""

    def forward(self, ids):
        x, bias = self.other(ids).unsqueeze(1), self.table(ids).unsqueeze(1)
        return self.top(F.scaled_dot_product_attention(x, x, x, attn_mask=bias).sum((1, 2)))


class LoopOverRows(Idiom):
    """As many lookups as rows: no graph has them."""

    def forward(self, ids):
        return torch.stack([self.top(self.table(row).sum(0)) for row in ids])


IDIOMS = {c.__name__: c for c in Idiom.__subclasses__() if c is not LoopOverRows}

"""Models that propagate embeddings through a graph of users and items, as such libraries write them."""

import torch
import torch.nn.functional as F
from torch import nn

USERS, ITEMS, DIM, LAYERS = 11, 7, 5, 2


def edges(users=USERS, items=ITEMS, seed=3):
    """Both directions of a bipartite graph: int64 ``[2, edges]``."""
    g = torch.Generator().manual_seed(seed)
    met = (torch.rand(users, items, generator=g) < min(0.4, 3 / items)).nonzero().T
    met = torch.cat([met, torch.stack([torch.arange(users), torch.arange(users) % items])], 1).unique(dim=1)
    there = torch.stack([met[0], met[1] + users])
    return torch.cat([there, there.flip(0)], 1)


def normalised(index, size):
    """D^-1/2 A D^-1/2 as its values, by edge."""
    degree = torch.zeros(size).index_add_(0, index[0], torch.ones(index.shape[1])).clamp(min=1)
    return (degree[index[0]] * degree[index[1]]).rsqrt()


class LightGCN(nn.Module):
    """He et al., SIGIR 2020; ``step`` is one of `STEPS`, ``held`` how the matrix is held."""

    def __init__(self, step="sparse.mm", held="coo buffer", users=USERS, items=ITEMS, dim=DIM, **kwargs):
        super().__init__()
        self.users, self.items, self.step = users, items, step
        self.user = nn.Embedding(users, dim, **kwargs)
        self.item = nn.Embedding(items, dim, **kwargs)
        index = edges(users, items)
        matrix = torch.sparse_coo_tensor(index, normalised(index, users + items), (users + items,) * 2)
        matrix = matrix.coalesce()
        if held.startswith("csr"):
            matrix = matrix.to_sparse_csr()
        elif held.startswith("dense"):
            matrix = matrix.to_dense()
        if held.endswith("buffer"):
            self.register_buffer("adjacency", matrix)
            self.register_buffer("index", index)
            self.register_buffer("norm", normalised(index, users + items))
        else:
            self.adjacency, self.index, self.norm = matrix, index, normalised(index, users + items)

    def everyone(self):
        e = torch.cat([self.user.weight, self.item.weight])
        layers = [e]
        for _ in range(LAYERS):
            e = STEPS[self.step](self, e)
            layers.append(e)
        out = torch.mean(torch.stack(layers, dim=1), dim=1)
        return torch.split(out, [self.users, self.items])

    def forward(self, user, item):
        users, items = self.everyone()
        return (users[user] * items[item]).sum(-1)

    def calculate_loss(self, user, item, negative):
        """Bayesian personalised ranking, and a regulariser of the rows that the batch has."""
        users, items = self.everyone()
        u, p, n = users[user], items[item], items[negative]
        bpr = -F.logsigmoid((u * p).sum(1) - (u * n).sum(1)).mean()
        rows = (self.user(user), self.item(item), self.item(negative))
        squares = sum(x.pow(2).sum() for x in rows) / user.shape[0]
        return bpr + 1e-2 * squares + 1e-3 * (torch.norm(rows[0], p=2) + rows[1].abs().mean() + rows[2].norm(p=1))


def _scatter(m, e):
    source, target = m.index
    return torch.zeros(e.shape[0], e.shape[1], dtype=e.dtype).index_add(0, target, e[source] * m.norm.unsqueeze(1))


def _scatter_add(m, e):
    source, target = m.index
    messages = e.index_select(0, source) * m.norm[:, None]
    return torch.zeros_like(e).scatter_add(0, target[:, None].expand(-1, e.shape[1]), messages)


STEPS = {
    "sparse.mm": lambda m, e: torch.sparse.mm(m.adjacency, e),
    "matmul": lambda m, e: m.adjacency @ e,
    "device": lambda m, e: torch.sparse.mm(m.adjacency.to(e.device), e),
    "index_add": _scatter,
    "scatter_add": _scatter_add,
}


class NGCF(LightGCN):
    """Wang et al., SIGIR 2019: dense layers between the steps mix columns."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        dim = self.user.embedding_dim
        self.sums = nn.ModuleList(nn.Linear(dim, dim) for _ in range(LAYERS))
        self.products = nn.ModuleList(nn.Linear(dim, dim) for _ in range(LAYERS))

    def everyone(self):
        e = torch.cat([self.user.weight, self.item.weight])
        layers = [e]
        for one, two in zip(self.sums, self.products, strict=True):
            near = torch.sparse.mm(self.adjacency, e)
            e = F.normalize(F.leaky_relu(one(near + e) + two(near * e), 0.2), dim=1)
            layers.append(e)
        return torch.split(torch.cat(layers, 1), [self.users, self.items])


def inputs(rows=6, users=USERS, items=ITEMS, loss=False):
    g = torch.Generator().manual_seed(0)
    item = [torch.randint(items, (rows,), generator=g) for _ in range(1 + loss)]
    return torch.randint(users, (rows,), generator=g), *item


class Weighted(LightGCN):
    """Layers with learnt weights, a learnt row for strangers, learnt biases and matrices on the way."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        dim = self.user.embedding_dim
        self.alpha = nn.Parameter(torch.rand(LAYERS + 1))
        self.stranger = nn.Parameter(torch.randn(1, dim))
        self.bias = nn.Parameter(torch.randn(dim))
        self.mix = nn.Parameter(torch.randn(self.users + self.items, 1))

    def everyone(self):
        e = torch.cat([self.user.weight, self.item.weight])
        layers = [e]
        for _ in range(LAYERS):
            e = torch.tanh(STEPS[self.step](self, e) + self.bias) * torch.sigmoid(self.mix)
            layers.append(e)
        out = (torch.stack(layers) * torch.softmax(self.alpha, 0).view(-1, 1, 1)).sum(0)
        users, items = torch.split(out, [self.users, self.items])
        return torch.cat([self.stranger, users]), items

    def forward(self, user, item):
        users, items = self.everyone()
        return (users[user + 1] * items[item - self.items]).sum(-1)  # negative ids count from the end


class Cosine(LightGCN):
    """Rows of length one, which all columns are needed for; of the tables too."""

    def everyone(self):
        return tuple(F.normalize(x, dim=1) for x in super().everyone())

    def forward(self, user, item):
        users, items = self.everyone()
        both = torch.cat([users[user], F.normalize(self.user.weight)[user]], 1)
        return (both * torch.cat([items[item], F.normalize(self.item.weight, dim=-1)[item]], 1)).sum(-1)


class Loss(nn.Module):
    """A model's loss as its forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return self.model.calculate_loss(*batch)

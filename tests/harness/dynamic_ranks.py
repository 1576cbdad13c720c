"""Models with dynamic tables, streams of ids, and training of both on ranks' shares."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import descompiler as des
from descompiler.dynamic import AfterSightings, Capacity, TimeToLive, WithProbability

WIDE = 1 << 62


class Clicks(nn.Module):
    """A dynamic table, bags of one, and a static table."""

    def __init__(self, dim=4, seed=3, dynamic_name="user", **options):
        super().__init__()
        self.dynamic_name = dynamic_name
        self.add_module(dynamic_name, des.DynamicEmbedding(dim, name="user", seed=seed, padding_idx=0, **options))
        self.item = nn.Embedding(50, 4)
        self.tags = des.DynamicEmbeddingBag(4, name="tags", mode="sum", **options)
        self.head = nn.Linear(8 + dim, 1)

    def forward(self, users, items, tags):
        found = [getattr(self, self.dynamic_name)(users), self.item(items), self.tags(tags)]
        return self.head(torch.cat(found, 1)).squeeze(1)


def stream(step, rows=10, drift=7):
    """Ids of a step: most of few, some that come and go, padding among them; the same on every rank."""
    g = torch.Generator().manual_seed(step)
    few = torch.randint(step * drift, step * drift + 60, (rows, 4), generator=g)
    wide = (few * 0x9E3779B97F4A7C15 - WIDE) ^ (few << 40)
    return wide[:, 0].where(few[:, 0] % 9 > 0, 0), torch.randint(0, 50, (rows,), generator=g), wide[:, 1:]


def shares(rows, ranks):
    """How many rows each rank has: unlike, one without any."""
    counts = [rows * (r + 1) * 2 // (ranks * (ranks + 1)) for r in range(ranks)]
    if ranks > 2:
        counts[1] = 0
    return [*counts[:-1], rows - sum(counts[:-1])]


def rows_of(table, ids):
    return table.rows.tensor[table.residence.find(table.keys(ids))].detach()


def of_all_ranks(module, name):
    """The ids of all ranks, sorted, and their rows; an id of a slice that all ranks have is the same on each."""
    table = module.get_submodule(name)._table
    mine, every = table.resident(), [None] * dist.get_world_size()
    dist.all_gather_object(every, (mine, rows_of(table, mine)))
    ids, rows = (torch.cat(x) for x in zip(*every, strict=True))
    once, of, times = ids.unique(return_inverse=True, return_counts=True)
    assert set(times.tolist()) <= {1, len(every)}
    first = once.new_empty(len(once)).index_copy_(0, of.flip(0), torch.arange(len(ids)).flip(0))
    torch.testing.assert_close(rows, rows[first][of], rtol=1e-10, atol=1e-14)
    return once, rows[first]


def _adagrad(module):
    return [torch.optim.Adagrad(module.parameters(), lr=0.1, initial_accumulator_value=0.25)]


def _sparse_adam(module):
    """For the dynamic tables; Adam for the rest."""
    rows = [module.user.weight, module.tags.weight]
    rest = [p for p in module.parameters() if all(p is not x for x in rows)]
    return [torch.optim.SparseAdam(rows, lr=0.05), torch.optim.Adam(rest, lr=0.02)]


OPTIMIZERS = {
    "sgd": lambda module: [torch.optim.SGD(module.parameters(), lr=0.05)],
    "adagrad": _adagrad,
    "sparse_adam": _sparse_adam,
    "ftrl": lambda module: [des.optim.FTRL(module.parameters(), lr=0.1, l1=0.02, l2=0.1)],
}


PLANS = {
    "row_wise": {"user.weight": "row_wise", "tags.weight": "row_wise"},
    "unique_rows": {"user.weight": "unique_rows", "tags.weight": "unique_rows"},
    "hot": {"user.weight": "hot_rows", "tags.weight": "hot_rows"},
    "both": {"user.weight": "table_wise", "tags.weight": "unique_rows"},
    "whole": {"user.weight": "table_wise", "tags.weight": "table_wise"},
}
OPTIONS = {
    "always": {},
    "sightings, lru": {"admit": AfterSightings(2), "evict": Capacity(64)},
    "by chance, time": {"admit": WithProbability(0.7), "evict": TimeToLive(5)},
    "sightings, lfu": {"admit": AfterSightings(2), "evict": Capacity(128, by="lfu")},
    "lfu": {"evict": Capacity(64, by="lfu")},
    "five sightings": {"admit": AfterSightings(5), "evict": Capacity(64, by="lfu")},
}


def trained(model, steps, rank=0, ranks=1, first=0):
    """Train a model, compiled or not, on a rank's shares of steps."""
    opts = OPTIMIZERS["adagrad"](model)
    train_on(model, opts, range(first, first + steps), rank, ranks)
    return opts


def train_on(model, opts, steps, rank, ranks):
    for step in steps:
        counts = shares(10, ranks)
        begin = sum(counts[:rank])
        F.softplus(model(*(x[begin : begin + counts[rank]] for x in stream(step)))).sum().backward()
        for o in opts:
            o.step()
            o.zero_grad()


def assert_same_tables(one, other):
    for name in ("user", "tags"):
        a, b = (m.get_submodule(name)._table for m in (one, other))
        assert torch.equal(a.resident(), b.resident()) and len(a.residence)
        torch.testing.assert_close(rows_of(a, a.resident()), rows_of(b, a.resident()), rtol=1e-10, atol=1e-12)
        assert a.residence.step == b.residence.step

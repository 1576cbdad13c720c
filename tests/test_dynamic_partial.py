"""Dynamic tables in models that are captured in part: the user's own forward runs, and owners look its ids up."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import descompiler as des
from descompiler.module.dynamic import tables_of
from tests.harness.dynamic_ranks import OPTIMIZERS, OPTIONS, of_all_ranks, rows_of, shares


class Bags(nn.Module):
    """Bags by offsets, weighted ones by offsets that end with the number of ids, and a single lookup of ids."""

    def __init__(self, mode="sum", padding_idx=None, **options):
        super().__init__()
        self.user = des.DynamicEmbedding(3, name="user", padding_idx=0, **options)
        self.tags = des.DynamicEmbeddingBag(3, name="tags", mode=mode, padding_idx=padding_idx, **options)
        self.seen = des.DynamicEmbeddingBag(2, name="seen", mode="sum", include_last_offset=True, **options)
        self.head = nn.Linear(8, 1)

    def forward(self, users, lengths, ids, weights):
        ends = lengths.cumsum(0)
        tags = self.tags(ids, ends - lengths)
        seen = self.seen(ids, F.pad(ends, (1, 0)), per_sample_weights=weights)
        return self.head(torch.cat([self.user(users), tags, seen], 1)).squeeze(1)


class Lists(nn.Module):
    """Ids go through Python lists; which lookups are made depends on them; a table has two names and is shared."""

    def __init__(self, **options):
        super().__init__()
        self.user = self.friend = des.DynamicEmbedding(3, name="user", padding_idx=0, **options)
        self.tags = des.DynamicEmbeddingBag(3, name="tags", mode="max", **options)
        self.seen = des.DynamicEmbedding(2, name="seen", **options)
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, users, lengths, ids, weights):
        owned = torch.tensor(users.tolist(), dtype=torch.int64)
        out = self.norm(self.user(owned) * self.friend(owned ^ 1))
        parts = ids.split(lengths.tolist())
        for i, part in enumerate(parts):
            if len(part):
                out = out + F.pad(self.tags(part[None]), (0, 0, i, len(parts) - i - 1))
        some = owned % 3 == 0
        if some.any():
            out = out.index_add(0, some.nonzero()[:, 0], self.seen(owned[some]).sum(1, True).expand(-1, 3))
        return self.head(out).squeeze(1)


def stream(step, rows=10, dtype=torch.int64):
    """Users, and a bag of each: ids that come and go, twice in a bag, and bags without any."""
    g = torch.Generator().manual_seed(step)
    few = torch.randint(step * 5, step * 5 + 50, (rows, 4), generator=g)
    wide = ((few * 0x9E3779B97F4A7C15 - (1 << 62)) ^ (few << 40)).to(dtype)
    lengths = torch.randint(0, 4, (rows,), generator=g)
    ids = torch.cat([row[1 : 1 + n] for row, n in zip(wide, lengths.tolist(), strict=True)])
    return wide[:, 0].where(few[:, 0] % 9 > 0, 0), lengths, ids, torch.rand(len(ids), generator=g, dtype=torch.float64)


def share(batch, rank, ranks):
    users, lengths, ids, weights = batch
    counts = shares(len(users), ranks)
    parts = [x.split(counts)[rank] for x in (users, lengths)]
    sizes = [int(x.sum()) for x in lengths.split(counts)]
    return (*parts, *(x.split(sizes)[rank] for x in (ids, weights)))


def train_beside_the_original(rank, ranks, cases, steps):
    torch.set_default_dtype(torch.float64)
    for make, options, optimizer in cases:
        torch.manual_seed(0)
        original = make(**options)
        module = des.compile(copy.deepcopy(original), stream(0), loss="sum")
        assert module.coverage().rung == "partial"
        tables = list(tables_of(original))
        assert all(module.plan.splits[f"{n}.weight"].form == "unique_rows" for n in tables), module.plan.forms
        mine, theirs = (OPTIMIZERS[optimizer](m) for m in (module, original))
        for step in range(steps):
            batch = stream(step)
            first = sum(shares(10, ranks)[:rank])
            own = share(batch, rank, ranks)
            training = step % 4 < 3
            module.train(training), original.train(training)
            with torch.set_grad_enabled(training):
                got, expected = module(*own), original(*batch)
            torch.testing.assert_close(got, expected[first : first + len(got)], rtol=1e-10, atol=1e-12)
            if training:
                F.softplus(got).sum().backward()
                F.softplus(expected).sum().backward()
                for o in (*mine, *theirs):
                    o.step()
                    o.zero_grad()
        for name in tables:
            ids, rows = of_all_ranks(module, name)
            table = original.get_submodule(name)._table
            assert torch.equal(ids, table.resident()) and len(ids)
            torch.testing.assert_close(rows, rows_of(table, ids), rtol=1e-10, atol=1e-12)


CASES = [
    (Bags, OPTIONS["sightings, lru"], "adagrad"),
    (Lists, OPTIONS["sightings, lru"], "sgd"),
]


@pytest.mark.parametrize("ranks", [2, 3])
def test_trained_as_in_one_process(on_ranks, ranks):
    on_ranks(train_beside_the_original, ranks, CASES, 16)

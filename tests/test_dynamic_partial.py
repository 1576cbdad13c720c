"""Dynamic tables in models that are captured in part: the user's own forward runs, and owners look its ids up."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import descompiler as des
from descompiler.dynamic import Capacity
from descompiler.module.dynamic import tables_of
from tests.harness.dynamic_ranks import OPTIMIZERS, OPTIONS, of_all_ranks, rows_of, shares
from tests.harness.jagged import Jagged


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
    """A rank's rows of a batch, of a stream of one kind or the other."""
    users, *rest = batch
    counts = shares(len(users), ranks)
    if not rest:
        return (users.split(counts)[rank],)
    lengths, ids, weights = rest
    sizes = [int(x.sum()) for x in lengths.split(counts)]
    return (*(x.split(counts)[rank] for x in (users, lengths)), *(x.split(sizes)[rank] for x in (ids, weights)))


def histories(step):
    """Ids of several columns."""
    users, *_ = stream(step)
    return (torch.stack([users, users ^ 5, users.roll(1)], 1),)


def as_the_original(rank, ranks, cases, steps):
    """Train each on a rank's shares, and the original on all; an evaluation now and then.

    What it is compiled on has ids that no step has.
    """
    torch.set_default_dtype(torch.float64)
    for make, options, optimizer, batches in cases:
        torch.manual_seed(0)
        original = make(**options)
        module = des.compile(copy.deepcopy(original), batches(1000), loss="sum")
        assert module.coverage().rung == "partial"
        tables = list(tables_of(original))
        assert all(module.plan.splits[f"{n}.weight"].form == "unique_rows" for n in tables), module.plan.forms
        mine, theirs = (OPTIMIZERS[optimizer](m) for m in (module, original))
        for step in range(steps):
            first, own = sum(shares(10, ranks)[:rank]), share(batches(step), rank, ranks)
            training = step % 4 < 3
            module.train(training), original.train(training)
            with torch.set_grad_enabled(training):
                got, expected = module(*own), original(*batches(step))
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
            assert torch.equal(ids, table.resident()) and len(ids), (make, name)
            torch.testing.assert_close(rows, rows_of(table, ids), rtol=1e-10, atol=1e-12)


def bag(**options):
    return des.DynamicEmbeddingBag(3, name="seen", evict=Capacity(64), **options)


class OfJagged(nn.Module):
    """Bags of ids, with padding among them, twice of one table."""

    def __init__(self, mode, **options):
        super().__init__()
        self.seen, self.top = bag(mode=mode, padding_idx=-5, **options), nn.Linear(3, 1)

    def forward(self, x):
        ends = x.lengths.cumsum(0)
        starts = ends - x.lengths
        return self.top(self.seen(x.values, starts) * self.seen(x.values ^ 6, starts)).squeeze(1)


class Packed(nn.Module):
    """Packing refuses a batch without rows, so a rank without any runs spare ones; a batch norm on top."""

    def __init__(self, **options):
        super().__init__()
        self.item = des.DynamicEmbedding(3, name="item", **{"evict": Capacity(64), **options})
        self.gru, self.norm, self.top = nn.GRU(3, 3, batch_first=True), nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, ids):
        lengths = torch.tensor([1 + (i % 3) for i in ids[:, 0].tolist()])
        packed = nn.utils.rnn.pack_padded_sequence(self.item(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.top(self.norm(self.gru(packed)[1][0])).squeeze(1)


class OfTheBatch(nn.Module):
    """Whether ids are looked up depends on others' rows; what forward returns does not show it."""

    def __init__(self, **options):
        super().__init__()
        self.item = des.DynamicEmbedding(3, name="item", **{"evict": Capacity(64), **options})
        self.top = nn.Linear(3, 1)

    def forward(self, ids):
        values = ids[:, 0].tolist()
        found = self.item(torch.tensor(values, dtype=torch.int64))
        if any(i % 4 == 3 for i in values):
            found = found + self.item(ids[:, 1]) * (ids[:, :1] % 4 == 3)
        return self.top(found).squeeze(1)


class Seldom(nn.Module):
    """Even ids are looked up in a table that what it is compiled on has nothing of."""

    def __init__(self, **options):
        super().__init__()
        self.item, self.even = (des.DynamicEmbedding(1, name=n, **options) for n in ("item", "even"))

    def forward(self, ids):
        out = self.item(ids[:, 0]).squeeze(1)
        even = ids[:, 1] % 2 == 0
        return out.index_add(0, even.nonzero()[:, 0], self.even(ids[even, 1]).squeeze(1)) if even.any() else out


def odd_at_first(step):
    """`histories`; without an even id where a model is compiled."""
    (several,) = histories(step)
    return (several | 1 if step == 1000 else several,)


def ids(*shape, seed=0, dtype=torch.int64):
    """Some ids of 64 bits, most of them several times; -5 is padding."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 23, shape, generator=g) * (-(1 << 58) if dtype is torch.int64 else 3) - 5).to(dtype)


LENGTHS = torch.tensor([1, 0, 3, 2, 2, 0, 1, 4, 2])
MODELS = {
    "sums": (lambda: OfJagged("sum"), Jagged(LENGTHS, ids(15))),
    "means": (lambda: OfJagged("mean"), Jagged(LENGTHS, ids(15))),
    "maxima": (lambda: OfJagged("max", dtype=torch.float32), Jagged(LENGTHS, ids(15, dtype=torch.int32))),
    "spare rows": (Packed, (ids(9, 3),)),
    "of the batch": (OfTheBatch, (ids(9, 2, dtype=torch.int32).long(),)),
}


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("name", "optimizer"), [*((m, "adagrad") for m in MODELS), ("spare rows", "sparse_adam")])
def test_it_is_verified(on_ranks, name, optimizer):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    report = des.verify(make(), inputs, plans=({},), optimizers=(optimizer,), launch=on_ranks)
    assert report.cases == 1 and max(report.worst.values()) < 1e-10, report


CASES = [
    (Bags, OPTIONS["sightings, lru"], "adagrad", stream),
    (Lists, OPTIONS["by chance, time"], "sgd", stream),
    (Packed, OPTIONS["sightings, lru"], "ftrl", histories),
    (OfTheBatch, OPTIONS["lfu"], "adagrad", histories),
    (Seldom, OPTIONS["always"], "sgd", odd_at_first),
]


EVERY = pytest.param(3, CASES, marks=pytest.mark.slow)


@pytest.mark.long
@pytest.mark.parametrize("ranks, cases", [(2, CASES), (3, [CASES[2], CASES[-1]]), EVERY], ids=["2", "3", "3, all"])
def test_trained_as_in_one_process(on_ranks, ranks, cases):
    on_ranks(as_the_original, ranks, cases, 16)


class OfTheLongest(nn.Module):
    """Bags are padded to the longest of a batch with an id that is looked up."""

    def __init__(self):
        super().__init__()
        self.seen = des.DynamicEmbedding(3, name="seen")

    def forward(self, x):
        padded = nn.utils.rnn.pad_sequence(x.values.split(x.lengths.tolist()), batch_first=True)
        there = torch.arange(padded.shape[1]) < x.lengths[:, None]
        return (self.seen(padded).sum(-1) * there).sum(1)


def test_what_others_have_looked_up_is_refused_where_batches_cant_be_put_together():
    with pytest.raises(des.UnsupportedError, match=r"which ids forward looks up in dynamic table 'seen'.*dim 0"):
        des.compile(OfTheLongest(), Jagged(LENGTHS, ids(15)))

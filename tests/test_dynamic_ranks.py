"""Dynamic tables on ranks: trained on N ranks as in one process, in every form, with ids that come and go."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import descompiler as des
from descompiler.dynamic import AfterSightings, Capacity, TimeToLive, WithProbability

WIDE = 1 << 62


class Clicks(nn.Module):
    """A dynamic table, bags of one, and a static table."""

    def __init__(self, **options):
        super().__init__()
        self.user = des.DynamicEmbedding(4, name="user", seed=3, padding_idx=0, **options)
        self.item = nn.Embedding(50, 4)
        self.tags = des.DynamicEmbeddingBag(4, name="tags", mode="sum", **options)
        self.head = nn.Linear(12, 1)

    def forward(self, users, items, tags):
        return self.head(torch.cat([self.user(users), self.item(items), self.tags(tags)], 1)).squeeze(1)


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
    """The ids of all ranks, sorted, and their rows."""
    table = module.get_submodule(name)._table
    mine, every = table.resident(), [None] * dist.get_world_size()
    dist.all_gather_object(every, (mine, rows_of(table, mine)))
    ids, rows = (torch.cat(x) for x in zip(*every, strict=True))
    order = ids.argsort()
    return ids[order], rows[order]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.25),
}


def train_beside_the_original(rank, ranks, options, plan, optimizer, steps):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    original = Clicks(**options)
    module = des.compile(copy.deepcopy(original), stream(0), plan=plan, loss="sum")
    assert {n: s.form for n, s in module.plan.splits.items() if n != "item.weight"} == plan
    mine, theirs = (OPTIMIZERS[optimizer](m.parameters()) for m in (module, original))
    for step in range(steps):
        batch, counts = stream(step), shares(10, ranks)
        first = sum(counts[:rank])
        own = [x[first : first + counts[rank]] for x in batch]
        training = step % 4 < 3
        module.train(training), original.train(training)
        with torch.set_grad_enabled(training):
            got, expected = module(*own), original(*batch)
        torch.testing.assert_close(got, expected[first : first + counts[rank]], rtol=1e-10, atol=1e-12)
        if training:
            F.softplus(got).sum().backward()
            F.softplus(expected).sum().backward()
            assert module.traffic() == module.predicted_traffic()
            for o in (mine, theirs):
                o.step()
                o.zero_grad()
    for name in ("user", "tags"):
        ids, rows = of_all_ranks(module, name)
        table = original.get_submodule(name)._table
        assert torch.equal(ids, table.resident()) and len(ids)
        torch.testing.assert_close(rows, rows_of(table, ids), rtol=1e-10, atol=1e-12)


PLANS = {
    "row_wise": {"user.weight": "row_wise", "tags.weight": "row_wise"},
    "unique_rows": {"user.weight": "unique_rows", "tags.weight": "unique_rows"},
    "both": {"user.weight": "table_wise", "tags.weight": "unique_rows"},
}
OPTIONS = {
    "always": {},
    "sightings, lru": {"admit": AfterSightings(2), "evict": Capacity(64)},
    "by chance, time": {"admit": WithProbability(0.7), "evict": TimeToLive(5)},
    "lfu": {"evict": Capacity(64, by="lfu")},
}


@pytest.mark.parametrize(
    ("ranks", "plan", "options", "optimizer"),
    [
        (2, "row_wise", "sightings, lru", "adagrad"),
        (2, "unique_rows", "by chance, time", "adagrad"),
        (2, "both", "lfu", "sgd"),
        (3, "unique_rows", "sightings, lru", "sgd"),
        (3, "row_wise", "always", "adagrad"),
    ],
)
def test_trained_as_in_one_process(on_ranks, ranks, plan, options, optimizer):
    on_ranks(train_beside_the_original, ranks, OPTIONS[options], PLANS[plan], optimizer, 16)


class Penalised(Clicks):
    def forward(self, users, items, tags):
        return super().forward(users, items, tags) + self.user.weight.square().sum()


class Untraceable(Clicks):
    def forward(self, users, items, tags):
        return super().forward(torch.tensor(users.tolist()).reshape(users.shape), items, tags)


class Leafed(nn.Module):
    """The lookup is in a module that only runs as it is."""

    def __init__(self):
        super().__init__()
        self.inner = Untraceable()

    def forward(self, users, items, tags):
        return self.inner(users, items, tags)


def refusals(rank, ranks):
    said = {}
    for name, model, options in [
        ("penalty", Penalised(), {}),
        ("untraceable", Untraceable(), {}),
        ("leaf", Leafed(), {}),
        ("in place", Clicks(), {"in_place": True}),
        ("pinned", Clicks(), {"plan": {"user": "column_wise"}}),
        ("everywhere", Clicks(), {"plan": {"tags": "replicate"}}),
        ("max", nn.Sequential(des.DynamicEmbeddingBag(2, mode="max", padding_idx=0)), {}),
    ]:
        inputs = (torch.ones(4, 2, dtype=torch.int64),) if name == "max" else stream(0)
        try:
            des.compile(model, inputs, **options)
            said[name] = ""
        except des.DescompilerError as error:
            said[name] = f"{type(error).__name__}: {error}"
    module = des.compile(Clicks(), stream(0))
    weight = module.user.weight
    uses = {
        "sum": lambda: weight.sum(),
        "norm": lambda: torch.linalg.vector_norm(weight.detach()),
        "clip": lambda: nn.utils.clip_grad_norm_([weight], 1.0),
        "row": lambda: weight[3],
        "mean": lambda: weight.data.mean(),
        "lookup": lambda: F.embedding(torch.tensor([1]), weight),
        "call": lambda: module.user(torch.tensor([1])),
        "floats": lambda: module(*(x.double() for x in stream(0))),
    }
    F.softplus(module(*stream(0))).sum().backward()
    for name, use in uses.items():
        try:
            use()
            said[name] = ""
        except (des.DescompilerError, NotImplementedError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def test_what_is_refused_by_name(on_ranks):
    for said in on_ranks(refusals, 2):
        assert "'user' are used by" in said["penalty"], said["penalty"]
        assert "captured whole" in said["untraceable"] and "captured whole" in said["leaf"], said
        assert "in_place=True" in said["in place"]
        assert all("each on the one rank" in said[x] for x in ("pinned", "everywhere")), said
        assert "padding_idx=0" in said["max"]
        assert all(said.values()), [name for name, text in said.items() if not text]


def trained(model, steps, rank=0, ranks=1, first=0):
    """Train a model, compiled or not, on a rank's shares of steps."""
    opt = OPTIMIZERS["adagrad"](model.parameters())
    train_on(model, opt, range(first, first + steps), rank, ranks)
    return opt


def train_on(model, opt, steps, rank, ranks):
    for step in steps:
        counts = shares(10, ranks)
        begin = sum(counts[:rank])
        F.softplus(model(*(x[begin : begin + counts[rank]] for x in stream(step)))).sum().backward()
        opt.step()
        opt.zero_grad()


def assert_same_tables(one, other):
    for name in ("user", "tags"):
        a, b = (m.get_submodule(name)._table for m in (one, other))
        assert torch.equal(a.resident(), b.resident()) and len(a.residence)
        torch.testing.assert_close(rows_of(a, a.resident()), rows_of(b, a.resident()), rtol=1e-10, atol=1e-12)
        assert a.residence.step == b.residence.step


def there_and_back(rank, ranks, plan):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    original = Clicks(**OPTIONS["sightings, lru"])
    trained(original, 6)
    module = des.compile(copy.deepcopy(original), stream(0), plan=plan, loss="sum")  # with the rows that it has
    state = des.full_state_dict(module)
    other = Clicks(**OPTIONS["sightings, lru"])
    other.load_state_dict(state)
    assert_same_tables(other, original)
    for model, share in ((module, (rank, ranks)), (original, (0, 1))):
        trained(model, 5, *share, first=6)
    single = des.to_single(module)
    if rank == 0:
        assert type(single.user) is des.DynamicEmbedding
        assert_same_tables(single, original)
        trained(single, 1, first=11)
    # the whole into the ranks' parts again, and each part's own state into it
    des.load_full_state_dict(module, state)
    at_first = des.full_state_dict(module)
    assert all(torch.equal(x, at_first[n]) for n, x in state.items())
    mine = copy.deepcopy(module.state_dict())
    trained(module, 2, rank, ranks)
    module.load_state_dict(mine)
    assert all(torch.equal(x, state[n]) for n, x in des.full_state_dict(module).items())
    said = []
    for wrong in (state, {**mine, "user.rank": torch.tensor(7)}):
        with pytest.raises(des.InputError) as error:
            module.load_state_dict(wrong)
        said.append(str(error.value))
    with pytest.raises(des.InputError, match="part that rank"):
        other.load_state_dict(mine)
    opt = trained(module, 1, rank, ranks)
    theirs = trained(original, 1)
    opt.load_state_dict(theirs.state_dict())
    with pytest.raises(des.DescompilerError):
        train_on(module, opt, [3], rank, ranks)
    return said


@pytest.mark.parametrize(("ranks", "plan"), [(2, "unique_rows"), (3, "both")])
def test_weights_go_in_and_out(on_ranks, ranks, plan):
    for whole, other in on_ranks(there_and_back, ranks, PLANS[plan]):
        assert "is the whole" in whole and "rank 7" in other

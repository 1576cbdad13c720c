"""Dynamic tables on ranks: trained on N ranks as in one process, in every form, with ids that come and go."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import descompiler as des
from descompiler.dynamic import AfterSightings, Capacity
from tests.harness.dynamic_ranks import (
    OPTIMIZERS,
    OPTIONS,
    PLANS,
    Clicks,
    assert_same_tables,
    of_all_ranks,
    rows_of,
    shares,
    stream,
    train_on,
    trained,
)


def train_beside_the_original(rank, ranks, options, plan, optimizer, steps):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    original = Clicks(**options)
    module = des.compile(copy.deepcopy(original), stream(0), plan=plan, loss="sum")
    assert {n: s.form for n, s in module.plan.splits.items() if n != "item.weight"} == plan
    mine, theirs = (OPTIMIZERS[optimizer](m) for m in (module, original))
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
            for o in (*mine, *theirs):
                o.step()
                o.zero_grad()
    for name in ("user", "tags"):
        ids, rows = of_all_ranks(module, name)
        table = original.get_submodule(name)._table
        assert torch.equal(ids, table.resident()) and len(ids)
        torch.testing.assert_close(rows, rows_of(table, ids), rtol=1e-10, atol=1e-12)


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    ("ranks", "plan", "options", "optimizer"),
    [
        (2, "row_wise", "sightings, lru", "adagrad"),
        (2, "unique_rows", "by chance, time", "adagrad"),
        (2, "both", "lfu", "sgd"),
        (3, "unique_rows", "sightings, lru", "sgd"),
        (3, "row_wise", "always", "adagrad"),
        (2, "unique_rows", "lfu", "ftrl"),
        (2, "hot", "sightings, lru", "adagrad"),
        (3, "hot", "lfu", "ftrl"),
        (3, "both", "sightings, lru", "ftrl"),
    ],
)
def test_trained_as_in_one_process(on_ranks, ranks, plan, options, optimizer):
    on_ranks(train_beside_the_original, ranks, OPTIONS[options], PLANS[plan], optimizer, 16)


def loop_with_prefetch(rank, ranks, plan, steps):
    """Ids of the next batch travel during this step; beside a part of the loop that leaves what went ahead."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    original, own = Clicks(**OPTIONS["sightings, lru"]), []
    module = des.compile(copy.deepcopy(original), stream(0), plan=plan, loss="sum")
    mine, theirs = (OPTIMIZERS["adagrad"](m)[0] for m in (module, original))
    for step in range(steps):
        counts = shares(10, ranks)
        first = sum(counts[:rank])
        own.append(tuple(x[first : first + counts[rank]] for x in stream(step)))
    ahead = des.prefetch(own, module)
    for step, batch in enumerate(ahead):
        given = batch if step != 5 else tuple(x.clone() for x in batch)  # other tensors: what went ahead is left
        for model, inputs, optimizer in ((module, given, mine), (original, stream(step), theirs)):
            F.softplus(model(*inputs)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert module.traffic() == module.predicted_traffic()
    for name in ("user", "tags"):
        ids, rows = of_all_ranks(module, name)
        table = original.get_submodule(name)._table
        assert torch.equal(ids, table.resident()) and len(ids)
        torch.testing.assert_close(rows, rows_of(table, ids), rtol=1e-10, atol=1e-12)
    return ahead.taken


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("ranks", "plan"), [(2, "row_wise"), (2, "unique_rows"), (3, "hot")])
def test_ids_travel_ahead(on_ranks, ranks, plan):
    assert min(on_ranks(loop_with_prefetch, ranks, PLANS[plan], 12)) >= 7


FREQUENT = 7 << 50, -9, 12345


def few_everywhere(step, rows=64):
    """Ids of which three are in nearly every batch."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(-(1 << 62), 1 << 62, (rows,), generator=g)
    return (torch.where(torch.rand(rows, generator=g) < 0.8, torch.tensor(FREQUENT)[torch.arange(rows) % 3], ids),)


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.head = des.DynamicEmbedding(4, name="user", evict=Capacity(4096)), nn.Linear(4, 1)

    def forward(self, users):
        return self.head(self.user(users)).squeeze(1)


def hot_slices_of(rank, ranks):
    """The bytes that a plan of measured slices expects, and those that steps send; whether all ranks have those ids."""
    torch.manual_seed(0)
    samples = [few_everywhere(step) for step in range(20)]
    module = des.compile(Alone(), samples[0], plan={"user": "hot_rows"}, samples=samples)
    table, bytes_sent = module.user._table, []
    hot = table.owners[table.residence.slices_of(table.keys(torch.tensor(FREQUENT)))]
    for step in range(20, 30):
        module(*few_everywhere(step * ranks + rank)).sum().backward()
        assert module.traffic() == module.predicted_traffic()
        bytes_sent.append(module.traffic().total)
    expected = module.plan.price_bytes
    return hot.tolist(), int((table.owners == -1).sum()), expected, sum(bytes_sent) / 10, str(module.plan.explain())


def test_slices_that_were_measured_are_on_all_ranks(on_ranks):
    for hot, slices, expected, sent, explained in on_ranks(hot_slices_of, 2):
        assert hot == [-1, -1, -1] and slices == 64 // 16
        assert abs(sent - expected) < 0.1 * expected
        assert "hot slices' gradients gathered" in explained


class Penalised(Clicks):
    def forward(self, users, items, tags):
        return super().forward(users, items, tags) + self.user.weight.square().sum()


class Untraceable(Clicks):
    def forward(self, users, items, tags):
        return super().forward(torch.tensor(users.tolist()).reshape(users.shape), items, tags)


class PenalisedInPart(Untraceable):
    def forward(self, users, items, tags):
        return super().forward(users, items, tags) + self.user.weight.square().sum()


def refusals(rank, ranks):
    said = {}
    for name, model, options in [
        ("penalty", Penalised(), {}),
        ("in part", PenalisedInPart(), {}),
        ("in place", Clicks(), {"in_place": True}),
        ("pinned", Clicks(), {"plan": {"user": "column_wise"}}),
        ("everywhere", Clicks(), {"plan": {"tags": "replicate"}}),
        ("pinned in part", Untraceable(), {"plan": {"user": "replicate"}}),
        ("in place in part", Untraceable(), {"in_place": True}),
    ]:
        try:
            des.compile(model, stream(0), **options)
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
        "copy": lambda: copy.deepcopy(module),
        "average": lambda: torch.optim.swa_utils.AveragedModel(module),
        "safetensors": lambda: des.save_safetensors(module, "never-written"),
        "from safetensors": lambda: des.load_safetensors(module, "never-read"),
        "a part's copy": lambda: copy.deepcopy(module.user)(torch.tensor([1])),
        "floats": lambda: module(*(x.double() for x in stream(0))),
        "functional call": lambda: torch.func.functional_call(module, {"user.weight": weight.detach() * 2}, stream(0)),
    }
    F.softplus(module(*stream(0))).sum().backward()
    for name, use in uses.items():
        try:
            use()
            said[name] = ""
        except (des.DescompilerError, NotImplementedError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    module.zero_grad()
    state = des.full_state_dict(module)
    wrong_ones = {"a key more": {"tags.other": torch.ones(1)}, "a dim more": {"tags.weight": torch.ones(9, 5)}}
    for name, wrong in wrong_ones.items():
        with pytest.raises(des.InputError) as refused:
            des.load_full_state_dict(module, {n: x + (n == "user.weight") for n, x in state.items()} | wrong)
        said[name] = str(refused.value)
    assert all(torch.equal(x, state[n]) for n, x in des.full_state_dict(module).items())
    # what one rank alone can't read: a gradient that waits, ids that were sighted, rows that were written over
    opt = torch.optim.Adagrad(module.parameters())
    F.softplus(module(*stream(0))).sum().backward()
    module.zero_grad() if rank else None
    for name, use in [
        ("gradient", lambda: des.full_state_dict(module)),
        ("saved", lambda: des.save(module, opt, "never-written")),
        ("written", lambda: weight.data.fill_(1.0 - rank) is None or des.full_state_dict(module)),
        ("single", lambda: des.to_single(module)),
    ]:
        with pytest.raises(des.DescompilerError) as refused:
            use()
        said[name] = str(refused.value)
    return said


@pytest.mark.long
def test_what_is_refused_by_name(on_ranks):
    for said in on_ranks(refusals, 2):
        assert "'user' are used by" in said["penalty"], said["penalty"]
        assert "'user' are used by" in said["in part"], said["in part"]
        assert "in_place=True" in said["in place"] and "in_place=True" in said["in place in part"]
        assert "take unique_rows" in said["pinned in part"], said["pinned in part"]
        assert all("unique_rows, hot_rows" in said[x] for x in ("pinned", "everywhere")), said["pinned"]
        assert "gradient that no optimiser" in said["gradient"] and "default row" in said["single"], said
        assert "another tensor" in said["functional call"] and "tags.other" in said["a key more"], said
        assert all(said.values()), [name for name, text in said.items() if not text]


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
    (mine,), (theirs,) = trained(module, 1, rank, ranks), trained(original, 1)
    mine.load_state_dict(theirs.state_dict())
    with pytest.raises(des.DescompilerError):
        train_on(module, [mine], [3], rank, ranks)
    return said


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("ranks", "plan"), [(2, "unique_rows"), (3, "both")])
def test_weights_go_in_and_out(on_ranks, ranks, plan):
    for whole, other in on_ranks(there_and_back, ranks, PLANS[plan]):
        assert "is the whole" in whole and "rank 7" in other


@pytest.mark.long
@pytest.mark.parametrize("plan", ["row_wise", "hot", "both"])
def test_it_is_verified(on_ranks, plan):
    torch.manual_seed(0)
    model = Clicks(**OPTIONS["sightings, lru"])
    trained(model, 4)
    optimizers = ("sgd", "adagrad", "sparse_adam", "ftrl")
    launch = None if plan == "both" else on_ranks  # None: processes of its own, to which the model is sent
    report = des.verify(model, stream(4), plans=(PLANS[plan],), optimizers=optimizers, launch=launch)
    assert report.cases == 4 and max(report.worst.values()) < 1e-10


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"user": nn.Embedding(20, 3, padding_idx=0), "tags": nn.EmbeddingBag(9, 3)})
        self.head = nn.Linear(6, 1)

    def forward(self, users, tags):
        return self.head(torch.cat([self.inner["user"](users), self.inner["tags"](tags)], 1)).squeeze(1)


def made_dynamic(rank, ranks):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    static = Plain()
    users, tags = torch.arange(8) + 5, torch.arange(24).reshape(8, 3) % 9
    with torch.no_grad():
        expected = static(users, tags)
    module = des.compile(static, (users, tags), dynamic={"user": {"admit": AfterSightings(2)}, "inner.tags": None})
    assert type(static.inner["user"]) is nn.Embedding and not module.plan.pieces["inner.user.weight"].is_replicated
    with torch.no_grad():
        torch.testing.assert_close(module(users, tags), expected, rtol=1e-12, atol=0)
    opt = torch.optim.Adagrad(module.parameters(), lr=0.1)
    new = users + (1 << 40) * (users > 9)
    for _ in range(3):
        module(new, tags).sum().backward()
        opt.step()
        opt.zero_grad()
    said = []
    for dynamic in ({"nobody": None}, {"head": None}):
        with pytest.raises(des.InputError) as error:
            des.compile(static, (users, tags), dynamic=dynamic)
        said.append(str(error.value))
    static.other = nn.Linear(3, 20)
    static.other.weight = static.inner["user"].weight
    with pytest.raises(des.UnsupportedError, match="untie"):
        des.compile(static, (users, tags), dynamic={"user": None})
    single = des.to_single(module)
    return said, None if single is None else single.inner["user"].resident().tolist()


@pytest.mark.long
def test_a_static_table_becomes_a_dynamic_one(on_ranks):
    (said, resident), _ = on_ranks(made_dynamic, 2)
    assert all("inner.user, inner.tags" in text for text in said), said
    assert resident == [*range(1, 20), *(x + (1 << 40) for x in (10, 11, 12))]


def full(rank, ranks, parts=None):
    """Train until the limit is met; then, in another job, go on from what each rank has, in a larger table."""
    torch.manual_seed(0)
    model = Clicks(max_rows=100 if parts is None else 130)
    module = des.compile(model, stream(0), plan=PLANS["row_wise"], loss="sum")
    opts = OPTIMIZERS["adagrad"](module)
    if parts is not None:
        step, mine = parts[rank]
        module.load_state_dict(mine)
        train_on(module, opts, [step], rank, ranks)
        return int(des.full_state_dict(module)["user.resident"].sum())
    for step in range(50):
        try:
            train_on(module, opts, [step], rank, ranks)
        except des.DescompilerError as error:
            return f"{type(error).__name__}: {error}", len(module.user), (step, module.state_dict())
    return None


@pytest.mark.long
def test_a_limit_of_rows_is_said_on_every_rank_and_nothing_is_lost(on_ranks):
    found = on_ranks(full, 2)
    assert sum("TableFullError" in said and "share of it" in said for said, *_ in found) >= 1, found
    assert all(said.startswith(("TableFullError", "RankError")) for said, *_ in found), found
    held, parts = sum(n for _, n, _ in found), [part for *_, part in found]
    assert 20 < held <= 100 and parts[0][0] == parts[1][0]
    assert all(held <= rows <= 130 for rows in on_ranks(full, 2, parts))

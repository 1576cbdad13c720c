"""What is done with a module that was captured in part and has dynamic tables: saved, fused, taken back, refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import descompiler as des
from descompiler.check.dynamic import gradient
from descompiler.dynamic import AfterSightings
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
from tests.harness.failures import raised


class Listed(Clicks):
    """Users' ids go through Python lists, which no tracer follows."""

    def forward(self, users, items, tags):
        return super().forward(torch.tensor(users.tolist(), dtype=torch.int64), items, tags)


class ListedInEvaluation(Clicks):
    def forward(self, users, items, tags):
        if not self.training:
            users = torch.tensor(users.tolist(), dtype=torch.int64)
        return super().forward(users, items, tags)


def compiled(cls=Listed, **options):
    """A model, and what it is compiled to; in float64."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    original = cls(**OPTIONS["sightings, lru"])
    return original, des.compile(copy.deepcopy(original), stream(0), loss="sum", **options)


def there_and_back(rank, ranks, folder):
    """Trained and saved, read again by modules of other kinds, and taken to one process."""
    original, module = compiled()
    assert module.coverage().rung == "partial"
    opts = trained(module, 6, rank, ranks)
    theirs = trained(original, 6)
    des.save(module, opts, f"{folder}/part", step=6)
    state = des.full_state_dict(module)
    other = Listed(**OPTIONS["sightings, lru"])
    other.load_state_dict(state)
    assert_same_tables(other, original)
    single = des.to_single(module)
    if rank == 0:
        assert type(single) is Listed
        assert_same_tables(single, original)
        trained(single, 1, first=11)
    train_on(original, theirs, range(6, 10), 0, 1)
    for cls, plan in ((Listed, module.plan), (Clicks, PLANS["row_wise"])):
        _, loaded = compiled(cls, plan=plan)
        opts = trained(loaded, 2, rank, ranks, first=20)  # what is there is replaced
        assert des.load(loaded, opts, f"{folder}/part")["step"] == 6
        train_on(loaded, opts, range(6, 10), rank, ranks)
        for name in ("user", "tags"):
            ids, rows = of_all_ranks(loaded, name)
            assert torch.equal(ids, original.get_submodule(name).resident())
            table = original.get_submodule(name)._table
            torch.testing.assert_close(rows, rows_of(table, ids), rtol=1e-10, atol=1e-12)
    increments = des.increments(module, None, f"{folder}/increments")
    increments.save()
    trained(module, 1, rank, ranks, first=30)
    increments.save(number=7)
    assert des.increments(module, None, f"{folder}/increments").load() == {"number": 7}
    des.load_full_state_dict(module, state)
    at_first = des.full_state_dict(module)
    assert all(torch.equal(x, at_first[n]) for n, x in state.items())
    mine = copy.deepcopy(module.state_dict())
    trained(module, 1, rank, ranks)
    module.load_state_dict(mine)
    assert all(torch.equal(x, state[n]) for n, x in des.full_state_dict(module).items())


@pytest.mark.long
def test_it_goes_in_and_out(on_ranks, tmp_path):
    on_ranks(there_and_back, 2, str(tmp_path))


def fused(rank, ranks):
    """Rows are updated in backward, twice with a gradient of other parameters alone in between."""
    original, module = compiled()
    tables = [original.user.weight, original.tags.weight]
    ordinary = [torch.optim.Adagrad(tables, lr=0.1), torch.optim.SGD([*original.head.parameters()], lr=0.1)]
    in_backward = des.fuse_optimizer(module, torch.optim.Adagrad, lr=0.1)
    assert {n for n, p in module.named_parameters() for q in in_backward.param_groups[0]["params"] if p is q} == {
        "user.weight",
        "tags.weight",
    }
    rest = torch.optim.SGD([*module.head.parameters()], lr=0.1)
    for step in range(12):
        for model, opts, share in ((module, [rest], (rank, ranks)), (original, ordinary, (0, 1))):
            train_on(model, opts, [step], *share)
    for name in ("user", "tags"):
        ids, rows = of_all_ranks(module, name)
        table = original.get_submodule(name)._table
        assert torch.equal(ids, table.resident()) and len(ids)
        torch.testing.assert_close(rows, rows_of(table, ids), rtol=1e-10, atol=1e-12)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("ranks", [2, 3])
def test_optimisers_step_in_backward(on_ranks, ranks):
    on_ranks(fused, ranks)


def used(rank, ranks):
    """What is said of each use that is none; gradients of those that are, also where rows have gone."""
    original, module = compiled()
    counts = shares(10, ranks)
    own = [x.split(counts)[rank] for x in stream(1)]
    weight, said = module.user.weight, {}

    def changed():
        """On one rank, what backward needs is changed before it."""
        loss = module(*own).sum()
        with torch.no_grad():
            module.head.weight.mul_(1 + rank)
        loss.backward()

    uses = {
        "grad": lambda: torch.autograd.grad(module(*own).sum(), [weight]),
        "inputs": lambda: module(*own).sum().backward(inputs=[weight, module.head.weight]),
        "call": lambda: module.user(torch.tensor([1])),
        "sum": lambda: weight.sum(),
        "copy": lambda: copy.deepcopy(module),
        "floats": lambda: module(own[0], own[1], own[2].double()),
        "changed": changed,
        "none": lambda: module(*own).sum().backward(inputs=[module.head.weight]),
    }
    first = copy.deepcopy(module.state_dict())
    for name, use in uses.items():
        said[name] = raised(use)
        assert weight.grad is None, name
        module.load_state_dict(first)
    assert module.head.weight.grad is not None
    module.zero_grad()
    # two forwards, and between their backwards a step after which rows of the first have gone
    called, tables = [], [[m.user.weight, m.tags.weight] for m in (module, original)]
    opts = [[torch.optim.SGD(rows, lr=0.05)] for rows in tables]
    weight.register_hook(lambda g: called.append(g._nnz()))
    for model, share in ((module, (rank, ranks)), (original, (0, 1))):
        trained(model, 3, *share, first=2)
    losses = [F.softplus(module(*(x.split(counts)[rank] for x in stream(4)))).sum()]
    losses.append(F.softplus(original(*stream(4))).sum())
    known = original.user.resident()
    for opt, model, share in zip(opts, (module, original), ((rank, ranks), (0, 1)), strict=True):
        train_on(model, opt, range(30, 34), *share)
    assert not torch.isin(known, original.user.resident()).all()
    for again in range(2):
        for loss in losses:
            loss.backward(retain_graph=not again)
    for name in ("user", "tags"):
        ids, mine = gradient(module.get_submodule(name))
        expected, theirs = gradient(original.get_submodule(name), module.get_submodule(name))
        assert torch.equal(ids, expected) and (len(ids) or name == "tags")
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert len(called) == 3 + 4 + 2
    return said


def test_what_rows_are_used_for(on_ranks):
    for said in on_ranks(used, 2):
        assert all("by itself" in said[x] for x in ("grad", "inputs")), said
        assert "outside of its forward" in said["call"] and "only lookups use them" in said["sum"], said
        assert "modified by an inplace operation" in said["changed"] and said["none"] == "nothing", said
        assert "can't be copied" in said["copy"] and "int64 or int32" in said["floats"], said


def full(rank, ranks):
    torch.manual_seed(0)
    module = des.compile(Listed(max_rows=100), stream(0), loss="sum")
    opts = OPTIMIZERS["adagrad"](module)
    for step in range(50):
        try:
            train_on(module, opts, [step], rank, ranks)
        except des.DescompilerError as error:
            return f"{type(error).__name__}: {error}", len(module.user), step
    return None


@pytest.mark.long
def test_a_limit_of_rows_is_said_on_every_rank(on_ranks):
    found = on_ranks(full, 2)
    assert sum("TableFullError" in said and "share of it" in said for said, *_ in found) >= 1, found
    assert all(said.startswith(("TableFullError", "RankError")) for said, *_ in found), found
    assert len({step for *_, step in found}) == 1 and all(rows <= 50 for _, rows, _ in found), found


def evaluated(rank, ranks):
    """Captured whole in training, in part in evaluation: there, owners are asked in any form that one of them has."""
    said = []
    for plan in ("row_wise", "both", "hot"):
        original, module = compiled(ListedInEvaluation, plan=PLANS[plan])
        assert module.coverage().rung != "partial"
        for model, share in ((module, (rank, ranks)), (original, (0, 1))):
            trained(model, 4, *share)
            model.eval()
        counts = shares(10, ranks)
        with torch.no_grad():
            try:
                got = module(*(x.split(counts)[rank] for x in stream(5)))
            except des.DescompilerError as error:
                said.append((plan, str(error)))
                continue
            torch.testing.assert_close(got, original(*stream(5)).split(counts)[rank], rtol=1e-10, atol=1e-12)
        for model, share in ((module, (rank, ranks)), (original, (0, 1))):
            trained(model.train(), 2, *share, first=6)
        for name in ("user", "tags"):
            ids, _ = of_all_ranks(module, name)
            assert torch.equal(ids, original.get_submodule(name).resident())
    return said


@pytest.mark.long
def test_training_flags_in_which_no_tracer_captures_it(on_ranks):
    for said in on_ranks(evaluated, 2):
        assert [plan for plan, _ in said] == ["hot"] and "every rank holds" in said[0][1], said


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(20, 3, mode="sum"), nn.Linear(3, 1)

    def forward(self, ids, offsets):
        return self.head(self.bags(ids, offsets)).squeeze(1)


def made_dynamic(rank, ranks):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    static = Plain()
    ids, offsets = torch.arange(12) % 20, torch.tensor([0, 3, 3, 8])
    module = des.compile(static, (ids, offsets), dynamic={"bags": {"admit": AfterSightings(2)}}, loss="sum")
    assert module.coverage().rung == "partial" and module.plan.forms == {"bags.weight": "unique_rows"}
    own = (ids[3 * rank :], offsets[: 2 + rank])
    with torch.no_grad():
        torch.testing.assert_close(module(*own), static(*own), rtol=1e-12, atol=0)
    opt = torch.optim.Adagrad(module.parameters(), lr=0.1)
    for _ in range(3):
        module((own[0] << 40) * (own[0] > 9) + own[0], own[1]).sum().backward()
        opt.step()
        opt.zero_grad()
    single = des.to_single(module)
    return None if single is None else single.bags.resident().tolist()


@pytest.mark.long
def test_a_static_bag_becomes_a_dynamic_one(on_ranks):
    resident, _ = on_ranks(made_dynamic, 2)
    assert resident == [*range(20), *((x << 40) + x for x in (10, 11))]

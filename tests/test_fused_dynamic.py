"""Dynamic tables that are updated in backward: rows, who is resident and what is kept are those of ordinary steps."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import descompiler as des
from descompiler.dynamic import TimeToLive
from descompiler.dynamic.by_id import take_out
from descompiler.dynamic.changes import Changes
from descompiler.dynamic.states import initial_of
from descompiler.module.fused import FusedOptimizer
from descompiler.module.updates import KINDS
from descompiler.runtime.gradients import add_gradient
from tests.harness.dynamic_ranks import (
    OPTIONS,
    PLANS,
    Clicks,
    assert_same_tables,
    of_all_ranks,
    rows_of,
    shares,
    stream,
    train_on,
)


class RowWise:
    """Adagrad with one number for each id, in plain Python, of one dynamic table."""

    def __init__(self, table):
        self.table, self.sums = table._table, {}

    def step(self):
        table, gradient = self.table, self.table.parameter.grad.coalesce()
        for slot, g in zip(gradient.indices()[0].tolist(), gradient.values(), strict=True):
            i = int(table.ids_of(torch.tensor([slot])))
            total = self.sums[i] = self.sums.get(i, 0.0) + float(g.square().mean())
            table.rows.tensor[slot] -= 0.1 * g / (math.sqrt(total) + 1e-3)
        table.parameter.grad = None
        table.end_step()
        self.sums = {i: self.sums[i] for i in table.resident().tolist() if i in self.sums}

    def zero_grad(self):
        pass


def of_tables(make):
    return lambda model: [make([model.user.weight, model.tags.weight])]


KIND = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}, of_tables(lambda p: torch.optim.SGD(p, lr=0.05))),
    "adagrad": (
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2},
        of_tables(lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2)),
    ),
    "adam": (torch.optim.Adam, {"lr": 0.05}, of_tables(lambda p: torch.optim.SparseAdam(p, lr=0.05))),
    "ftrl": (
        des.optim.FTRL,
        {"lr": 0.1, "l1": 0.02, "l2": 0.1, "maximize": True},
        of_tables(lambda p: des.optim.FTRL(p, lr=0.1, l1=0.02, l2=0.1, maximize=True)),
    ),
    "row-wise": (
        torch.optim.Adagrad,
        {"lr": 0.1, "eps": 1e-3, "row_wise": True},
        lambda model: [RowWise(model.user), RowWise(model.tags)],
    ),
}


def original(options, kind):
    """The model in one process, and its ordinary optimisers."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = Clicks(**OPTIONS[options])
    rest = [*model.head.parameters(), model.item.weight]
    return model, [*KIND[kind][2](model), torch.optim.SGD(rest, lr=0.02)]


def fused(options, kind, plan, with_item=False):
    """The model on ranks, its fused tables and the optimiser of the rest."""
    model, _ = original(options, kind)
    cls, given, _ = KIND[kind]
    module = des.compile(model, stream(0), plan={"item.weight": "replicate", **PLANS[plan]}, loss="sum")
    tables = [des.fuse_optimizer(module, cls, **given)]
    if with_item:
        tables.append(des.fuse_optimizer(module, torch.optim.SGD, params=[module.item.weight], lr=0.02))
    rest = [*module.head.parameters(), *([] if with_item else [module.item.weight])]
    return module, [*tables, torch.optim.SGD(rest, lr=0.02)]


def beside_the_original(rank, ranks, options, kind, plan, with_item, steps):
    module, mine = fused(options, kind, plan, with_item)
    model, theirs = original(options, kind)
    for step in range(steps):
        batch, counts = stream(step), shares(10, ranks)
        first = sum(counts[:rank])
        got = module(*(x[first : first + counts[rank]] for x in batch))
        expected = model(*batch)
        torch.testing.assert_close(got, expected[first : first + counts[rank]], rtol=1e-10, atol=1e-12)
        F.softplus(got).sum().backward()
        F.softplus(expected).sum().backward()
        assert module.traffic() == module.predicted_traffic()
        assert module.user.weight.grad is None and module.tags.weight.grad is None
        assert module.user.step == module.tags.step == step + 1
        for o in (*mine, *theirs):
            o.step()
            o.zero_grad()
    for name in ("user", "tags"):
        ids, rows = of_all_ranks(module, name)
        table = model.get_submodule(name)._table
        assert torch.equal(ids, table.resident()) and len(ids)
        torch.testing.assert_close(rows, rows_of(table, ids), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        des.full_state_dict(module)["item.weight"], model.item.weight.detach(), rtol=1e-10, atol=1e-12
    )


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    ("ranks", "options", "kind", "plan", "with_item"),
    [
        (1, "lfu", "adam", "row_wise", True),
        (2, "sightings, lru", "adagrad", "row_wise", True),
        (2, "by chance, time", "row-wise", "unique_rows", False),
        (2, "lfu", "sgd", "both", False),
        (3, "sightings, lru", "ftrl", "both", False),
        (3, "lfu", "adam", "unique_rows", False),
    ],
)
def test_trained_as_by_ordinary_steps(on_ranks, ranks, options, kind, plan, with_item):
    on_ranks(beside_the_original, ranks, options, kind, plan, with_item, 12)


class Bare(nn.Module):
    """Nothing but tables: the gradient of the dynamic one, pulled by its rows, is there before the static one's."""

    def __init__(self):
        super().__init__()
        self.item, self.user = nn.Embedding(50, 4), des.DynamicEmbedding(4, name="user", evict=TimeToLive(2))

    def forward(self, users, items, tags):
        return (self.item(items) * self.user(users)).sum(1)


def one_optimizer_of_all(rank, ranks):
    """A table whose whole gradient ranks average comes after all others, in the same backward: that is one step."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = Bare()
    module = des.compile(model, stream(0), plan={"item.weight": "replicate", "user.weight": "unique_rows"}, loss="sum")
    params = [module.item.weight, module.user.weight]
    tables = des.fuse_optimizer(module, torch.optim.Adagrad, params=params, lr=0.1)
    train_on(module, [tables], range(8), rank, ranks)
    train_on(model, [torch.optim.Adagrad(model.parameters(), lr=0.1)], range(8), 0, 1)
    assert module.user.step == model.user.step == 8
    ids, rows = of_all_ranks(module, "user")
    assert torch.equal(ids, model.user.resident())
    torch.testing.assert_close(rows, rows_of(model.user._table, ids), rtol=1e-10, atol=1e-12)
    item = des.full_state_dict(module)["item.weight"]
    torch.testing.assert_close(item, model.item.weight.detach(), rtol=1e-10, atol=1e-12)


def test_static_tables_in_the_same_optimizer(on_ranks):
    on_ranks(one_optimizer_of_all, 2)


def test_a_gradient_that_comes_when_all_others_are_applied_ends_no_step():
    """As an average of ranks may, at the end of the backward."""
    module = des.compile(Bare(), stream(0), plan=None, loss="sum")
    params, queue = [module.item.weight, module.user.weight], torch.autograd.Variable._execution_engine.queue_callback
    des.fuse_optimizer(module, torch.optim.SGD, params=params, lr=0.1)
    before = module.item.weight.detach().clone()
    late = torch.ones_like(before)
    outputs = module(*stream(0))
    outputs.register_hook(lambda g: queue(lambda: queue(lambda: add_gradient(module.item.weight, late))))
    outputs.sum().backward()
    assert module.user.step == 1
    untouched = [i for i in range(50) if i not in stream(0)[1].tolist()]
    torch.testing.assert_close(module.item.weight.detach()[untouched], before[untouched] - 0.1)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.user = des.DynamicEmbedding(3, name="user", evict=TimeToLive(2))
        self.item = des.DynamicEmbedding(3, name="item", evict=TimeToLive(2))

    def forward(self, users, items):
        return self.user(users).sum(1), self.item(items).sum(1)


def one_loss(rank, ranks):
    """Steps end for all tables of the optimiser with a backward that comes to one of them."""
    torch.set_default_dtype(torch.float64)
    module = des.compile(Two(), (torch.arange(6), torch.arange(6)), loss="sum")
    des.fuse_optimizer(module, torch.optim.SGD, lr=0.1)
    model = Two()
    ordinary = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        ids = torch.arange(6) + 3 * step
        of = slice(0, 2) if rank == 0 else slice(2, 6)
        which = 0 if step % 3 else 1
        module(ids[of] if ranks > 1 else ids, -ids[of] if ranks > 1 else -ids)[which].square().sum().backward()
        model(ids, -ids)[which].square().sum().backward()
        ordinary.step()
        ordinary.zero_grad()
    for name in ("user", "item"):
        ids, rows = of_all_ranks(module, name)
        table = model.get_submodule(name)._table
        assert torch.equal(ids, table.resident()) and table.residence.step == 6
        torch.testing.assert_close(rows, rows_of(table, ids), rtol=1e-10, atol=1e-12)
        assert module.get_submodule(name).step == 6


@pytest.mark.long(but=1)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_backward_that_comes_to_one_table_ends_the_step_of_all(on_ranks, ranks):
    on_ranks(one_loss, ranks)


def save(rank, ranks, path, kind, plan):
    module, opts = fused("lfu", kind, plan)
    train_on(module, opts, range(5), rank, ranks)
    des.save(module, opts, path, step=5)


def load_and_go_on(rank, ranks, path, kind, plan, again):
    module, opts = fused("lfu", kind, plan)
    opts[0].param_groups[0]["lr"] = 17.0  # the checkpoint has the options
    train_on(module, opts, range(2), rank, ranks)
    step = des.load(module, opts, path)["step"]
    train_on(module, opts, range(step, step + 4), rank, ranks)
    des.save(module, opts, again, step=step + 4)


def in_one_process(rank, ranks, path, kind):
    """The original loads it into an ordinary optimiser of the same state, and goes on as it never stopped."""
    model, opts = original("lfu", kind)
    step = des.load(model, opts, path)["step"]
    train_on(model, opts, range(step, 12), 0, 1)
    other, theirs = original("lfu", kind)
    train_on(other, theirs, range(12), 0, 1)
    assert_same_tables(model, other)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("kind", ["adagrad", "ftrl"])
def test_its_state_is_the_ordinary_ones(on_ranks, tmp_path, kind):
    on_ranks(save, 2, str(tmp_path / "0"), kind, "row_wise")
    on_ranks(load_and_go_on, 3, str(tmp_path / "0"), kind, "both", str(tmp_path / "1"))
    on_ranks(in_one_process, 1, str(tmp_path / "1"), kind)


def from_ordinary(rank, ranks, path):
    """One that never stepped, and that kept nothing yet, into a fused one."""
    model, opts = original("lfu", "adam")
    with torch.no_grad():
        model(*stream(0))
    model.user.end_step(), model.tags.end_step()
    des.save(model, opts, path)
    module, mine = fused("lfu", "adam", "both")
    train_on(module, mine, range(3), rank, ranks)
    des.load(module, mine, path)
    train_on(module, mine, range(1, 5), rank, ranks)
    train_on(model, opts, range(1, 5), 0, 1)
    assert_same_tables(module, model)


def test_a_state_that_has_not_begun_is_loaded(on_ranks, tmp_path):
    on_ranks(from_ordinary, 1, str(tmp_path / "0"))


def refusals(rank, ranks, folder):
    said = {}

    def says(name, use):
        try:
            use()
            said[name] = ""
        except des.DescompilerError as error:
            said[name] = str(error)

    module, (tables, rest) = fused("lfu", "row-wise", "row_wise")
    train_on(module, [tables, rest], range(2), rank, ranks)
    des.save(module, [tables, rest], folder)
    every = torch.optim.Adagrad(module.parameters(), lr=0.1)
    F.softplus(module(*stream(3))).sum().backward()
    says("another", every.step)
    says("twice", lambda: des.fuse_optimizer(module, torch.optim.SGD))
    says("kind", lambda: des.fuse_optimizer(module, torch.optim.RMSprop))
    tables.unfuse()
    full = des.fuse_optimizer(module, torch.optim.Adagrad, lr=0.1)
    says("kept", lambda: des.load(module, [full, rest], folder))
    full.unfuse()
    says("rate", lambda: des.fuse_optimizer(module, des.optim.FTRL, lr=0.0))
    rest.zero_grad()
    F.softplus(module(*stream(4))).sum().backward()
    before = module.user.step
    every.step()
    assert module.user.step == before + 1
    return said


def test_what_is_refused_by_name(on_ranks, tmp_path):
    for said in on_ranks(refusals, 2, str(tmp_path / "there")):
        assert "updated in backward already" in said["another"] and "unfuse()" in said["another"]
        assert "unfuse()" in said["twice"]
        assert "des.optim.FTRL" in said["kind"] and "torch.optim.SGD" in said["kind"]
        assert "saved with row-wise Adagrad, and is loaded with Adagrad" in said["kept"]
        assert "lr=0.0" in said["rate"]


def alone(kind, **options):
    """A dynamic table of one process, and an optimiser that updates it in backward."""
    table = des.DynamicEmbedding(2, dtype=torch.float64, **options)
    update = KINDS[kind]
    given = {**update.options, "lr": 0.1, "maximize": False}
    return table, FusedOptimizer([table.weight], given, update, False, [], None, {id(table.weight): table._table})


class Within(torch.autograd.Function):
    """Identity, whose backward makes other backwards."""

    @staticmethod
    def forward(ctx, x, act):
        ctx.act = act
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            ctx.act()
        return grad, None


def test_gradients_of_rows_that_went_meanwhile_are_nobodys():
    table, opt = alone(torch.optim.SGD, evict=TimeToLive(2))
    seen, other = torch.arange(4), torch.arange(10, 14)

    def act():
        for ids in (other, other, other, torch.arange(20, 24)):  # rows of `seen` go, and their slots are used anew
            table(ids).sum().backward()
            opt.step()

    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (Within.apply(x, act).sum() + table(seen).sum()).backward()
    assert table.resident().tolist() == [20, 21, 22, 23] and table.step == 5
    assert table._table.residence.free.end == 9  # slots were used anew
    again, opt_again = alone(torch.optim.SGD)
    again(torch.arange(20, 24)).sum().backward()
    ids = torch.arange(20, 24)
    assert opt_again.backend == "torch"
    with torch.no_grad():
        assert torch.equal(table.eval()(ids), again.eval()(ids))


def test_state_begins_anew_and_grows_in_its_place():
    table, opt = alone(torch.optim.Adagrad, evict=TimeToLive(1))
    places = set()
    for step in range(6):
        ids = torch.arange(600) + 300 * step
        (2 * table(ids)).sum().backward()
        slots = table._table.residence.find(table._table.keys(ids))
        total, there = opt.state[table.weight]["sum"], slots > 0
        steps = 1 + (torch.arange(600) < 300).double() * (step > 0)  # one of two steps each id is looked up in
        assert torch.equal(total[slots[there], 0], 4 * steps[there])
        assert len(total) > slots.max()
        places.add(total.data_ptr())
        free = torch.ones(len(table.weight), dtype=torch.bool)
        free[slots] = free[table._table.residence.resident()] = False
        assert not bool(table.weight[free].any())
    assert len(places) < 3 and float(opt.state[table.weight]["step"]) == 6
    assert initial_of(opt) == {"sum": 0.0}


def test_what_has_changed_is_known():
    table, opt = alone(torch.optim.Adagrad)
    table(torch.arange(8)).sum().backward()
    changes = Changes(table._table, seen=False)
    changes.forget()
    table(torch.tensor([3, 5, 3])).sum().backward()
    kept = take_out(table._table, opt)
    assert sorted(changes.update(kept.slices, opt).now.ids.tolist()) == [3, 5]
    assert kept.kept is not None and kept.kept.optimizer == "Adagrad" and not changes.everything
    with torch.no_grad():
        table.weight[1:].add_(1.0)  # by somebody else, in between; row 0 is the default row
    table(torch.tensor([3])).sum().backward()
    assert changes.everything

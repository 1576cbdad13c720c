"""Lookups of several tables as one operator: as the original; rows go to who updates them, and to nobody else."""

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.ops.local import FEW, MANY, SOME, lookup, put_rows, rows_at
from descompiler.ops.together import Mixed, lookups, one_table, stacked
from descompiler.runtime.border import Anchor
from tests.harness.cases import cases
from tests.harness.failures import raised

IDS = torch.randint(9, (8, 3), generator=torch.Generator().manual_seed(2))
IDS[0] = 4  # of every table, and the padding row of one


class Tables(nn.Module):
    """Three tables, one of which has a padding row, and one that is looked up twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Embedding(9, 2, sparse=True), nn.Embedding(20, 2, sparse=True)
        self.c = nn.Embedding(9, 2, sparse=True, padding_idx=4)
        self.top = nn.Linear(2, 1)

    def forward(self, ids):
        x, y, z = ids.unbind(1)
        return self.top((self.a(x) * self.b(y)).tanh() + self.c(z) * self.b(x))


def _as_one(tables):
    whole = torch.cat([t.detach() for t in tables])
    return [nn.Parameter(x) for x in whole.split([len(t) for t in tables])]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("alike", [False, True])
def test_values_and_gradients_are_those_of_each_lookup(together, alike):
    torch.manual_seed(0)
    tables = [nn.Parameter(torch.randn(n, 3, dtype=torch.float64)) for n in (4, 1, 6)]
    if together:
        tables = _as_one(tables)
        assert one_table(tables[::-1])[1] == [5, 4, 0]
    else:
        assert one_table(tables) is None
    shapes = [(4,)] * 3 if alike else [(4,), (2, 3), (0,)]
    ids = [torch.randint(len(t), s) for t, s in zip(tables, shapes, strict=True)]
    paddings = [-1, -1, 2]
    expected = [lookup(t, x, p, True) for t, x, p in zip(tables, ids, paddings, strict=True)]
    found = lookups(tables, ids, paddings)
    for e, f in zip(expected, found, strict=True):
        assert torch.equal(e, f)
    weights = [torch.randn_like(e) for e in expected]
    for chosen in ((0, 2), (0, 1, 2)):  # of what nobody reads there is no gradient
        grads = []
        for outputs in (expected, found):
            for t in tables:
                t.grad = None
            sum((outputs[i] * weights[i]).sum() for i in chosen).backward(retain_graph=True)
            grads.append([t.grad for t in tables])
        for e, f in zip(*grads, strict=True):
            assert (e is None) == (f is None)
            assert e is None or (f.is_sparse and torch.equal(e.to_dense(), f.to_dense()))
            assert e is None or (f.is_coalesced() and torch.equal(e.coalesce().indices(), f.indices()))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("shape", [(4,), (2, 3), (0,)])
@pytest.mark.parametrize("paddings", [[-1, -1, -1], [-1, -1, 2]])
def test_stacked_lookups_are_lookups_that_are_stacked(together, shape, paddings):
    torch.manual_seed(0)
    tables = [nn.Parameter(torch.randn(n, 3, dtype=torch.float64)) for n in (4, 1, 6)]
    tables = _as_one(tables) if together else tables
    tables[1].requires_grad_(shape != (2, 3))
    ids = [torch.randint(len(t), shape) for t in tables]
    grads = []
    for found in (torch.stack(lookups(tables, ids, paddings), 1), stacked(tables, ids, paddings)):
        for t in tables:
            t.grad = None
        (found * torch.arange(found.numel()).view(found.shape)).sum().backward()
        grads.append([found.detach(), *(t.grad if t.grad is None else t.grad.to_dense() for t in tables)])
    for e, f in zip(*grads, strict=True):
        assert f is e is None or torch.equal(e, f)


class Fields(nn.Module):
    """A table a field, of which two step otherwise than the third; results are stacked."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(9, 2, sparse=True) for _ in range(3))
        self.top = nn.Linear(2, 1)

    def forward(self, ids):
        return self.top(torch.stack([t(x) for t, x in zip(self.tables, ids.unbind(1), strict=True)], 1).prod(1))


def _of_fields(rank, ranks, form, ahead):
    example = IDS if ranks > 1 else IDS.int()
    module = des.compile(Fields(), (example,), plan={"*": form} if ranks > 1 else None, loss="sum")
    tables = [p for n, p in module.named_parameters() if n.startswith("tables")]
    options = {"lr": 0.5, "lr_decay": 0.3}
    fused = [des.fuse_optimizer(module, torch.optim.Adagrad, params=tables, **options)]
    fused[0].state[tables[0]]["step"] += ahead  # tables of one storage that have made other numbers of steps
    mine = IDS.tensor_split(ranks)[rank] if ranks > 1 else IDS.int()
    for _ in range(3):
        module(mine).sum().backward()
    count = sum(n.target is stacked for e in module._programs for n in e.module.graph.nodes)
    return count, des.full_state_dict(module)


@pytest.mark.parametrize(
    ("ranks", "form", "ahead"), [(1, "", 0), (1, "", 2), (2, "column_wise", 2), (2, "row_wise", 0)]
)
def test_stacked_tables_are_updated_as_in_one_process(ranks, form, ahead, on_ranks):
    model = Fields()
    optimizers = [torch.optim.Adagrad(t.parameters(), lr=0.5, lr_decay=0.3) for t in model.tables]
    optimizers[0].state[model.tables[0].weight]["step"] += ahead
    for _ in range(3):
        model.zero_grad()
        model(IDS).sum().backward()
        for o in optimizers:
            o.step()
    for count, weights in on_ranks(_of_fields, ranks, form, ahead):
        assert count == (form != "row_wise")
        for name, p in model.named_parameters():
            if name.startswith("tables"):
                torch.testing.assert_close(weights[name], p.detach())


class PutTogether(Fields):
    def __init__(self, put):
        super().__init__()
        self.put = put

    def forward(self, ids):
        found = self.put([t(x) for t, x in zip(self.tables, ids.unbind(1), strict=True)])
        return (found * torch.arange(found[0].numel()).view(found.shape[1:])).flatten(1).sum(1)


@pytest.mark.parametrize(
    "put",
    [
        lambda x: torch.stack(x, 1),
        lambda x: torch.stack(x[::-1], 1),
        lambda x: torch.stack(x, 2),
        lambda x: torch.stack([*x, x[0]], 1),
        lambda x: torch.stack(x[:2], 1) + x[2][:, None],
        lambda x: torch.stack(x, 1) * x[1][:, None],
    ],
)
def test_only_what_is_stacked_in_order_is_one(put):
    model = PutTogether(put)
    module = des.compile(model, (IDS,))
    torch.testing.assert_close(module(IDS), model(IDS))
    model(IDS).sum().backward()
    module(IDS).sum().backward()
    for t, u in zip(model.parameters(), module.parameters(), strict=True):
        assert t.grad is u.grad is None or torch.equal(t.grad.to_dense(), u.grad.to_dense())


def _grouped(module):
    return sum(n.target is lookups for e in module._programs for n in e.module.graph.nodes)


FETCHED = [(2, "unique_rows", hooked) for hooked in (False, True)]


def _asked(rank, ranks, form, hooked):
    module = des.compile(Tables(), (IDS,), plan={"*": form} if ranks > 1 else None, loss="sum")
    tables = des.fuse_optimizer(module, torch.optim.SGD, lr=0.5)
    rows, seen = IDS[rank::ranks], []
    before = des.full_state_dict(module)
    loss = module(rows).sum()
    said = None
    if ranks == 1:  # asked for, and not applied
        (asked,) = torch.autograd.grad(loss, module.a.weight, retain_graph=True)
        said = asked.to_dense()
    stands = all(torch.equal(before[n], x) for n, x in des.full_state_dict(module).items())
    if hooked:
        module.a.weight.register_hook(lambda g: seen.append(g.layout))
    came = []
    tables.came = lambda parts, came_as=tables.came: (came.append(len(parts)), came_as(parts))
    loss.backward()
    after, while_fused = des.full_state_dict(module), list(seen)
    tables.unfuse()
    for p in (module.a.weight, module.b.weight, module.c.weight):  # another's hook, as this optimiser's was
        p.register_post_accumulate_grad_hook(lambda p: None)
    module(rows).sum().backward()
    kept = [p.grad is not None for p in (module.a.weight, module.b.weight, module.c.weight)]
    return came, said, stands, while_fused, after, kept


@pytest.mark.parametrize(
    ("ranks", "form", "hooked"),
    cases(
        [(1, "", False), (1, "", True), (2, "table_wise", False), (2, "column_wise", True), *FETCHED],
        [(1, "", False), (1, "", True), (2, "table_wise", False), *FETCHED],
    ),
)
def test_gradients_are_where_they_are_waited_for(ranks, form, hooked, on_ranks):
    model = Tables()
    loss = model(IDS).sum()
    gradients = torch.autograd.grad(loss, [t.weight for t in (model.a, model.b, model.c)])
    for came, said, stands, seen, after, kept in on_ranks(_asked, ranks, form, hooked):
        assert stands
        if form != "table_wise":  # all four lookups at once, all fetched rows, or each table's gradient by itself
            assert came == ([1, 1, 1] if hooked else [1] if form == "unique_rows" else [4])
        assert said is None or torch.allclose(said, gradients[0].to_dense())
        assert seen == [torch.sparse_coo] * hooked or form == "table_wise"
        for name, g in zip("abc", gradients, strict=True):
            expected = getattr(model, name).weight.detach() - 0.5 * g.to_dense()
            torch.testing.assert_close(after[f"{name}.weight"], expected)
        assert form == "table_wise" or kept == [True] * 3


@pytest.mark.parametrize("chosen", [["a"], ["b", "c"], ["a", "b", "c"]])
def test_tables_that_are_fused_in_part_are_looked_up_with_the_others(chosen):
    """Those that are not have their gradients; and each has the rate that its optimiser has now."""
    model = Tables()
    module = des.compile(model, (IDS,))
    fused = des.fuse_optimizer(module, torch.optim.SGD, lr=9.0, params=[getattr(module, n).weight for n in chosen])
    for name in set("abc") - set(chosen):  # others may wait for theirs, as this optimiser does
        getattr(module, name).weight.register_post_accumulate_grad_hook(lambda p: None)
    fused.load_state_dict(fused.state_dict())  # which has groups of its own
    fused.param_groups[0]["lr"] = 0.5
    model(IDS).sum().backward()
    module(IDS).sum().backward()
    for name in "abc":
        found, expected = getattr(module, name).weight, getattr(model, name).weight
        if name in chosen:
            torch.testing.assert_close(found.detach(), expected.detach() - 0.5 * expected.grad.to_dense())
        else:
            torch.testing.assert_close(found.grad.to_dense(), expected.grad.to_dense())


OPTIMISERS = {
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1, eps=1e-3),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, 0.1, eps=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
}


def _by_torch(net, kind, batches):
    """Steps of an ordinary optimiser; the second is of two gradients. Whether gradients came coalesced."""
    tables, came = [t.weight for t in (net.a, net.b, net.c)], []
    optimisers = [OPTIMISERS[kind](tables), torch.optim.SGD(net.top.parameters(), 0.1)]
    for step, batch in enumerate(batches):
        net(batch).pow(2).sum().backward()
        came.append([p.grad is None or p.grad.is_coalesced() for p in tables])
        if step != 1:
            for o in optimisers:
                o.step()
                o.zero_grad()
    return came


def _trained(rank, ranks, form, kind):
    torch.set_default_dtype(torch.float64)
    module = des.compile(Tables(), (IDS,), plan={"*": form}, loss="sum")
    third = slice(3 * rank, 3 * rank + 3 if rank + 1 < ranks else 8)
    came = _by_torch(module, kind, [IDS[rank::ranks], IDS[: 8 * (rank == 0)], IDS[third], IDS[rank::ranks]])
    return came, des.full_state_dict(module), _grouped(module)


FORMS = (1, "replicate"), (2, "column_wise"), (2, "replicate"), (2, "unique_rows"), (3, "table_wise")
TRAINED = [(*form, kind) for kind in OPTIMISERS for form in FORMS]


@pytest.mark.parametrize(
    ("ranks", "form", "kind"),
    cases(
        TRAINED,
        [
            *((1, "replicate", "Adagrad"), (1, "replicate", "SGD"), (2, "column_wise", "SparseAdam")),
            (2, "unique_rows", "SparseAdam"),
        ],
    ),
)
def test_optimisers_find_sorted_gradients(ranks, form, kind, on_ranks):
    """And train as in one process, also of several backwards, and where a rank has no rows."""
    torch.set_default_dtype(torch.float64)
    model = Tables()
    torch.set_default_dtype(torch.float32)
    _by_torch(model, kind, [IDS] * 4)
    for came, after, grouped in on_ranks(_trained, ranks, form, kind):
        if form != "table_wise" and (ranks, form) != (2, "replicate"):  # gradients of each table, or dense ones
            assert bool(grouped) == (form != "unique_rows") and came[0] == came[3] == [True] * 3
        for name, x in model.state_dict().items():
            torch.testing.assert_close(after[name], x, rtol=1e-10, atol=1e-12)


def test_of_other_gradients_nothing_is_said():
    """A hook's, with as many rows, one of them twice."""
    module = des.compile(Tables(), (IDS,))

    def other(g):
        return torch.sparse_coo_tensor(g._indices() * 0, g._values(), g.shape)

    handle = module.a.weight.register_hook(other)
    module(IDS).sum().backward()
    handle.remove()
    assert [t.weight.grad.is_coalesced() for t in (module.a, module.b, module.c)] == [False, True, True]


class Vectors(nn.Module):
    """Outputs that are lookups, one as it is and one as a view."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(9, 2, sparse=True), nn.Embedding(9, 2, sparse=True)

    def forward(self, ids):
        return self.a(ids), self.b(ids).unsqueeze(1)


def test_outputs_that_are_lookups_may_be_changed_in_place():
    model = Vectors()
    module = des.compile(model, (IDS,))
    for net in (model, module):
        for x in net(IDS):
            x.mul_(2)
            x.sum().backward()
    for name in "ab":
        found, expected = (getattr(net, name).weight.grad.to_dense() for net in (module, model))
        assert torch.equal(found, expected)


def test_a_table_of_none_but_wrong_ids_is_not_its_neighbour():
    """Ids are looked at before, also where tables are one."""
    module = des.compile(Tables(), (IDS,))
    des.fuse_optimizer(module, torch.optim.SGD, lr=0.5)
    assert module(IDS).shape == (8, 1)
    wrong = IDS.clone()
    wrong[3, 0] = 9  # of the first table none, of the storage the first row of another
    assert _grouped(module) and "table 'a.weight'" in raised(lambda: module(wrong))


def test_parts_of_a_storage_that_are_no_rows_are_not_one():
    assert one_table([torch.zeros(4, 16), torch.zeros(4, 16)]) is None  # which begin a whole number of rows apart
    whole = torch.zeros(11)
    first, second = whole[:4].view(2, 2), whole[5:9].view(2, 2)
    assert one_table([first, second]) is None
    assert one_table([first, whole[4:8].view(2, 2)])[1] == [0, 2]


def test_a_table_without_rows_has_a_gradient_of_the_same_kind():
    table, anchor = torch.zeros(0, 4, requires_grad=True), torch.zeros((), requires_grad=True)
    Anchor.apply(anchor, [torch.sparse_coo], table).backward()
    assert (table.grad.sparse_dim(), table.grad.dense_dim(), table.grad.shape) == (1, 1, table.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(
    "shape, count", [((50, 16), MANY), ((50, 16), FEW), ((50, 1), MANY), ((50,), FEW), ((9, 2), 5), ((0, 3), 0)]
)
def test_rows_at_are_those_that_index_select_finds(dtype, shape, count):
    table, rows = (torch.randn(shape) * 9).to(dtype), torch.randint(max(shape[0], 1), (count,))
    assert torch.equal(rows_at(table, rows), table.index_select(0, rows))
    apart = table.new_empty((2, *shape)).copy_(table).transpose(0, 1)[:, 0]
    assert torch.equal(rows_at(apart.requires_grad_(dtype.is_floating_point), rows), table.index_select(0, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(50, 16), *((2 * SOME, *x) for x in ((16,), (1,), (), (2, 3), (0,))), (0, 3)])
def test_put_rows_are_where_index_copy_puts_them(dtype, shape):
    table = (torch.randn(shape) * 9).to(dtype)
    rows = torch.randperm(shape[0])[::2]
    values = (torch.randn(len(rows), *shape[1:]) * 9).to(dtype)
    expected, version = table.index_copy(0, rows, values), table._version
    apart = table.new_empty((2, *shape)).copy_(table).transpose(0, 1)[:, 0]
    for into in (table, apart):
        put_rows(into, rows, values)
        assert torch.equal(into, expected)
    assert table._version > version  # so that autograd sees it
    put_rows(table, rows[:0], values[:0])
    assert torch.equal(table, expected)


def test_rows_of_several_tables_are_each_tables():
    """In any order: as one table, in which each begins somewhere, and taken apart."""
    which, ids = torch.tensor([2, 0, 2, 1, 0]), torch.tensor([3, 1, 0, 5, 1])
    values = torch.arange(10.0).view(5, 2)
    mixed = Mixed("abc", which, ids, values)
    rows, gradients = mixed.flat([10, 20, 30])
    assert rows.tolist() == [33, 11, 30, 25, 11] and gradients is values
    parts = [mixed.of_table(i) for i in range(3)]
    assert [p.tables for p in parts] == [["a"], ["b"], ["c"]]
    assert [p.ids[:, 0].tolist() for p in parts] == [[1, 1], [5], [3, 0]]
    assert [p.gradients[:, 0].tolist() for p in parts] == [[[2, 3], [8, 9]], [[6, 7]], [[0, 1], [4, 5]]]

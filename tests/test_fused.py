"""Optimisers that step in backward: exact, of the rows that were looked up, and with a state that is saved."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import descompiler as des
from tests.harness.cases import cases
from tests.harness.failures import raised

IDS = torch.randint(20, (12, 4), generator=torch.Generator().manual_seed(1))
IDS[:, 1] = IDS[:, 0]  # each row is looked up twice, and by several ranks
IDS[0] = 3
COUNTS = (0, 12), (5, 7), (12, 0)


class Model(nn.Module):
    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item, self.top = nn.Embedding(40, 6, sparse=sparse), nn.Linear(6, 1)
        self.bag = nn.EmbeddingBag(40, 6, mode="mean", sparse=sparse)

    def forward(self, ids):
        return self.top((self.item(ids) + self.bag(ids)[:, None]).tanh().sum(1))


class RowWise(torch.optim.Optimizer):
    """Adagrad with one number for each row, in one process."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            g, state = p.grad.to_dense(), self.state[p]
            state["sum"] = state.get("sum", 0) + g.square().mean(1, keepdim=True)
            p.sub_(0.1 * g / (state["sum"].sqrt() + 1e-3))


SPARSE_ADAM = "Adam of the rows"
KINDS = {
    "SGD": (torch.optim.SGD, lambda p: torch.optim.SGD(p, 0.1), {"lr": 0.1}),
    "Adagrad": (
        torch.optim.Adagrad,
        lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.1, initial_accumulator_value=0.2, eps=1e-3),
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3},
    ),
    "Adam": (torch.optim.Adam, lambda p: torch.optim.SparseAdam(p, 0.1, eps=1e-3), {"lr": 0.1, "eps": 1e-3}),
    SPARSE_ADAM: (torch.optim.SparseAdam, lambda p: torch.optim.SparseAdam(p, 0.1, eps=1e-3), {"lr": 0.1, "eps": 1e-3}),
    "row-wise": (torch.optim.Adagrad, RowWise, {"lr": 0.1, "eps": 1e-3, "row_wise": True}),
    "FTRL": (
        des.optim.FTRL,
        lambda p: des.optim.FTRL(p, 0.3, l1=0.05, l2=0.1, maximize=True),
        {"lr": 0.3, "l1": 0.05, "l2": 0.1, "maximize": True},
    ),
}


def fused(kind, form, in_place=False, sparse=True):
    """The model, its fused tables, and an optimiser of the rest."""
    torch.set_default_dtype(torch.float64)
    cls, _, options = KINDS[kind]
    module = des.compile(Model(sparse), (IDS,), plan={"*": form}, loss="sum", in_place=in_place)
    params = None if sparse else [module.item.weight, module.bag.weight]
    return (
        module,
        des.fuse_optimizer(module, cls, params=params, **options),
        torch.optim.SGD(module.top.parameters(), 0.1),
    )


def own(rank, ranks, step):
    if ranks == 2:
        counts = COUNTS[step % len(COUNTS)]
        return slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    return slice(12 * rank // ranks, 12 * (rank + 1) // ranks)


def train(module, rest, rank, ranks, steps):
    for step in steps:
        rest.zero_grad()
        module(IDS[own(rank, ranks, step)]).pow(2).sum().backward()
        rest.step()
        kept = [n for n, p in module.named_parameters() if p.grad is not None]
        assert kept == ["top.weight", "top.bias"]


def in_one_process(kind, steps, sparse=True):
    torch.set_default_dtype(torch.float64)
    try:
        model = Model(sparse)
        tables = KINDS[kind][1]([model.item.weight, model.bag.weight])
        rest = torch.optim.SGD(model.top.parameters(), 0.1)
        for _ in range(steps):
            for o in (tables, rest):
                o.zero_grad()
            model(IDS).pow(2).sum().backward()
            for o in (tables, rest):
                o.step()
        return model.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)


def _trained(rank, ranks, kind, form, in_place, sparse=True):
    module, _, rest = fused(kind, form, in_place, sparse)
    train(module, rest, rank, ranks, range(4))
    sent = [module.traffic() == module.predicted_traffic()] if not in_place else []
    return des.full_state_dict(module), sent


FUSED = [
    *itertools.product(KINDS, [("row_wise", False), ("hot_rows", True), ("replicate", False)]),
    *itertools.product(KINDS, [("unique_rows", False)]),
]


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("kind", "how"), cases(FUSED, FUSED[::2]))
def test_rows_are_updated_as_in_one_process(kind, how, on_ranks):
    form, in_place = how
    expected = in_one_process(kind, 4)
    for state, _ in on_ranks(_trained, 2, kind, form, in_place):
        for name, x in expected.items():
            torch.testing.assert_close(state[name], x, rtol=1e-10, atol=1e-12)


TABLES = [
    *itertools.product(
        ("SGD", "Adagrad", "row-wise", "FTRL", SPARSE_ADAM), ("row_wise", "hot_rows", "unique_rows"), (2,)
    ),
    *itertools.product(("SGD", "Adagrad", "row-wise", "FTRL"), ("replicate", "table_wise"), (2,)),
    *itertools.product(("SGD", "Adagrad", "FTRL", SPARSE_ADAM), ("column_wise", "sparse_all_gather"), (2,)),
    *itertools.product(KINDS.keys() - {"Adam"}, ("replicate",), (1,)),
]
DENSE = [  # in place, whole tables are averaged
    (*c, i) for c in TABLES for i in (False, True) if not i or c[:2] != (SPARSE_ADAM, "sparse_all_gather")
]
DENSE_ALWAYS = [
    ("row-wise", "row_wise", 2, False),
    ("FTRL", "replicate", 2, False),
    ("Adagrad", "replicate", 2, True),
    ("SGD", "column_wise", 2, False),
    (SPARSE_ADAM, "hot_rows", 2, True),
]


@pytest.mark.parametrize(("kind", "form", "ranks", "in_place"), cases(DENSE, DENSE_ALWAYS))
def test_rows_of_dense_tables_are_updated_as_in_one_process(kind, form, ranks, in_place, on_ranks):
    expected = in_one_process(kind, 4, sparse=kind == SPARSE_ADAM)
    for state, sent in on_ranks(_trained, ranks, kind, form, in_place, False):
        assert all(sent)
        for name, x in expected.items():
            torch.testing.assert_close(state[name], x, rtol=1e-10, atol=1e-12)


class Sizes(TorchDispatchMode):
    """The most elements of a tensor that is made meanwhile, and is none of some."""

    def __init__(self, known):
        super().__init__()
        self.most, self.known = 0, {x.untyped_storage().data_ptr() for x in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(made):
            strided = isinstance(x, torch.Tensor) and x.layout is torch.strided
            if strided and x.untyped_storage().data_ptr() not in self.known:
                self.most = max(self.most, x.numel())
        return made


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.item, self.top = nn.Embedding(5000, 6), nn.Linear(6, 1)

    def forward(self, ids):
        return self.top(self.item(ids).sum(1))


def _no_gradient_of_its_size(rank, ranks, form):
    """The most elements of a tensor that a backward makes, and where the gradient was seen by a hook."""
    module = des.compile(Wide(), (IDS,), plan={"*": form})
    kinds = []
    module.item.weight.register_hook(lambda g: kinds.append(g.layout))
    tables = weakref.ref(des.fuse_optimizer(module, torch.optim.Adagrad, params=[module.item.weight]))
    twice = raised(lambda: des.fuse_optimizer(module, torch.optim.SGD, params=[module.item.weight]))
    gc.collect()  # the module keeps the optimiser
    loss = module(IDS).sum()
    state = tables().state[module.item.weight]["sum"]
    with Sizes([des.local_tensor(x) for x in (module.item.weight, state)]) as sizes:
        loss.backward()
    copied = copy.deepcopy(module)
    copied(IDS).sum().backward()
    return sizes.most, kinds, copied.item.weight.grad.layout, module.item.weight.grad, twice


@pytest.mark.parametrize("form", ["row_wise", "column_wise", "unique_rows"])
def test_no_gradient_of_a_table_is_made(form, on_ranks):
    for most, kinds, of_copy, kept, twice in on_ranks(_no_gradient_of_its_size, 2, form):
        assert most < 2000 and kinds == [torch.sparse_coo] and of_copy is torch.sparse_coo and kept is None
        assert "'item.weight' is updated in backward already: unfuse() that optimiser first" in twice


def _saved(rank, ranks, kind, form, path, is_first):
    module, tables, rest = fused(kind, form)
    if is_first:
        train(module, rest, rank, ranks, range(2))
        des.save(module, [tables, rest], path)
        return None
    des.load(module, [tables, rest], path)
    train(module, rest, rank, ranks, range(2, 4))
    return des.full_state_dict(module)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("kind", ["Adam", "row-wise"])
def test_its_state_is_in_checkpoints(kind, on_ranks, tmp_path):
    on_ranks(_saved, 2, kind, "row_wise", tmp_path / "c", True)
    expected = in_one_process(kind, 4)
    for state in on_ranks(_saved, 3, kind, "unique_rows", tmp_path / "c", False):
        for name, x in expected.items():
            torch.testing.assert_close(state[name], x, rtol=1e-10, atol=1e-12)


class Several(nn.Module):
    """Tables of one width, one with fewer rows than ranks, some not used in each step; and two of other widths."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(n, 4, sparse=True) for n in (30, 1, 17, 40))
        self.wide = nn.Embedding(30, 5, sparse=True)
        self.narrow = nn.Embedding(30, 3, sparse=True)
        self.top = nn.Linear(12, 1)

    def forward(self, ids, weights):
        vectors = sum(w * t(ids % t.num_embeddings) for t, w in zip(self.tables, weights.unbind(1), strict=True))
        return self.top(torch.cat([vectors.tanh(), self.wide(ids % 30), self.narrow((ids + 7) % 30)], -1)).sum(1)


WEIGHTS = torch.ones(12, 4, dtype=torch.float64)


def _several(step):
    """Without a loss of some tables in some steps: their rows have gradients of 0, or none."""
    return WEIGHTS * (torch.arange(4) != step % 4)


def _double_states(optimizer):
    """Load other states."""
    saved = copy.deepcopy(optimizer.state_dict())
    for states in saved["state"].values():
        for name in states.keys() - {"step"}:
            states[name].mul_(2)
    optimizer.load_state_dict(saved)


def _parts_of_one_storage(rank, ranks, kind, form):
    torch.set_default_dtype(torch.float64)
    cls, _, options = KINDS[kind]
    module = des.compile(Several(), (IDS, WEIGHTS[:, :, None, None]), plan={"*": form}, loss="sum")
    tables = des.fuse_optimizer(module, cls, **options)
    rest = torch.optim.SGD(module.top.parameters(), 0.1)
    moved = []
    for step in range(6):
        before = [des.local_tensor(p) for p in module.parameters()]  # held, so that nothing else comes to lie there
        at = [x.data_ptr() for x in before]
        if step == 3:  # states that are loaded, and a table that is put elsewhere
            tables.load_state_dict(copy.deepcopy(tables.state_dict()))
            for p in module.tables.parameters():
                p.data = p.data.clone()
        if step == 4:
            _double_states(tables)
        rows = own(rank, ranks, step)
        rest.zero_grad()
        module(IDS[rows], _several(step)[rows][:, :, None, None]).pow(2).sum().backward()
        rest.step()
        moved.append(at != [des.local_tensor(p).data_ptr() for p in module.parameters()])
    parts = [des.local_tensor(p) for p in module.tables.parameters() if len(des.local_tensor(p))]
    parts += [des.local_tensor(tables.state[p]["sum"]) for p in module.tables.parameters() if kind == "Adagrad"]
    return des.full_state_dict(module), moved, len({x.untyped_storage().data_ptr() for x in parts if x.numel()})


@pytest.mark.parametrize(
    ("kind", "form"),
    cases(
        itertools.product(("Adagrad", "Adam", "SGD"), ("row_wise", "table_wise")),
        [("Adagrad", "row_wise"), ("Adam", "table_wise")],
    ),
)
def test_tables_of_one_width_are_updated_as_one(kind, form, on_ranks):
    torch.set_default_dtype(torch.float64)
    model = Several()
    torch.set_default_dtype(torch.float32)
    rest = torch.optim.SGD(model.top.parameters(), 0.1)
    tables = KINDS[kind][1]([p for n, p in model.named_parameters() if "top" not in n])
    for step in range(6):
        if step == 4:
            _double_states(tables)
        model.zero_grad()
        model(IDS, _several(step)[:, :, None, None]).pow(2).sum().backward()
        tables.step()
        rest.step()
    for state, moved, storages in on_ranks(_parts_of_one_storage, 2, kind, form):
        assert moved[:4] == [False] * 3 + [True] and not moved[5]  # only when something else has moved them, or states
        assert storages == 1 + (kind == "Adagrad")
        for name, x in model.state_dict().items():
            torch.testing.assert_close(state[name], x, rtol=1e-10, atol=1e-12)


def _fails_once(rank, ranks):
    module, tables, _ = fused("Adagrad", "row_wise")
    loss = module(IDS).pow(2).sum()
    came = []

    def fails(gradient):
        came.append(gradient)
        if len(came) == 2:  # the other table's is there
            raise RuntimeError("once")

    before = des.full_state_dict(module)
    handles = [t.weight.register_hook(fails) for t in (module.item, module.bag)]
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
    after = des.full_state_dict(module)
    for handle in handles:
        handle.remove()
    module(IDS).pow(2).sum().backward()
    more = raised(lambda: tables.add_param_group({"params": [module.top.weight]}))
    return all(torch.equal(before[n], x) for n, x in after.items()), des.full_state_dict(module), more


def test_a_backward_that_fails_updates_nothing(on_ranks):
    expected = in_one_process("Adagrad", 0)
    torch.set_default_dtype(torch.float64)
    model = Model()
    torch.set_default_dtype(torch.float32)
    tables = KINDS["Adagrad"][1]([model.item.weight, model.bag.weight])
    (2 * model(IDS).pow(2).sum()).backward()
    tables.step()
    for stands, state, more in on_ranks(_fails_once, 2):
        assert stands
        assert "fuse_optimizer(module, kind, params=[...]) fuses further tables" in more
        torch.testing.assert_close(state["item.weight"], model.item.weight.detach(), rtol=1e-10, atol=1e-12)
        assert not torch.equal(state["item.weight"], expected["item.weight"])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.item = nn.Embedding(40, 6)

    def forward(self, ids):
        return self.item(ids).sum(1) @ self.item.weight.t()


class Largest(nn.Module):
    """The maximum over bags; and, of another table, a penalty beside the lookups."""

    def __init__(self):
        super().__init__()
        self.bag, self.item = nn.EmbeddingBag(40, 6, mode="max"), nn.Embedding(40, 6)

    def forward(self, ids):
        return (self.bag(ids) + self.item(ids).sum(1)).square().sum(1) + self.item.weight.square().sum()


def _not_by_rows(rank, ranks, form):
    module = des.compile(Largest(), (IDS,), plan={"*": form})
    found = [
        raised(lambda p=p: des.fuse_optimizer(module, torch.optim.SGD, params=[p]))
        for p in (module.bag.weight, module.item.weight)
    ]
    module(IDS).sum().backward()  # as before
    return found, module.bag.weight.grad.layout


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_has_no_gradient_of_rows_is_refused(ranks, on_ranks):
    for (largest, penalty), layout in on_ranks(_not_by_rows, ranks, "unique_rows"):
        assert "UnsupportedError" in largest and "has no sparse gradient: mode='sum' or 'mean'" in largest
        assert "UnsupportedError" in penalty or (ranks == 1 and penalty == "nothing")
        assert layout is torch.strided


def _refused(rank, ranks):
    module = des.compile(Model(), (IDS,), plan={"*": "column_wise"})
    dense = des.compile(nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 1)), (IDS % 9,), plan={"*": "replicate"})
    weight = dense.get_parameter("0.weight")
    tied = des.compile(Tied(), (IDS,), plan={"*": "row_wise"})
    return [
        raised(lambda: des.fuse_optimizer(module, torch.optim.RMSprop)),
        raised(lambda: des.fuse_optimizer(module, torch.optim.SGD, momentum=0.9)),
        raised(lambda: des.fuse_optimizer(module, torch.optim.SGD, row_wise=True)),
        raised(lambda: des.fuse_optimizer(module, torch.optim.Adagrad, row_wise=True)),
        raised(lambda: des.fuse_optimizer(module, torch.optim.SGD, params=[module.top.weight])),
        raised(lambda: des.fuse_optimizer(module, torch.optim.SGD, params=[nn.Parameter(torch.zeros(3))])),
        raised(lambda: des.fuse_optimizer(dense, torch.optim.SGD)),
        raised(lambda: des.fuse_optimizer(dense, torch.optim.Adam, params=[weight])),
        raised(lambda: des.fuse_optimizer(dense, torch.optim.SparseAdam, params=[weight])),
        raised(lambda: des.fuse_optimizer(tied, torch.optim.SGD, params=[tied.item.weight])),
    ]


def test_what_can_not_be_fused_is_refused(on_ranks):
    for other, option, rows, columns, layer, stranger, dense, adam, averaged, tied in on_ranks(_refused, 2):
        assert "'RMSprop' is none of torch.optim.SGD, torch.optim.Adagrad" in other
        assert "it takes lr, maximize, not momentum" in option
        assert (
            "one number for each row is Adagrad's" in rows
            and "holds some columns: a row's mean is on no rank" in columns
        )
        assert "'top.weight' is no table that is looked up" in layer
        assert "moves rows that were not looked up" in adam and "torch.optim.SparseAdam leaves them alone" in adam
        assert "every rank holds '0.weight' whole" in averaged and "is used beside its lookups" in tied
        assert "of shape (3,) is no parameter of the module" in stranger and "no table with sparse gradients" in dense

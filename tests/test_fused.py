"""Optimisers that step in backward: exact, of the rows that were looked up, and with a state that is saved."""

import pytest
import torch
from torch import nn

import descompiler as des
from tests.harness.failures import raised

IDS = torch.randint(20, (12, 4), generator=torch.Generator().manual_seed(1))
IDS[:, 1] = IDS[:, 0]  # each row is looked up twice, and by several ranks
IDS[0] = 3
COUNTS = (0, 12), (5, 7), (12, 0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item, self.top = nn.Embedding(40, 6, sparse=True), nn.Linear(6, 1)
        self.bag = nn.EmbeddingBag(40, 6, mode="mean", sparse=True)

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


KINDS = {
    "SGD": (torch.optim.SGD, lambda p: torch.optim.SGD(p, 0.1), {"lr": 0.1}),
    "Adagrad": (
        torch.optim.Adagrad,
        lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.1, initial_accumulator_value=0.2, eps=1e-3),
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3},
    ),
    "Adam": (torch.optim.Adam, lambda p: torch.optim.SparseAdam(p, 0.1, eps=1e-3), {"lr": 0.1, "eps": 1e-3}),
    "row-wise": (torch.optim.Adagrad, RowWise, {"lr": 0.1, "eps": 1e-3, "row_wise": True}),
}


def fused(kind, form, in_place=False):
    """The model, its fused tables, and an optimiser of the rest."""
    torch.set_default_dtype(torch.float64)
    cls, _, options = KINDS[kind]
    module = des.compile(Model(), (IDS,), plan={"*": form}, loss="sum", in_place=in_place)
    return module, des.fuse_optimizer(module, cls, **options), torch.optim.SGD(module.top.parameters(), 0.1)


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


def in_one_process(kind, steps):
    torch.set_default_dtype(torch.float64)
    try:
        model = Model()
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


def _trained(rank, ranks, kind, form, in_place):
    module, _, rest = fused(kind, form, in_place)
    train(module, rest, rank, ranks, range(4))
    return des.full_state_dict(module)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("form", "in_place"), [("row_wise", False), ("hot_rows", True), ("replicate", False)])
def test_rows_are_updated_as_in_one_process(kind, form, in_place, on_ranks):
    expected = in_one_process(kind, 4)
    for state in on_ranks(_trained, 2, kind, form, in_place):
        for name, x in expected.items():
            torch.testing.assert_close(state[name], x, rtol=1e-10, atol=1e-12)


def _saved(rank, ranks, kind, form, path, is_first):
    module, tables, rest = fused(kind, form)
    if is_first:
        train(module, rest, rank, ranks, range(2))
        des.save(module, [tables, rest], path)
        return None
    des.load(module, [tables, rest], path)
    train(module, rest, rank, ranks, range(2, 4))
    return des.full_state_dict(module)


@pytest.mark.parametrize("kind", ["Adam", "row-wise"])
def test_its_state_is_in_checkpoints(kind, on_ranks, tmp_path):
    on_ranks(_saved, 2, kind, "row_wise", tmp_path / "c", True)
    expected = in_one_process(kind, 4)
    for state in on_ranks(_saved, 3, kind, "unique_rows", tmp_path / "c", False):
        for name, x in expected.items():
            torch.testing.assert_close(state[name], x, rtol=1e-10, atol=1e-12)


def _refused(rank, ranks):
    module = des.compile(Model(), (IDS,), plan={"*": "column_wise"})
    dense = des.compile(nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 1)), (IDS % 9,))
    return [
        raised(lambda: des.fuse_optimizer(module, torch.optim.RMSprop)),
        raised(lambda: des.fuse_optimizer(module, torch.optim.SGD, momentum=0.9)),
        raised(lambda: des.fuse_optimizer(module, torch.optim.SGD, row_wise=True)),
        raised(lambda: des.fuse_optimizer(module, torch.optim.Adagrad, row_wise=True)),
        raised(lambda: des.fuse_optimizer(module, torch.optim.SGD, params=[module.top.weight])),
        raised(lambda: des.fuse_optimizer(module, torch.optim.SGD, params=[nn.Parameter(torch.zeros(3))])),
        raised(lambda: des.fuse_optimizer(dense, torch.optim.SGD)),
    ]


def test_what_can_not_be_fused_is_refused(on_ranks):
    for other, option, rows, columns, layer, stranger, dense in on_ranks(_refused, 2):
        assert "'RMSprop' is none of torch.optim.SGD, torch.optim.Adagrad" in other
        assert "it takes lr, maximize, not momentum" in option
        assert (
            "one number for each row is Adagrad's" in rows
            and "holds some columns: a row's mean is on no rank" in columns
        )
        assert "gradients of 'top.weight' are not sparse: make the table with sparse=True" in layer
        assert "of shape (3,) is no parameter of the module" in stranger and "no table with sparse gradients" in dense

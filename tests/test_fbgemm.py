"""FBGEMM's kernel under `fuse_optimizer`: PyTorch's numbers to rounding, in the same tensors, or PyTorch's own."""

import importlib

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.module import fbgemm
from descompiler.module.updates import KINDS, Step
from descompiler.ops.together import summed
from tests.harness.cases import cases
from tests.harness.failures import raised

pytestmark = pytest.mark.skipif(fbgemm.lacks() is not None, reason=fbgemm.lacks() or "")

IDS = torch.randint(20, (12, 4), generator=torch.Generator().manual_seed(1))
IDS[:, 1] = IDS[:, 0]  # each row is looked up twice, and by several ranks
IDS[0] = 3
OPTIONS = {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3}


def _step(width, ids=300, dtype=torch.float32, rows=40):
    g = torch.Generator().manual_seed(width)
    table, total = torch.randn(rows, width, generator=g), torch.rand(rows, width, generator=g)
    of = torch.randint(rows, (ids,), generator=g), torch.randn(ids, width, generator=g)
    options = {"lr": 0.1, "eps": 1e-3, "lr_decay": 0.1}
    return Step(table.to(dtype), of[0], of[1].to(dtype), [total.to(dtype)], 3.0, options)


def _torch(s):
    """The step in float64, by the operators that are compared with torch.optim elsewhere."""
    s = Step(s.table.double(), s.rows, s.gradient.double(), [x.double() for x in s.states], s.number, s.options)
    s.rows, s.gradient = summed(s.rows, s.gradient, [])
    KINDS[torch.optim.Adagrad].of(s)
    return s.table, s.states[0]


def _expanded(s):
    s.gradient = s.gradient[:1].expand(len(s.rows), -1)


def _ids_of_32_bits(s):
    s.rows = s.rows.int()


def _ids_between_others(s):
    s.rows = s.rows.repeat_interleave(2)[::2]


@pytest.mark.parametrize("change", [None, _expanded, _ids_of_32_bits, _ids_between_others])
@pytest.mark.parametrize("width", [1, 3, 16])
def test_rows_that_are_there_several_times_move_once(width, change):
    s = _step(width)
    if change is not None:
        change(s)
    table, total = _torch(s)
    at = s.table.data_ptr(), s.states[0].data_ptr()
    assert fbgemm.adagrad(s)
    assert at == (s.table.data_ptr(), s.states[0].data_ptr())
    torch.testing.assert_close(s.table.double(), table, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s.states[0].double(), total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"ids": 0},
        {"width": fbgemm.MOST_COLUMNS + 1, "rows": 2},
        {"states": lambda s: s.states[0][:, :1].clone()},
        {"states": lambda s: s.states[0].t().contiguous().t()},
        {"states": lambda s: s.states[0].double()},
        {"table": lambda s: s.table.t().contiguous().t()},
        {"table": lambda s: torch.empty(fbgemm.MOST_ROWS + 1, 4, device="meta")},
    ],
)
def test_what_it_can_not_do_is_left_alone(change):
    s = _step(change.pop("width", 4), **{k: v for k, v in change.items() if not callable(v)})
    if "states" in change:
        s.states = [change["states"](s)]
    if "table" in change:
        s.table = change["table"](s)
    before = [x.clone() for x in (s.table, *s.states)]
    assert not fbgemm.adagrad(s)
    assert all(x.is_meta or torch.equal(x, y) for x, y in zip((s.table, *s.states), before, strict=True))


def test_a_release_with_another_operator_is_not_called(monkeypatch):
    def lacks():
        return fbgemm.lacks.__wrapped__()

    assert lacks() is None
    with monkeypatch.context() as patch:
        patch.setattr(fbgemm, "ARGUMENTS", fbgemm.ARGUMENTS[1:])
        assert "has another split_embedding_backward_codegen_adagrad_cpu" in lacks()
    with monkeypatch.context() as patch:
        patch.setattr(fbgemm, "OPERATOR", "of_tomorrow")
        assert "has another of_tomorrow" in lacks()

    def fails(name):
        raise OSError(f"{name}: undefined symbol")

    monkeypatch.setattr(importlib, "import_module", fails)
    assert lacks() == "FBGEMM can't be imported (fbgemm_gpu: undefined symbol): pip install descompiler[fbgemm]"


class Model(nn.Module):
    """Two tables of a storage, one of them with fewer rows than ranks; one of another width, and one in bags."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.item, self.one = nn.Embedding(40, 6, sparse=True), nn.Embedding(1, 6, sparse=True)
        self.linear, self.bag = nn.Embedding(40, 1, sparse=True), nn.EmbeddingBag(40, 6, mode="mean", sparse=True)
        self.top = nn.Linear(6, 1)

    def forward(self, ids):
        vectors = self.item(ids) + self.one(ids * 0) + self.bag(ids)[:, None]
        return (self.top(vectors.tanh()) + self.linear(ids)).sum(1)


def _own(rank, ranks, step):
    """Of the rows of all; of two ranks one has none in the first and third step."""
    ends = {1: (0, 12), 2: ((0, 0, 12), (0, 5, 12), (0, 12, 12))[step % 3], 3: (0, 1, 6, 12)}[ranks]
    return slice(ends[rank], ends[rank + 1])


def _trained(rank, ranks, form, dtype, backend):
    torch.set_default_dtype(dtype)
    module = des.compile(Model(), (IDS,), plan={"*": form}, loss="sum")
    tables = des.fuse_optimizer(module, torch.optim.Adagrad, backend=backend, **OPTIONS)
    rest = torch.optim.SGD(module.top.parameters(), 1e-3)
    made = []
    kernel = tables._kernel
    if kernel is not None:
        tables._kernel = lambda s: made.append((kernel(s), len(s.rows) > 0)) or made[-1][0]
    places = [[p.data_ptr() for p in module.parameters()]]
    for step in range(4):
        rest.zero_grad()
        module(IDS[_own(rank, ranks, step)]).pow(2).sum().backward()
        rest.step()
        places.append([p.data_ptr() for p in module.parameters()])
    sums = {n: des.local_tensor(tables.state[p]["sum"]) for n, p in module.named_parameters() if p in tables.state}
    return des.full_state_dict(module), sums, tables.backend, made, all(x == places[0] for x in places)


def _in_one_process(dtype):
    """Computed in float64, whatever it begins with."""
    torch.set_default_dtype(dtype)
    model = Model().double()
    torch.set_default_dtype(torch.float32)
    of = [p for n, p in model.named_parameters() if "top" not in n]
    optimizers = [torch.optim.Adagrad(of, **OPTIONS), torch.optim.SGD(model.top.parameters(), 1e-3)]
    for _ in range(4):
        for o in optimizers:
            o.zero_grad()
        model(IDS).pow(2).sum().backward()
        for o in optimizers:
            o.step()
    return model.state_dict(), {n: optimizers[0].state[p]["sum"] for n, p in model.named_parameters() if "top" not in n}


TRAINED = [
    *((1, "replicate", torch.float32, "fbgemm"), (2, "row_wise", torch.float32, "fbgemm")),
    *((2, "replicate", torch.float32, "fbgemm"), (3, "hot_rows", torch.float32, "fbgemm")),
    *((2, "column_wise", torch.float32, "fbgemm"), (3, "table_wise", torch.float32, "fbgemm")),
    *((2, "unique_rows", torch.float32, "fbgemm"), (2, "row_wise", torch.float64, "fbgemm")),
    (2, "row_wise", torch.float32, "torch"),
]


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("ranks", "form", "dtype", "backend"), cases(TRAINED, [*TRAINED[:3], *TRAINED[-2:]]))
def test_tables_are_trained_as_in_one_process(ranks, form, dtype, backend, on_ranks):
    """Float32 to its rounding; float64, which FBGEMM does not know, to that of PyTorch's operators."""
    is_single = dtype == torch.float32
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if is_single else {"rtol": 1e-10, "atol": 1e-12}
    expected, expected_sums = _in_one_process(dtype)
    every, of_all = on_ranks(_trained, ranks, form, dtype, backend), []
    for state, sums, used, made, stay in every:
        assert stay and used == ("fbgemm" if is_single and backend != "torch" else "torch")
        assert all(by_kernel == has_rows for by_kernel, has_rows in made)
        for name, x in expected.items():
            torch.testing.assert_close(state[name].double(), x.double(), **tolerance)
        if form == "replicate":
            for name, x in expected_sums.items():
                torch.testing.assert_close(sums[name].double(), x.double(), **tolerance)
        of_all += made
    assert any(by_kernel for by_kernel, _ in of_all) == (is_single and backend != "torch")
    for name, x in every[0][0].items():
        assert all(torch.equal(x, state[name]) for state, *_ in every)


def _chosen(rank, ranks, form):
    """By default: whose kernels, of all tables, and of those with one column."""
    module = des.compile(Model(), (IDS,), plan={"*": form}, loss="sum")
    found = []
    for params in (None, [module.linear.weight], [module.item.weight]):
        tables = des.fuse_optimizer(module, torch.optim.Adagrad, params=params, **OPTIONS)
        found.append(tables.backend)
        tables.unfuse()
    return found


def test_by_default_the_kernel_is_for_narrow_tables(on_ranks):
    """By their width in the original: two ranks have three columns each of the wide ones here."""
    for found in (*on_ranks(_chosen, 1, "replicate"), *on_ranks(_chosen, 2, "column_wise")):
        assert found == ["torch", "fbgemm", "torch"]


def _without(rank, ranks, lacking):
    """Of a rank that lacks FBGEMM, where the others have it."""
    module = des.compile(Model(), (IDS,), plan={"*": "row_wise"}, loss="sum")
    with pytest.MonkeyPatch.context() as patch:
        if rank in lacking:
            patch.setattr(fbgemm, "lacks", lambda: "no FBGEMM here: pip install it")
        kinds = torch.optim.Adagrad, torch.optim.SGD
        said = [raised(lambda k=k: des.fuse_optimizer(module, k, backend="fbgemm")) for k in kinds]
        tables = des.fuse_optimizer(module, torch.optim.Adagrad, params=[module.linear.weight])
    return said, tables.backend


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_without_it_are_named_on_every_rank(ranks, on_ranks):
    last = ranks - 1
    for said, backend in on_ranks(_without, ranks, [last]):
        assert backend == "torch"
        for text in said:
            assert text == (
                f"UnsupportedError: fuse_optimizer(backend='fbgemm'):\nrank {last}: no FBGEMM here: pip install it"
            )


def test_backends_have_names():
    module = des.compile(Model(), (IDS,))
    assert "backend='cuda' is none of auto, fbgemm, torch" in raised(
        lambda: des.fuse_optimizer(module, torch.optim.Adagrad, backend="cuda")
    )
    assert des.fuse_optimizer(module, torch.optim.SGD).backend == "torch"

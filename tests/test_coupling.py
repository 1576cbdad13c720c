"""Operators that mix the rows of the batch: exact on real ranks, uneven and empty ones too."""

import copy
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

import descompiler as des
from descompiler.classify.scope import polynomial
from tests.harness.cases import cases

FORMS = ("replicate", "sparse_all_gather", "table_wise", "row_wise", "column_wise", "unique_rows")


class TwoTower(nn.Module):
    """Users and items; ``f`` is what mixes their rows."""

    def __init__(self, **options):
        super().__init__()
        self.user, self.item = nn.Embedding(9, 4, **options), nn.Embedding(7, 4, **options)
        self.linear = nn.Linear(4, 4)

    def forward(self, users, items, x):
        return self.f(self.linear(self.user(users)), self.item(items), x)

    def f(self, u, v, x):
        raise NotImplementedError


class InBatchSoftmax(TwoTower):
    def f(self, u, v, x):
        return F.cross_entropy(u @ v.T, torch.arange(u.shape[0]))


class Contrastive(TwoTower):
    """Two views of each row, concatenated along the batch (SimCLR's NT-Xent)."""

    def f(self, u, v, x):
        z = F.normalize(torch.cat([u, v], 0), dim=1)
        n = u.shape[0]
        similar = z @ z.T / 0.5
        similar = similar - 1e9 * torch.eye(2 * n, dtype=z.dtype)
        target = torch.cat([torch.arange(n) + n, torch.arange(n)])
        return F.cross_entropy(similar, target)


class Centred(TwoTower):
    def f(self, u, v, x):
        return ((u - u.mean(0)) * v).sum(1)


class ColumnNorm(TwoTower):
    def f(self, u, v, x):
        return u / u.norm(dim=0) + F.normalize(v, dim=0)


class SoftmaxOverBatch(TwoTower):
    def f(self, u, v, x):
        return torch.softmax((u * v).sum(1), 0), torch.log_softmax(u, 0).sum(1)


class Losses(TwoTower):
    """As a library's ``calculate_loss``: everything is in the model, a scalar comes out."""

    def f(self, u, v, x):
        score = (u * v).sum(1)
        bpr = -F.logsigmoid(score - x).mean()
        rest = F.mse_loss(score, x) + F.binary_cross_entropy_with_logits(score, x, reduction="sum")
        classes = F.cross_entropy(u, (10 * x).long() % 4, ignore_index=3, label_smoothing=0.1)
        classes = classes + F.kl_div(F.log_softmax(u, 1), F.softmax(v, 1), reduction="batchmean")
        regular = 0.01 * self.linear.weight.norm()
        total = bpr + rest + classes + regular + F.smooth_l1_loss(u, v) + F.l1_loss(u, v.relu())
        return 0.02 * total  # `verify` squares it, and larger steps would diverge in one process too


class SeveralOutputs(TwoTower):
    def f(self, u, v, x):
        score = (u * v).sum(1)
        return {"score": score, "loss": score.square().mean(), "all": u @ v.T, "largest": x.max()}


class Cumulative(TwoTower):
    def f(self, u, v, x):
        return torch.cumsum(u, 0) * v


class Listwise(TwoTower):
    """Sorted by score over the batch (ListMLE)."""

    def f(self, u, v, x):
        score = (u * v).sum(1)
        ordered = score[torch.argsort(x, descending=True)]
        return (torch.logcumsumexp(ordered.flip(0), 0).flip(0) - ordered).mean()


class BatchSize(TwoTower):
    def f(self, u, v, x):
        n = x.shape[0]
        return (u * v).sum(1) / n + torch.arange(n).to(u) / (2 * n + 1)


class Normalised(TwoTower):
    """Batch norm of sequences, in front of what mixes rows."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def f(self, u, v, x):
        z = self.norm(torch.stack([u, v], 1))
        return (z - z.mean(0)).square().sum((1, 2))


class Rolled(TwoTower):
    """Negatives are the ids of the row before: the second lookup's ids are computed from the whole batch."""

    def forward(self, users, items, x):
        u, v = self.user(users), self.item(items)
        return (u * v).sum(1) - (u * self.item(items.roll(1, 0))).sum(1)


class BatchSecond(TwoTower):
    """Sequences with the batch in dimension 1, and rows side by side: nothing mixes."""

    def f(self, u, v, x):
        s = torch.stack([u, v, u * v], 1).transpose(0, 1)  # [3, b, 4]
        s = s.reshape(3, -1, 2).tanh().reshape(3, -1, 4) * x.unsqueeze(-1)
        return s.transpose(0, 1).flatten(1)


class Regularised(TwoTower):
    """Penalties on every row of tables that are looked up."""

    def f(self, u, v, x):
        penalty = 0.1 * (self.user.weight**2).sum() + self.item.weight.norm() + self.item.weight.abs().mean()
        return (u * v).sum(1) + x.mean() * self.user.weight.norm(p=1), F.mse_loss((u * v).sum(1), x) + penalty, penalty


class Penalised(TwoTower):
    """Norms of what was looked up, as regularisers in a library's loss; a slice whose end is computed."""

    def f(self, u, v, x):
        u = u[: int(u.shape[0] / 1)]
        return (u * v).sum(1) + torch.norm(u) + 0.1 * u.norm(p=1) + torch.norm(v * x[:, None], dim=(0, 1), p=3)


MODELS = [
    Penalised,
    InBatchSoftmax,
    Contrastive,
    Centred,
    ColumnNorm,
    SoftmaxOverBatch,
    Losses,
    SeveralOutputs,
    Cumulative,
    Listwise,
    BatchSize,
    Normalised,
    Rolled,
    BatchSecond,
    Regularised,
    lambda: Attention(True, 0.0),
]


def inputs():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(9, (8,), generator=generator),
        torch.randint(7, (8,), generator=generator),
        torch.rand(8, generator=generator),
    )


def double():
    return tuple(x.double() if x.is_floating_point() else x for x in inputs())


@pytest.mark.parametrize("model", cases(MODELS, MODELS[::3]))
def test_two_ranks(on_ranks, model):
    torch.manual_seed(0)
    report = des.verify(
        model(),
        inputs(),
        ranks=2,
        plans=[None, {"user*": "row_wise", "item*": "table_wise"}, {"*": "unique_rows"}],
        launch=on_ranks,
    )
    assert report.cases == 3


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_split(on_ranks, model, ranks):
    torch.manual_seed(0)
    des.verify(model(), inputs(), ranks=ranks, plans=[{"*": form} for form in FORMS], launch=on_ranks)


@pytest.mark.parametrize("model", [InBatchSoftmax, SeveralOutputs])
def test_four_ranks(on_ranks, model):
    torch.manual_seed(0)
    des.verify(model(), inputs(), ranks=4, plans=[{"*": "row_wise"}], launch=on_ranks)


def plan_of(model, ranks=2):
    return des.plan(model, inputs(), ranks=ranks, batch=16)


def test_rows_that_stay_apart_are_not_exchanged():
    assert plan_of(BatchSecond()).layout.exchanges == ()


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        (Centred, {"reduce": 4, "spread": 4}),  # a mean over the batch is a sum of ranks' terms
        (InBatchSoftmax, {"gather": 8, "spread": 1}),  # of a scalar's gradient, one number crosses
        (Cumulative, {"gather": 4, "slice": 4}),
        (Penalised, {"reduce": 2, "gather": 4, "spread": 3}),  # of other norms than of order 1 and 2, their rows
    ],
)
def test_what_crosses(model, kinds):
    found = {}
    for e in plan_of(model()).layout.exchanges:
        found[e.kind] = found.get(e.kind, 0) + e.elements(1)
    assert found == kinds


def test_tables_with_regularisers_can_be_divided():
    plan = plan_of(Regularised())
    assert all(
        {"row_wise", "table_wise", "column_wise", "unique_rows"} <= set(plan.prices[t.name]) for t in plan.tables
    )
    pinned = des.plan(Regularised(), inputs(), ranks=2, batch=16, pins={"*": "row_wise"})
    assert [e.kind for e in pinned.layout.exchanges].count("total") == 4
    assert "a sum over a whole table is one over the owners' terms" in pinned.explain()


def test_a_table_that_is_also_used_whole_otherwise_stays_whole():
    class Whole(TwoTower):
        def f(self, u, v, x):
            return (u * v) @ (self.item.weight**2).sum(0)

    (table,) = (t for t in plan_of(Whole()).tables if t.name == "item.weight")
    assert "also used by aten.pow" in table.refusals["row_wise"]


def test_the_explanation_names_what_mixes_and_what_is_drawn():
    class Dropped(TwoTower):
        def f(self, u, v, x):
            return F.dropout(u, 0.5) - v.mean(0)

    text = plan_of(Dropped()).explain()
    assert "reduce aten.mean.dim, 4 elements: a sum over the batch is one over ranks' terms" in text
    assert "random aten.dropout: each rank draws for its own rows" in text
    assert "test_coupling.py:" in text


class Attention(TwoTower):
    """Attention among the rows of the batch (a transformer without ``batch_first``), or within each row."""

    def __init__(self, across, dropout):
        super().__init__()
        self.across, self.attention = across, nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)

    def f(self, u, v, x):
        s = torch.stack([u, v], 1)
        s = s.transpose(0, 1) if self.across else s
        out = self.attention(s, s, s, need_weights=False)[0]
        return (out.transpose(0, 1) if self.across else out).flatten(1)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_mixes_rows_only_along_the_batch(dropout):
    within, across = plan_of(Attention(False, dropout)), plan_of(Attention(True, dropout))
    assert within.layout.exchanges == () and "gather" in {e.kind for e in across.layout.exchanges}
    assert any("equal on all ranks" in note for note in across.notes) == (dropout > 0)
    assert any("own rows" in note for note in within.notes) == (dropout > 0)


class Noisy(TwoTower):
    def f(self, u, v, x):
        return u + torch.randn_like(u)


def test_verify_says_that_it_can_not_compare_what_each_rank_draws():
    with pytest.raises(des.EquivalenceError, match=r"the model draws them: random aten\.randn_like"):
        des.verify(Noisy(), inputs(), ranks=2)


def test_verify_gives_the_original_what_is_drawn_for_the_whole_batch(on_ranks):
    assert des.verify(Shuffled(), inputs(), ranks=3, plans=[None, {"*": "row_wise"}], launch=on_ranks).cases == 2


class Shuffled(TwoTower):
    """Negatives drawn from the batch, one draw of weights for all rows, and another order."""

    def f(self, u, v, x):
        order = torch.randperm(x.shape[0])
        return v[order], order, x * torch.rand(1), torch.randperm(x.shape[0])


def _shuffled(rank, ranks):
    torch.manual_seed(rank)
    model = Shuffled()
    module = des.compile(model, double())
    counts = [3, 0, 5]
    first = sum(counts[:rank])
    mine = tuple(x[first : first + counts[rank]] for x in double())
    runs = [module(*mine) for _ in range(2)]
    return [[x.tolist() for x in run] for run in runs], des.full_state_dict(module)["item.weight"]


def test_draws_for_the_whole_batch_are_equal_on_all_ranks(on_ranks):
    results = on_ranks(_shuffled, 3)
    _, items, x = double()
    orders = []
    for step in range(2):
        rows, order, scaled, other = ([x for runs, _ in results for x in runs[step][i]] for i in range(4))
        assert sorted(order) == sorted(other) == list(range(8))
        assert order != other
        assert torch.equal(torch.tensor(rows), results[0][1][items[order]])
        assert torch.allclose(torch.tensor(scaled).double(), x * (scaled[0] / x[0]))
        orders.append(order)
    assert orders[0] != orders[1]


def _modes(rank, ranks, loss):
    torch.manual_seed(0)
    model = SeveralOutputs().double()
    reference = copy.deepcopy(model)
    module = des.compile(model, double(), plan={"*": "row_wise"}, loss=loss)
    counts = [2, 6]
    first = sum(counts[:rank])

    def own(out, rows=None):
        """The user's loss: something over the rank's rows, and something of the whole batch."""
        score = out["score"] if rows is None else out["score"][rows]
        return (score.square().sum() if loss == "sum" else score.square().mean()) + out["loss"] + out["all"].sum().sin()

    own(module(*(x[first : first + counts[rank]] for x in double()))).backward()
    out = reference(*double())
    if loss == "rank_mean":
        (sum(own(out, slice(a, b)) for a, b in ((0, 2), (2, 8))) / 2).backward()
    else:
        own(out).backward()
    grads = {n: p.grad for n, p in reference.named_parameters()}
    errors = [(p.grad - module.pieces(n).cut(grads[n], rank)).abs().max() for n, p in module.named_parameters()]
    return float(max(errors)) / float(max(g.abs().max() for g in grads.values()))


@pytest.mark.parametrize("loss", ["rank_mean", "row_mean", "sum"])
def test_losses_that_use_rows_and_the_whole_batch(on_ranks, loss):
    assert max(on_ranks(_modes, 2, loss)) < 1e-10


def _other_outputs(rank, ranks):
    torch.manual_seed(0)
    model = SeveralOutputs().double()
    reference = copy.deepcopy(model)
    module = des.compile(model, double(), plan={"*": "row_wise"})
    out = module(*(x[4 * rank : 4 * rank + 4] for x in double()))
    (out["loss"] if rank else out["score"].sum()).backward()  # each rank's loss uses another output
    whole = reference(*double())
    ((whole["loss"] + whole["score"][:4].sum()) / 2).backward()
    grads = {n: p.grad for n, p in reference.named_parameters()}
    errors = [(p.grad - module.pieces(n).cut(grads[n], rank)).abs().max() for n, p in module.named_parameters()]
    module.eval()
    with torch.no_grad():
        module(*(x[4 * rank : 4 * rank + 4] for x in double()))
    return float(max(errors)), module.traffic() == module.plan.traffic(rank, 4, backward=False)


def test_ranks_that_use_different_outputs_and_evaluation(on_ranks):
    for error, counted in on_ranks(_other_outputs, 2):
        assert error < 1e-10 and counted


class Sized(nn.Module):
    """What is computed of a batch's sizes, among the arguments of operators."""

    def __init__(self, of) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.of = nn.Embedding(20, 8), of

    def forward(self, ids):
        return self.of(self.table(ids), len(ids), ids.shape[1])


def halves(x, rows, length):
    first = x[:, : length // 2].sum(1) * 2
    return torch.cat([first[: rows // 2] / (rows % 3 + 1), first[rows // 2 :]]) / (rows / 2) ** 0.5


def thirds(x, rows, length):
    return torch.cat([part * (i + 1) for i, part in enumerate(x.split([rows // 3, rows - rows // 3]))]).sum(1)


def counted(x, rows, length):
    return x.sum(1) * torch.sym_max(rows, 3) / torch.sym_float(x.numel() // length) + x.roll(rows // 2, 0).sum(1)


def viewed(x, rows, length):
    return x.reshape(rows * length // 2, 16).sum(1).view(rows, -1).sum(1) * min(1.0, rows / 100) * -(-rows // 4)


def rational(x, rows, length):
    return x.sum(1) * Fraction(rows, length).denominator / math.gcd(rows, 4)


SIZED = [halves, thirds, counted, viewed, rational]


@pytest.mark.parametrize("of", cases(SIZED, SIZED[:1]))
def test_arithmetic_of_sizes_is_that_of_the_global_batch(of, on_ranks):
    ids = torch.randint(20, (12, 6), generator=torch.Generator().manual_seed(0))
    des.verify(Sized(of), (ids,), plans=[{"*": "row_wise"}], launch=on_ranks)


def ragged(x, rows, length):
    return torch.cat([part * (i + 1) for i, part in enumerate(x.tensor_split(3))]).sum(1)


def test_a_size_that_is_no_multiple_of_the_rows_is_refused_with_what_to_do():
    with pytest.raises(des.UnsupportedError, match=r"test_coupling.py:\d+: .*rows by a mask"):
        des.plan(Sized(ragged), (torch.zeros(12, 6, dtype=torch.int64),), ranks=2)


def test_a_guard_says_what_a_part_of_a_size_is():
    batch = sympy.Symbol("b", integer=True, positive=True)
    third = sympy.floor(batch / 3)
    guarded = SimpleNamespace(batch=batch, guards=(sympy.Eq(third, 1),))
    assert polynomial(2 * batch + third, guarded) == (1, 2)
    assert polynomial(2 * batch + third, SimpleNamespace(batch=batch, guards=())) is None

"""FTRL is the paper's, of dense gradients and of rows alike, on one rank and on several."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import descompiler as des
from tests.harness.cases import cases

OPTIONS = {"lr": 0.3, "beta": 0.7, "l1": 0.4, "l2": 0.2}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


class Paper:
    """Algorithm 1, line by line, for one coordinate; z begins where it gives the weight."""

    def __init__(self, w, lr, beta, l1, l2):
        self.alpha, self.beta, self.l1, self.l2 = lr, beta, l1, l2
        self.w, self.n = w, 0.0
        self.z = -w * (beta / lr + l2) - (math.copysign(l1, w) if w else 0.0)

    def step(self, g):
        sigma = (math.sqrt(self.n + g * g) - math.sqrt(self.n)) / self.alpha
        self.z += g - sigma * self.w
        self.n += g * g
        sign = math.copysign(1.0, self.z)
        rate = 1 / ((self.beta + math.sqrt(self.n)) / self.alpha + self.l2)
        self.w = 0.0 if abs(self.z) <= self.l1 else -rate * (self.z - sign * self.l1)


def gradients(steps, rows=7, dim=3):
    g = torch.Generator().manual_seed(3)
    for _ in range(steps):
        ids = torch.randint(rows, (5,), generator=g)  # some twice
        yield ids, torch.randn(5, dim, generator=g, dtype=torch.float64)


def begin():
    weight = torch.randn(7, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weight[0] = 0
    return nn.Parameter(weight)


def sparse(ids, values):
    return torch.sparse_coo_tensor(ids[None], values, (7, 3), check_invariants=True)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_it_is_the_papers(is_sparse, maximize):
    weight = begin()
    opt = des.optim.FTRL([weight], **OPTIONS, maximize=maximize)
    papers = [[Paper(w, **OPTIONS) for w in row] for row in weight.tolist()]
    zeros = 0
    for ids, values in gradients(40):
        whole = sparse(ids, values).to_dense()
        weight.grad = sparse(ids, values) if is_sparse else whole
        opt.step()
        for row, gradient in zip(papers, whole.tolist(), strict=True):
            for paper, g in zip(row, gradient, strict=True):
                if g:
                    paper.step(-g if maximize else g)
        expected = torch.tensor([[paper.w for paper in row] for row in papers], dtype=torch.float64)
        close(weight.detach(), expected)
        assert torch.equal(weight == 0, expected == 0)
        zeros += int((expected == 0).sum())
        for name in ("z", "n"):
            kept = [[getattr(p, name) for p in row] for row in papers]
            moved = torch.tensor([[p.n > 0 for p in row] for row in papers])
            close(opt.state[weight][name][moved], torch.tensor(kept, dtype=torch.float64)[moved])
    assert zeros > 20  # and no weight of the beginning is one, but for a row
    assert opt.state[weight].keys() == {"z", "n"}


def test_rows_are_dense_gradients_bit_for_bit_and_others_stay():
    one, other = begin(), begin()
    opts = [des.optim.FTRL([p], **OPTIONS) for p in (one, other)]
    for step, (ids, values) in enumerate(gradients(12)):
        for o in opts:
            o.param_groups[0]["lr"] = 0.3 / (1 + step)
        before, others = one.detach().clone(), torch.ones(7, dtype=torch.bool)
        others[ids] = False
        one.grad, other.grad = sparse(ids, values), sparse(ids, values).to_dense()
        for o in opts:
            o.step()
        assert torch.equal(one, other) and torch.equal(one[others], before[others]) and bool(others.any())
    of_elements = begin()
    opt = des.optim.FTRL([of_elements], **OPTIONS)
    for ids, values in gradients(3):
        of_elements.grad = sparse(ids, values).to_dense().to_sparse(2)
        opt.step()
    alone = begin()
    opt = des.optim.FTRL([alone], **OPTIONS)
    for ids, values in gradients(3):
        alone.grad = sparse(ids, values)
        opt.step()
    assert torch.equal(alone, of_elements)


def trained(weight, opt, steps):
    for ids, values in steps:
        weight.grad = sparse(ids, values)
        opt.step()
    return weight


def test_it_goes_on_from_its_state():
    steps = list(gradients(10))
    expected = trained(weight := begin(), des.optim.FTRL([weight], **OPTIONS), steps)
    trained(weight := begin(), opt := des.optim.FTRL([weight], **OPTIONS), steps[:5])
    other = nn.Parameter(weight.detach().clone())
    loaded = des.optim.FTRL([other])
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(trained(other, loaded, steps[5:]), expected)
    for again in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        ((own,),) = (g["params"] for g in again.param_groups)
        assert own is not weight and torch.equal(trained(own, again, steps[5:]), expected)


def test_groups_and_closures_are_torchs():
    one, other, still = begin(), begin(), begin()
    opt = des.optim.FTRL([one], lr=0.1)
    opt.add_param_group({"params": [other], "lr": 0.2, "l1": 0.1})
    opt.add_param_group({"params": [still]})

    def closure():
        opt.zero_grad()
        loss = one.square().sum() + other.square().sum()
        loss.backward()
        return loss

    assert float(opt.step(closure).detach()) == float(begin().detach().square().sum() * 2)
    for p, options in ((one, {"lr": 0.1}), (other, {"lr": 0.2, "l1": 0.1})):
        alone = begin()
        alone.grad = 2 * alone.detach()
        des.optim.FTRL([alone], **options).step()
        assert torch.equal(p, alone) and not torch.equal(p, begin())
    assert torch.equal(still, begin()) and still not in opt.state


def test_a_rate_that_changes_and_a_weight_that_is_written_move_nothing_by_themselves():
    """The next step goes on from the weight that is there, by little where the gradient is little."""
    trained(weight := begin(), opt := des.optim.FTRL([weight], **OPTIONS), gradients(20))
    opt.param_groups[0]["lr"] = 0.003
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, 1e-9)
    opt.step()
    assert float((weight.detach() - before).abs().max()) < 1e-9
    with torch.no_grad():
        weight.add_(1.0)
    before = weight.detach().clone()
    opt.step()
    assert 0 < float((weight.detach() - before).abs().max()) < 1e-9
    opt.param_groups[0]["lr"] = 0  # as a schedule may begin
    before, kept = weight.detach().clone(), copy.deepcopy(opt.state[weight])
    weight.grad = torch.ones_like(weight)
    opt.step()
    assert torch.equal(weight, before) and all(torch.equal(x, opt.state[weight][n]) for n, x in kept.items())


def test_what_has_no_step_is_refused():
    for wrong in ({"lr": 0.0}, {"lr": -1.0}, {"beta": -1.0}, {"l1": -0.1}, {"l2": math.nan}):
        ((name, value),) = wrong.items()
        with pytest.raises(des.InputError, match=f"{name}={value}"):
            des.optim.FTRL([begin()], **wrong)
        opt = des.optim.FTRL([begin()])
        with pytest.raises(des.InputError, match=f"{name}={value}"):
            opt.add_param_group({"params": [begin()], **wrong})
        assert len(opt.param_groups) == 1
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(des.UnsupportedError, match="complex"):
        des.optim.FTRL([weight]).step()


IDS = torch.randint(40, (12, 4), generator=torch.Generator().manual_seed(1))
COUNTS = {1: [(12,)], 2: [(0, 12), (5, 7), (12, 0)], 3: [(3, 0, 9), (4, 4, 4), (0, 1, 11)]}


class Model(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.item, self.top = nn.Embedding(40, 6, sparse=sparse), nn.Linear(6, 1)
        self.bag = nn.EmbeddingBag(40, 6, mode="sum", sparse=sparse)

    def forward(self, ids):
        return self.top((self.item(ids) + self.bag(ids)[:, None]).tanh().sum(1))


def train(module, rank, counts, steps=6):
    """Train by FTRL on a rank's rows; the weights."""
    opt = des.optim.FTRL(module.parameters(), lr=0.2, l1=0.05, l2=0.1)
    for step in range(steps):
        own = counts[step % len(counts)]
        opt.zero_grad()
        module(IDS[sum(own[:rank]) : sum(own[: rank + 1])]).pow(2).sum().backward()
        opt.step()


def on_a_rank(rank, ranks, form, is_sparse):
    torch.set_default_dtype(torch.float64)
    module = des.compile(Model(is_sparse), (IDS,), plan={"*": form}, loss="sum")
    train(module, rank, COUNTS[ranks])
    return des.full_state_dict(module)


FORMS = "row_wise", "column_wise", "table_wise", "unique_rows", "hot_rows", "sparse_all_gather", "replicate"
WORLDS = [(form, ranks, is_sparse) for form in FORMS for ranks in (1, 2, 3) for is_sparse in (False, True)]
ALWAYS = [("row_wise", 3, True), ("column_wise", 2, False), ("unique_rows", 2, True), ("replicate", 1, True)]


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("form", "ranks", "is_sparse"), cases(WORLDS, ALWAYS))
def test_ranks_train_as_one_process(form, ranks, is_sparse, on_ranks):
    torch.set_default_dtype(torch.float64)
    try:
        train(model := Model(is_sparse), 0, [(12,)])
    finally:
        torch.set_default_dtype(torch.float32)
    expected = model.state_dict()
    assert any(bool((x == 0).any()) for x in expected.values())
    for state in on_ranks(on_a_rank, ranks, form, is_sparse):
        for name, x in expected.items():
            torch.testing.assert_close(state[name], x, rtol=1e-10, atol=1e-12)
            assert torch.equal(state[name] == 0, x == 0)

"""Compiled in place: the user's own object, with its methods and its training loop, on real ranks."""

import copy
import dataclasses
import importlib.util
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import descompiler as des
from descompiler.model.attributes import reads_of
from tests.harness.cases import cases
from tests.harness.failures import raised
from tests.harness.models import IDS, LABELS, Recommender, batch_of


class Branching(Recommender):
    data_dependent = True


def _train(rank, ranks, cls, method, cuts):
    """Three steps of the user's own loop; the largest differences from the single process."""
    model = cls().double()
    reference = copy.deepcopy(model)
    with warnings.catch_warnings(record=True):
        same = des.compile(
            model, (batch_of(slice(0, 8)),), in_place=True, method=method, plan={"*": "row_wise"}, loss="row_mean"
        )
    assert same is model and type(model) is cls and model.penalised[0] is model.table.weight
    optimizers = [torch.optim.Adagrad(m.parameters(), lr=0.1, eps=1e-3) for m in (model, reference)]
    worst = {"loss": 0.0, "weight": 0.0, "prediction": 0.0}
    for step in range(3):
        cut = cuts[step % len(cuts)]
        mine = slice(0, cut) if rank == 0 else slice(cut, 8)
        for m, o, rows in ((model, optimizers[0], mine), (reference, optimizers[1], slice(0, 8))):
            m.train()
            o.zero_grad()
            if method == "calculate_loss":
                loss = m.calculate_loss(batch_of(rows))
            else:
                part = (m(batch_of(rows)) - LABELS[rows]).square()
                loss = part.mean() if len(part) else part.sum()
            penalty = m.regularization_loss()
            (loss + penalty).backward()
            o.step()
            last = (loss if method == "calculate_loss" else penalty).item()
            worst["loss"] = abs(last - worst.pop("last", last))
            if m is model:
                worst["last"] = last
    for name, value in des.full_state_dict(model).items():
        worst["weight"] = max(worst["weight"], float((value - reference.state_dict()[name]).abs().max()))
    worst["prediction"] = float(
        (model.eval().predict(batch_of(mine)) - reference.eval().predict(batch_of(mine))).abs().max()
    )
    return worst, des.module_of(model).coverage().rung


@pytest.mark.parametrize(
    ("cls", "method", "rung"),
    cases(
        [
            (Recommender, "forward", "export"),
            (Recommender, "calculate_loss", "export"),
            (Branching, "forward", "partial"),
            (Branching, "calculate_loss", "partial"),
        ],
        [(Recommender, "calculate_loss", "export"), (Branching, "forward", "partial")],
    ),
)
def test_own_loop(on_ranks, cls, method, rung):
    for worst, captured in on_ranks(_train, 2, cls, method, [3, 4, 6]):
        assert captured == rung
        assert all(x < 1e-12 for x in worst.values()), worst


def test_errors():
    with pytest.raises(des.InputError, match="needs example_inputs"):
        des.compile(Recommender(), in_place=True)
    with pytest.raises(des.InputError, match="no method 'calculate'"):
        des.compile(Recommender(), (batch_of(slice(0, 8)),), method="calculate")
    with pytest.raises(des.InputError, match="not compiled in place"):
        des.module_of(Recommender())


ROWS, BATCH = 96, 16


def _click_log():
    generator = np.random.default_rng(0)
    x = {f"c{i}": generator.integers(0, n, ROWS) for i, n in enumerate((7, 13, 29))}
    x["d0"] = generator.normal(size=ROWS).astype("float32")
    y = ((x["c0"] + x["c1"]) % 2).astype("float32")
    return x, y


def _deepctr_model():
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import DeepFM

    columns = [SparseFeat(f"c{i}", n, embedding_dim=4) for i, n in enumerate((7, 13, 29))] + [DenseFeat("d0", 1)]
    torch.manual_seed(0)
    model = DeepFM(
        columns, columns, dnn_hidden_units=(8,), l2_reg_embedding=1e-2, l2_reg_linear=1e-2, l2_reg_dnn=1e-2, seed=1
    )
    return model


def _fit(rank, ranks):
    """deepctr-torch's own ``fit``; every rank feeds its part of each batch of the single process."""
    x, y = _click_log()
    model = _deepctr_model()
    if ranks > 1:
        example = torch.from_numpy(np.stack(list(x.values()), 1)).float()[:BATCH]
        with warnings.catch_warnings(record=True):
            des.compile(model, (example,), in_place=True, loss="sum", plan={"*": "row_wise"})
    model.compile("adagrad", "binary_crossentropy", metrics=["binary_crossentropy", "auc"])
    mine = np.arange(ROWS).reshape(-1, ranks, BATCH // ranks)[:, rank].reshape(-1)
    history = model.fit(
        {k: v[mine] for k, v in x.items()}, y[mine], batch_size=BATCH // ranks, epochs=3, verbose=0, shuffle=False
    )
    scores = model.evaluate(dict(x), y, batch_size=BATCH)
    state = model.state_dict() if ranks == 1 else des.full_state_dict(model)
    rung = des.module_of(model).coverage().rung if ranks > 1 else ""
    return history.history["loss"], scores, {n: v.numpy() for n, v in state.items()}, rung


@pytest.mark.zoo
@pytest.mark.skipif(importlib.util.find_spec("deepctr_torch") is None, reason="pip install 'descompiler[zoo]'")
@pytest.mark.slow
def test_the_training_loop_of_deepctr_torch(on_ranks):
    _, expected, state, _ = _fit(0, 1)
    for _, scores, weights, rung in on_ranks(_fit, 2):
        assert rung == "export"
        for name, value in expected.items():
            assert scores[name] == pytest.approx(value, rel=1e-5)
        for name, value in state.items():
            assert np.abs(weights[name] - value).max() < 1e-5, name
    untrained = _deepctr_model().state_dict()
    assert any(np.abs(state[n] - untrained[n].numpy()).max() > 0.01 for n in state), "it has to have trained"


class Annealed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.drop, self.top = nn.Embedding(9, 4), nn.Dropout(0.5), nn.Linear(4, 1)
        self.alpha, self.best = 1.0, 0.0

    def forward(self, ids):
        return self.top(self.drop(self.table(ids).sum(1))) * self.alpha


def _annealed(rank, ranks):
    """Outputs' differences from the original while users change plain attributes, and what they are told."""
    model = Annealed().double()
    reference = copy.deepcopy(model)
    des.compile(model, (IDS,), in_place=True, plan={"*": "row_wise"})
    mine, worst, told = IDS[:3] if rank else IDS[3:], 0.0, []
    model.alpha = 2.0 + rank
    with pytest.raises(des.RankError, match=r"alpha is 3\.0 now"):  # in the first forward too
        model(mine)
    for p, alpha in ((0.0, 1.0), (0.0, 3.0), (0.0, 1.0), (1.0, 3.0)):
        for m in (model, reference):
            m.drop.p, m.alpha, m.best = p, alpha, m.best + 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            worst = max(worst, float((model(mine) - reference(mine)).abs().max()))
        told.append([str(w.message) for w in caught if "captured anew" in str(w.message)])
    errors = []
    for value in (5.0 if rank else 7.0, torch.tensor(2.0) if rank else 1.0):
        model.alpha = value
        try:
            model(mine)
        except des.DescompilerError as error:
            errors.append(str(error))
    return worst, told, errors


def test_plain_attributes_that_change(on_ranks):
    for worst, told, errors in on_ranks(_annealed, 2):
        assert worst < 1e-12
        assert [len(x) for x in told] == [1, 1, 0, 1], "best is not read, and a known value is not captured again"
        assert "drop.p is 0.0 now, and was 0.5" in told[0][0] and "alpha is 3.0 now, and was 1.0" in told[1][0]
        assert "rank 0" in errors[0] and "alpha is 7.0 now" in errors[0] and "alpha is 5.0 now" in errors[0]
        assert "rank 1: UnsupportedError: alpha was 1.0 when the model was compiled, and is a Tensor now" in errors[1]


@dataclasses.dataclass
class Options:
    scale: float = 1.0
    unread: tuple[float, ...] = (1.0, 2.0)


class Configured(nn.Module):
    """Reads numbers inside of what it holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 3, dtype=torch.float64)
        self.config = {"alpha": 0.5, "epoch": 0, "nested": {"power": [1, 2]}}
        self.weights, self.pair, self.options = [1.0, 2.0, 3.0], (1.0, 2.0), Options()
        self.space = SimpleNamespace(shift=0.25)
        self.cache: dict[str, int] = {"seen": 0}

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids) * self.config["alpha"] * self.weights[1] + self.pair[0] * self.space.shift
        return rows ** self.config["nested"]["power"][0] * self.options.scale


def _change(model, step):
    if step == 1:
        model.config["alpha"] = 2.0
    elif step == 2:
        model.weights[1] = 0.1
    elif step == 3:
        model.pair = (3.0, 2.0)
    elif step == 4:
        model.options.scale = 7.0
    elif step == 5:
        model.space.shift = -1.0
    elif step == 6:
        model.config = {"alpha": 3.0, "epoch": 1, "nested": {"power": [1, 2]}}
    elif step == 7:
        model.config["nested"]["power"][0] = 2
    elif step == 8:
        model.config["epoch"] = 5  # is not read


def _configured(rank, ranks):
    model = Configured()
    reference, mine = copy.deepcopy(model), torch.arange(4) + 4 * rank
    des.compile(model, (torch.arange(5),), in_place=True)
    told = []
    for step in range(9):
        for net in (model, reference):
            _change(net, step)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.testing.assert_close(model(mine), reference(mine))
        told.append([str(w.message) for w in caught if "captured anew" in str(w.message)])
    del model.config["alpha"]
    return told, raised(lambda: model(mine))


def test_numbers_inside_of_attributes_that_change(on_ranks):
    for told, error in on_ranks(_configured, 2):
        assert [len(x) for x in told] == [0, 1, 1, 1, 1, 1, 1, 1, 0]
        assert "config['alpha'] is 2.0 now, and was 0.5" in told[1][0] and "weights[1] is 0.1 now" in told[2][0]
        assert "options.scale is 7.0 now" in told[4][0] and "config['nested']['power'][0] is 2 now" in told[7][0]
        assert "config['alpha'] was 0.5 when the model was compiled, and is not there now" in error


def test_which_numbers_inside_are_read():
    model = Configured()
    before = model.config
    with reads_of(model) as reads:
        model(torch.arange(3))
    assert {name for _, name in reads if "config" in name} == {
        "config['alpha']", "config['nested']['power'][0]", "config['nested']['power'][1]",
    }  # fmt: skip
    assert model.config is before and type(before) is dict

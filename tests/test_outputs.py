"""Products with a table and what is asked of the logits: which are recognised, and that they train as the original."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import descompiler as des
from descompiler.capture.ladder import capture
from descompiler.check.compare import train_and_compare
from descompiler.model.probe import blueprint
from descompiler.passes import NORMALISE
from examples.models import SequentialRecommender
from tests.harness.cases import cases

ITEMS, DIM, LENGTH, ROWS = 37, 4, 5, 6


class Model(nn.Module):
    """A history encoded by its mean, and a product with the item table; ``HEADS[name](model, h, s, y, t)`` is the rest.

    h [b, k] and s [b, L, k] are encoded histories, y [b] targets, t [b, L] targets of each position.
    """

    def __init__(self, name):
        super().__init__()
        self.items = nn.Embedding(ITEMS, DIM, padding_idx=0)
        self.encoder = nn.Linear(DIM, DIM)
        self.out = nn.Linear(DIM, 1030)
        self.bias = nn.Parameter(torch.randn(ITEMS))
        self.register_buffer("weights", torch.randn(ITEMS))
        self.gate = nn.Parameter(torch.randn(ITEMS, 1))
        self.name = name

    def forward(self, t, y):
        s = torch.tanh(self.encoder(self.items(t)))
        return HEADS[self.name][0](self, s.mean(1), s, y, t)


def make_inputs(rows=ROWS):
    g = torch.Generator().manual_seed(0)
    t = torch.randint(ITEMS, (rows, LENGTH), generator=g)
    t[0, :2] = 0
    return t, torch.randint(1, ITEMS, (rows,), generator=g)


def scores(m, x):
    return torch.matmul(x, m.items.weight.transpose(0, 1))


HEADS = {
    # the head, and what the pass has to note
    "cross entropy": (
        lambda m, h, s, y, t: F.cross_entropy(scores(m, h), y, reduction="none"),
        "log_sum_exp, select",
    ),
    "every position, smoothed, padding ignored": (
        lambda m, h, s, y, t: F.cross_entropy(
            (s @ m.items.weight.t()).view(-1, ITEMS), t.view(-1), ignore_index=0, label_smoothing=0.1, reduction="none"
        ).view(-1, LENGTH),
        "log_sum_exp, select, total",
    ),
    "mean over all positions but padding": (
        lambda m, h, s, y, t: F.cross_entropy(scores(m, s).transpose(1, 2), t, ignore_index=0),
        "log_sum_exp, select",
    ),
    "mean over the batch": (lambda m, h, s, y, t: F.cross_entropy(scores(m, h), y), "log_sum_exp, select"),
    "an output layer of its own": (
        lambda m, h, s, y, t: F.nll_loss(F.log_softmax(m.out(h), 1), y, reduction="none"),
        "out.weight: log_sum_exp, select",
    ),
    "temperature and item bias": (
        lambda m, h, s, y, t: -F.log_softmax(F.linear(h, m.items.weight) / 0.2 + m.bias, -1).gather(1, y.unsqueeze(1)),
        "log_sum_exp, select",
    ),
    "probability of some items": (
        lambda m, h, s, y, t: torch.softmax(scores(m, h), -1).gather(1, t),
        "log_sum_exp, select",
    ),
    "candidates": (lambda m, h, s, y, t: scores(m, h).gather(-1, t), ": select"),
    "target": (
        lambda m, h, s, y, t: scores(m, h)[torch.arange(y.shape[0]), y],
        ": select",
    ),
    "log-sum-exp": (
        lambda m, h, s, y, t: torch.logsumexp(torch.einsum("blk,vk->blv", s, m.items.weight), -1),
        "log_sum_exp",
    ),
    "top-k without padding": (lambda m, h, s, y, t: tuple(torch.topk(h @ m.items.weight[1:].T, 7)), ": top"),
    "best": (lambda m, h, s, y, t: scores(m, h)[:, 1:].max(1), ": max"),
    "full scores": (lambda m, h, s, y, t: scores(m, h), ": logits"),
    "scores squashed": (lambda m, h, s, y, t: torch.sigmoid(scores(m, h)).sum(1), ": logits"),
    "a small layer": (lambda m, h, s, y, t: F.log_softmax(m.encoder(h), 1).gather(1, y.unsqueeze(1) % DIM), None),
    "classes with weights, padding ignored": (
        lambda m, h, s, y, t: F.cross_entropy(scores(m, s).transpose(1, 2), t, m.weights.abs(), ignore_index=0),
        "log_sum_exp, select",
    ),
    "cosine scores": (
        lambda m, h, s, y, t: F.cross_entropy(
            F.normalize(h, dim=-1) @ F.normalize(m.items.weight, dim=-1).T / 0.1, y, reduction="none"
        ),
        "items.weight: log_sum_exp, select",
    ),
    "normalised in both places": (
        lambda m, h, s, y, t: (
            (n := F.normalize(m.items.weight, dim=1)),
            torch.logsumexp((h + n[y] + F.embedding(t, n, 0).sum(1)) @ n[1:].T, 1),
        )[1],
        "items.weight: log_sum_exp",
    ),
    "an item tower": (
        lambda m, h, s, y, t: F.cross_entropy(h @ torch.relu(m.encoder(m.items.weight) * m.gate).T, y),
        "items.weight: log_sum_exp, select",
    ),
    "loss and scores": (
        lambda m, h, s, y, t: [(x := scores(m, h)), F.cross_entropy(x, y, reduction="none")],
        ": logits",
    ),
}


def notes_of(name):
    torch.manual_seed(0)
    program, _ = capture(blueprint(Model(name)), make_inputs(), passes=NORMALISE)
    return [n for n in program.journal if n.startswith("recognise_outputs")]


NOTED = [n for n in HEADS if HEADS[n][1]]


@pytest.mark.parametrize("name", cases(NOTED, NOTED[::2]))
def test_what_is_asked_of_the_logits(name):
    """Capture accepts the rewritten graph only if it reproduces outputs and gradients."""
    (note,), expected = notes_of(name), HEADS[name][1]
    assert note.split("with ")[1].endswith(expected) or f"{expected}, for" in note


def test_small_layers_are_left_alone():
    assert not notes_of("a small layer")


def _heads(rank, ranks, names):
    reports = {}
    for name in names:
        torch.manual_seed(0)
        plans = [{"*": "row_wise"}, {"*": "unique_rows"}]
        reports[name] = train_and_compare(
            rank, ranks, Model(name).double(), (make_inputs(), {}), 2, plans, ["adagrad"], "cpu"
        )
    return reports


@pytest.mark.parametrize("names", cases([(list(HEADS)[i::4],) for i in range(4)], [(list(HEADS)[::4],)]), ids=len)
def test_every_head_trains_as_the_original(names, on_ranks):
    for reports in on_ranks(_heads, 2, names):
        assert all(r.cases == 2 for r in reports.values()) and len(reports) == len(names)


def test_a_large_layer_that_is_gathered(on_ranks):
    """Its gradient is priced; and what is no cheaper divided stays whole."""
    model, inputs = Model("an output layer of its own"), make_inputs()
    des.verify(model, inputs, plans=[{"out.weight": "fsdp"}], launch=on_ranks)
    plan = des.plan(model, inputs, ranks=2, pins={"out.weight": "fsdp"})
    assert [w.backward for w in plan.layout.wholes] == [True]
    forbid = {"out.weight": ["row_wise", "unique_rows"]}
    assert des.plan(model, inputs, ranks=2, forbid=forbid).forms["out.weight"] == "replicate"


def _bad_target(rank, ranks):
    t, y = make_inputs()
    texts = []
    for form in ("row_wise", "replicate"):
        torch.manual_seed(0)
        module = des.compile(Model("cross entropy").double(), (t, y), plan={"items.weight": form})
        wrong = y.clone()
        if rank == 1:
            wrong[2] = ITEMS
        with pytest.raises(des.InputError) as caught:
            module(t, wrong)
        module(t, y).sum().backward()
        texts.append(str(caught.value))
    return texts


def test_a_target_that_is_no_item_raises_on_every_rank(on_ranks):
    for texts in on_ranks(_bad_target, 2):
        assert all(f"id {ITEMS} in row 2" in text and "'items.weight'" in text for text in texts)


@pytest.mark.parametrize("encoder, ranks", [("gru", 2), ("attention", 3)])
def test_a_sequential_recommender_with_a_tied_item_table(on_ranks, encoder, ranks):
    torch.manual_seed(0)
    model = SequentialRecommender(40, 4, length=5, encoder=encoder)
    history, target = torch.randint(41, (9, 5)), torch.randint(1, 41, (9,))
    plans = [None, {"items.weight": "row_wise"}, {"items.weight": "unique_rows"}]
    assert des.verify(
        model, (history, target), ranks=ranks, plans=plans, optimizers=["adam"], launch=on_ranks
    ).cases == len(plans)


def test_the_planner_leaves_the_logits_with_the_owners():
    with torch.device("meta"):
        model = SequentialRecommender(100_000, 16)
    inputs = (torch.randint(1, 1000, (4, 20)), torch.randint(1, 1000, (4,)))
    plan = des.plan(model, inputs, ranks=4, batch=256)
    assert plan.splits["items.weight"].form == "unique_rows" and plan.layout.vocabularies
    assert plan.price_bytes < plan.baselines()["data parallel, dense gradients"] / 20
    assert "log_sum_exp, select" in plan.explain()


class WithLoss(nn.Module):
    """A public model that returns scores of all items, unmodified, and its loss."""

    def __init__(self, name):
        super().__init__()
        if name == "stamp":
            feature = SimpleNamespace(name="history", vocab_size=43, embed_dim=4)
            self.model = importlib.import_module("torch_rechub.models.matching.stamp").STAMP(feature, 0.3, 0.3)
        else:
            hstu = importlib.import_module("torch_rechub.models.generative.hstu").HSTUModel
            self.model = hstu(43, d_model=8, n_heads=2, n_layers=1, dqk=4, dv=4, max_seq_len=6)
        self.name = name

    def forward(self, history, target):
        scores = self.model({"history": history} if self.name == "stamp" else history)
        return F.cross_entropy(scores.flatten(0, -2), target.flatten(), reduction="none")


@pytest.mark.zoo
@pytest.mark.slow  # the zoo has them too
@pytest.mark.parametrize("name", ["stamp", "hstu"])
def test_public_models_with_scores_of_all_items(on_ranks, name):
    pytest.importorskip("torch_rechub")
    torch.manual_seed(0)
    history = torch.randint(1, 43, (8, 6))
    history[:4, 4:] = 0
    target = torch.randint(1, 43, (8,) if name == "stamp" else (8, 6))
    plan = des.plan(WithLoss(name), (history, target), ranks=2, pins={"*": "unique_rows"})
    assert [kind for v in plan.layout.vocabularies for kind, _ in v.requests] == ["log_sum_exp", "select"]
    des.verify(WithLoss(name), (history, target), plans=[{"*": "unique_rows"}, {"*": "row_wise"}], launch=on_ranks)

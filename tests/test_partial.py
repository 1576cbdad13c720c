"""Partial capture: the user's own forward, with tables fetched from their owners, on real ranks."""

import copy
import inspect
import random
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import descompiler as des
from descompiler.eager.measure import measure_in_part
from descompiler.eager.planning import plan_partial
from descompiler.eager.survey import MEAN, ROWS, SAME, SUM, survey
from descompiler.model.probe import blueprint
from descompiler.planning.objective import Terms
from tests.harness.cases import cases
from tests.harness.failures import Raises, raised
from tests.harness.models import IDS, Branch, ThroughLists

PULL = {"*": "row_wise"}


class Everything(ThroughLists):
    """Bags, a parameter indexed, a parameter multiplied, sparse gradients, batch norm, dicts out."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 4, mode="mean", sparse=True)
        self.bias = nn.Parameter(torch.randn(9))
        self.matrix = nn.Parameter(torch.randn(9, 4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, ids):
        lengths = (ids % 3).sum(1)
        flat = torch.cat([ids.new_full((n,), i % 9) for i, n in enumerate(lengths.tolist())] + [ids.new_zeros(0)])
        flat = flat * 0 + ids[:, 0].repeat_interleave(lengths)
        bags = self.bag(flat, F.pad(lengths.cumsum(0)[:-1], (1, 0)) if len(ids) else lengths)
        e = self.norm(self.table(ids).sum(1) + bags)
        scores = e @ self.matrix.t()
        return {"score": self.top(e).squeeze(1) + self.bias[ids[:, 1]], "all": scores, "n": None}


class Packed(ThroughLists):
    """As most sequence models: packing refuses a batch without rows; a batch norm on top."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, ids):
        lengths = 1 + (ids[:, 0] % 3)
        packed = nn.utils.rnn.pack_padded_sequence(self.table(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.top(self.norm(self.gru(packed)[1][0]))


class Squeezed(Packed):
    """Can't run on one row either."""

    def forward(self, ids):
        e = self.embed(ids).unsqueeze(0).squeeze()
        return self.top(self.norm(e)) + super().forward(ids)


@pytest.mark.parametrize("cls", [Branch, Everything, Packed, Squeezed])
def test_trains_as_the_original(on_ranks, cls):
    with warnings.catch_warnings(record=True):
        report = des.verify(cls(), (IDS,), plans=[PULL], optimizers=["adagrad"], launch=on_ranks)
    assert report.cases == 1


def _no_rows_on_the_first_rank(rank, ranks):
    """Without rows the ids that `Branch` makes of a list are floats, at which the original fails."""
    model = Branch().double()
    reference = copy.deepcopy(model)
    module = des.compile(model, (IDS,), plan=PULL, loss="sum")
    out = module(IDS[:0] if rank == 0 else IDS)
    expected = reference(IDS)
    out.square().sum().backward()
    expected.square().sum().backward()
    worst = float((out - expected[: len(out)]).abs().sum())
    for (n, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        worst = max(worst, float((p.grad - module.pieces(n).cut(q.grad, rank)).abs().max()))
    text = raised(lambda: module(IDS if rank == 0 else IDS.double()))
    return worst, text


def test_a_lookup_that_needs_rows(on_ranks):
    for worst, text in on_ranks(_no_rows_on_the_first_rank, 2):
        assert worst < 1e-12
        assert "rank 1" in text and "int" in text


class FromTheEnd(ThroughLists):
    """A parameter that is indexed by numbers which count from its end."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(9))

    def forward(self, ids):
        return self.top(self.embed(ids)).squeeze(1) + self.bias[ids[:, 0] - 9]


def _below_zero(rank, ranks):
    """The largest difference from one process; what an embedding says of a negative id on one rank."""
    model = FromTheEnd().double()
    module = des.compile(copy.deepcopy(model), (IDS,), plan=PULL)
    worst = float((module(IDS) - model(IDS)).abs().max())
    return worst, raised(lambda: module(IDS - 9 * (rank == 1)))


def test_indices_may_count_from_the_end_and_ids_may_not(on_ranks):
    for worst, text in on_ranks(_below_zero, 2):
        assert worst < 1e-12
        assert re.search(r"InputError: rank 1: table 'table\.weight': id -\d is not in 0 to 8", text)


class Scalars(Packed):
    """A mean and a sum over rows, and what no row changes; packing needs rows."""

    def forward(self, ids):
        score = super().forward(ids).squeeze(1)
        return {"mean": score.mean(), "rows": score, "sum": score.sum(), "same": self.top.weight.square().sum()}


@pytest.mark.long
def test_scalars_of_the_batch(on_ranks):
    assert survey(blueprint(Scalars()), (IDS,)).outputs == (MEAN, ROWS, SUM, SAME)
    assert des.verify(Scalars(), (IDS,), plans=[PULL], launch=on_ranks).cases == 1


def test_what_a_parameter_is_used_for():
    class Uses(Everything):
        def __init__(self):
            super().__init__()
            self.rare = nn.Embedding(9, 1, sparse=True)

        def forward(self, ids):
            rare = torch.embedding(self.rare.weight, ids[:, 0], -1, False, True)  # functions of F pass keywords on
            return super().forward(ids)["score"] + rare.squeeze(1)

    uses = survey(blueprint(Uses()), (IDS,)).uses
    assert {n for n, u in uses.items() if u.sparse} == {"bag.weight", "rare.weight"}
    assert {n for n, u in uses.items() if u.lookups and not u.others} == {
        "table.weight", "bag.weight", "bias", "rare.weight"
    }  # fmt: skip
    assert not uses["matrix"].lookups and uses["matrix"].others


def _own_examples(rank, ranks):
    """The bags of `Everything` are as long as the values say, so that ranks see other numbers of ids."""
    module = des.compile(Everything().double(), (IDS[3:] if rank else IDS[:3],), plan=PULL)
    module(IDS[: 1 + rank])["score"].sum().backward()
    return module.plan.digest()


def test_ranks_whose_examples_differ_make_one_plan(on_ranks):
    assert len(set(on_ranks(_own_examples, 2))) == 1


def test_one_rank():
    model = Branch()
    module = des.compile(model, (IDS,), plan=PULL)
    assert torch.equal(module(IDS), model(IDS))
    module(IDS).sum().backward()
    model(IDS).sum().backward()
    assert all(torch.allclose(p.grad, q.grad) for p, q in zip(module.parameters(), model.parameters(), strict=True))
    coverage = module.coverage()
    assert coverage.rung == "partial" and [f.rung for f in coverage.failures] == ["export", "dynamo", "fx", "leaf"]


class RankDependent(ThroughLists):
    """Looks up once more where a flag says so, or fails there."""

    action = ""

    def forward(self, ids):
        e = self.embed(ids)
        if self.action == "twice":
            e = e + self.table(ids).sum(1)
        if self.action == "norm":
            e = F.batch_norm(e, None, None, training=True)
        if self.action == "fails":
            raise ValueError("no such user")
        return self.top(e)


def _differ(rank, ranks, action):
    module = des.compile(RankDependent().double(), (IDS,), plan=PULL)
    host = vars(module)["_host"]
    if rank == 1:
        host.action = action
    text = raised(lambda: module(IDS))
    host.action = ""
    module(IDS).sum().backward()
    return text, bool(module.table.weight.grad.isfinite().all())


NORM = r"RankError.*rank 0: runs in mode the end of forward.*rank 1: runs in mode batch norm"


@pytest.mark.parametrize(("action", "expected"), [("norm", NORM), ("fails", "no such user")])
def test_ranks_that_differ_get_an_error(on_ranks, action, expected):
    for text, fine in on_ranks(_differ, 2, action, timeout_s=60):
        assert re.search(expected, text, re.S), text
        assert fine, "the next step has to work"


class FailsBackward(ThroughLists):
    """Backward raises, or autograd does, in front of a batch norm's backward or behind it."""

    action = ""
    mixes = False

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, ids, x):
        e = self.norm(Raises.apply(self.embed(ids) + x, self.action == "behind the norm"))
        e = Raises.apply(e, self.action == "in front of the norm").exp()
        if self.action == "autograd":
            e.detach().zero_()
        return self.top(e - e.mean(0) if self.mixes else e)


class FailsBackwardMixing(FailsBackward):
    mixes = True


BACKWARDS = [
    (FailsBackward, "behind the norm"),
    (FailsBackward, "in front of the norm"),
    (FailsBackward, "autograd"),
    (FailsBackwardMixing, "in front of the norm"),
]


def _failing_backwards(rank, ranks):
    """What each backward says that fails on rank 1; the error of the next step, whose inputs come from a graph too."""
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    modules, found = {}, []
    for cls, action in BACKWARDS:
        if cls not in modules:
            model = cls().double()
            with warnings.catch_warnings(record=True):
                modules[cls] = des.compile(copy.deepcopy(model), (IDS, x), plan=PULL, loss="sum"), model
        module, reference = modules[cls]
        host = vars(module)["_host"]
        host.action = action if rank == 1 else ""
        text = raised(module(IDS[mine], x[mine]).square().sum().backward)
        host.action = ""
        worst, scales = 0.0, [torch.tensor(2.0, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        for m, rows, scale in ((module, mine, scales[0]), (reference, slice(0, 8), scales[1])):
            m.zero_grad()
            scaled = (x * scale)[rows]
            (m(IDS[rows], scaled).square().sum() + 0 * scaled.sum()).backward()  # their graph has another user
        for (n, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
            if q.grad is not None:
                worst = max(worst, float((p.grad - module.pieces(n).cut(q.grad, rank)).abs().max()))
        found.append((text, worst, [float(scale.grad) for scale in scales]))
    return found


def test_a_backward_that_fails_on_one_rank_raises_on_all(on_ranks):
    ranks = on_ranks(_failing_backwards, 2, timeout_s=120)
    for (_, action), *found in zip(BACKWARDS, *ranks, strict=True):
        said = rf"\({re.escape(inspect.getfile(Raises))}:\d+\): ValueError: no such gradient"
        if action == "autograd":
            said = r"\(an operator of torch\): RuntimeError: one of the variables needed for gradient computation"
        for text, worst, _ in found:
            assert re.search(rf"^InputError: rank 1: backward of forward {said}", text), text
            assert worst < 1e-11, "the next step has to work"
        scales = [scale for *_, scale in found]
        assert sum(mine for mine, _ in scales) == pytest.approx(scales[0][1], rel=1e-12)


def _unequal_lookups(rank, ranks):
    """Rank 1 looks one table up twice, rank 0 another one: nobody waits, and gradients are right."""
    model = Unequal().double()
    reference = copy.deepcopy(model)
    module = des.compile(model, (IDS,), plan=PULL, loss="sum")
    mine = IDS[:3] % 4 if rank == 0 else IDS[3:] % 4 + 4
    out = module(mine)
    out.square().sum().backward()
    every = reference(torch.cat([IDS[:3] % 4, IDS[3:] % 4 + 4]))
    every.square().sum().backward()
    worst = float((out - (every[:3] if rank == 0 else every[3:])).abs().max())
    for (n, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        if q.grad is not None:  # of the layer that Unequal does not use
            worst = max(worst, float((p.grad - module.pieces(n).cut(q.grad, rank)).abs().max()))
    return worst


class Unequal(ThroughLists):
    def __init__(self):
        super().__init__()
        self.rare = nn.Embedding(9, 4)

    def forward(self, ids):
        e = self.table(ids).sum(1)
        low, high = ids[:, 0] < 4, ids[:, 0] >= 4
        if high.any():
            e = e + (self.table(ids[:, 1]) * self.table(ids[:, 2])) * high[:, None]
        if low.any():
            e = e + self.rare(ids[:, 1]) * low[:, None]
        return self.top(e)


def test_ranks_that_look_up_different_things(on_ranks):
    for worst in on_ranks(_unequal_lookups, 2):
        assert worst < 1e-12


class Mixes(ThroughLists):
    def forward(self, ids):
        e = self.embed(ids)
        return self.top(e - e.mean(0))


class MixesInAllWays(Packed):
    """Rows of the batch, a matrix of two of its sizes, scalars, batch norm: every output combines rows."""

    def forward(self, ids):
        e = self.norm(self.table(ids).sum(1)) + super().forward(ids)
        return {"centred": e - e.mean(0), "pairs": e @ e.t(), "largest": e.max(), "rows": e, "two": e.new_ones(2)}


@pytest.mark.parametrize(("cls", "ranks"), [(Mixes, 2), (MixesInAllWays, 3)])
def test_where_rows_depend_on_each_other_every_rank_runs_the_global_batch(on_ranks, cls, ranks):
    assert (
        des.verify(cls(), (IDS,), ranks=ranks, plans=[None, PULL], optimizers=["adagrad"], launch=on_ranks).cases == 2
    )


class ThroughTwo(ThroughLists):
    def forward(self, ids):
        return self.top(self.embed(ids).tanh() + self.embed(ids).sigmoid())


class Transformed(ThroughLists):
    """torch.func lets nobody watch what autograd keeps."""

    def forward(self, ids):
        return self.top(self.embed(ids) + torch.func.grad(lambda e: e.square().sum())(self.table(ids[:, 0])))


@pytest.mark.parametrize(("cls", "least"), [(ThroughTwo, 2 * 4), (Transformed, 0)])
def test_what_autograd_keeps_is_seen_where_it_can_be(cls, least):
    """Of each row: what tanh and the sigmoid return, and what the layer takes."""
    seen = survey(blueprint(cls()), (IDS,))
    assert least <= seen.kept <= 3 * least and seen.uses["table.weight"].lookups and seen.outputs == ("rows",)


class Chooses(Packed):
    """What is chosen depends on the whole batch, for some weights and rows: gradients don't tell."""

    def forward(self, ids):
        e = self.table(ids).sum(1)
        return super().forward(ids) + e[:, e.mean(0).argmax()][:, None]


class MeanOfValid(Packed):
    """A mean over the valid positions of all rows: a mean over rows where they have as many."""

    def forward(self, ids):
        valid = ids % 2 == 0
        return (super().forward(ids) * valid).sum() / valid.sum()


@pytest.mark.parametrize("cls", [Chooses, MeanOfValid])
def test_combinations_that_one_division_would_not_show(cls):
    seen = survey(blueprint(cls()), (IDS,))
    assert seen.coupled.startswith("output 0 of forward depends") and not seen.random


class Draws(Mixes):
    def forward(self, ids):
        noise = torch.tensor([random.random(), np.random.random(), torch.rand(()).item()])
        return super().forward(ids), noise


class Noise(Branch):
    """Rows are independent, and share one random number."""

    def forward(self, ids):
        return super().forward(ids) * random.random()


@pytest.mark.parametrize("cls", [Draws, Noise])
def test_what_is_drawn_for_the_whole_batch_is_the_same_in_one_process(on_ranks, cls):
    seen = survey(blueprint(cls()), (IDS,))
    assert seen.coupled and seen.random
    assert des.verify(cls(), (IDS,), ranks=2, plans=[None, PULL], launch=on_ranks).cases == 2


def _same_draws(rank, ranks):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = des.compile(Draws(), (IDS,))
    for draw in (random.random, np.random.random, torch.rand):
        [draw(1) if draw is torch.rand else draw() for _ in range(rank)]  # ranks' own generators differ
    before = random.random(), np.random.random()
    draws = [module(IDS[rank : 3 + 2 * rank])[1].tolist() for _ in range(2)]
    return draws, [str(w.message) for w in caught], before


def test_the_global_batch_draws_the_same_on_every_rank(on_ranks):
    (first, warned, mine), (second, _, other) = on_ranks(_same_draws, 2)
    assert first == second and first[0] != first[1] and mine != other
    assert any(
        "output 0 of forward depends on how a batch is divided" in w and "computes the global batch" in w
        for w in warned
    )


def _regularised(rank, ranks, kind, cls=Branch, plan=PULL):
    """A regulariser outside forward, on whatever the rank holds."""
    model = cls().double()
    reference = copy.deepcopy(model)
    module = des.compile(model, (IDS,), plan=plan)
    assert (plan == PULL) == (not module.pieces("table.weight").shared())
    penalty = {
        "squares": lambda m: sum((0.1 * p.square()).sum() for p in m.parameters()),
        "norm": lambda m: torch.norm(m.table.weight),
        "p-norm": lambda m: torch.norm(m.table.weight, p=3) ** 2 + m.table.weight.pow(2).mean(),
        "product": lambda m: (m.table.weight @ m.table.weight.t()).square().sum(),
    }[kind]
    losses = []
    for m, rows in ((reference, slice(0, 8)), (module, slice(rank * 4, rank * 4 + 4))):
        loss = m(IDS[rows]).square().mean() + penalty(m)
        loss.backward()
        losses.append(penalty(m).item())
    worst = 0.0
    for (n, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        if q.grad is not None:
            worst = max(worst, float((p.grad - module.pieces(n).cut(q.grad, rank)).abs().max()))
    return worst, abs(losses[0] - losses[1])


@pytest.mark.parametrize("kind", cases(["squares", "norm", "p-norm", "product"], ["p-norm", "product"]))
def test_regularisers_outside_forward(on_ranks, kind):
    for gradient, value in on_ranks(_regularised, 2, kind):
        assert gradient < 1e-12 and value < 1e-12


class Graph(ThroughLists):
    def forward(self, ids):
        return self.top(self.table(ids).sum(1))


@pytest.mark.parametrize("kind", ["squares", "norm", "p-norm"])
def test_regularisers_where_every_rank_holds_some_rows(on_ranks, kind):
    for gradient, value in on_ranks(_regularised, 2, kind, Graph, {"*": "hot_rows"}):
        assert gradient < 1e-12 and value < 1e-12


def test_plans_are_made_saved_and_followed(tmp_path):
    model = Branch()
    plan = des.plan(model, (IDS,), ranks=1, pins=PULL)
    assert (
        plan.forms == {"table.weight": "unique_rows"}
        and plan.edit({"table": "replicate"}).forms["table.weight"] == "replicate"
    )
    plan.save(tmp_path / "plan.json")
    for followed in (plan, tmp_path / "plan.json", des.plan(model, (IDS,), plan=tmp_path / "plan.json")):
        module = des.compile(model, (IDS,), plan=followed)
        assert module.plan.forms == plan.forms and torch.equal(module(IDS), model(IDS))
    text = (
        (tmp_path / "plan.json").read_text().replace('"table.weight": "unique_rows"', '"table.weight": "replicate"', 1)
    )
    (tmp_path / "edited.json").write_text(text)
    assert des.compile(model, (IDS,), plan=tmp_path / "edited.json").plan.forms["table.weight"] == "replicate"
    with pytest.raises(des.PlanError, match="for 2 ranks, and this is 1"):
        des.compile(model, (IDS,), plan=des.plan(model, (IDS,), ranks=2))
    with pytest.raises(des.PlanError, match=r"'bag\.weight' can't take the form replicate: its gradients are sparse"):
        des.plan(Everything(), (IDS,), ranks=2, pins={"bag.weight": "replicate"})
    with pytest.raises(des.PlanError, match="captured in part"):
        des.compile(model, (IDS,), plan=des.plan(TrainingOnly(), (IDS,), ranks=1))


class Large(ThroughLists):
    """A table that is worth dividing, beside one that is not."""

    def __init__(self):
        super().__init__()
        self.big = nn.Embedding(30_000, 4)

    def forward(self, ids):
        return self.top(self.embed(ids) + self.big(torch.tensor(ids.tolist()).reshape(ids.shape) * 3).sum(1))


@pytest.fixture(scope="module")
def large():
    template = blueprint(Large())
    seen = survey(template, (IDS,))
    return lambda rows=8, ranks=2, pins=None, **terms: plan_partial(template, seen, ranks, rows, pins, Terms(**terms))


def test_what_plans_of_other_models_consider_is_considered(large):
    """Forms that are forbidden, a limit of memory, a cluster: by the planner of every other model."""
    forms = {"table.weight": "replicate", "big.weight": "unique_rows"}
    pulled, whole = large(), large(forbid={"big": "unique_rows"})
    assert pulled.forms == forms and pulled.exact and whole.forms == forms | {"big.weight": "replicate"}
    assert pulled.price_bytes < whole.price_bytes == pulled.prices["big.weight"]["replicate"]
    # by hand: a weight, its gradient and adagrad's state, of 15,000 rows of 4 and of the small ones
    small = 9 * 4 + 4 + 1  # the other layer is not used, but held
    assert pulled.pieces["big.weight"].numel(0) == 60_000
    memory = large(memory_bytes=1 << 30).memory(0)
    assert memory.weights_bytes == 4 * (60_000 + small + 5) and memory.gradients_bytes == memory.weights_bytes
    assert memory.activations_bytes >= 8 * (3 + 3) * 4 * 4  # what is looked up, at least
    many = 1 << 22
    assert large(many).forms["big.weight"] == "replicate"  # each rank needs nearly all of it
    limit = large(many, memory_bytes=1 << 40).memory(0).total - 1
    assert large(many, memory_bytes=limit).forms["big.weight"] == "unique_rows"
    with pytest.raises(des.PlanError, match="no plan fits 10 B a rank"):
        large(memory_bytes=10)
    cluster = des.Cluster.builtin("ethernet-10g", 2)
    timed = large(cluster=cluster)
    assert timed.objective == "seconds" and 0 < timed.bound <= timed.price
    for terms, text in (
        ({"forbid": {"big": ["unique_rows", "replicate"]}}, "left without a form"),
        ({"cluster": cluster.with_ranks(4)}, "has 4 ranks, the plan is for 2"),
        ({"pins": {"big": "column_wise"}}, "captured in part; there it is replicate or unique_rows"),
    ):
        with pytest.raises(des.PlanError, match=text):
            large(**terms)


def test_global_batches_are_priced_as_such():
    """Where rows are coupled every rank looks up the rows of all."""
    table = nn.Embedding(9_000, 4)
    plans = []
    for cls in (Branch, Mixes):
        model = cls()
        model.table = table
        template = blueprint(model)
        plans.append(plan_partial(template, survey(template, (IDS,)), 4, 8, None, Terms()))
    alone, coupled = (p.unique["table.weight"] for p in plans)
    assert 20 < alone <= 24 and 3 * alone < coupled <= 4 * 24


def _from_samples(rank, ranks):
    """Samples of three ids, by which rows are divided: gradients, and the plan."""
    model = Large().double()
    reference = copy.deepcopy(model)
    samples = [(torch.randint(3, (8, 3)),) for _ in range(4)] if rank == 0 else []
    module = des.compile(model, (IDS,), loss="sum", samples=samples, memory_bytes=1 << 30, plan={"table": "row_wise"})
    share = slice(0, 3) if rank == 0 else slice(3, 8)
    module(IDS[share]).square().sum().backward()
    reference(IDS).square().sum().backward()
    predicted, sent = module.plan.traffic(rank).bytes_by_collective, module.traffic().bytes_by_collective
    assert predicted.keys() <= sent.keys(), "an estimate of the same collectives"
    worst = 0.0
    for (name, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        if q.grad is not None:
            worst = max(worst, float((p.grad - module.pieces(name).cut(q.grad, rank)).abs().max()))
    text = raised(lambda: des.compile(Large(), (IDS,), samples=[]))
    return worst, module.plan.statistics, module.plan.unique, module.pieces("table.weight").sizes.tolist(), text


@pytest.mark.long
def test_ids_of_samples_are_measured(on_ranks):
    (worst, source, unique, sizes, text), other = on_ranks(_from_samples, 2)
    assert max(worst, other[0]) < 1e-12 and other[2] == unique
    assert source == "measured on 4 batches, 32 rows" and unique["big.weight"] == pytest.approx(3)
    assert sizes[0] < sizes[1] < 9, "the first rank has the rows that are asked for"
    assert all("samples has no batch" in t for t in (text, other[-1]))


def test_samples_that_can_not_be_run():
    with pytest.raises(des.InputError, match="can't run sample 1 "):
        template = blueprint(Large())
        measure_in_part(template, survey(template, (IDS,)), [(IDS,), (IDS + 9,)], 2)


def _follows(rank, ranks, path):
    module = des.compile(Branch(), (IDS,), plan=path)
    return module.plan.forms, module.table.weight.shape[0]


def test_two_ranks_follow_a_plan(on_ranks, tmp_path):
    des.plan(Branch(), (IDS,), ranks=2, pins=PULL).save(tmp_path / "plan.json")
    found = on_ranks(_follows, 2, tmp_path / "plan.json")
    assert [f for f, _ in found] == [{"table.weight": "unique_rows"}] * 2 and sum(n for _, n in found) == 9


class TrainingOnly(ThroughLists):
    """Traced in training; in evaluation ids go through lists."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids):
        e = self.table(ids).sum(1) if self.training else self.embed(ids)
        return self.top(e) * self.scale


def _evaluated(rank, ranks, form):
    model = TrainingOnly().double()
    module = des.compile(model, (IDS,), plan={"*": form})
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, module)]
    rows = slice(rank * 4, rank * 4 + 4)
    worst = []
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        for _ in range(2):
            model.train(), module.train()
            model(IDS).square().mean().backward()
            module(IDS[rows]).square().mean().backward()
            for o in optimizers:
                o.step()
                o.zero_grad()
            model.eval(), module.eval()
            with torch.no_grad():
                worst.append(float((module(IDS[rows]) - model(IDS)[rows]).abs().max()))
    text = raised(lambda: module(IDS[rows]))
    said = sum("not captured as a graph in these training flags" in str(n.message) for n in notes)
    return module.coverage().rung, max(worst), said, module.output_rows, module.traffic().total, text


@pytest.mark.parametrize("form", ["row_wise", "column_wise", "hot_rows"])
def test_evaluation_that_is_not_captured_runs_the_users_forward(on_ranks, form):
    for rung, worst, said, rows, sent, text in on_ranks(_evaluated, 2, form):
        assert rung == "export" and worst < 1e-12 and said == 1 and len(rows) == 1 and sent > 0
        assert "call it within torch.no_grad()" in text


def test_compiled_by_the_first_forward():
    model = Branch()
    module = des.compile(model)
    assert torch.equal(module(IDS), model(IDS))
    assert type(module).__name__ == "PartialModule" and module.coverage().rung == "partial"


def test_hooks_of_a_module_that_its_first_forward_compiles():
    """They are called once in a call, in the first too."""
    module, seen = des.compile(Branch()), []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    for _ in range(2):
        module(IDS)
    assert seen == ["before", "PartialModule"] * 2


def _as_alone(rank, ranks, usage):
    """The largest difference of a gradient on this rank from the original's, in an unusual but legal use."""
    model = Everything().double()
    for p in model.parameters():
        p.requires_grad_(usage != "thawed" or p.dim() > 1)
    alone = copy.deepcopy(model)
    module = des.compile(model, (IDS,), plan=PULL, loss="sum")
    share = slice(0, 3) if rank == 0 else slice(3, 8)
    if usage == "thawed":
        module.requires_grad_(True)
        alone.requires_grad_(True)
    if usage == "hooks":
        for p in (*module.parameters(), *alone.parameters()):
            p.register_hook(lambda g: g * 0.5)
    for m, ids in ((module, IDS[share]), (alone, IDS)):
        out = m(ids)
        loss = out["score"].square().sum() + out["all"].sin().sum()
        for last in (False, True)[usage != "twice" :]:
            loss.backward(retain_graph=not last)
    differences = []
    for name, p in module.named_parameters():
        if alone.get_parameter(name).grad is None:
            assert p.grad is None
            continue
        want = module.pieces(name).cut(alone.get_parameter(name).grad.to_dense(), rank)
        differences.append(float((p.grad.to_dense() - want).abs().max()) if want.numel() else 0.0)
    return max(differences)


@pytest.mark.parametrize("usage", ["thawed", "hooks", "twice"])
def test_gradients_of_thawed_parameters_behind_hooks_and_twice(on_ranks, usage):
    with warnings.catch_warnings(record=True):
        assert max(on_ranks(_as_alone, 2, usage)) < 1e-12

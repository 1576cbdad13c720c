"""The choice of forms: optimal on small models, bounded on large ones, never worse than what the field does."""

import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.captured import Captured
from descompiler.examples import zipf_ids
from descompiler.layout.fetches import Counts
from descompiler.passes import FORMS, RULES
from descompiler.planning.cluster import CLUSTERS
from descompiler.planning.objective import Terms
from descompiler.planning.pins import allowed_forms
from descompiler.planning.search import Search
from descompiler.region import flow
from descompiler.region.cut import Weights
from examples.models import MODELS
from tests.harness.cases import cases

NAMES = [f.name for f in FORMS if f.name != "hot_rows"]


class Mixture(nn.Module):
    """Tables of several sizes, and consumers chosen by the test; they may all read the same ids."""

    def __init__(self, sizes, dim, hidden, consumers, sparse, same_ids):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, dim, sparse=sparse) for n in sizes)
        self.first = nn.Linear(len(sizes) * dim, hidden)
        self.norm, self.linear = nn.BatchNorm1d(len(sizes) * dim), nn.Linear(dim, 2)
        self.consumers, self.same_ids = consumers, same_ids

    def forward(self, x):
        ids = [x[:, 0]] * len(self.tables) if self.same_ids else x.unbind(1)
        e = torch.stack([t(i) for t, i in zip(self.tables, ids, strict=True)], 1)
        out = []
        for consumer in self.consumers:
            if consumer == "fm":
                out.append((e.sum(1) ** 2 - (e**2).sum(1)).sum(1))
            elif consumer == "deep":
                out.append(torch.relu(self.first(e.flatten(1))).sum(1))
            elif consumer == "gmf":
                out.append((e[:, 0] * e[:, -1]).sum(1))
            elif consumer == "attention":
                out.append((torch.softmax(e @ e.transpose(1, 2), -1) @ e).sum((1, 2)))
            elif consumer == "norm":
                out.append((self.norm(e.flatten(1)) ** 2).sum(1))
            elif consumer == "sorted":  # no rule keeps it in the region
                out.append(e.sort(-1).values[:, :, 0].sum(1))
            elif consumer == "each":
                out.append(self.linear(e).sum((1, 2)))
        return torch.stack(out, 1)


def captured(sizes, dim, hidden, consumers, sparse=False, same_ids=False):
    with torch.device("meta"):
        model = Mixture(sizes, dim, hidden, consumers, sparse, same_ids)
    return Captured.of(model, torch.zeros(4, len(sizes), dtype=torch.int64))


def search_of(found, ranks, rows, **terms):
    w = Weights(ranks, rows)
    allowed = allowed_forms(found.operators, forbid={"*": "hot_rows"})  # nothing says which rows are
    return Search(found.program, found.operators, RULES, w, allowed, Terms(**terms))


def resized(found, sizes):
    """The same model with tables of other sizes, without capturing it again."""
    rows = dict(zip((o.name for o in found.operators), sizes, strict=True))
    operators = [replace(o, table=replace(o.table, rows=rows[o.name])) for o in found.operators]
    tables = {o.name: nn.Parameter(torch.empty(o.rows, o.dim, device="meta")) for o in operators}
    program = replace(found.program, parameters={**found.program.parameters, **tables})
    return replace(found, program=program, operators=operators)


def compare_with_all_choices(found, ranks, rows, **terms):
    """The bound, and what the search finds, with the price of every form of every table."""
    every = search_of(found, ranks, rows, **terms)
    forms, _ = every.run()
    below = lambda allowed: every.bound_of(every.relaxation.solve(allowed).sent_bytes, allowed)  # noqa: E731
    names = list(every.allowed)
    choices = [dict(zip(names, c, strict=True)) for c in itertools.product(*every.allowed.values())]
    best = min(every.score(c).price for c in choices)
    assert below(every.allowed) <= best * (1 + 1e-9)
    assert not every.exact or every.score(forms).price == best
    search = search_of(found, ranks, rows, effort=1000, **terms)
    forms, bound = search.run()
    assert search.score(forms).price == best and search.exact and bound == best
    # and with some forms fixed, as branch and bound asks
    for c in choices[:: max(1, len(choices) // 10)]:
        fixed = {n: (c[n],) if k % 2 else f for k, (n, f) in enumerate(every.allowed.items())}
        least = min(every.score(x).price for x in choices if all(x[n] in f for n, f in fixed.items()))
        assert below(fixed) <= least * (1 + 1e-9)


SIZES = [2, 30, 1000, 100_000]


@pytest.mark.parametrize("number", cases(range(100), range(5)))
def test_small_models_get_the_best_of_all_choices(number, draws):
    """Every form of every table, mixtures included; no choice is below the bound, and what is exact is the least."""
    count = draws.choice([2, 2, 2, 2, 3])
    dim, hidden, sparse = draws.choice([1, 4, 16]), draws.choice([2, 64, 400]), draws.random() < 0.3
    consumers = draws.sample(["fm", "deep", "gmf", "attention", "norm", "sorted", "each"], draws.choice([1, 2]))
    model = captured([2] * count, dim, hidden, consumers, sparse, same_ids=draws.random() < 0.3)
    for _ in range(5):
        sizes, ranks = [draws.choice(SIZES) for _ in range(count)], draws.choice([2, 3, 8, 40])
        rows = draws.choice([1, 50, 4096])
        print(f"{sizes}, {dim=}, {hidden=}, {consumers}, {sparse=}, {ranks=}, {rows=}")
        found = resized(model, sizes)
        compare_with_all_choices(found, ranks, rows)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("number", cases(range(40), range(2)))
def test_in_seconds_no_choice_is_below_the_bound_either(number, draws):
    """What ranks do themselves counts: the least of each table, as if ranks shared it evenly."""
    count, dim, sparse = draws.choice([2, 2, 3]), draws.choice([1, 4, 16]), draws.random() < 0.5
    consumers = draws.sample(["fm", "deep", "gmf", "attention", "norm", "sorted", "each"], draws.choice([1, 2]))
    model = captured([2] * count, dim, 64, consumers, sparse, same_ids=draws.random() < 0.3)
    for _ in range(3):
        sizes, ranks, rows = (
            [draws.choice(SIZES) for _ in range(count)],
            draws.choice([2, 3, 8]),
            draws.choice([1, 4096]),
        )
        name = draws.choice(CLUSTERS.names)
        print(f"{sizes}, {dim=}, {consumers}, {sparse=}, {ranks=}, {rows=}, {name}")
        compare_with_all_choices(resized(model, sizes), ranks, rows, cluster=des.Cluster.builtin(name, ranks))


@pytest.mark.parametrize(
    ("sizes", "dim", "hidden", "consumers", "sparse", "same_ids", "ranks", "rows"),
    [
        ([100_000, 100_000], 16, 2, ["norm"], False, False, 8, 4096),  # of a rank's share of what leaves
        ([100_000, 100_000], 16, 2, ["deep", "fm"], True, True, 2, 4096),  # of what leaves
        ([1000, 100_000, 1000], 1, 400, ["deep"], False, False, 2, 50),  # of weights that are cut
        ([100_000] * 3, 16, 2, ["fm"], False, True, 2, 4096),  # of ids
    ],
)
def test_the_bound_where_it_is_close(sizes, dim, hidden, consumers, sparse, same_ids, ranks, rows):
    """Half as much again of any of its terms would be above the best plan."""
    compare_with_all_choices(captured(sizes, dim, hidden, consumers, sparse, same_ids), ranks, rows)


class Returned(nn.Module):
    """One table leaves as it is, another as what is made of it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.linear = nn.Embedding(10_000, 4), nn.Embedding(500, 32), nn.Linear(32, 2)

    def forward(self, x):
        return self.first(x[:, 0]), self.linear(self.second(x[:, 1]))


def test_the_bound_is_that_of_the_graph_before_it_is_reduced(monkeypatch):
    """Whatever forms are possible: what tables cost is added to what the reduction leaves there."""
    returned = Captured.of(Returned().to("meta"), torch.zeros(4, 2, dtype=torch.int64))
    for found in (returned, captured([1000, 100_000], 1, 400, ["deep", "sorted"])):
        search = search_of(found, 4, 64)
        choices = [dict(zip(search.allowed, c, strict=True)) for c in itertools.product(*search.allowed.values())]
        possible = [search.allowed, *({n: (form,) for n, form in c.items()} for c in choices)]
        bounds = [search.relaxation.solve(allowed) for allowed in possible]
        assert len(set(bounds)) > 3
        with monkeypatch.context() as whole:
            whole.setattr(flow, "reduced", lambda graph, kept: graph)
            other = search_of(found, 4, 64).relaxation
            assert bounds == [other.solve(allowed) for allowed in possible]


def test_a_bound_above_the_price_is_an_error_and_never_a_proof(monkeypatch):
    """With ids that are counted too dear by far, the relaxation is no relaxation."""
    found = captured([1000, 100_000], 16, 64, ["fm"])
    search = search_of(found, 8, 4096)
    dear = {
        n: {f: replace(c, sent_bytes=100 * c.sent_bytes) for f, c in forms.items()} for n, forms in search.costs.items()
    }
    monkeypatch.setattr(search, "costs", dear)
    with pytest.raises(des.DescompilerError, match=r"less than .* that no plan should be below"):
        search.run()
    assert not search.exact


def test_branch_and_bound_from_any_choice():
    """What it leaves out is no better, be the bound as close as can be, or none at all, also from close to the best."""
    search = search_of(captured([1000, 100_000], 1, 400, ["deep"]), 2, 50, effort=1000)
    choices = [dict(zip(search.allowed, c, strict=True)) for c in itertools.product(*search.allowed.values())]
    prices = sorted({search.score(c).price for c in choices})
    assert prices[1] < 1.02 * prices[0], "some choice is close to the best"

    def least(fixed):
        prices = [search.score(c).price for c in choices if all(c[n] in forms for n, forms in fixed.items())]
        return SimpleNamespace(sent_bytes=min(prices))

    bounds = SimpleNamespace(solve=least), SimpleNamespace(solve=lambda fixed: SimpleNamespace(sent_bytes=0))
    for bound, price in itertools.product(bounds, (*prices[:3], prices[-1])):
        start = next(c for c in choices if search.score(c).price == price)
        search.relaxation, search.exact = bound, False
        assert search.score(search.complete(start)).price == prices[0] and search.exact


def test_a_search_that_is_broken_off_is_not_exact():
    search = search_of(captured([100_000] * 2, 16, 2, ["norm"]), 8, 4096, effort=0)
    dear = dict.fromkeys(search.allowed, "replicate")
    assert search.complete(dear) == dear and not search.exact


def test_no_single_move_improves_what_the_descent_finds():
    """Of more tables than branch and bound takes; it begins with the worst start, not with the best one."""
    found = captured([2, 30, 1000, 4000, 20_000, 100_000, 400_000] * 2, 16, 64, ["deep", "fm"])
    search = search_of(found, 8, 4096, effort=1000)
    starts = list(search.starts(frozenset()))
    worst = max(starts, key=search.score)
    search.starts = lambda inside: iter([worst])
    forms, _ = search.run()
    least = search.score(forms)
    assert least <= min(map(search.score, starts)) < search.score(worst)
    assert all(search.score(search.tied(forms, move)) >= least for move in search._moves(forms))


PRINT = """
import torch
from descompiler.captured import Captured
from examples.models import MODELS
model = MODELS["deepfm"]("fields", vocab_sizes=[10 ** (1 + i) for i in range(5)], dim=8, hidden=(32, 16))
plan = Captured.of(model, (torch.randn(4, 3), torch.zeros(4, 5, dtype=torch.int64))).plan(ranks=6, batch=512)
print(plan.digest(), plan.trials)
"""


def test_the_same_inputs_give_the_same_plan_in_any_process():
    texts = set()
    space: dict[str, str] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # here hashes are drawn anew for each process
        exec(PRINT, space)
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PRINT], env=environment, capture_output=True, text=True, check=True)
    texts |= {printed.getvalue(), run.stdout}
    assert len(texts) == 1 and len(texts.pop().split()) == 2


@pytest.mark.parametrize("name", ["fm", "deepfm", "dlrm", "wide_deep"])
def test_never_above_a_baseline(name):
    """Each strategy of the field that the forms can express, priced for its busiest rank like the plan."""
    model = MODELS[name]("fields", vocab_sizes=[200, 5_000, 1_000_000, 1_000_000], dim=16, hidden=(64, 32))
    inputs = (torch.randn(4, 3), torch.zeros(4, 4, dtype=torch.int64))
    found = Captured.of(model, inputs)
    for ranks in (2, 8, 64):
        plan = found.plan(ranks=ranks, batch=1024)
        search = search_of(found, ranks, 1024)
        for form in NAMES:
            uniform = {n: form if form in f else "replicate" for n, f in search.allowed.items()}
            assert plan.price_bytes <= search.score(uniform).price_bytes
        assert plan.price_bytes >= plan.bound * (1 - 1e-9)


def small():
    return MODELS["deepfm"]("fields"), (torch.randn(4, 3), torch.zeros(4, 6, dtype=torch.int64))


def test_seconds_are_minimised_on_a_cluster():
    model, inputs = small()
    found = Captured.of(model, inputs)
    cluster = des.Cluster.builtin("ethernet-10g", ranks=4)
    plan = found.plan(cluster=cluster, batch=64)
    assert plan.objective == "seconds" and plan.ranks == 4
    seconds = cluster.seconds([plan.traffic(r) for r in range(4)])
    assert plan.price == pytest.approx(seconds + plan.work_s) and plan.work_s > 0
    for form in NAMES:
        other = found.plan(cluster=cluster, batch=64, pins={"*": form})
        assert plan.bound <= plan.price <= other.price
    with pytest.raises(des.PlanError, match=r"has 4 ranks.*with_ranks\(8\)"):
        found.plan(cluster=cluster, ranks=8)


def test_memory_is_what_is_held():
    with torch.device("meta"):
        model = MODELS["deepfm"]("fields", vocab_sizes=[1000] * 4, dim=16, hidden=(8,))
    found = Captured.of(model, (torch.randn(4, 3), torch.zeros(4, 4, dtype=torch.int64)))
    dense = sum(p.numel() for n, p in model.named_parameters() if "tables" not in n)
    for form, share in (("replicate", 1), ("row_wise", 4)):
        m = found.plan(ranks=4, batch=8, pins={"*": form}, optimizer="adam").memory(0)
        rows = 4 * 1000 * 17 // share
        cut = sum(p.numel() for p in model.parameters()) - 4 * 1000 * 17 - dense
        assert cut == 0 and m.weights_bytes == m.gradients_bytes == 4 * (rows + dense)
        assert m.state_bytes == 2 * m.weights_bytes and m.activations_bytes > 0


def test_a_limit_of_memory_is_kept():
    """Tables that would be replicated are split; where nothing fits, the error says what is missing and what would."""
    with torch.device("meta"):
        model = MODELS["fm"]("fields", vocab_sizes=[3000] * 4, dim=16)
    found = Captured.of(model, (torch.randn(4, 3), torch.zeros(4, 4, dtype=torch.int64)))
    free = found.plan(ranks=4, batch=1_000_000)
    assert set(free.forms.values()) == {"replicate"}
    less = free.memory(0).total - 1
    split = found.plan(ranks=4, batch=1_000_000, memory_bytes=less)
    assert max(split.memory(r).total for r in range(4)) <= less and split.price_bytes > free.price_bytes
    whole = found.plan(ranks=4, batch=1, pins={"*": "replicate"}).memory(0).total
    limited = found.plan(ranks=4, batch=1, memory_bytes=whole // 2)
    assert max(limited.memory(r).total for r in range(4)) <= whole // 2
    with pytest.raises(des.PlanError, match=r"rank 0 is short of [\d,]+ B: it needs .*weights") as error:
        found.plan(ranks=4, batch=1, memory_bytes=whole // 6)
    assert "8 ranks would fit" in str(error.value)
    with pytest.raises(des.PlanError, match=r"without the pins and forbidden forms it fits"):
        found.plan(ranks=4, batch=1, memory_bytes=whole // 2, pins={"*": "replicate"})
    with pytest.raises(des.PlanError, match="its memory is not known"):
        found.plan(ranks=4, optimizer="lion")


class Scores(nn.Module):
    """What is cheapest by columns: a product of few numbers a row; one table is frozen."""

    def __init__(self, frozen=False):
        super().__init__()
        self.user, self.item = nn.Embedding(50_000, 32), nn.Embedding(50_000, 32)
        self.item.requires_grad_(not frozen)

    def forward(self, ids):
        return (self.user(ids[:, 0]) * self.item(ids[:, 1])).sum(1)


def test_an_optimiser_of_whole_rows_takes_no_columns():
    found, frozen = (Captured.of(Scores(x), torch.zeros(64, 2, dtype=torch.int64)) for x in (False, True))
    by_columns = {"user.weight": "column_wise", "item.weight": "column_wise"}
    for optimizer in ("adagrad", "adam", "sgd"):
        assert found.plan(ranks=2, optimizer=optimizer).forms == by_columns
    plan = found.plan(ranks=2, optimizer="rowwise_adagrad")
    assert "column_wise" not in plan.forms.values() and "column_wise" not in plan.prices["user.weight"]
    every = found.plan(ranks=2, pins={"*": "column_wise"}, optimizer="rowwise_adagrad")  # where it is possible
    assert every.forms == plan.forms
    with pytest.raises(des.PlanError, match=r"can't take the form column_wise: optimizer='rowwise_adagrad' looks at"):
        found.plan(ranks=2, pins={"user": "column_wise"}, optimizer="rowwise_adagrad")
    assert frozen.plan(ranks=2, pins={"item": "column_wise"}, optimizer="rowwise_adagrad")
    with pytest.raises(des.PlanError, match=r"and it can't take .*column_wise: optimizer='rowwise_adagrad'"):
        others = [n for n in NAMES if n != "column_wise"] + ["hot_rows"]
        found.plan(ranks=2, forbid={"*": others}, optimizer="rowwise_adagrad")


@pytest.mark.parametrize("form", ["row_wise", "unique_rows", "hot_rows"])
def test_ranks_hold_equally_many_rows_where_memory_is_short(form):
    """Rows of which a few are asked for: three of four ranks own those, unless the fourth can't hold all others."""
    model = MODELS["fm"]("fields", vocab_sizes=[40_000], dim=16)
    popular = torch.arange(40).unsqueeze(1)
    found = Captured.of(model, (torch.zeros(40, 3), popular))
    asked = {"ranks": 4, "batch": 40, "pins": {"*": form}, "samples": [(torch.zeros(40, 3), popular)] * 3}
    free = found.plan(**asked)
    most = [max(free.memory(r).total for r in range(4)), sum(free.memory(r).total for r in range(4)) // 3]
    assert most[1] < most[0]
    limited = found.plan(**asked, memory_bytes=most[1])
    assert max(limited.memory(r).total for r in range(4)) <= most[1]
    assert limited.price_bytes >= free.price_bytes


def test_whole_tables_are_balanced():
    """Longest processing time first: within 4/3 of the best, and of the mean where tables are many."""
    dims = [64, 48, 40, 32, 32, 24, 16, 16, 8, 8, 8, 8]

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(100, d) for d in dims)

        def forward(self, x):
            return torch.cat([torch.tanh(t(x[:, i])) * 2 for i, t in enumerate(self.tables)], 1)

    plan = des.plan(Wide(), torch.zeros(4, 12, dtype=torch.int64), ranks=4, batch=64, pins={"*": "table_wise"})
    loads = [sum(e.width(r) for e in plan.layout.exits) for r in range(4)]
    assert sum(loads) == sum(dims) and max(loads) <= sum(dims) / 4 * 4 / 3


def test_the_explanation_says_how_good_the_plan_is_and_why_each_form_lost():
    model, inputs = small()
    plan = Captured.of(model, inputs).plan(ranks=4, batch=64)
    text = plan.explain()
    assert "bytes of the busiest rank" in text and ("no choice of forms" in text or "above the best" in text)
    assert "ids: assumed: Zipf(1.05)" in text and "with adagrad; most on rank" in text
    table = max(plan.tables, key=lambda t: t.rows)
    one = plan.explain(table.name.removesuffix(".weight"))
    assert f"  {table.name}" in one and not any(t.name in one for t in plan.tables if t is not table)
    chosen = plan.prices[table.name][plan.forms[table.name]]
    for form, price in plan.prices[table.name].items():
        verdict = "chosen" if form == plan.forms[table.name] else rf"(runner-up, )?\+{price - chosen:,} B"
        assert re.search(rf"  {form}  .*  {price:,} B  {verdict}$", one, re.M), form
    for form, why in table.refusals.items():
        assert re.search(rf"  {form}  .*not possible: {re.escape(why)}$", one, re.M), form
    assert "beats" in one, "where replicating overtakes pulling has a closed form"
    with pytest.raises(des.PlanError, match="no table 'nobody'"):
        plan.explain("nobody")


def test_samples_are_what_prices_depend_on():
    """Ids that repeat are cheap to pull; the plan says what was measured."""
    model, dense = MODELS["fm"]("fields", vocab_sizes=[10_000] * 3, dim=4), torch.randn(64, 3)
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randint(n, (64, 3), generator=generator) for n in (2, 10_000))
    found = Captured.of(model, (dense, many))
    plans = [found.plan(ranks=4, pins={"*": "unique_rows"}, samples=[(dense, x)] * 3) for x in (few, many)]
    assert plans[0].price_bytes < plans[1].price_bytes / 4
    assert all("assumed" not in p.statistics for p in plans)
    assert max(plans[0].unique.values()) <= 2.5 < min(plans[1].unique.values())


def test_every_rank_is_priced_where_all_are_different():
    """Measured ids load each of 64 owners differently; the price is the busiest one's, and what is exact is that."""
    generator, rows, ranks = torch.Generator().manual_seed(0), 64, 64
    sizes = [10, 300, 5000, 30_000, 30_000, 1000, 20_000, 7, 50, 9000]
    model = MODELS["fm"]("offsets", vocab_sizes=sizes, dim=16)
    ids = [(torch.rand(rows, 10, generator=generator) ** 4 * torch.tensor(sizes)).long() for _ in range(4)]
    samples = [(torch.randn(rows, 3), x) for x in ids]
    found = Captured.of(model, samples[0])
    plan = found.plan(ranks=ranks, samples=samples)
    expected = plan.layout.expected([rows] * ranks, found.measure(samples))
    sent = []
    for r in range(ranks):
        own = {n: Counts(*(of[r] for of in vars(x).values())) for n, x in expected.items()}
        sent.append(plan.traffic(r, unique=own).total)
    assert max(sent) == plan.price_bytes and len(set(sent)) > 30
    assert not plan.exact or plan.price == plan.bound


@pytest.mark.long
def test_planning_takes_no_memory_for_the_rows_of_tables():
    """Fifty terabytes of tables, in every form."""
    rows = 10**11
    found = resized(captured([1000] * 4, 16, 8, ["fm", "deep"]), [rows] * 4)
    tracemalloc.start()
    try:
        plans = [found.plan(ranks=256, batch=512, pins={"*": form}) for form in NAMES] + [found.plan(ranks=256)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(t.rows == rows for p in plans for t in p.tables) and peak < 20e6


@pytest.mark.long
def test_the_work_of_planning_grows_with_tables_not_with_tables_times_ranks():
    def calls(found, ranks):
        count = 0

        def counted(frame, event, argument):
            nonlocal count
            count += event == "call"

        sys.setprofile(counted)
        try:
            found.plan(ranks=ranks, batch=512)
        finally:
            sys.setprofile(None)
        return count

    few, many = (captured([50_000 + i for i in range(n)], 16, 8, ["fm", "deep"]) for n in (10, 40))
    assert calls(many, 1024) < 1.5 * calls(many, 64)  # on 16 times as many ranks
    assert calls(many, 256) < 5 * calls(few, 256)  # of 4 times as many tables


@pytest.mark.slow
def test_a_plan_takes_no_room_for_each_table_on_each_rank():
    """What a table adds to the plan's file is the same on 16 times as many ranks."""
    few, many = (captured([100_003 + i for i in range(tables)], 32, 8, ["fm", "deep"]) for tables in (4, 12))
    for form in NAMES:
        sizes = [
            [len(found.plan(ranks=ranks, pins={"*": form}).to_json()) for found in (few, many)] for ranks in (64, 1024)
        ]
        assert sizes[1][1] - sizes[1][0] < 1.2 * (sizes[0][1] - sizes[0][0]), form


class Histories(nn.Module):
    """A recurrent encoding of a history of items, for one score."""

    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(1_000_000, 32)
        self.encoder, self.score = nn.GRU(32, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, history):
        return self.score(self.encoder(self.items(history))[1].squeeze(0))


def test_an_encoder_moves_to_its_table_where_computing_is_cheap_beside_sending():
    """The owner encodes every rank's histories: ids in, scores out, if the cluster computes fast enough."""
    with torch.device("meta"):
        model = Histories()
    found = Captured.of(model, torch.zeros(4, 50, dtype=torch.int64))
    slow, fast = (
        replace(des.Cluster.builtin("ethernet-10g", ranks=4), flops_per_s=flops_per_s, rates=None)
        for flops_per_s in (1e10, 1e15)
    )
    sent = {}
    for name, cluster in (("slow", slow), ("fast", fast)):
        plan = found.plan(batch=1024, cluster=cluster)
        sent[name] = max(plan.traffic(r).total for r in range(4))
        assert plan.forms == {"items.weight": "unique_rows" if name == "slow" else "table_wise"}
        cut = found.partition(plan).cut  # what ranks emit is what was priced
        assert [x.name for x in cut.exits] == [x.name for x in plan.layout.exits]
    assert plan.exits[0].startswith("aten.linear Owned")
    assert sent["fast"] < sent["slow"] / 10


def test_of_choices_as_cheap_the_fewest_collectives_are_taken():
    """A tiny table of its own form saves 60 of 7,408 bytes, and costs a collective more."""
    sizes = [4] + [100_000] * 6
    with torch.device("meta"):
        model = MODELS["lr"]("fields", vocab_sizes=sizes, sparse=True)
    ids = torch.stack([torch.zeros(64, dtype=torch.int64)] * len(sizes), 1)
    found = Captured.of(model, (torch.zeros(64, 3), ids))
    plan = found.plan(ranks=4, batch=256)
    pinned = found.plan(ranks=4, batch=256, pins={name: "unique_rows" for name in plan.forms if "tables.0." in name})
    calls = [max(p.traffic(r).calls for r in range(4)) for p in (plan, pinned)]
    assert calls[0] < calls[1] and pinned.price_bytes < plan.price_bytes <= pinned.price_bytes * 1.01
    assert not plan.exact and plan.bound <= pinned.price_bytes
    assert (
        f"{calls[0]} collectives a step where the least bytes, {pinned.price_bytes:,} B, take {calls[1]}"
        in plan.notes[0]
    )


class TermsBesideOthers(nn.Module):
    """What is returned is one table's, of a stack in which another one's terms are."""

    def __init__(self):
        super().__init__()
        self.bags = nn.EmbeddingBag(3, 6, sparse=True, mode="sum")
        self.items = nn.Embedding(9, 6, sparse=True)

    def forward(self, bags, items):
        both = torch.stack([self.bags(bags), self.items(items)], 1)
        return torch.stack(torch.unbind(both, 1)[::-1], 1)[:, 0].sum(1).tanh()


def test_no_plan_is_below_the_bound_where_terms_meet_values_from_outside():
    found = Captured.of(TermsBesideOthers(), (torch.zeros(6, 3, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)))
    for bags in ("row_wise", "table_wise", "column_wise", "replicate"):
        for items in ("unique_rows", "row_wise", "replicate"):
            plan = found.plan(ranks=2, pins={"bags.weight": bags, "items.weight": items})
            assert 0 < plan.bound <= plan.price


@pytest.mark.parametrize("form", ["hot_rows", "unique_rows", "sparse_all_gather"])
def test_the_bound_of_measured_ids_is_below_their_price(form):
    """As many ids are counted as were measured, and not as many as rows' probabilities add up to."""
    sizes = [1000, 38_461, 1_000_000]
    inputs = (torch.zeros(1024, 3), zipf_ids(sizes, (1024,), seed=1))
    with torch.device("meta"):
        model = MODELS["lr"]("fields", vocab_sizes=sizes, sparse=True)
    for batch in (256, 1024, 4096):
        plan = des.plan(model, inputs, ranks=2, batch=batch, samples=[inputs], pins={"*": form}, cluster="bytes")
        assert plan.bound <= plan.price

"""What ranks do themselves, counted by hand; and that a plan for a cluster weighs it."""

import dataclasses

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.check.rates import slowest_rates
from descompiler.cost_models.work import Rates
from descompiler.planning.work import CALL_OF_FETCHED
from examples.models import MODELS, make_inputs

RANKS, BATCH, IDS, ROWS, DIM = 2, 5, 3, 12, 4
NOTHING = dict.fromkeys(("call_s", "id_s", "element_s", "unique_s", "swept_s", "value_s"), 0.0)
OWN, ALL = BATCH * IDS, RANKS * BATCH * IDS


def model(sparse):
    return nn.EmbeddingBag(ROWS, DIM, mode="sum", sparse=sparse)


def where(flops_per_s=None, **rates):
    cluster = des.Cluster.builtin("ethernet-100g", ranks=RANKS)
    return dataclasses.replace(cluster, rates=Rates(**{**NOTHING, **rates}), flops_per_s=flops_per_s)


def counted(form, what, sparse=True):
    """How often the busiest rank does something, whatever the others cost."""
    ids = torch.zeros(BATCH, IDS, dtype=torch.int64)
    plan = des.plan(model(sparse), (ids,), ranks=RANKS, batch=BATCH, pins={"*": form}, cluster=where(**{what: 1.0}))
    assert plan.price == pytest.approx(plan.work_s + where().seconds([plan.traffic(r) for r in range(RANKS)]))
    return plan.work_s, plan.unique["weight"]


@pytest.mark.parametrize(
    ("form", "ids", "elements", "calls"),
    [
        ("row_wise", ALL, ALL * DIM, 1),
        ("column_wise", ALL, ALL * DIM / RANKS, 1),
        ("table_wise", ALL, ALL * DIM, 1),
        ("replicate", OWN, OWN * DIM, 1),
    ],
)
def test_ids_in_the_region_are_those_of_all_ranks(form, ids, elements, calls):
    assert counted(form, "id_s", sparse=False)[0] == pytest.approx(ids)
    assert counted(form, "element_s", sparse=False)[0] == pytest.approx(elements)
    assert counted(form, "call_s", sparse=False)[0] == pytest.approx(calls)
    assert counted(form, "unique_s", sparse=False)[0] == 0


def test_rows_that_are_fetched_are_looked_up_twice():
    ids, unique = counted("unique_rows", "id_s")
    assert ids == pytest.approx(OWN + RANKS * unique / 2)
    assert counted("unique_rows", "unique_s")[0] == pytest.approx(OWN)
    assert counted("unique_rows", "call_s")[0] == pytest.approx(1 + CALL_OF_FETCHED)  # the owner's, and its own


def test_gathered_gradients_update_rows_of_all_ranks():
    ids, unique = counted("sparse_all_gather", "id_s")
    assert ids == pytest.approx(OWN + (RANKS - 1) * unique)


def test_dense_gradients_are_of_all_rows_that_a_rank_holds():
    held = {
        "replicate": ROWS * DIM,
        "row_wise": ROWS * DIM / 2,
        "column_wise": ROWS * DIM / 2,
        "table_wise": ROWS * DIM,
    }
    for form, elements in held.items():
        assert counted(form, "swept_s", sparse=False)[0] == pytest.approx(elements)
        if form != "replicate":
            assert counted(form, "swept_s")[0] == 0


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("replicate", BATCH * (DIM + 8)),  # own rows: pooled vectors, and what a layer makes of them
        ("column_wise", RANKS * BATCH * DIM / RANKS + BATCH * 8),  # half of all rows' vectors
        ("table_wise", RANKS * BATCH * DIM + BATCH * 8),
        ("row_wise", RANKS * BATCH * DIM + BATCH * 8),  # a term of each
    ],
)
def test_values_and_products(form, values):
    net = nn.Sequential(model(False), nn.Linear(DIM, 8, bias=False))
    ids = torch.zeros(BATCH, IDS, dtype=torch.int64)
    options = {"ranks": RANKS, "batch": BATCH, "pins": {"*": form}}
    assert des.plan(net, (ids,), **options, cluster=where(value_s=1.0)).work_s == pytest.approx(values)
    # of all ranks' rows it would be twice as much: the layer stays outside
    assert des.plan(net, (ids,), **options, cluster=where(1.0)).work_s == pytest.approx(6 * BATCH * DIM * 8)


@pytest.fixture(scope="module")
def example():
    torch.manual_seed(0)
    return MODELS["fm"]("fields", vocab_sizes=[50_000] * 8, dim=16, sparse=True), make_inputs("fm", "fields", 8)


@pytest.mark.long
def test_a_plan_weighs_work_against_bytes(example):
    """Where ids cost nothing, ranks take columns of all tables; where they are dear, each id is looked up once."""
    net, _ = example
    inputs = (torch.randn(8, 3), torch.zeros(8, 8, dtype=torch.int64))
    free = des.plan(
        net, inputs, ranks=RANKS, batch=1024, cluster=where(), forbid={"*": ["replicate", "sparse_all_gather"]}
    )
    dear = des.plan(net, inputs, ranks=RANKS, batch=1024, cluster=where(id_s=1e-4))
    assert set(free.forms.values()) == {"column_wise"} and free.work_s == 0
    assert "column_wise" not in dear.forms.values()
    assert dear.price < dear.seconds["embeddings.tables.0.weight"]["column_wise"]
    assert dear.price == dear.seconds["embeddings.tables.0.weight"][dear.forms["embeddings.tables.0.weight"]]
    alone = des.plan(net, inputs, ranks=RANKS, batch=1024, cluster=where(id_s=1e-4), pins=dear.forms)
    assert alone.work_s == dear.work_s  # whatever else was tried before
    assert "replicate" not in dear.forms.values()  # which looks up as many ids, and is asked for first
    text = str(dear)
    assert "seconds of the collectives and of the busiest rank's own work on ethernet-100g" in text
    assert des.Plan.from_json(dear.to_json()) == dear


def test_the_slowest_ranks_rates_count():
    one, two = Rates(1, 2, 3, 4, 5, 6, "one"), Rates(6, 5, 4, 3, 2, 1, "two")
    assert slowest_rates([one, two]) == Rates(6, 5, 4, 4, 5, 6, "one")


def test_a_rate_is_a_number_of_seconds():
    with pytest.raises(des.PlanError, match="id_s must be seconds"):
        Rates(**{**NOTHING, "id_s": -1.0})

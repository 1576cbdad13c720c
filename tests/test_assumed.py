"""Which cluster is meant, and that plans of the default are for it and say so."""

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.captured import REAL_ROWS, Captured
from descompiler.planning.assumed import ASSUMED, BYTES, cluster_of
from examples.models import MODELS


def model(name="fm", rows=100_000):
    with torch.device("meta"):
        return MODELS[name]("fields", vocab_sizes=[rows] * 8, dim=16, sparse=True)


INPUTS = (torch.zeros(4, 3), torch.zeros(4, 8, dtype=torch.int64))


def test_what_is_given_is_meant():
    mine = des.Cluster.builtin("ethernet-25g", 4)
    assert cluster_of(mine, 4) is mine and cluster_of(BYTES, 4) is None
    assert cluster_of("nvlink-a100", 16) == des.Cluster.builtin("nvlink-a100", 16)


def test_a_class_is_assumed_by_device_and_limits_no_memory():
    for device, name in ASSUMED.items():
        found = cluster_of(None, 4, device)
        assert found.name == f"{name} (assumed)" and found.ranks == 4 and found.memory_bytes is None
        assert found.rates is not None and found.flops_per_s is not None
    assert cluster_of(None, 4, "meta") == cluster_of(None, 4, "cpu")


@pytest.mark.parametrize(
    "wrong, text", [("token-ring", "no cluster 'token-ring'; the clusters are ethernet-10g"), (7, "cluster=7; it is a")]
)
def test_another_is_refused(wrong, text):
    """Before the model is captured, which may take long: this one can't be."""
    with pytest.raises(des.PlanError, match=text):
        des.plan(nn.Identity(), (), ranks=4, cluster=wrong)


@pytest.mark.long
def test_the_default_plan_is_for_the_class_and_says_so():
    default = des.plan(model(), INPUTS, ranks=4, batch=1024)
    assert default.objective == "seconds" and "on ethernet-10g (assumed)" in default.explain()
    least = des.plan(model(), INPUTS, ranks=4, batch=1024, cluster=BYTES)
    assert least.objective == "bytes" and least.price_bytes < default.price_bytes
    # what columns save on the wire they cost in lookups of all ranks' ids in all tables
    where = cluster_of(None, 4)
    same = des.plan(model(), INPUTS, ranks=4, batch=1024, cluster=where, pins=least.forms)
    assert default.price < same.price


def test_a_plan_of_a_class_by_name_has_its_ranks_from_elsewhere():
    with pytest.raises(des.PlanError, match="needs ranks="):
        des.plan(model(), INPUTS, cluster="ethernet-100g")
    assert des.plan(model(), INPUTS, ranks=2, cluster="ethernet-100g").cluster.name == "ethernet-100g"


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.other = nn.Embedding(50_000, 4, sparse=True), nn.Embedding(50_000, 4, sparse=True)

    def forward(self, ids, others):
        return (self.table(ids) * self.other(others)).sum(1)


def test_a_real_batch_as_an_example_says_how_often_ids_repeat():
    rows = REAL_ROWS
    ids = torch.arange(rows) % 8
    found = Captured.of(Bag(), (ids, torch.zeros_like(ids))).of_example()
    assert found.unique("table.weight", rows) == pytest.approx(8)
    # all the same: made up
    assert set(found.measured) == {"table.weight"} and "assumed Zipf(1.05) for the others" in found.source
    plan = des.plan(Bag(), (ids, ids), ranks=2)
    assert plan.statistics == f"measured on the example's {rows} rows" and plan.unique["other.weight"] == pytest.approx(
        8
    )
    assert "assumed" in des.plan(Bag(), (ids[1:], ids[1:]), ranks=2).statistics
    assert Captured.of(Bag(), (torch.zeros_like(ids), torch.zeros_like(ids))).of_example() is None


def test_samples_come_before_the_example():
    ids = torch.arange(REAL_ROWS)
    plan = des.plan(Bag(), (ids, ids), ranks=2, samples=[(ids % 4, ids % 4)])
    assert plan.unique["table.weight"] == pytest.approx(4) and plan.statistics.startswith("measured on 1 batches")

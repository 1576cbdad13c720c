"""Calibration and audit on real ranks."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import descompiler as des
from descompiler.check.calibrate import fit
from descompiler.examples import MODELS, make_inputs
from descompiler.passes import FORMS
from descompiler.planning.cluster import COLLECTIVES
from tests.harness.models import IDS, Branch


@given(st.floats(1e-5, 1e-1), st.floats(1e5, 1e11), st.floats(0, 0.05))
def test_the_fit_finds_what_made_the_times(latency, rate, noise):
    draw = random.Random(0)
    sizes = [1e3, 1e4, 1e5, 1e6, 1e7]
    times = [(latency + x / rate) * (1 + noise * draw.uniform(-1, 1)) for x in sizes]
    a, b = fit(sizes, times)
    worst = max(abs(a + b * x - t) / t for x, t in zip(sizes, times, strict=True))
    assert a >= 0 and b > 0 and worst < 2 * noise + 1e-6


def test_the_fit_stays_on_the_right_side():
    assert fit([1.0, 2.0], [1.0, 0.5])[1] > 0, "times that shrink have no bandwidth, but a rate all the same"
    assert fit([1e6, 2e6], [1e-3, 3e-3])[0] == 0.0, "nor can latency be negative"


def _calibrate(rank, ranks, folder):
    cluster = des.calibrate(sizes_bytes=(64, 4096, 65536), repeats=3, path=f"{folder}/cluster.json", memory_bytes=10**9)
    model = MODELS["deepfm"]("fields", batch_norm=True).double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in make_inputs("deepfm", "fields", 8))
    module = des.compile(model, inputs, plan={"*": "row_wise"})
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    batches = [tuple(x[: 8 - step - rank] for x in inputs) for step in range(4)]
    audit = des.audit(module, batches, cluster=cluster, warm_up=1)
    same = all(torch.equal(p, weights[n]) and p.grad is None for n, p in module.named_parameters())
    module(*inputs).sum().backward()  # and the module works on, without the clock
    return cluster, audit, same, module._runtime.clock


def test_calibrate_and_audit(on_ranks, tmp_path):
    (first, audit, same, clock), (second, other, _, _) = on_ranks(_calibrate, 2, str(tmp_path))
    assert first == second == des.Cluster.load(tmp_path / "cluster.json")
    assert first.ranks == 2 and first.ranks_per_node == 2 and first.memory_bytes == 10**9
    made = first.provenance
    assert made["backend"] == "gloo" and made["hosts"] == 1 and made["torch"] == torch.__version__ and made["date"]
    assert set(made["collectives"]) == set(COLLECTIVES)
    assert made["collectives"]["all_to_all"]["sent_bytes"] == [64, 4096, 65536]
    assert made["collectives"]["all_reduce"]["sent_bytes"] == [64, 4096, 65536]
    for of in made["collectives"].values():
        assert all(t > 0 for t in of["median_s"]) and 0 <= of["median_relative_error"] <= of["largest_relative_error"]
    assert first.seconds_of("all_to_all", 10**6) > 0
    assert 1e7 < first.flops_per_s < 1e14 and first.flops_per_byte > 0

    assert audit == other and same and clock is None
    assert audit.steps == 3 and not audit.mismatches
    names = [x.name for x in audit.collectives]
    assert names[0] == "all_to_all (header)" and "all_reduce (dense gradients)" in names
    assert "all_reduce (batch norm, backward)" in names
    for x in audit.collectives:
        assert x.predicted_bytes == x.sent_bytes and x.measured_s > 0 and x.predicted_s > 0
    assert "traffic predicted exactly" in str(audit) and audit.measured_s > 0


def _refused(rank, ranks):
    texts, module = [], des.compile(MODELS["fm"]("fields"), make_inputs("fm", "fields", 8))
    for call in (lambda: des.calibrate(sizes_bytes=[64]), lambda: des.audit(module, [])):
        try:
            call()
        except des.DescompilerError as error:
            texts.append(str(error))
    return texts


def test_what_is_refused(on_ranks):
    for sizes, batches in on_ranks(_refused, 2):
        assert "two different positive sizes" in sizes and "more than warm_up=2 batches" in batches
    with pytest.raises(des.PlanError, match="two ranks at least"):
        des.calibrate()
    with pytest.raises(des.InputError, match="one rank makes none"):
        des.audit(des.compile(MODELS["fm"]("fields"), make_inputs("fm", "fields", 8)), [])


def _every_form(rank, ranks):
    cluster, mismatches = des.Cluster.builtin("ethernet-10g", ranks=ranks), {}
    inputs = make_inputs("deepfm", "fields", 8)
    batches = [tuple(x[: 8 - rank - step] for x in inputs) for step in range(2)]
    for form in FORMS:
        for sparse in (False, True):
            module = des.compile(MODELS["deepfm"]("fields", sparse=sparse), inputs, plan={"*": form.name})
            audit = des.audit(module, batches, cluster=cluster, warm_up=1)
            assert all(x.measured_s > 0 for x in audit.collectives), "each collective goes through the clock"
            mismatches[form.name, sparse] = audit.mismatches
    return mismatches


@pytest.mark.slow
def test_every_form_runs_under_the_clock_and_sends_what_is_predicted(on_ranks):
    """Collectives that are waited for one by one, those of the reducer too, never wait for ever."""
    for mismatches in on_ranks(_every_form, 2):
        assert len(mismatches) == 2 * len(FORMS) and not any(mismatches.values())


def _in_part(rank, ranks):
    module = des.compile(Branch(), (IDS,), plan={"*": "row_wise"})
    return des.audit(module, [(IDS,)] * 2, cluster=des.Cluster.builtin("ethernet-10g", ranks=ranks), warm_up=1)


def test_a_model_captured_in_part_is_timed_and_its_traffic_called_an_estimate(on_ranks):
    for audit in on_ranks(_in_part, 2):
        assert not audit.exact and not audit.mismatches and "an estimate" in str(audit)
        assert sum(x.sent_bytes for x in audit.collectives) > 0
        assert all(x.measured_s > 0 for x in audit.collectives if x.calls)

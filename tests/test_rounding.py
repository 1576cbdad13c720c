"""Values that are rounded where they cross: what is sent, what is summed in which dtype, how far it takes a model."""

import json

import pytest
import torch
from torch import Tensor, nn

import descompiler as des
from descompiler.check.compare import train_and_compare
from descompiler.layout.border import ValuesOut
from descompiler.layout.fetches import Fetch
from descompiler.runtime.runtime import Runtime
from tests.harness.models import IDS as IN_PART
from tests.harness.models import Branch

IDS = torch.randint(0, 30, (16, 3), generator=torch.Generator().manual_seed(3))
FORMS = ("row_wise", "column_wise", "table_wise", "unique_rows", "sparse_all_gather", "hot_rows")
ROUNDED = (ValuesOut.SEND, ValuesOut.BACK, Fetch.ROWS, Fetch.BACK, Fetch.GATHERED_BACK)
"""Collectives of what crosses to one receiver."""


class Ctr(nn.Module):
    """Two tables that other values follow, and a layer that stays with the ranks; one with sparse gradients perhaps."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items, self.users = nn.Embedding(50, 8, sparse=sparse), nn.Embedding(31, 8, padding_idx=0)
        self.deep = nn.Sequential(nn.Linear(24, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.items(ids[:, :2]).flatten(1), self.users(ids[:, 2])], 1)
        return self.deep(x).squeeze(1)


def steps(rank, ranks, dtype, wire_dtype, form, sparse):
    """Three steps on rows of different numbers, one rank without any: bytes, predicted bytes, weights."""
    model = Ctr(sparse).to(dtype)
    module = des.compile(model, (IDS,), plan={"*": form}, wire_dtype=wire_dtype, loss="sum", cluster="bytes")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    first, stop = [(0, 9), (9, 9), (9, 16)][rank] if ranks == 3 else [(0, 9), (9, 16)][rank]
    sent = []
    for step in range(3):
        ids = IDS.roll(step, 0)[first:stop]
        (module(ids) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        sent.append((module.traffic().bytes_by_collective, module.predicted_traffic().bytes_by_collective))
    replicas = [
        des.local_tensor(p).detach() for n, p in module.named_parameters() if module.plan.pieces[n].is_replicated
    ]
    return sent, des.full_state_dict(module), replicas


@pytest.mark.long(but=1)
@pytest.mark.parametrize("form", FORMS)
def test_what_crosses_is_rounded_and_counted(form, on_ranks):
    """Half of the bytes of what is rounded, all of the others'; replicas are equal bit for bit."""
    for sparse in (False, True):
        plain = on_ranks(steps, 3, torch.float32, None, form, sparse)
        rounded = on_ranks(steps, 3, torch.float32, torch.bfloat16, form, sparse)
        total = 0
        for (a, _, _), (b, weights, replicas) in zip(plain, rounded, strict=True):
            for (full, _), (sent, predicted) in zip(a, b, strict=True):
                assert sent == predicted
                assert sent == {n: x / 2 if n in ROUNDED else x for n, x in full.items()}
                total += sum(full[n] for n in ROUNDED if n in full)
            for mine, other in zip(replicas, rounded[0][2], strict=True):
                assert torch.equal(mine, other)
            exact = plain[0][1]
            assert any(not torch.equal(weights[n], exact[n]) for n in exact)  # rounding does something
            assert all(torch.allclose(weights[n], exact[n], atol=0.05) for n in exact)
        assert total > 0


def sums(rank, ranks, values):
    """A bag of one row from each rank, in steps that a sum in float16 would lose."""
    model = nn.EmbeddingBag(2, 1, mode="sum")
    with torch.no_grad():
        model.weight.copy_(torch.tensor(values).reshape(2, 1))
    ids = torch.tensor([[0, 1]])
    module = des.compile(model, (ids,), plan={"*": "row_wise"}, wire_dtype=torch.float16)
    out = module(ids)
    out.sum().backward()
    return out.item(), des.local_tensor(module.weight).grad


def test_sums_are_made_in_the_models_dtype(on_ranks):
    for out, _ in on_ranks(sums, 2, [2048.0, 1.0]):
        assert out == 2049.0  # float16 has no 2049


def test_none_is_as_before(on_ranks):
    """Without it, nothing is cast: bit for bit what a plan without the word does."""
    plan = des.plan(Ctr(), (IDS,), ranks=2, pins={"*": "unique_rows"})
    data = json.loads(plan.to_json())
    assert data["layout"].pop("wire_dtype") is None and data.pop("version") >= 7
    assert des.Plan.from_json(json.dumps({**data, "version": 6})) == plan


@pytest.mark.long
def test_plans_keep_it():
    terms = {"ranks": 4, "pins": {"*": "row_wise"}, "cluster": "bytes"}
    rounded = des.plan(Ctr(), (IDS,), wire_dtype=torch.bfloat16, **terms)
    exact = des.plan(Ctr(), (IDS,), **terms)
    again = des.Plan.from_json(rounded.to_json())
    assert again == rounded and again.wire_dtype is torch.bfloat16
    assert des.plan(Ctr(), (IDS,), plan=again).wire_dtype is torch.bfloat16
    assert (
        again.traffic(0).bytes_by_collective[ValuesOut.SEND] * 2 == exact.traffic(0).bytes_by_collective[ValuesOut.SEND]
    )
    assert rounded.price_bytes < exact.price_bytes and rounded.bound <= rounded.price_bytes
    assert "wire_dtype: None -> torch.bfloat16" in exact.diff(rounded)
    assert "rounded to torch.bfloat16" in rounded.explain() and "rounded to" not in exact.explain()


@pytest.mark.parametrize(
    "model, given, text",
    [
        (Ctr(), {"wire_dtype": torch.int8}, "it is one of torch.bfloat16"),
        (Ctr(), {"wire_dtype": torch.float32}, "no narrower than the model's torch.float32"),
        (Ctr().half(), {"wire_dtype": torch.bfloat16}, "no narrower"),
        (Ctr(), {"wire_dtype": torch.float16, "plan": "bfloat16"}, "the plan has torch.bfloat16"),
    ],
)
def test_what_is_refused(model, given, text):
    if "plan" in given:
        given = {**given, "plan": des.plan(model, (IDS,), ranks=2, wire_dtype=torch.bfloat16)}
    with pytest.raises(des.PlanError, match=text):
        des.plan(model, (IDS,), ranks=2, **given)


def disagree(rank, ranks):
    with pytest.raises(des.RankError, match="different options"):
        des.compile(Ctr(), (IDS,), plan={"*": "row_wise"}, wire_dtype=torch.bfloat16 if rank else None)
    return True


def test_ranks_that_round_differently_raise(on_ranks):
    assert all(on_ranks(disagree, 2))


def test_captured_in_part_is_refused():
    with pytest.raises(des.PlanError, match="its own forward"):
        des.plan(Branch(), IN_PART, ranks=2, wire_dtype=torch.bfloat16)


PLANS = [{"*": form} for form in ("row_wise", "unique_rows", "sparse_all_gather", "column_wise")]


@pytest.mark.long(but=1)
@pytest.mark.parametrize("wire_dtype", [torch.float32, torch.bfloat16])
def test_verify_says_how_far_it_goes(wire_dtype, on_ranks):
    """Within the bound, and by no less than rounding does: the errors are those of the dtype."""
    launch = lambda function, ranks, *args, timeout_s: on_ranks(function, ranks, *args)  # noqa: E731
    report = des.verify(Ctr(), (IDS,), plans=PLANS, wire_dtype=wire_dtype, launch=launch, steps=2)
    unit = torch.finfo(wire_dtype).eps / 2
    assert unit / 100 < min(report.worst[x] for x in ("output", "gradient", "weight"))
    assert max(report.worst.values()) < 100 * unit and 0 < report.share < 1
    assert f"rounded to {wire_dtype}" in str(report)


def tampered(rank, ranks, share, *args):
    """A fault on one rank in what it receives: a share of its rows' values."""
    original = Runtime.exit_wait
    if rank:
        Runtime.exit_wait = lambda self, started: [x * (1 + share) for x in original(self, started)]
    try:
        return train_and_compare(rank, ranks, *args)
    finally:
        Runtime.exit_wait = original


@pytest.mark.parametrize("wire_dtype, share", [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
def test_verify_finds_what_is_more_than_rounding(wire_dtype, share, on_ranks):
    launch = lambda _, ranks, *args, timeout_s: on_ranks(tampered, ranks, share, *args)  # noqa: E731
    with pytest.raises(des.EquivalenceError, match=f"rounding to {wire_dtype} may do"):
        des.verify(Ctr(), (IDS,), plans=PLANS[:1], wire_dtype=wire_dtype, launch=launch, steps=1)


def test_a_thorough_proof_is_another():
    with pytest.raises(des.InputError, match="call verify once with each"):
        des.verify(Ctr(), (IDS,), wire_dtype=torch.bfloat16, thorough=True)

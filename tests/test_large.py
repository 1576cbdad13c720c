"""Models larger than a machine: captured, planned, compiled, saved and proven in little memory, or refused in time."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import descompiler as des
from benchmarks import memory
from descompiler.capture.checks import check_reproduces
from descompiler.captured import Captured
from descompiler.check import verify
from descompiler.errors import CaptureError
from descompiler.model.folded import FOLDED_ROWS, Folded, has_own_values
from descompiler.model.probe import blueprint, materialise
from descompiler.module.initial import BLOCK_ROWS
from descompiler.ops.local import bag, lookup
from descompiler.runtime import room
from tests.harness.cases import cases
from tests.harness.pool import RankPool

HUGE = 10**10
aten = torch.ops.aten


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as ranks:
        yield ranks


class Large(nn.Module):
    """Tables of any number of rows, looked up singly and in bags."""

    def __init__(self, rows: int, dim: int = 8):
        super().__init__()
        self.table, self.bag = nn.Embedding(rows, dim, padding_idx=3), nn.EmbeddingBag(rows, dim, mode="mean")
        self.top = nn.Linear(dim, 1)

    def forward(self, ids):
        return self.top(self.table(ids).sum(1) * self.bag(ids))


def on_meta(rows: int, dim: int = 8) -> nn.Module:
    with torch.device("meta"):
        return Large(rows, dim)


# ---- probes


def folded() -> Folded:
    rows = torch.randn(FOLDED_ROWS + 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Folded.of(torch.Size((HUGE, 4)), rows, True)


def test_every_lookup_in_a_folded_table_reads_the_same_rows():
    w, ids = folded(), torch.tensor([[1, 2, HUGE - 1], [FOLDED_ROWS + 1, 0, 0]])
    expected = w.rows[ids % FOLDED_ROWS]
    flat = ids.reshape(-1)
    results = [
        F.embedding(ids, w), F.embedding(input=ids, weight=w), w[ids], torch.embedding(w, ids), lookup(w, ids),
        aten.embedding.default(w, ids), aten.index.Tensor(w, [ids]), w[ids - HUGE],
        w.index_select(0, flat).reshape(2, 3, 4), torch.index_select(w, dim=0, index=flat).reshape(2, 3, 4),
        aten.index_select.default(w, 0, flat).reshape(2, 3, 4), w.detach()[ids],
    ]  # fmt: skip
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert results[0].requires_grad and not results[-1].requires_grad


@pytest.mark.parametrize("padding", [0, HUGE - 1, None])
def test_bags_of_a_folded_table_leave_out_padding_and_no_other_id(padding):
    ids = torch.tensor([[0, FOLDED_ROWS, 5], [HUGE - 1, (HUGE - 1) % FOLDED_ROWS, 5]])
    w = folded()
    kept = (ids != (-1 if padding is None else padding)).unsqueeze(-1)
    expected = (w[ids] * kept).sum(1)
    got = F.embedding_bag(ids, w, mode="sum", padding_idx=padding)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(bag(w, ids, "sum", padding), expected)


@pytest.mark.parametrize("bad", [HUGE, -1])
def test_an_id_that_is_none_of_the_tables_is_an_error(bad):
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([bad]), folded())


def test_parameters_of_a_probe_take_little_memory():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(n, 16) for n in (10, 10**4, 10**6, 10**7, HUGE))
            self.flat, self.cube = nn.Parameter(torch.empty(10**9)), nn.Parameter(torch.empty(26, 10**6, 16))

    with torch.device("meta"):
        model = Many()
    probe = materialise(blueprint(model), torch.device("cpu"), double=True)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in probe.parameters()}
    assert sum(held.values()) < 60 << 20
    assert [p.shape for p in probe.parameters()] == [p.shape for p in model.parameters()]
    assert has_own_values(probe.tables[1].weight) and not has_own_values(probe.tables[3].weight)


class Kept(nn.Module):
    """A regulariser of a large table, reached by a list that is no part of the module."""

    def __init__(self, detached: bool = False):
        super().__init__()
        self.table, self.top = nn.Embedding(600_000, 8), nn.Linear(8, 1)
        self.kept, self.detached = [self.table.weight], detached

    def forward(self, ids):
        weights = [w.detach() if self.detached else w for w in self.kept]
        return self.top(self.table(ids).sum(1).detach()) + sum(w[:5].square().sum() for w in weights)


def test_a_graph_that_loses_the_gradient_of_a_large_table_is_refused():
    ids = torch.randint(600_000, (6, 3))
    whole, lost = (Captured.of(Kept(detached), (ids,)) for detached in (False, True))
    probe = materialise(blueprint(Kept()), torch.device("cpu"), double=True)
    assert not has_own_values(probe.table.weight)
    flat = Flatter(probe)
    check_reproduces(whole.program, flat, [ids])
    with pytest.raises(CaptureError, match=r"whether 'table\.weight' gets a gradient"):
        check_reproduces(lost.program, flat, [ids])


class Flatter(nn.Module):
    """What `check_reproduces` needs of a probe."""

    arithmetic = torch.enable_grad

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *tensors):
        return [self.model(*tensors)]


# ---- plans, pieces, state dicts


def test_a_plan_of_a_terabyte_needs_no_rows():
    ids = torch.randint(HUGE // 2, (6, 3))
    plan = des.plan(on_meta(HUGE // 2, 32), (ids,), ranks=64)
    assert sum(t.rows for t in plan.tables) == HUGE
    assert set(plan.forms.values()) <= {"unique_rows", "row_wise", "table_wise", "column_wise"}


@pytest.mark.long
@pytest.mark.parametrize("kind", cases(["meta", "first", "in place"], ["first", "in place"]))
def test_no_rank_holds_more_than_its_share(pool, kind, tmp_path):
    """The share of 512 MiB on 2 ranks, a tenth of it and 300 MB; rank 0's whole state_dict beside it."""
    whole = 512 << 20
    limit = whole / 2 * 1.1 + memory.ALLOWANCE_BYTES
    for rank, found in enumerate(pool(memory.measure, kind, whole // (4 * 64 * 4), 64, str(tmp_path / "checkpoint"))):
        for call, (peak, _) in found.items():
            assert peak < limit + (whole if (call.startswith("full") or call == "to_single") and rank == 0 else 0), (
                rank,
                call,
                peak,
            )


def _streams(rank, ranks, plan):
    """Whether what rank 0 alone gets is what every rank gets, and comes back from rank 0 alone; what an error says."""
    torch.manual_seed(rank)
    model, ids = Large(50), torch.randint(50, (8, 3))
    module = des.compile(model, (ids,), plan={"*": plan})
    whole, first = des.full_state_dict(module), des.full_state_dict(module, rank0_only=True)
    same = (
        not first if rank else all(torch.equal(whole[n], x) for n, x in first.items()) and first.keys() == whole.keys()
    )
    other = {n: x + 1 for n, x in first.items()}
    des.load_full_state_dict(module, other, rank0_only=True)
    back = all(torch.equal(x, whole[n] + 1) for n, x in des.full_state_dict(module).items())
    other.pop("top.bias", None)
    try:
        des.load_full_state_dict(module, other, rank0_only=True)
    except des.DescompilerError as error:
        return same, back, str(error)
    return same, back, ""


@pytest.mark.long(but=1)
@pytest.mark.parametrize("plan", ["row_wise", "column_wise", "table_wise", "replicate"])
def test_state_dicts_stream_to_and_from_rank_0(pool, plan):
    for same, back, text in pool(_streams, plan):
        assert same and back
        assert "missing ['top.bias']" in text


def _drawn(rank, ranks, form):
    """A table of several blocks, drawn on the meta device's behalf, and a linear layer of as many outputs."""

    class Output(Large):
        def __init__(self):
            super().__init__(2 * BLOCK_ROWS + 10, 2)
            self.out = nn.Linear(2, BLOCK_ROWS + 10)

        def forward(self, ids):
            return super().forward(ids) + self.out(self.table(ids[:, 0])).sum(1, keepdim=True)

    with torch.device("meta"):
        model = Output()
    module = des.compile(model, (torch.randint(50, (8, 3)),), plan={"table*": form, "bag*": form}, seed=7)
    return des.full_state_dict(module)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("form", ["row_wise", "column_wise"])
def test_blocks_of_rows_are_drawn_apart_and_padding_is_zero(on_ranks, form):
    (first, *_), (alone,) = on_ranks(_drawn, 2, form), on_ranks(_drawn, 1, "replicate")
    for name, whole in first.items():
        assert torch.equal(whole, alone[name]), name
        if len(whole) > BLOCK_ROWS:
            assert not torch.equal(whole[:5], whole[BLOCK_ROWS : BLOCK_ROWS + 5]), name
    assert not first["table.weight"][3].any() and first["bag.weight"][3].all()
    bound = 1 / 2**0.5
    assert first["out.weight"].abs().max() <= bound and first["out.weight"].abs().mean() == pytest.approx(
        bound / 2, 0.05
    )


def _without_room(rank, ranks, in_place):
    before, room.free_bytes = room.free_bytes, lambda device: 80 << 20
    try:
        des.compile(on_meta(10**6), (torch.randint(10**6, (8, 3)),), in_place=in_place, plan={"*": "replicate"})
    except des.PlanError as error:
        return str(error)
    finally:
        room.free_bytes = before


def test_what_does_not_fit_is_told_before_it_is_allocated(pool):
    for text in pool(_without_room, False):
        assert "pieces of parameters need 128,000,072 B" in text
        assert "83,886,080 B are free: 44,113,992 B are missing" in text


# ---- proofs


@pytest.mark.long
def test_a_large_model_is_proven_with_smaller_tables():
    ids = torch.tensor([[HUGE - 1, 5, 3], [1, 2, 3], [7, 7, HUGE // 2], [0, 1, 9]])
    report = des.verify(on_meta(HUGE), (ids,), rows=50, plans=[{"*": "row_wise"}, None], optimizers=["adagrad"])
    assert report.cases == 2


def test_a_proof_that_does_not_fit_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(verify, "free_bytes", lambda device: 1 << 20)
    ids = torch.randint(10_000, (6, 3))
    with pytest.raises(des.InputError, match=r"verify needs about .* are missing\. verify\(\.\.\., rows=1000\)"):
        des.verify(Large(10_000), (ids,))
    with pytest.raises(des.InputError, match=r"'table\.weight', 'bag\.weight', .* are on the meta device.*rows=1000"):
        des.verify(on_meta(10_000), (ids,))
    monkeypatch.setattr(verify, "free_bytes", lambda device: 40 << 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        des.verify(Large(10_000), (ids,), steps=1)
    assert any("verify needs about" in str(w.message) for w in caught)


def test_a_large_parameter_that_is_no_table_is_named():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.empty(10**7, 4, device="meta"))

    with pytest.raises(des.InputError, match=r"'matrix' \(10000000, 4\)"):
        des.verify(Other(), (torch.zeros(2, 2),), rows=10)

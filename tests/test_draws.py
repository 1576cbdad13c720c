"""Sets and draws over the batch: what is looked for in all rows, and what is drawn for all of them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import descompiler as des
from descompiler.captured import Captured
from descompiler.classify.scope import GLOBAL, scope_of
from descompiler.model.random_state import seeded

IDS = torch.randint(0, 300, (8, 3), generator=torch.Generator().manual_seed(5))
SAME = torch.zeros(8, 3, dtype=torch.int64)


class Towers(nn.Module):
    """Users and items, and what ``mask`` finds in the ids of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 4)

    def forward(self, ids: Tensor) -> Tensor:
        u, v, n = self.table(ids).unbind(1)
        return (u * v).sum(1) - (u * n).sum(1) * self.mask(ids)

    def mask(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


class AccidentalHits(Towers):
    """Negatives that are some row's positive."""

    def mask(self, ids: Tensor) -> Tensor:
        return torch.isin(ids[:, 2], ids[:, 1], invert=True).double()


class Histories(Towers):
    """Negatives in any row's history, which has two dimensions."""

    def mask(self, ids: Tensor) -> Tensor:
        return torch.isin(ids[:, 2], ids[:, :2]).double()


class Ranks(Towers):
    """The rank of an item among those of the batch."""

    def mask(self, ids: Tensor) -> Tensor:
        return torch.searchsorted(ids[:, 1].sort().values, ids[:, 2]).double()


class Buckets(Towers):
    def mask(self, ids: Tensor) -> Tensor:
        return torch.bucketize(ids[:, 2], ids[:, 1].cummax(0).values).double()


class Next(Towers):
    """The row before and the rows turned round, of ids that are all the same in the example."""

    def mask(self, ids: Tensor) -> Tensor:
        return (ids[:, 2].roll(1, 0) + ids.flip(0)[:, 1]).double()


@pytest.mark.long(but=1)
@pytest.mark.parametrize("model", [AccidentalHits, Histories, Ranks, Buckets, Next])
@pytest.mark.parametrize("example", [SAME, pytest.param(IDS, marks=pytest.mark.slow)])
def test_what_is_looked_for_in_all_rows_is(model, example, on_ranks):
    torch.manual_seed(0)
    model = model().double()
    for rank, found in enumerate(on_ranks(_outputs, 2, model, example)):
        torch.testing.assert_close(found, model(IDS).detach()[rank * 4 : rank * 4 + 4])


def _outputs(rank, ranks, model, example):
    return des.compile(model, (example,), plan={"*": "row_wise"})(IDS[rank * 4 : rank * 4 + 4]).detach()


class OwnBounds(Towers):
    """Each row is looked for in its own: nothing mixes."""

    def mask(self, ids: Tensor) -> Tensor:
        bounds = ids[:, :2].sort(1).values
        return torch.searchsorted(bounds, ids[:, 2:]).squeeze(1) + torch.isin(ids[:, 2], torch.arange(9)).double()


def test_rows_that_are_searched_apart_stay_local():
    program = Captured.of(OwnBounds().double(), (IDS,)).program
    assert not any(scope_of(n).kind == GLOBAL for n in program.graph.nodes)


class Negatives(Towers):
    """In-batch negatives: rows, drawn."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows(ids)
        return (self.table(ids[:, 0]) * self.table(ids[:, 1])[rows]).sum(1), rows

    def rows(self, ids: Tensor) -> Tensor:
        return torch.randint(0, len(ids), (len(ids),))


class Others(Negatives):
    def rows(self, ids: Tensor) -> Tensor:
        n = ids.shape[0]
        return (torch.arange(n) + torch.randint(1, n, (n,))) % n


class Like(Negatives):
    def rows(self, ids: Tensor) -> Tensor:
        return torch.randint_like(ids[:, 0], ids.shape[0])


class Distinct(Negatives):
    """Without replacement: no row twice."""

    def rows(self, ids: Tensor) -> Tensor:
        return torch.multinomial(torch.ones(len(ids)), len(ids))


class Weighted(Negatives):
    def rows(self, ids: Tensor) -> Tensor:
        return torch.multinomial(1.0 + ids[:, 0], len(ids), replacement=True)


class Items(Negatives):
    """Of a fixed catalogue, none twice in a batch."""

    def rows(self, ids: Tensor) -> Tensor:
        return torch.multinomial(torch.ones(300), len(ids)) % len(ids)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("model", [Negatives, Others, Like, Distinct, Weighted, Items])
def test_draws_among_all_rows_are_one_process_draws(model, on_ranks):
    torch.manual_seed(0)
    model = model().double()
    found = on_ranks(_drawn, 2, model)
    rows = torch.cat([r for _, r, _ in found])
    v, u = model.table(IDS[:, 1]), model.table(IDS[:, 0])
    torch.testing.assert_close(torch.cat([s for s, _, _ in found]), (u * v[rows]).sum(1).detach())
    assert torch.equal(rows, found[0][2])


def _drawn(rank, ranks, model):
    module = des.compile(model, (IDS,), plan={"*": "row_wise"})
    scores, rows = module(IDS[rank * 4 : rank * 4 + 4])
    with module.latest_draws():
        expected = model.rows(IDS)
    return scores.detach(), rows, expected


class Rarely(Towers):
    """A draw of NumPy's where no row of the example leads to."""

    def forward(self, ids: Tensor) -> Tensor:
        ids = torch.from_numpy(np.sort(ids.numpy(), axis=1))
        x = self.table(ids).sum((1, 2))
        return x * float(np.random.rand()) if int(ids.max()) == 299 else x


class OwnGenerator(Towers):
    """A generator that the model keeps."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum((1, 2)) * float(self.rng.random())


def _rarely(rank, ranks):
    module = des.compile(Rarely(), (SAME,))
    same = module(SAME[:4])
    with pytest.raises(des.DescompilerError, match="draws random numbers of NumPy's or Python's here"):
        module(torch.full((4, 3), 299 if rank else 1))
    return torch.equal(module(SAME[:4]), same)


def test_a_draw_that_the_example_did_not_show_is_refused_on_every_rank(on_ranks):
    assert on_ranks(_rarely, 2) == [True, True]


def _generators(rank, ranks, seeds):
    if len(set(seeds)) > 1:
        with pytest.raises(des.DescompilerError, match=r"(?s)seed alike what the model keeps.*'rng'"):
            des.compile(OwnGenerator(seeds[rank]), (IDS,))
        return None
    module = des.compile(OwnGenerator(seeds[rank]), (IDS,))
    original = OwnGenerator(seeds[rank])
    original.load_state_dict(des.full_state_dict(module))
    mine = slice(rank * 4, rank * 4 + 4)
    return [float((module(IDS[mine]) - original(IDS)[mine]).abs().max()) for _ in range(2)]


@pytest.mark.long
def test_a_models_own_generator_draws_as_in_one_process(on_ranks):
    assert all(max(errors) < 1e-6 for errors in on_ranks(_generators, 2, [3, 3]))
    on_ranks(_generators, 2, [3, 4])


def test_seeding_is_torchs_on_the_devices_in_use_alone(monkeypatch):
    """A device that is not in use would be seeded later, when the user begins to use it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = torch.rand(4)
    asked = []
    for kind in (torch.cuda, torch.xpu, torch.mtia):
        monkeypatch.setattr(kind, "manual_seed_all", lambda seed, kind=kind: asked.append(kind.__name__))
    before = torch.get_rng_state()
    with seeded(5, torch.device("cpu")):
        assert torch.equal(torch.rand(4), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert asked == ["torch.cuda"] * torch.cuda.is_initialized()

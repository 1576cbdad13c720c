"""Statistics of ids, measured and assumed, against what they are about."""

import numpy as np
import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.capture.ladder import capture
from descompiler.cost_models.forms import HOT_ROWS, rounded
from descompiler.cost_models.symbols import UH, H, N, U, d, k, s
from descompiler.cost_models.table import Table
from descompiler.layout.keys import expected_bytes
from descompiler.layout.pieces import ALL, Pieces
from descompiler.layout.statistics import Statistics, zipf_unique
from descompiler.model.probe import blueprint
from descompiler.passes import NORMALISE
from descompiler.tables.form import find_tables, form_named
from descompiler.tables.measure import measure

BATCH = 1024


class Model(nn.Module):
    """Three uses of ids: as they are, plus a constant, and computed from a lookup (which can't be measured)."""

    def __init__(self, rows: int):
        super().__init__()
        self.item = nn.Embedding(rows, 2, padding_idx=0)
        self.offset = nn.Embedding(2 * rows, 2)
        self.computed = nn.Embedding(2, 2)
        self.register_buffer("shift", torch.tensor([0, rows]))

    def forward(self, ids):
        x = self.item(ids)
        return (x + self.offset(ids + self.shift) + self.computed((x[..., 0] > 0).long())).sum((1, 2))


def zipf_ids(rows: int, exponent: float, size: tuple[int, ...], seed: int) -> torch.Tensor:
    """Popular rows come first."""
    p = np.arange(1, rows + 1.0) ** -exponent
    drawn = np.random.default_rng(seed).choice(rows, size, p=p / p.sum())
    return torch.from_numpy(drawn)


def measured(rows: int, exponent: float, batches: int = 10) -> Statistics:
    model = Model(rows)
    program, _ = capture(blueprint(model), (torch.zeros(3, 2, dtype=torch.long),), passes=NORMALISE)
    samples = [[zipf_ids(rows, exponent, (BATCH, 2), seed)] for seed in range(batches)]
    return measure(program, find_tables(program), samples)


@pytest.mark.parametrize(("rows", "exponent"), [(30_000, 1.05), (30_000, 0.8), (1000, 1.2), (30_000, 1.4)])
def test_unique_ids_of_batches_that_were_not_measured(rows, exponent):
    statistics = measured(rows, exponent)
    p = np.arange(1, rows + 1.0) ** -exponent
    p /= p.sum()
    for batch in (BATCH // 8, BATCH, 3 * BATCH, 10 * BATCH, 40 * BATCH, 160 * BATCH):
        expected = (1 - (1 - p) ** (2 * batch)).sum()
        assert statistics.unique("item.weight", batch) == pytest.approx(expected, rel=0.1)
    counts = [len(zipf_ids(rows, exponent, (BATCH, 2), seed).unique()) for seed in range(10)]
    assert statistics.unique("item.weight", BATCH) == pytest.approx(np.mean(counts), rel=1e-9), "exact where measured"


def test_frequencies_and_pooling_and_what_can_not_be_measured():
    statistics = measured(1000, 1.05)
    drawn = torch.cat([zipf_ids(1000, 1.05, (BATCH, 2), seed) for seed in range(10)])
    frequency = statistics.frequency("item.weight")
    assert float(frequency.sum()) == pytest.approx(1)
    common = drawn.reshape(-1).bincount().argmax()
    assert float(frequency[common]) == pytest.approx(float((drawn == common).double().mean()), rel=0.01)
    assert float(frequency.min()) > 0, "a row that was not seen may come"
    assert statistics.pooling("item.weight") == pytest.approx(2 * float((drawn != 0).double().mean()))
    assert statistics.frequency("computed.weight") is None
    assert "10 batches" in statistics.source and "assumed Zipf(1.05) for computed.weight" in statistics.source
    second = statistics.frequency("offset.weight")[1000:].sum()  # the second column reads the second half
    assert float(second) == pytest.approx(0.5, abs=0.05)


def test_boundaries_are_balanced_on_what_was_measured():
    statistics = measured(1000, 1.2)
    shares = []
    for sizes in (statistics.balanced_rows("item.weight", 4, BATCH), [250] * 4):
        pieces = Pieces.by_sizes((1000, 2), 0, sizes, 4)
        ids = [zipf_ids(1000, 1.2, (BATCH, 2), seed).unique() for seed in range(20, 30)]
        ranges = list(pieces.division)
        counts = torch.stack([torch.stack([(x >= r.start) & (x < r.stop) for r in ranges]).sum(1) for x in ids])
        shares.append((counts.double().mean(0) / counts.double().mean(0).sum()).max())
        expected = statistics.shares("item.weight", pieces, BATCH)
        assert expected[:4] == pytest.approx(
            (counts.sum(0) / counts.sum()).tolist(), abs=0.03
        )  # ten batches say so much
    assert shares[0] < 0.28 < 0.4 < shares[1]


@pytest.mark.parametrize("itemsize", [4, 2])
def test_hot_rows_are_those_that_cost_less_replicated(itemsize):
    """Where pulled rows are rounded, and sums by all-reduce are not, too."""
    statistics = measured(1000, 1.2)
    program, _ = capture(blueprint(Model(1000)), (torch.zeros(3, 2, dtype=torch.long),), passes=NORMALISE)
    table = next(o for o in find_tables(program) if o.name == "item.weight")
    choice = form_named("hot_rows").choose(table, 4, statistics, BATCH, itemsize=itemsize)
    split = form_named("hot_rows").split(table, 4, choice)
    ids, present, other = statistics.presence("item.weight", BATCH)
    everything = dict(zip(ids.tolist(), present.tolist(), strict=True))
    unique = np.array([statistics.unique("item.weight", BATCH)])
    each = expected_bytes(unique, np.array([1000])) / unique
    values = {N: 4, k: 2, s: 4, d: each[0], U: 100, UH: 50, H: 20}
    hot = {row for r in split.pieces.shared() for row in range(r.start, r.stop)}
    assert (0 < len(hot) < 300) == (itemsize == 4) and len(hot) < 300
    for row in range(1000):
        q = everything.get(row, other)
        sent = rounded(HOT_ROWS, itemsize)
        pays = sent.subs({**values, UH: 50 + q, H: 21}) < sent.subs(values)
        assert pays == (row in hot)
    # the least that any hot rows cost: each row the cheaper way, q (d + 2 k s) fetched, d at least 1, or 2 k s reduced
    # of as many ids as were measured, which plans count
    expected = [everything.get(row, other) for row in range(1000)]
    share = float(unique[0]) / sum(expected)
    least = 3 * sum(min(share * q * (1 + 4 * itemsize), 16) for q in expected)
    assert form_named("hot_rows").least_bytes(table, 4, statistics, BATCH, itemsize) == pytest.approx(least)
    shares = statistics.shares("item.weight", split.pieces, BATCH)
    assert max(shares[:4]) < 1.1 * min(shares[:4])
    assert form_named("hot_rows").choose(table, 4, Statistics.assumed([table.table]), BATCH).hot is None


def test_shares_of_rows_that_all_hold():
    statistics = Statistics.assumed([Table("t", 100, 2)])
    pieces = Pieces.of((100, 2), 0, [(10, ALL), (30, 1), (60, 0)], 2)
    assert statistics.shares("t", pieces, 50) == pytest.approx([0.6, 0.3, 0.1])


def test_zipf_in_groups_is_zipf():
    p = np.arange(1, 300_001.0) ** -1.05
    p /= p.sum()
    assert zipf_unique(300_000, 50_000) == pytest.approx((1 - (1 - p) ** 50_000).sum(), rel=1e-4)


def test_samples_that_are_wrong():
    program, _ = capture(blueprint(Model(10)), (torch.zeros(3, 2, dtype=torch.long),), passes=NORMALISE)
    operators = find_tables(program)
    with pytest.raises(des.InputError, match="no batch"):
        measure(program, operators, [])
    with pytest.raises(des.InputError, match=r"sample 0: .*id 10 in row 1"):
        measure(program, operators, [[torch.tensor([[0, 1], [10, 2]])]])

"""Parts of dynamic tables: keys, owners, initial rows, sketches, tensors that grow."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from descompiler.dynamic import AfterSightings, Always, Capacity, Constant, DynamicEmbedding, Normal, Uniform, storage
from descompiler.dynamic.hashing import mix, slice_of, slices_for, unit, unmix
from descompiler.dynamic.owners import Owners
from descompiler.dynamic.residence import FreeSlots
from descompiler.dynamic.sketch import Sketch
from descompiler.dynamic.stand_in import StandIn, stand_in_rows
from descompiler.dynamic.static import with_dynamic
from descompiler.dynamic.storage import Growing
from descompiler.dynamic.table import Config, Table
from descompiler.errors import InputError
from tests.harness import dynamic as oracle

CPU = torch.device("cpu")
words = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(words, min_size=1))
def test_mix_is_splitmix64s_finaliser_and_a_bijection(ids):
    mixed = mix(torch.tensor(ids))
    assert mixed.tolist() == [oracle.signed(oracle.mix(i % oracle.WORD)) for i in ids]
    assert unmix(mixed).tolist() == ids


@given(st.lists(words, min_size=1), st.sampled_from([64, 512, 4096]))
def test_slices_are_top_bits(keys, slices):
    assert slice_of(torch.tensor(keys), slices).tolist() == [(k % oracle.WORD) * slices >> 64 for k in keys]


@pytest.mark.parametrize(("rows", "slices"), [(1, 64), (8191, 64), (16384, 128), (16383, 64), (10**9, 4096)])
def test_slices_of_a_capacity(rows, slices):
    assert slices_for(rows) == slices


def zipf(count: int) -> torch.Tensor:
    """Ids of which the k-th is asked for as often as k to the power of -1.1."""
    generator = torch.Generator().manual_seed(3)
    return (torch.rand(count, generator=generator, dtype=torch.float64) ** -10).clamp(max=1e15).to(torch.int64)


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 16])
def test_owners_are_balanced_on_ids_that_follow_zipf(ranks):
    """By rows, which are spread evenly; what one hot id has more of lookups is that id's."""
    owners = Owners(4096, ranks)
    ids = zipf(300_000).unique()
    held = torch.bincount(owners.of(mix(ids)), minlength=ranks).double()
    assert len(ids) > 20_000 and float(held.max() / held.mean()) < 1.05
    shares = torch.bincount(owners.of_slices, minlength=ranks)
    assert int(shares.max() - shares.min()) <= 1


@pytest.mark.parametrize("slices", [64, 4096])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 63, 64, 70])
def test_one_rank_more_moves_its_share_and_nothing_else(slices, ranks):
    before, after = Owners(slices, ranks).of_slices, Owners(slices, ranks + 1).of_slices
    moved = before != after
    assert bool((after[moved] == ranks).all())
    assert int(moved.sum()) == slices // (ranks + 1)


@pytest.mark.parametrize("given", [(63, 2), (1, 1), (64, 0)])
def test_owners_of_what_there_is(given):
    with pytest.raises(InputError, match=r"slices=|ranks="):
        Owners(*given)


def test_initial_rows_depend_on_their_key_alone():
    """Not on the keys beside them, nor on how many there are: bit for bit."""
    keys = mix(torch.arange(1000))
    for init in (Normal(0.5, 2.0), Uniform(-0.1, 0.3)):
        rows = init.values(keys, 7)
        for part in (keys[:1], keys[3:20], keys[999:]):
            at = int((keys == part[0]).nonzero())
            assert torch.equal(init.values(part, 7), rows[at : at + len(part)])
    assert Normal(0.5, 2.0).values(keys[:5], 7).tolist() == [
        oracle.normal_row(k % oracle.WORD, 7, 0.5, 2.0) for k in keys[:5].tolist()
    ]


def test_initial_rows_are_distributed_as_they_say():
    keys = mix(torch.arange(20_000))
    normal, uniform = Normal(1.0, 2.0).values(keys, 4), Uniform(-1.0, 3.0).values(keys, 4)
    assert abs(float(normal.mean()) - 1) < 0.03 and abs(float(normal.std()) - 2) < 0.03
    within = ((normal - 1).abs() < 2).double().mean()
    assert abs(float(within) - 0.6827) < 0.01
    assert float(uniform.min()) >= -1 and float(uniform.max()) < 3 and abs(float(uniform.mean()) - 1) < 0.03
    assert abs(float(torch.corrcoef(normal.T)[0, 1])) < 0.03
    assert bool((Constant(0.25).values(keys, 2) == 0.25).all())


@pytest.mark.parametrize("make", [lambda: Uniform(1, 0), lambda: Normal(0, -1), lambda: Constant(float("nan"))])
def test_initial_rows_that_are_none(make):
    with pytest.raises(InputError, match=r"low is above|not negative|finite"):
        make()


@pytest.mark.parametrize(("bits", "width"), [(8, 8), (8, 512), (16, 8)])
def test_a_sketch_counts_never_too_few(draws, bits, width):
    seen, true = Sketch(64, width, bits), {}
    keys = mix(torch.arange(400))
    for _ in range(40):
        some = torch.tensor(sorted(draws.sample(range(400), draws.randint(0, 200))), dtype=torch.int64)
        seen.add(keys[some])
        for i in some.tolist():
            true[i] = true.get(i, 0) + 1
    found = seen.estimate(keys).tolist()
    assert all(found[i] >= true.get(i, 0) for i in range(400))
    exact = sum(found[i] == true.get(i, 0) for i in range(400))
    assert exact == 400 if width == 512 else exact < 400


def test_a_sketch_is_that_of_the_set():
    """The same whatever the order; full counters stay; halves are halves."""
    keys = mix(torch.arange(5000))
    one, other = Sketch(64, 16, 8, halve_every=300), Sketch(64, 16, 8)
    for _ in range(260):
        one.add(keys)
        other.add(keys.flip(0))
    assert torch.equal(one.counters, other.counters) and int(one.counters.max()) == Sketch.most(8) == 255
    one.end_step(298)
    assert int(one.estimate(keys).min()) == 255
    one.end_step(299)
    assert int(one.estimate(keys).max()) == 127


BAD_SIGHTINGS = [{"sightings": 0}, {"sightings": 300}, {"bits": 7}, {"width": 0}, {"halve_every": 0}]


@pytest.mark.parametrize("option", BAD_SIGHTINGS)
def test_sightings_that_cannot_be_counted(option):
    with pytest.raises(InputError, match=next(iter(option))):
        AfterSightings(**{"sightings": 2, **option})


@pytest.mark.parametrize("reserved", [True, False])
def test_tensors_grow_and_keep_what_they_have(monkeypatch, reserved):
    """In reserved space views of before stay views; elsewhere, and where the space ends, values are copied."""
    if not reserved:
        monkeypatch.setattr(storage, "reserve", lambda size: None)
    monkeypatch.setattr(storage, "RESERVED_BYTES", 4096)
    grown, shown = Growing((1, 3), torch.float64, CPU), []
    for size in (2, 3, 100, 170, 171, 1000):
        first = grown.tensor
        first[-1] = len(first)
        grown.grow(size)
        shown.append(grown.tensor.data_ptr() == first.data_ptr())
        assert grown.tensor.shape == (size, 3) and bool((grown.tensor[-1] == 0).all())
        if reserved:
            assert grown.tensor.untyped_storage().nbytes() == size * 24
    assert shown == ([True, True, True, True, False, False] if reserved else shown)
    assert sorted({float(x) for x in grown.tensor[:, 0]}) == [0.0, 1.0, 2.0, 3.0, 100.0, 170.0, 171.0]
    grown.grow(5)
    assert len(grown.tensor) == 1000


def test_a_tensor_takes_the_memory_that_it_uses():
    grown = Growing((1, 64), torch.float32, CPU)
    assert grown._room * 256 > 1 << 35
    before = resident_kib()
    grown.grow(100_000)
    assert resident_kib() - before < 5_000
    grown.tensor[:] = 1
    assert resident_kib() - before > 20_000


def resident_kib() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def test_free_slots_are_taken_once():
    draws = random.Random(1)
    free, taken = FreeSlots(), set()
    for _ in range(200):
        slots = free.take(draws.randint(0, 20)).tolist()
        assert not taken & set(slots) and 0 not in slots
        taken |= set(slots)
        gone = draws.sample(sorted(taken), draws.randint(0, len(taken)))
        free.give(torch.tensor(gone, dtype=torch.int64))
        taken -= set(gone)
        assert len(free) + len(taken) == free.end - 1
    again = FreeSlots()
    again.restore(torch.tensor(sorted(taken)), free.end)
    assert set(again.take(len(free)).tolist()) == set(range(1, free.end)) - taken


def test_units_are_below_one():
    assert unit(torch.tensor([-1, 0, 1 << 62])).tolist() == [1 - 2**-53, 0.0, 0.25]


def test_rows_of_a_stand_in_lie_in_their_slices_and_are_all_used():
    table = DynamicEmbedding(2, name="user", evict=Capacity(1000))
    stand_in = StandIn(table, torch.device("cpu"))
    keys = torch.randint(-(1 << 62), 1 << 62, (100_000,))
    rows = stand_in_rows(keys, stand_in.salt, stand_in.slices, stand_in.rows, None, True)
    assert stand_in.rows == 16 * 64 and len(rows.unique()) == stand_in.rows
    assert torch.equal(rows // 16, slice_of(table._table.keys(keys), 64))
    assert rows.bincount().float().std() < 20  # of 98 on average: as of draws


def test_static_tables_become_dynamic_ones_of_different_names():
    model = with_dynamic(nn.ModuleList([nn.Embedding(3, 4), nn.Embedding(3, 4)]), {"0": None, "1": None})
    one, other = (table(torch.tensor([7])) for table in model)
    assert not torch.equal(one, other) and len(model[0]) == 4


def test_ranks_have_no_more_rows_together_than_one():
    """Slices that every rank has count once, as their rows do."""
    config, limits = Config(2, "user", 0, Constant(0.5), Always(), None, 1000), []
    owners = torch.arange(64) % 4 - 1  # a quarter of the slices is every rank's
    for rank in range(3):
        table = Table(config, torch.float32, torch.device("cpu"))
        table.own(owners, rank, 3)
        limits.append(table.residence.max_rows)
        assert len(table.held_slices) == 32
    assert sum(limits) == 1000

"""The map from keys to slots is a dict, whatever is entered and taken out, and while it moves to more cells."""

import ctypes
import mmap
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from descompiler.dynamic.hashing import mix, slice_of
from descompiler.dynamic.id_map import FULL, MOVED_AT_ONCE, IdMap, prime_from

SLICES = 64

words = st.integers(-(2**63), 2**63 - 1)
few = st.integers(0, 40).map(lambda i: (i % 3) << 58 | i << 20)
"""Keys of three slices."""
names = st.sampled_from(["insert", "find", "keep"])
calls = st.lists(st.tuples(names, st.lists(few | words, max_size=60)), max_size=12)


def check(ids: IdMap, known: dict[int, int], keys: list[int]) -> None:
    found = ids.find(torch.tensor(keys, dtype=torch.int64))
    assert found.tolist() == [known.get(k, 0) for k in keys]


@pytest.mark.long
@settings(max_examples=120)
@given(calls)
def test_it_is_a_dict(steps):
    ids, known, slot = IdMap(SLICES), {}, 1
    for call, keys in steps:
        if call == "insert":
            new = list(dict.fromkeys(k for k in keys if k not in known))
            slots = torch.arange(slot, slot + len(new))
            ids.insert(torch.tensor(new, dtype=torch.int64), slots)
            known |= dict(zip(new, slots.tolist(), strict=True))
            slot += len(new)
        elif call == "keep":
            slices = {int(slice_of(torch.tensor([k]), SLICES)) for k in keys}
            stay = {k for k in keys if k in known}
            gone = {k for k in known if int(slice_of(torch.tensor([k]), SLICES)) in slices and k not in stay}
            slots = torch.tensor([known[k] for k in sorted(stay)], dtype=torch.int64)
            ids.keep(torch.tensor(sorted(slices), dtype=torch.int64), slots)
            known = {k: s for k, s in known.items() if k not in gone}
        check(ids, known, [*keys, *known])
        assert len(ids) == len(known) == int(ids.live.sum())
        assert sorted(ids.in_slices(torch.arange(SLICES)).tolist()) == sorted(known.values())


def fill(ids: IdMap, start: int, count: int, known: dict[int, int]) -> None:
    keys = mix(torch.arange(start, start + count))
    slots = torch.arange(start + 1, start + count + 1)
    ids.insert(keys, slots)
    known |= dict(zip(keys.tolist(), slots.tolist(), strict=True))


def test_it_grows_little_by_little():
    """A call moves no more than a few times what it inserts, or one slice, and finds everything meanwhile."""
    ids, known, moving, most, written = IdMap(SLICES), {}, 0, 0, []
    fill(ids, 0, 20_000, known)
    original = ids._write
    ids._write = lambda slices, slots=None: (written.append(int(ids.live[slices].sum())), original(slices, slots))
    for start in range(20_000, 60_000, 200):
        written.clear()
        fill(ids, start, 200, known)
        most, moving = max(most, sum(written)), moving + ids.moving
        check(ids, known, [*known][-400:] + [*known][:: max(start // 200, 1)])
    assert 50 < moving < 200 and most < MOVED_AT_ONCE + 4 * 200 + 2 * 60_000 // SLICES
    assert len(ids) == 60_000 and int(ids.find(mix(torch.arange(60_000))).min()) == 1


def test_a_call_that_brings_many_fits():
    ids, known = IdMap(SLICES), {}
    for start, count in ((0, 1), (1, 5_000), (5_001, 90_000), (95_001, 10)):
        fill(ids, start, count, known)
        assert int(ids.live.max()) <= FULL * ids._layout.size
    check(ids, known, [*known])
    check(ids, {}, mix(torch.arange(200_000, 210_000)).tolist())


def test_keys_that_meet_in_one_slice_fit():
    """All have the same top bits, so that one slice alone has them."""
    ids = IdMap(SLICES)
    keys = torch.arange(5_000) << 20
    ids.insert(keys, torch.arange(1, 5_001))
    assert ids.find(keys).tolist() == list(range(1, 5_001)) and int(ids.live[0]) == 5_000


def test_memory_of_an_id():
    """Cells and keys; at its largest when it has just grown. With both counters, 8 bytes, it is 24 at most."""
    ids, known = IdMap(SLICES), {}
    taken = []
    for start in range(0, 150_000, 1_000):
        fill(ids, start, 1_000, known)
        if start > 50_000 and not ids.moving:
            taken.append((ids._layout.cells.nbytes + 8 * len(ids)) / len(ids))
    assert max(taken) <= 16.1


@pytest.mark.parametrize("size", [17, 18, 100, 1000])
def test_sizes_are_prime(size):
    found = prime_from(size)
    assert found >= size and all(found % d for d in range(2, found))


def resident_bytes(array):
    """Of the pages that an array lies in, which has them for itself, those that take memory."""
    pages = -(-array.nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), found) == 0
    return sum(x & 1 for x in found) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back where it is reserved")
def test_cells_that_have_moved_take_no_memory():
    """What is counted while slices move is what the system counts, and never more than when all have."""
    ids, generator, most, moves = IdMap(256), torch.Generator().manual_seed(0), 0.0, 0
    for first in range(1, 400_000, 4_000):
        keys = mix(torch.randint(-(1 << 62), 1 << 62, (4_000,), generator=generator))
        ids.insert(keys, torch.arange(first, first + 4_000))
        if len(ids) < 100_000:
            continue
        most = max(most, ids.memory_bytes() / len(ids))
        if ids.moving:
            moves += 1
            held = ids.memory_bytes() - ids.keys.tensor.nbytes
            there = resident_bytes(ids._layout.cells) + resident_bytes(ids._old.cells)
            assert abs(there - held) < 0.05 * held + (1 << 17)
    assert moves > 10 and most < 16
    assert torch.equal(ids.find(keys), torch.arange(first, first + 4_000))

"""Pieces: what is cut can be joined again, and what ranks hold is said in as few words as there are kinds of ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from descompiler.layout.division import Range
from descompiler.layout.pieces import ALL, Pieces, even_sizes

RANKS = 4
RANGES = st.lists(st.tuples(st.integers(0, 3), st.integers(ALL, RANKS - 1)), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(RANGES)
def test_runs_are_the_ranges_that_they_were_made_of(held):
    rows, expected = 0, []
    for size, owner in held:
        expected.append(Range(rows, rows + size, owner))
        rows += size
    pieces = Pieces.of((rows, 2), 0, held, RANKS)
    assert list(pieces.division) == expected
    for rank in range(RANKS):
        assert pieces.own(rank) == [r for r in expected if r.owner == rank and r.size]
        assert pieces.own_size(rank) == sum(r.size for r in expected if r.owner == rank)
    division, before = pieces.division, dict.fromkeys(range(ALL, RANKS), 0)
    for r, offset in zip(expected, division.offsets().tolist(), strict=True):
        assert offset == before[r.owner]
        before[r.owner] += r.size
    assert all(division.widths.get(owner, 0) == size for owner, size in before.items())
    for first, last in ((0, rows), (1, rows - 1), (2, 3)):
        parts = list(division.within(first, last))
        for owner in range(ALL, RANKS):
            mine = [i for i in division.positions(owner) if first <= i < last]
            assert mine == [i for r, _ in parts if r.owner == owner for i in range(r.start, r.stop)]
        assert {(r.start - offset, r.owner) for r, offset in parts} <= {(r.start, r.owner) for r in expected}
    assert pieces.shared() == [r for r in expected if r.owner == ALL and r.size]
    assert pieces.owners == tuple(sorted({r.owner for r in expected if r.size} - {ALL}))
    weight = torch.randn(rows, 2)
    assert torch.equal(pieces.join([pieces.cut(weight, r) for r in range(RANKS)]), weight)


@pytest.mark.parametrize("rows", [0, 3, 1000, 1024, 10**12 + 1])
@pytest.mark.parametrize("ranks", [1, 7, 1024])
def test_an_even_division_is_two_runs_at_most(rows, ranks):
    pieces = Pieces.even((rows, 8), 0, ranks)
    assert pieces == Pieces.by_sizes((rows, 8), 0, even_sizes(rows, ranks), ranks) and len(pieces.division.runs) <= 2


@pytest.mark.parametrize("held", [[(3, 0)], [(4, RANKS)], [(2, 0), (-1, 1), (3, 2)], [(4, -2)], [(2, 3), (2, 4)]])
def test_ranges_that_do_not_tile_are_refused(held):
    with pytest.raises(ValueError, match="do not tile dimension 0"):
        Pieces.of((4, 2), 0, held, RANKS)

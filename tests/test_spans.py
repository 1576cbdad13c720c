"""Spans of ranks say the same as a value for each rank."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from descompiler.layout.spans import alike, at, spans_of, summed, union

RANKS = 9
BY_RANK = st.dictionaries(st.integers(0, RANKS - 1), st.integers(1, 2))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(BY_RANK, min_size=1, max_size=3))
def test_spans_are_values_by_rank(several):
    every = [spans_of(sorted(values.items())) for values in several]
    for values, spans in zip(several, every, strict=True):
        assert {r: at(spans, r, None) for r in range(-1, RANKS + 1) if at(spans, r, None)} == values
        assert summed(spans) == sum(values.values())
        assert alike(sorted(values), "all") == spans_of((r, "all") for r in sorted(values))
        assert all(a[1] < b[0] or a[2] != b[2] for a, b in itertools.pairwise(spans))
    together = union(every, sum)
    for r in range(RANKS):
        assert at(together, r, 0) == sum(values.get(r, 0) for values in several)


def test_spans_of_ranks_side_by_side_are_found_without_looking_at_each():
    class Counted(tuple):
        looks = 0

        def __getitem__(self, i):
            Counted.looks += 1
            return tuple.__getitem__(self, i)

    assert alike(Counted(range(100_000)), 1) == ((0, 100_000, 1),)
    assert Counted.looks < 100

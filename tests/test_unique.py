"""Ids made unique: as `torch.unique` has them, with sums in the order of positions."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from descompiler.ops.unique import unique

IDS = st.one_of(
    st.lists(st.integers(0, 5), max_size=40),
    st.lists(st.integers(-(2**40), 2**40), max_size=40),
    st.lists(st.sampled_from([-(2**63), -1, 0, 1, 2**62, 2**63 - 1]), max_size=12),  # no room for a position
)


@example([2**61, 1, 2**61, 1 - 2**61, 5], torch.int64, (3,))  # beside positions of three bits
@given(IDS, st.sampled_from([torch.int64, torch.int32]), st.sampled_from([(), (3,), (2, 2), (0,)]))
def test_it_is_torchs_and_sums_in_order(ids, dtype, tail):
    given_ids = torch.tensor(ids, dtype=torch.int64).to(dtype)
    expected, inverse = torch.unique(given_ids, return_inverse=True)
    found = unique(given_ids)
    assert torch.equal(found.ids, expected) and torch.equal(found.inverse, inverse) and found.ids.dtype == dtype
    values = torch.randn(len(ids), *tail, dtype=torch.float64)
    sums = torch.zeros(len(expected), *tail, dtype=torch.float64)
    for i, at in enumerate(inverse.tolist()):  # bit for bit: one after another
        sums[at] += values[i]
    assert torch.equal(found.sums(values), sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_sums_are_of_the_values_dtype(dtype):
    ids, values = torch.tensor([4, 2, 4, 4]), torch.tensor([[1.0], [8.0], [2.0], [4.0]]).to(dtype)
    assert torch.equal(unique(ids).sums(values), torch.tensor([[8.0], [7.0]]).to(dtype))

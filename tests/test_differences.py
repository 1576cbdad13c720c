"""Unique ids that cross as differences: what arrives is what was sent, in as many bytes as was told and predicted."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.layout.fetches import Fetch
from descompiler.layout.keys import digits_of, expected_bytes
from descompiler.runtime.differences import decode, differences, encode, sizes_of

EDGES = [0, 1, 126, 127, 128, 129, 255, 16_383, 16_384, 16_385, (1 << 21) - 1, 1 << 21, 1 << 28, 1 << 31, (1 << 62) - 1]


def crossed(groups, digits):
    """Keys of groups, there and back, and the bytes that they took."""
    keys = torch.tensor([k for g in groups for k in g], dtype=torch.int64)
    group = torch.tensor([i for i, g in enumerate(groups) for _ in g], dtype=torch.int64)
    distances = differences(keys, group)
    sizes = sizes_of(distances, digits)
    message = encode(distances, sizes, int(sizes.sum()))
    assert message.dtype is torch.uint8
    assert decode(message, [len(g) for g in groups], digits).tolist() == keys.tolist()
    return len(message)


@pytest.mark.parametrize("edge", EDGES)
def test_every_size_of_a_distance(edge):
    """As the only key, as the first of several groups, behind others and before them, beside groups without any."""
    digits = digits_of(edge + 1)
    size = crossed([[edge]], digits)
    assert size == max(1, -(-edge.bit_length() // 7)) <= digits
    assert crossed([[], [edge], [], [edge], []], digits) == 2 * size
    if edge > 1:
        assert crossed([[0, 1, edge], [edge]], digits) <= 2 + 2 * size


def test_nothing():
    assert crossed([], 3) == crossed([[], []], 1) == 0


def test_any_keys():
    generator = np.random.default_rng(7)
    for rows, count in itertools.product((1, 40, 5000, 1 << 20, 1 << 40), (1, 7, 300)):
        groups = [np.unique(generator.integers(rows, size=generator.integers(count + 1))).tolist() for _ in range(3)]
        sizes = [len(str(bin(d))) for g in groups for d in np.diff(g, prepend=-1) - 1]
        assert crossed(groups, digits_of(rows)) == sum(-(-max(n - 2, 1) // 7) for n in sizes)


@pytest.mark.parametrize("rows, unique", [(5000, 40), (100_000, 700), (3_000_000, 100)])
def test_expected_is_the_mean(rows, unique):
    generator, digits = np.random.default_rng(7), digits_of(rows)
    counted = [crossed([sorted(generator.choice(rows, unique, replace=False).tolist())], digits) for _ in range(30)]
    (expected,) = expected_bytes(np.array([float(unique)]), np.array([rows]))
    assert np.mean(counted) == pytest.approx(expected, rel=0.04)


class Wide(nn.Module):
    """Two tables whose ids lie far apart, fetched together; and one that is asked of what the first says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.late = nn.Embedding(70_000, 2), nn.Embedding(300, 2), nn.Embedding(40_000, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        a = self.a(ids[:, 0])
        chosen = (a[:, 0].abs() * 10_000).long().clamp(max=39_999)
        return (a * self.b(ids[:, 1])).sum(1) + self.late(chosen).sum(1)


def _ids(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(n, (rows,), generator=generator) for n in (70_000, 300)], 1)


def trained(rank, ranks, form):
    """Rows, gradients and bytes of a step, on ranks of which one has no rows."""
    model = Wide().double()
    module = des.compile(model, (_ids(4, 0),), plan={"*": form}, loss="sum")
    found = []
    for counts in ([40, 0, 7], [1, 2, 0]):
        ids = _ids(sum(counts[:ranks]), 5)
        first = sum(counts[:rank])
        out = module(ids[first : first + counts[rank]])
        out.square().sum().backward()
        expected = model(ids)
        expected.square().sum().backward()
        assert torch.allclose(out, expected[first : first + counts[rank]], rtol=1e-12, atol=1e-12)
        for name, p in module.named_parameters():
            part = module.plan.pieces[name].cut(model.get_parameter(name).grad, rank)
            grad = torch.zeros_like(part) if p.grad is None else des.local_tensor(p.grad)
            assert torch.allclose(grad.to_dense(), part, rtol=1e-10, atol=1e-12), name
        assert module.traffic() == module.predicted_traffic()
        unique = module.unique()
        sent = module.traffic().bytes_by_collective
        found.append((sum(x.asked for x in unique.values()), sum(x.shared for x in unique.values()), sent))
        module.zero_grad()
        model.zero_grad()
    return found


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    "form, ranks", [("unique_rows", 3), ("unique_rows", 2), ("sparse_all_gather", 3), ("hot_rows", 2)]
)
def test_what_arrives_is_what_was_asked(form, ranks, on_ranks):
    for found in on_ranks(trained, ranks, form):
        for asked, shared, sent in found:
            if form == "unique_rows":
                assert asked <= sent[Fetch.IDS] <= 3 * asked  # two digits mostly, in place of four bytes
            if form == "sparse_all_gather":
                assert (ranks - 1) * shared <= sent[Fetch.GATHERED_IDS] <= 3 * (ranks - 1) * shared

"""Products with a table divided over the vocabulary equal those with the whole table, on real ranks."""

import itertools

import pytest
import torch

from descompiler.layout.division import Division
from descompiler.layout.layout import Layout
from descompiler.layout.traffic import Traffic
from descompiler.layout.vocabulary import Vocabulary
from descompiler.ops.vocabulary import kinds_of, vocabulary
from descompiler.runtime import vocabulary as vocab
from descompiler.runtime.runtime import Runtime
from descompiler.runtime.vocabulary import vocabulary_on_ranks

SIZE, DIM, LENGTH = 23, 3, 2
REQUESTS = {
    "cross_entropy": ["log_sum_exp", "select"],
    "sampled": ["select"],
    "smoothed": ["log_sum_exp", "total", "select"],
    "best": ["top", "max"],
    "everything": ["logits", "top", "select", "max", "log_sum_exp", "total"],
}


def data(rows):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(rows, LENGTH, DIM, generator=g, dtype=torch.float64)
    weight = torch.randn(SIZE, DIM, generator=g, dtype=torch.float64)
    bias = torch.randn(SIZE, generator=g, dtype=torch.float64)
    ids = torch.randint(SIZE, (rows, LENGTH, 5), generator=g)
    ids[:, :, 0] = torch.arange(rows).unsqueeze(1) % SIZE  # targets on every owner, repeated ones
    ids[::3, :, 1] = -100  # ignored
    return x, weight, bias, ids


def requests_for(kinds, ids):
    arguments = {"select": (ids, -100), "top": (9,)}  # more than some owners have
    return [(kind, *arguments.get(kind, ())) for kind in kinds]


def loss_of(results, first):
    total = torch.zeros((), dtype=torch.float64)
    for r in results:
        if r.is_floating_point():
            rows = torch.arange(first, first + len(r), dtype=r.dtype).reshape(-1, *[1] * (r.dim() - 1))
            total = total + ((r - torch.cos(rows)) ** 2).sum()
    return total


def close(a, b):
    assert a.shape == b.shape
    if a.numel():
        assert float((a - b).abs().max()) <= 1e-10 * max(1.0, float(b.abs().max()))


def _case(rank, ranks, kinds, counts, held, first, kept):
    if kept is not None:
        vocab.KEPT_ELEMENTS = kept
    x, weight, bias, ids = data(sum(counts))
    size = sum(size for size, _ in held) - first
    requests = requests_for(kinds, ids)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    expected = vocabulary(leaves[0], leaves[1], leaves[2][:size], first, size, requests)
    loss_of(expected, 0).backward()

    # the piece of a rank is its rows of the table; the part of the vocabulary may begin inside it
    starts = itertools.accumulate((size for size, _ in held), initial=0)
    mine = next((slice(a, a + n) for a, (n, owner) in zip(starts, held, strict=False) if owner == rank), slice(0, 0))
    part = slice(max(mine.start - first, 0), max(mine.stop - first, 0))
    piece, piece_bias = weight[mine].clone().requires_grad_(), bias[part].clone().requires_grad_()
    begin = sum(counts[:rank])
    rows = slice(begin, begin + counts[rank])
    own = x[rows].clone().requires_grad_()
    widths = kinds_of(requests, lambda i: i.shape[-1])
    spec = Vocabulary("v", Division.of(held), first, size, DIM, LENGTH, widths)
    import torch.distributed as dist

    runtime = Runtime(dist.group.WORLD, rank, ranks, "sum", wire_dtype=torch.float64)
    runtime.rows, runtime.traffic = list(counts), Traffic()
    asked = [ids[rows]] if "select" in kinds else []
    got = vocabulary_on_ranks(runtime, spec, [n * LENGTH for n in counts], own, piece, piece_bias, asked)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        close(a, b[rows])
    (loss_of(got, begin) * ranks).backward()  # a rank's gradients are those of the sum, times the ranks
    close(own.grad, leaves[0].grad[rows] * ranks)
    if len(piece):
        close(piece.grad, leaves[1].grad[mine])
        close(piece_bias.grad, leaves[2].grad[part])
    predicted = Layout(ranks, (spec,)).predict(rank, counts, 8)
    sent = dict(runtime.traffic.bytes_by_collective)
    predicted.bytes_by_collective = {k: v for k, v in predicted.bytes_by_collective.items() if "vocabulary" in k}
    assert predicted.bytes_by_collective == sent
    return sum(sent.values())


CASES = [
    # rows of each rank, (size, owner) of the table's ranges, first row of the vocabulary, logits to keep
    ([4, 3], [(12, 0), (11, 1)], 0, None),
    ([0, 5], [(12, 0), (11, 1)], 0, None),
    ([5, 2], [(23, 1)], 0, None),  # one owner
    ([5, 2], [(3, 1), (20, 0)], 0, 40),  # owners out of order; logits computed again, in chunks
    ([3, 4], [(12, 0), (11, 1)], 2, None),  # without the first two rows
]


def _cases(rank, ranks):
    return [
        _case(rank, ranks, kinds, counts, held, first, kept)
        for counts, held, first, kept in CASES
        for kinds in REQUESTS.values()
    ]


def test_two_ranks_equal_one(on_ranks):
    results = on_ranks(_cases, 2)
    assert all(a + b > 0 for a, b in zip(*results, strict=True))


def _three(rank, ranks):
    held = [(8, 0), (15, 2)]  # a rank that owns nothing
    return [_case(rank, ranks, kinds, [2, 3, 0], held, 0, None) for kinds in REQUESTS.values()]


def test_a_rank_that_owns_nothing(on_ranks):
    on_ranks(_three, 3)


@pytest.mark.parametrize("kind, expected", [("max", 1), ("top", 1)])
def test_the_first_of_equal_logits_wins(kind, expected):
    spec = Vocabulary("v", Division.of([(2, 0), (2, 1)]), 0, 4, 1, 1, ((kind, 1),))
    parts = [torch.tensor([[3.0]]), torch.tensor([[3.0]])]
    values, best = vocab._merge(spec, parts, [torch.tensor([[1]]), torch.tensor([[2]])])
    assert (values.item(), best.item()) == (3.0, expected)

"""Collectives that pass through the host, as gloo needs for tensors of a GPU; the groups that collectives run in."""

import pytest
import torch
import torch.distributed as dist

import descompiler as des
from descompiler.runtime import collectives
from examples.models import MODELS, make_inputs


def _through_the_host(rank, ranks, function):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "through_host", lambda x, group: True)
        return function(rank, ranks)


def _exchange(rank, ranks):
    sent = [(rank + 1) * (r + 1) for r in range(ranks)]
    received = [(r + 1) * (rank + 1) for r in range(ranks)]
    values = torch.arange(sum(sent), dtype=torch.float64) + 100 * rank
    pending = collectives.all_to_all(values, sent, received, None)
    every = collectives.all_gather(torch.tensor([rank, rank + 10]), None)
    if rank == 0:
        collectives.send(torch.arange(3).t(), 1, None)
    moved = collectives.receive(torch.empty(3, dtype=torch.int64), 0, None) if rank == 1 else torch.arange(3)
    return pending.wait(), every, moved


def test_through_the_host(on_ranks):
    for direct, staged in zip(on_ranks(_exchange, 2), on_ranks(_through_the_host, 2, _exchange), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(direct, staged, strict=True))
        assert direct[1].tolist() == [0, 10, 1, 11] and direct[2].tolist() == [0, 1, 2]


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)


def _sums(rank, ranks):
    """Sums of tensors of many dtypes and sizes, and what lies in memory beside them."""
    generator, found = torch.Generator().manual_seed(rank), []
    for dtype in DTYPES:
        for size in (0, 1, 7, 5000):
            memory = torch.rand(3, size, 2, generator=generator, dtype=torch.float64).mul_(80).to(dtype)
            before, x = memory.clone(), memory[1]
            under_way = collectives.all_reduce(x, None)
            assert under_way.wait() is x and under_way.wait() is x  # once is enough
            assert torch.equal(memory[::2], before[::2])
            found.append((before[1], x))
    trained = torch.ones(2, requires_grad=True)
    collectives.all_reduce(trained, None).wait()
    assert trained.tolist() == [ranks, ranks] and trained.is_leaf  # autograd has nothing to do with it
    most = torch.tensor([rank, -rank])
    collectives.all_reduce(most, None, dist.ReduceOp.MAX).wait()
    return found, most.tolist()


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_over_ranks(on_ranks, ranks):
    every = on_ranks(_sums, ranks)
    for parts in zip(*(found for found, _ in every), strict=True):
        total = torch.stack([before.double() for before, _ in parts]).sum(0)
        for _, mine in parts:
            assert torch.equal(mine, parts[0][1])  # the same bits on all ranks
            eps = torch.finfo(mine.dtype).eps if mine.is_floating_point() else 0.0
            torch.testing.assert_close(mine.double(), total, rtol=ranks * eps, atol=0.0)
    assert [most for _, most in every] == [[ranks - 1, 0]] * ranks
    if ranks == 2:
        for (found, _), (staged, _) in zip(every, on_ranks(_through_the_host, 2, _sums), strict=True):
            assert all(torch.equal(a[1], b[1]) for a, b in zip(found, staged, strict=True))


def _train(rank, ranks):
    torch.manual_seed(0)
    model, inputs = MODELS["deepfm"]("fields", batch_norm=True).double(), make_inputs("deepfm", "fields", 6)
    inputs = (inputs[0].double(), inputs[1])
    module = des.compile(model, inputs, plan={"*": "row_wise"}, loss="row_mean")
    mine = slice(0, 4) if rank == 0 else slice(4, 6)
    module(*(x[mine] for x in inputs)).mean().backward()
    model(*inputs).mean().backward()
    whole = dict(model.named_parameters())
    return max(
        float((p.grad - module.pieces(n).cut(whole[n].grad, rank)).abs().max())
        for n, p in module.named_parameters()
        if p.numel()
    )


def test_training_through_the_host(on_ranks):
    for error in on_ranks(_through_the_host, 2, _train):
        assert error == pytest.approx(0, abs=1e-12)


def _trained(group):
    torch.manual_seed(0)
    inputs = make_inputs("fm", "fields", 8)
    module = des.compile(MODELS["fm"]("fields"), inputs, plan={"*": "row_wise"}, process_group=group, timeout=30)
    module(*inputs).sum().backward()


def _groups(rank, ranks):
    pairs = {pair: dist.new_group(pair) for pair in [(0, 1), (1, 2)]}
    for pair in [(1, 2), (0, 1)]:  # when the second is compiled for, the first rank is in fewer groups than the other
        if rank in pair:
            _trained(pairs[pair])
    for _ in range(2):
        group = dist.new_group([0, 1, 2])
        _trained(group)
        dist.destroy_process_group(group)
    _trained(None)


@pytest.mark.long
def test_groups_that_overlap_and_groups_that_were_destroyed(on_ranks):
    """Ranks agree on the names of the groups that are made for them, and take none twice."""
    on_ranks(_groups, 3)

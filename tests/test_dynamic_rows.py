"""Rows of dynamic tables and what optimisers keep: growing within a step, late gradients, slots used anew."""

import copy
import gc
import weakref

import pytest
import torch

from descompiler.dynamic import (
    AfterSightings,
    Always,
    Capacity,
    Constant,
    DynamicEmbedding,
    DynamicEmbeddingBag,
    TimeToLive,
)
from descompiler.dynamic.id_map import FEWEST_CELLS
from descompiler.dynamic.rows import FEWEST_ROWS
from descompiler.dynamic.storage import SOME
from descompiler.errors import UnsupportedError
from tests.harness.dynamic import OPTIMIZERS, contents, made

IDS = torch.arange


def of(**options):
    return DynamicEmbedding(2, dtype=torch.float64, **options)


def test_one_step_may_bring_more_rows_than_there_is_room_for():
    """Lookups of before and after the parameter has grown, in one backward and in two: the gradient is their sum."""
    table = of()
    lookups = [IDS(10), IDS(5, 2 * FEWEST_ROWS), IDS(3, 5 * FEWEST_ROWS), IDS(0, 20 * FEWEST_ROWS)]
    found = [table(ids) for ids in lookups]
    found[2].sum().backward()
    (found[0].sum() + found[1].sum()).backward(retain_graph=True)
    found[3].sum().backward()
    found[0].sum().backward()
    assert table.weight.grad.shape == table.weight.shape
    dense = table.weight.grad.to_dense()[:, 0]
    slots = table._table.residence.find(table._table.keys(lookups[3]))
    expected = sum(torch.isin(lookups[3], ids).double() for ids in (*lookups, lookups[0]))
    assert torch.equal(dense[slots], expected) and float(dense.sum()) == float(expected.sum())


@pytest.mark.parametrize("admit", [Always(), AfterSightings(2)])
def test_a_step_may_begin_with_lookups_of_nothing(admit):
    """Gradients of no rows, in a backward of their own, and then of some."""
    table = of(admit=admit)
    table(IDS(5))
    table.end_step()
    for ids in (IDS(0), IDS(100, 105), IDS(3), IDS(0), IDS(2)):
        table(ids).sum().backward()
    assert table.weight.grad.coalesce().values()[:, 0].sort(descending=True).values[:3].tolist() == [2, 2, 1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_that_grow_are_steps_of_what_had_the_room(optimizer):
    """The same training on a table that is large from the start, bit for bit."""
    found = []
    for rows in (1, 40 * FEWEST_ROWS):
        table = made("always", "none")
        table._table.rows.need(rows)
        opt = OPTIMIZERS[optimizer][1](table.parameters())
        for step in range(1, 6):
            opt.zero_grad()
            sum(table(IDS(0, n * step * FEWEST_ROWS, 7)).square().sum() for n in (1, 3, 6)).backward()
            opt.step()
        found.append(contents(table))
    assert found[0] == found[1]


def test_rows_come_without_copies():
    """The parameter grows in its place, and with it what the optimiser keeps."""
    table = of()
    opt = torch.optim.Adagrad(table.parameters(), lr=0.1)
    places = []
    for step in range(1, 8):
        table(IDS(step * 2 * FEWEST_ROWS)).sum().backward()
        opt.step()
        opt.zero_grad()
        places.append((table.weight.data_ptr(), opt.state[table.weight]["sum"].data_ptr()))
    assert len(set(places[1:])) == 1
    assert table.weight.untyped_storage().nbytes() == table.weight.nbytes < 16 * 3 * 14 * FEWEST_ROWS


@pytest.mark.parametrize(
    ("optimizer", "initial"),
    [
        (lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5), {"sum": 0.5}),
        (lambda p: torch.optim.SparseAdam(list(p), lr=0.1), {"exp_avg": 0.0, "exp_avg_sq": 0.0}),
    ],
)
def test_a_slot_used_anew_begins_anew(optimizer, initial):
    table = of(evict=TimeToLive(1))
    opt = optimizer(table.parameters())
    for ids in (IDS(4), IDS(10, 11), IDS(20, 24)):  # the first rows go when the second step ends
        opt.zero_grad()
        table(ids).square().sum().backward()
        opt.step()
    assert table.resident().tolist() == [20, 21, 22, 23]
    assert table._table.residence.free.end == 6  # slots were used anew
    alone = of(evict=TimeToLive(1))
    other = optimizer(alone.parameters())
    for ids in (IDS(0), IDS(0), IDS(20, 24)):
        other.zero_grad()
        (alone(ids).square().sum() + 0 * alone(ids).sum()).backward()
        other.step()
    assert {i: contents(table)[i] for i in range(20, 24)} == contents(alone)
    slots = table._table.residence.find(table._table.keys(IDS(20, 24)))
    assert all(bool((opt.state[table.weight][name][slots] != value).all()) for name, value in initial.items())
    table.end_step()
    table.end_step()
    opt.zero_grad()
    table(IDS(30, 40))  # without a gradient, so that the state stays as it begins
    opt.step()
    slots = table._table.residence.find(table._table.keys(IDS(30, 40)))
    assert all(bool((opt.state[table.weight][name][slots] == value).all()) for name, value in initial.items())


def test_rows_of_free_slots_are_zeros():
    table = of(evict=TimeToLive(1))
    opt = torch.optim.SGD(table.parameters(), lr=0.1)
    for ids in (IDS(50), IDS(50, 60), IDS(60, 61)):
        table(ids).sum().backward()
        opt.step()
        opt.zero_grad()
    slots = table._table.residence.resident()
    free = torch.ones(len(table.weight), dtype=torch.bool)
    free[slots] = False
    assert len(slots) == len(table) < 50 and not bool(table.weight[free].any())


def test_a_gradient_that_comes_late_finds_no_other_row():
    """Looked up before rows went and slots got others: what is left of the gradient is that of rows that stayed."""
    table = of(evict=TimeToLive(1), init=Constant(1.0))
    late = table(IDS(6))
    table.end_step()
    table(IDS(3))
    table.end_step()  # 3, 4, 5 go
    table(IDS(100, 103))  # to their slots
    assert table.resident().tolist() == [0, 1, 2, 100, 101, 102]
    late.sum().backward()
    grad = dict(zip(table.weight.grad.coalesce().indices()[0].tolist(), [1] * 6, strict=False))
    slots = table._table.residence.find(table._table.keys(IDS(3))).tolist()
    assert sorted(grad) == sorted(slots)


def test_a_gradient_that_is_not_taken_away_is_of_no_later_row():
    """Without zero_grad a gradient goes on to the next step, but for the rows that went: others have their slots."""
    table = of(init=Constant(0.0), evict=TimeToLive(1))
    opt = torch.optim.SGD(table.parameters(), lr=1.0)
    for ids in (IDS(3), IDS(2, 4), IDS(4, 8)):  # rows 0 and 1 go with the second step, 2 with the third
        table(ids).sum().backward()
        opt.step()
    assert table.resident().tolist() == [4, 5, 6, 7]
    assert table(IDS(4, 8)).tolist() == [[-1.0, -1.0]] * 4


def test_a_row_with_a_gradient_stays_until_an_optimiser_has_taken_it():
    table = of(evict=TimeToLive(1))
    table(IDS(3)).sum().backward()
    for _ in range(4):
        table.end_step()
    assert len(table) == 3
    opt = torch.optim.SGD(table.parameters(), lr=0.1)
    opt.step()
    assert len(table) == 0
    assert table.weight.grad._nnz() == 0  # nothing is applied to slots that are free
    opt.step()
    assert not bool(table.weight.any())


def test_capacity_keeps_rows_with_a_gradient():
    """One slice or all: what can't go stays, also above the capacity."""
    table = of(evict=Capacity(64))
    table(IDS(500)).sum().backward()
    table.end_step()
    assert len(table) == 500
    torch.optim.SGD(table.parameters(), lr=0.1).step()
    assert len(table) <= 64


def test_evaluation_creates_and_counts_nothing():
    table = of(admit=AfterSightings(2), evict=Capacity(64 * 4, by="lfu"))
    opt = torch.optim.SGD(table.parameters(), lr=0.1)
    for _ in range(3):
        table(IDS(40)).sum().backward()
        opt.step()
    before = {k: v.clone() for k, v in table.state_dict().items()}
    table.eval()
    rows = table(IDS(30, 60).view(5, 6))
    assert not bool(rows.view(-1, 2)[10:].any()) and bool(rows.view(-1, 2)[:10].all())
    assert all(torch.equal(before[k], v) for k, v in table.state_dict().items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_closure_is_part_of_its_step(optimizer):
    found = []
    for by_closure in (True, False):
        table = made("always", "ttl")
        opt = OPTIMIZERS[optimizer][1](table.parameters())
        for step in range(4):

            def closure(table=table, opt=opt, step=step):
                opt.zero_grad()
                loss = table(IDS(step, 3 * FEWEST_ROWS * (step + 1))).square().sum()
                loss.backward()
                return loss

            if by_closure:
                opt.step(closure)
            else:
                closure()
                opt.step()
        found.append(contents(table))
    assert found[0] == found[1]


def test_optimisers_of_others_end_no_step():
    table, other = of(), torch.nn.Linear(2, 2)
    other(table(IDS(3)).float()).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert table.step == 0
    torch.optim.SGD([*other.parameters(), *table.parameters()], lr=0.1).step()
    assert table.step == 1


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_those_of_a_static_table(mode):
    """Bags of one table: empty ones, offsets, weights, padding, two dimensions; outputs and gradients."""
    static = torch.nn.EmbeddingBag(50, 3, mode=mode, dtype=torch.float64, include_last_offset=True)
    padded = torch.nn.EmbeddingBag(50, 3, mode=mode, dtype=torch.float64, padding_idx=7)
    padded.weight.data[7] = 0
    ids, offsets = torch.randint(0, 50, (40,)), torch.tensor([0, 0, 5, 30, 30, 40])
    weights = torch.rand(40, dtype=torch.float64, requires_grad=True) if mode == "sum" else None
    for reference, given, options in (
        (static, (ids, offsets, weights), {"include_last_offset": True}),
        (static, (ids[:0], offsets[:3] * 0), {"include_last_offset": True}),
        (padded, (ids.view(4, 10).to(torch.int32), None, None if weights is None else weights.view(4, 10)), {}),
        (padded, (torch.full((2, 3), 7),), {}),
    ):
        rows = torch.nn.Embedding(50, 3, _weight=reference.weight.detach().clone())
        table = DynamicEmbeddingBag(3, mode=mode, dtype=torch.float64, padding_idx=reference.padding_idx, **options)
        table._table.enter(IDS(50), rows.weight.detach())
        expected, found = reference(*given), table(*given)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
        slope = torch.randn_like(expected)
        reference.zero_grad()
        weighted = [weights] if weights is not None and len(given) > 2 else []
        wanted = torch.autograd.grad((expected * slope).sum(), [reference.weight, *weighted])
        (found * slope).sum().backward(inputs=[table.weight, *weighted])
        slots = table._table.residence.find(table._table.keys(IDS(50)))
        assert torch.allclose(table.weight.grad.to_dense()[slots], wanted[0], rtol=1e-12, atol=1e-12)
        if len(wanted) > 1:
            assert torch.allclose(weights.grad, wanted[1])
            weights.grad = None


def test_any_ids_of_any_shape():
    table = of()
    extremes = torch.tensor([[[2**63 - 1, -(2**63), 0]], [[-1, 1, 0]]])
    rows = table(extremes)
    assert rows.shape == (2, 1, 3, 2) and len(table) == 5
    assert torch.equal(rows[0, 0, 2], rows[1, 0, 2])
    assert torch.equal(table(torch.tensor(-1, dtype=torch.int32)), rows[1, 0, 0])
    assert table(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4, 2)
    assert table(extremes.transpose(0, 2)).shape == (3, 1, 2, 2)
    with torch.no_grad():
        assert not table(extremes).requires_grad


def test_names_and_seeds_draw_other_rows():
    rows = [of(name=n, seed=s)(IDS(3)).detach() for n, s in (("a", 0), ("a", 0), ("b", 0), ("a", 1))]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_tables_have_rows_that_are_rounded(dtype):
    wide, narrow = of(seed=3), DynamicEmbedding(2, seed=3, dtype=dtype)
    assert torch.equal(narrow(IDS(99)), wide(IDS(99)).to(dtype))


def test_a_cast_keeps_the_table():
    table = of(seed=3)
    table(IDS(9))
    weight = table.weight
    table.float()
    assert table.weight is weight and table(IDS(2 * FEWEST_ROWS)).dtype == torch.float32
    assert torch.equal(table(IDS(400)), of(seed=3)(IDS(400)).float())
    table.to("cpu")
    assert len(table) == 2 * FEWEST_ROWS


def test_averages_are_those_of_ids_or_refused():
    """`AveragedModel` goes by slot: right while slots have the ids that they had, and refused by name from then on."""
    table = of(name="user", init=Constant(0.0), evict=TimeToLive(2))
    opt = torch.optim.SGD(table.parameters(), lr=1.0)

    def step(ids):
        opt.zero_grad()
        table(ids).sum().backward()
        opt.step()

    step(IDS(3))
    average = torch.optim.swa_utils.AveragedModel(table)
    average.update_parameters(table)
    step(IDS(2))
    average.update_parameters(table)
    average.eval()
    assert average(IDS(3)).tolist() == [[-1.5, -1.5], [-1.5, -1.5], [-1.0, -1.0]]
    step(IDS(1, 2))  # row 2 goes
    step(IDS(1, 4))  # row 3 has its slot
    average.update_parameters(table)
    for use in (lambda: average(IDS(1)), average.module.to_embedding, average.state_dict):
        with pytest.raises(UnsupportedError, match=r"'user'.*AveragedModel"):
            use()
    assert copy.deepcopy(table)(IDS(2)).shape == (2, 2)


def test_a_frozen_table_is_copied_and_thawed():
    table = of()
    table(IDS(3))
    table.requires_grad_(False)
    other = copy.deepcopy(table)
    assert not other.weight.requires_grad and not other(IDS(5)).requires_grad
    other.requires_grad_(True)
    lookups = [other(IDS(4)), other(IDS(4 * FEWEST_ROWS))]
    (lookups[0].sum() + lookups[1].sum()).backward()
    assert float(other.weight.grad.to_dense().sum()) == 2 * (4 + 4 * FEWEST_ROWS)


def test_rows_that_come_in_inference_mode_are_trained():
    table, alike = of(admit=AfterSightings(2)), of(admit=AfterSightings(2))
    with torch.inference_mode():
        table(IDS(3 * FEWEST_ROWS))
    alike(IDS(3 * FEWEST_ROWS))
    for t in (table, alike):
        t.end_step()
        opt = torch.optim.Adagrad(t.parameters(), lr=0.1)
        t(IDS(2, 9)).square().sum().backward()
        opt.step()
    assert contents(table) == contents(alike) and len(table) == 7


def test_a_gradient_asked_for_leaves_the_one_that_waits():
    """Of lookups since the parameter has grown; that of before has its shape since."""
    table = of()
    table(IDS(3)).sum().backward()
    rows = table(IDS(4 * FEWEST_ROWS))
    assert table.weight.grad.shape == table.weight.shape
    (asked,) = torch.autograd.grad(rows.sum(), table.weight)
    assert float(asked.to_dense().sum()) == 8 * FEWEST_ROWS
    assert float(table.weight.grad.to_dense().sum()) == 6


def test_nothing_is_held_of_steps_and_tables():
    table = of(evict=TimeToLive(2))
    for step in range(6):
        table(IDS(step, step + 3)).sum().backward()
        table.zero_grad()
        table.end_step()
    assert not len(table._table.rows.tickets) and len(table._table.residence.free) > 0
    gone = weakref.ref(table._table)
    opt = torch.optim.SGD(table.parameters(), lr=0.1)
    del table
    opt.step()
    del opt
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_memory_is_that_of_all_there_is(optimizer):
    table = DynamicEmbedding(4, dtype=torch.float64, admit=AfterSightings(1, width=8), evict=Capacity(64, by="lfu"))
    opt = OPTIMIZERS[optimizer][1](table.parameters())
    table(torch.arange(40)).sum().backward()
    opt.step()
    states = {"sgd": 0, "adagrad": 1, "sparse_adam": 2, "ftrl": 2}[optimizer]
    numbers = 8 * 4 * FEWEST_ROWS * (1 + states)
    cells, beside, sketch = 4 * 64 * FEWEST_CELLS, (41 + SOME) * (8 + 4 + 4), 64 * 4 * 8
    assert table.memory_bytes() == numbers + cells + beside + sketch

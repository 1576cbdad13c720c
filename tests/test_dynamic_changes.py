"""What has changed in a dynamic table: an update after what there was is what there is, bit for bit; and no more."""

import gc

import pytest
import torch

from descompiler.dynamic import AfterSightings, DynamicEmbedding, TimeToLive
from descompiler.dynamic.by_id import take_out
from descompiler.dynamic.changes import Changes
from descompiler.dynamic.hashing import slice_of
from tests.harness.cases import cases
from tests.harness.dynamic import ADMIT, EVICT, OPTIMIZERS, made, run, same, stream

ALL = [(a, e, o) for a in ADMIT for e in EVICT for o in OPTIMIZERS]
SOME = [("always", "lru", "sgd"), ("sightings", "lfu", "sparse_adam"), ("probability", "ttl", "adagrad")]
SOME += [("always", "none", "adagrad")]


@pytest.mark.parametrize(("admit", "evict", "optimizer"), cases(ALL, SOME))
def test_an_update_after_what_there_was_is_what_there_is(draws, admit, evict, optimizer):
    """Between steps and within them, after one step or several; some rows change and most don't."""
    table = made(admit, evict)
    opt = OPTIMIZERS[optimizer][1](table.parameters())
    changes = Changes(table._table, seen=True)
    assert changes.everything
    run(table, opt, stream(draws, 12))
    before = take_out(table._table, opt)
    changes.forget()
    fewer = gone = 0
    for count, most in [(1, 5), (4, 20), (0, 0), *[(4, 120)] * 20]:
        run(table, opt, stream(draws, count, most=most))
        opt.zero_grad()
        with torch.no_grad():
            table(torch.tensor([draws.randint(0, 99) for _ in range(3)]))
        now, update = take_out(table._table, opt), changes.update(before.slices, opt)
        assert not changes.everything and same(update.after(before), now)
        fewer, gone, before = fewer + (len(update.now.ids) < len(now.ids)), gone + len(update.gone), now
        changes.forget()
        if most == 120 and (gone or evict == "none"):
            break
    assert fewer and (gone > 0) == (evict != "none")


def test_an_update_of_some_slices_has_what_changed_there(draws):
    """Rows, ids that went, and counters: together with one of the other slices it is the update of all."""
    table = made("sightings", "lfu")
    opt, every = OPTIMIZERS["adagrad"][1](table.parameters()), torch.arange(table._table.residence.slices)
    changes = Changes(table._table, seen=True)
    run(table, opt, stream(draws, 12))
    changes.forget()
    some, others = every[every % 3 == 0], every[every % 3 > 0]
    for step in stream(draws, 200):
        run(table, opt, [step])
        now = changes.update(every, opt)
        of_some = int(torch.isin(now.now.slices_of(now.gone), some).sum())
        if len(now.gone) > 9 and 0 < of_some < len(now.gone):  # ten may all be of one part, once in fifty runs
            break
    whole = changes.update(every, opt)
    for slices in (some, others):
        part, there = changes.update(slices, opt), torch.isin(whole.lines, slices)
        gone = whole.gone[torch.isin(whole.now.slices_of(whole.gone), slices)]
        assert same(part.now, whole.now.only(slices)) and len(part.now.ids)
        assert torch.equal(part.gone, gone) and 0 < len(gone) < len(whole.gone)
        assert torch.equal(part.lines, whole.lines[there]) and 0 < len(part.lines) < len(whole.lines)
        assert torch.equal(part.sketch, whole.sketch[there])


def adagrad(table):
    return torch.optim.Adagrad(table.parameters(), lr=0.1)


def test_an_update_has_what_changed_and_no_more():
    """Rows that came, were trained or seen; ids that went, and not those that came again; slices that were sighted."""
    table = DynamicEmbedding(2, admit=AfterSightings(2), evict=TimeToLive(2))
    opt, every = adagrad(table), torch.arange(table._table.residence.slices)
    changes, rows = Changes(table._table, seen=True), Changes(table._table, seen=False)
    run(table, opt, [[[1, 2, 3, 4]], [[1, 2, 3, 4]]])
    changes.forget()
    rows.forget()
    run(table, opt, [[[1, 2]]])
    with torch.no_grad():
        table(torch.tensor([3]))
    assert sorted(changes.update(every, opt).now.ids.tolist()) == [1, 2, 3] and not len(changes.update(every, opt).gone)
    assert sorted(rows.update(every, None).now.ids.tolist()) == [1, 2]
    run(table, opt, [[[3]], [[4, 9]], [[1, 9]]])  # 4 and 1 go and come again; 2 and 3 go; 9 is sighted
    update = changes.update(every, opt)
    assert sorted(update.now.ids.tolist()) == [1, 4, 9] == table.resident().tolist()
    assert sorted(update.gone.tolist()) == [2, 3]
    assert torch.equal(update.lines, slice_of(table._table.keys(torch.tensor([9])), len(every)))


def test_counters_that_are_halved_need_not_be_there():
    """Of slices that nothing else has changed."""
    table = DynamicEmbedding(2, admit=AfterSightings(9, halve_every=3))
    opt, changes = adagrad(table), Changes(table._table, seen=True)
    run(table, opt, [[list(range(50))]] * 4)
    before = take_out(table._table, opt)
    changes.forget()
    run(table, opt, [[[1]], [[2]], [[1]]])
    update = changes.update(before.slices, opt)
    assert update.halved == 1 and len(update.lines) == 2
    assert same(update.after(before), take_out(table._table, opt))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.weight.mul_(2),
        lambda table: table.load_state_dict(table.state_dict()),
        lambda table: table.float() if table.weight.dtype == torch.float64 else table.double(),
    ],
)
def test_when_others_write_rows_everything_has_changed(change):
    table = DynamicEmbedding(2, dtype=torch.float64)
    opt, changes = adagrad(table), Changes(table._table, seen=False)
    run(table, opt, [[[1, 2, 3]], [[2]]])
    changes.forget()
    run(table, opt, [[[1, 2, 3]], [list(range(3000))]])
    assert not changes.everything
    with torch.no_grad():
        change(table)
    assert changes.everything
    changes.forget()
    assert not changes.everything
    with torch.no_grad():
        change(table)
    run(table, adagrad(table), [[[1, 2, 3]]])
    assert changes.everything  # an optimiser's step does not cover it


def test_an_optimiser_that_had_not_stepped_has_begun_with_rows_that_did_not_change():
    """SparseAdam keeps nothing until it steps, and then something for every row."""
    table = made("always", "none")
    opt, changes = torch.optim.SparseAdam(list(table.parameters()), lr=0.1), Changes(table._table, seen=True)
    with torch.no_grad():
        table(torch.arange(9))
    before = take_out(table._table, opt)
    changes.forget()
    run(table, opt, [[[1, 2]]])
    update = changes.update(before.slices, opt)
    assert len(update.now.ids) == 2 and not before.kept.rows and same(update.after(before), take_out(table._table, opt))


def test_rows_that_are_given_have_changed():
    table = DynamicEmbedding(2)
    changes = Changes(table._table, seen=False)
    changes.forget()
    table._table.enter(torch.tensor([3, 4]), torch.ones(2, 2))
    assert sorted(changes.update(torch.arange(4096), None).now.ids.tolist()) == [3, 4]


def test_what_nobody_holds_is_told_nothing():
    table = DynamicEmbedding(2)
    changes = Changes(table._table, seen=True)
    assert len(table._table.watching) == 1
    del changes
    gc.collect()
    assert not len(table._table.watching)


def test_rows_of_many_steps_are_marked_once():
    """What is kept of changes grows with the rows that changed, and not with the steps."""
    table = DynamicEmbedding(2)
    opt, changes = adagrad(table), Changes(table._table, seen=True)
    run(table, opt, [[list(range(100))]] * 3)
    assert sum(map(len, changes._slots)) == 100

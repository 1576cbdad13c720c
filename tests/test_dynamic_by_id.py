"""The state of a dynamic table by id: taken out, divided among owners and put in again, it goes on as it would have."""

import pytest
import torch

import descompiler as des
from descompiler.dynamic import AfterSightings, Capacity, DynamicEmbedding, TimeToLive, Uniform
from descompiler.dynamic.by_id import joined, keys_of, put_in, take_out
from descompiler.dynamic.owners import Owners
from tests.harness.cases import cases
from tests.harness.dynamic import (
    ADMIT,
    EVICT,
    OPTIMIZERS,
    assert_equal,
    contents,
    made,
    oracle_of,
    run,
    same,
    seen_by,
    stream,
)

ALL = [(a, e, o) for a in ADMIT for e in EVICT for o in OPTIMIZERS]
SOME = [("always", "lru", "sgd"), ("sightings", "lfu", "sparse_adam"), ("probability", "ttl", "adagrad")]


def table_of(admit, evict, optimizer):
    table = made(admit, evict)
    return table, OPTIMIZERS[optimizer][1](table.parameters())


def owned(table, ranks):
    """The slices of each rank."""
    of_slices = Owners(table._table.residence.slices, ranks).of_slices
    return [(of_slices == rank).nonzero()[:, 0] for rank in range(ranks)]


@pytest.mark.parametrize(("admit", "evict", "optimizer"), cases(ALL, SOME))
def test_taken_out_into_owners_and_back_it_goes_on_as_its_oracle(draws, admit, evict, optimizer):
    """One table, then 3 owners that see their own ids, then 2, then one; in its end as the oracle of all steps."""
    steps = list(stream(draws, 40, most=40))
    one = table_of(admit, evict, optimizer)
    oracle = oracle_of(one[0], optimizer)
    for step in steps:
        oracle.run(step)
    run(*one, steps[:16])
    held, number, known = [one], 16, [torch.arange(one[0]._table.residence.slices)]
    for ranks, until in ((3, 24), (2, 32), (1, 40)):
        parts = [take_out(t._table, o, s) for (t, o), s in zip(held, known, strict=True)]
        held, known = [table_of(admit, evict, optimizer) for _ in range(ranks)], owned(one[0], ranks)
        for (table, opt), slices in zip(held, known, strict=True):
            put_in(table._table, parts, opt, slices)
        assert sum(len(table) for table, _ in held) == sum(len(part.ids) for part in parts)
        for step in steps[number:until]:
            for rank, (table, opt) in enumerate(held):
                run(table, opt, [[seen_by(table, rank, ranks, ids) for ids in step]])
        number = until
    ((table, _),) = held
    assert table.resident().tolist() == sorted(oracle.rows) and table.step == 40
    assert_equal(contents(table), {i: row.values for i, row in oracle.rows.items()})


@pytest.mark.parametrize(("admit", "evict", "optimizer"), cases(ALL, SOME))
def test_a_state_knows_no_slots_and_no_history(draws, admit, evict, optimizer):
    """Taken from a table, and from one that it was put into by parts: bit for bit the same, sorted by key."""
    one, other = table_of(admit, evict, optimizer), table_of(admit, evict, optimizer)
    run(*one, stream(draws, 20))
    run(*other, [[[1, 2, 3, 10**9]], [[5]]])
    state = take_out(one[0]._table, one[1])
    parts = [take_out(one[0]._table, one[1], slices) for slices in owned(one[0], 3)]
    put_in(other[0]._table, [parts[2], parts[0], parts[1]], other[1])
    assert same(state, take_out(other[0]._table, other[1])) and same(state, joined(other[0]._table, parts, other[1]))
    words = [k % 2**64 for k in keys_of(state.made, state.ids).tolist()]
    assert words == sorted(words) and len(words) == len(one[0]) > 0
    slots = one[0]._table.residence.find(one[0]._table.keys(state.ids))
    assert torch.equal(state.rows, one[0].weight[slots]) and torch.equal(state.ids.sort().values, one[0].resident())


@pytest.mark.parametrize("admit", ["always", "sightings"])
def test_a_state_within_a_step_has_what_the_step_has_sighted_and_entered(draws, admit):
    """New rows begin anew in the optimiser's state, whatever the slot had, and so in the state."""
    steps = [*stream(draws, 19, most=60), [list(range(10**6, 10**6 + 30))], *stream(draws, 10, most=60)]
    one, other = table_of(admit, "lfu", "adagrad"), table_of(admit, "lfu", "adagrad")
    run(*one, steps[:20])
    one[1].zero_grad()
    with torch.no_grad():
        one[0](torch.tensor([i for step in steps[15:25] for ids in step for i in ids] + list(range(10**6, 10**6 + 60))))
    parts = [take_out(one[0]._table, one[1], slices) for slices in owned(one[0], 2)]
    assert len(one[0]._table.states.fresh) and (admit == "always" or len(parts[0].sighted))
    put_in(other[0]._table, parts, other[1])
    for pair in (one, other):
        run(*pair, steps[20:])
    assert_equal(contents(other[0]), contents(one[0]))
    assert same(take_out(one[0]._table, one[1]), take_out(other[0]._table, other[1]), 1e-10)


def test_a_gradient_that_waits_is_not_left_behind():
    table, opt = table_of("always", "none", "sgd")
    run(table, opt, [[[1, 2]]])
    take_out(table._table, opt)  # the gradient of a step is there until the next one, and was taken
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(des.UnsupportedError, match=r"table 't' has a gradient that no optimiser has taken.*zero_grad"):
        take_out(table._table, opt)
    opt.zero_grad()
    take_out(table._table, opt)


def test_without_its_optimiser_a_state_begins_anew_there():
    """As rows that have just come; what the optimiser kept for other rows in their slots is nobody's."""
    one, other = table_of("always", "none", "adagrad"), table_of("always", "none", "adagrad")
    run(*one, [[[1, 2, 3]]])
    run(*other, [[[7, 8, 9]]])
    put_in(other[0]._table, [take_out(one[0]._table, one[1])])
    kept = take_out(other[0]._table, other[1]).kept
    assert other[0].resident().tolist() == [1, 2, 3] and bool((kept.rows["sum"] == 0.25).all())


def test_an_owner_that_has_not_stepped_has_what_an_optimiser_begins_with():
    """SparseAdam keeps nothing for a parameter without a gradient."""
    one, other, both = (table_of("always", "none", "sparse_adam") for _ in range(3))
    slices = owned(one[0], 2)
    ids = torch.arange(40)
    mine = Owners(one[0]._table.residence.slices, 2).of(one[0]._table.keys(ids)) == 0
    run(*one, [[ids[mine].tolist()]])
    with torch.no_grad():
        other[0](ids[~mine])
    other[1].step()
    parts = [take_out(t._table, o, s) for (t, o), s in zip((one, other), slices, strict=True)]
    assert parts[0].kept.scalars == {"step": 1} and not parts[1].kept.rows
    put_in(both[0]._table, parts, both[1])
    kept = take_out(both[0]._table, both[1]).kept
    assert len(both[0]) == 40 and kept.scalars == {"step": 1} and kept.rows["exp_avg"].shape == (40, 3)


def adagrads(step):
    """Parts of two owners, of which one has made other steps."""
    found = []
    for rank, steps in ((0, 1), (1, step)):
        table, opt = table_of("always", "none", "adagrad")
        opt.state[table.weight]["step"] += steps
        found.append(take_out(table._table, opt, owned(table, 2)[rank]))
    return found


def state_of(optimizer="sgd", slices=None, steps=0, **options):
    table = made("always", "none", **options)
    table(torch.arange(9))
    for _ in range(steps):
        table.end_step()
    return take_out(table._table, OPTIMIZERS[optimizer][1](table.parameters()), slices)


HALF = torch.arange(2048)


@pytest.mark.parametrize(
    ("parts", "options", "text"),
    [
        (lambda: [state_of(dim=2)], {}, r"table 't' is of a table with dim=2, and the table has dim=3"),
        (lambda: [state_of(seed=6)], {}, r"with seed=6.*seed=5"),
        (lambda: [state_of(name="u")], {}, r"with name=u"),
        (lambda: [state_of(dtype=torch.float32)], {}, r"with dtype=float32"),
        (lambda: [state_of(init=Uniform(0.0, 1.0))], {}, r"with init=Uniform"),
        (lambda: [state_of()], {"max_rows": 8}, r"slices=4096, and the table has slices=64"),
        (lambda: [state_of(max_rows=600)], {"max_rows": 8}, r"has 9 rows, more than max_rows=8"),
        (lambda: [state_of(slices=HALF)], {}, r"slices \[2048, .*2048 in all\) are in no part"),
        (lambda: [state_of(), state_of(slices=HALF)], {}, r"2048 in all\) are in several parts"),
        (lambda: [state_of(slices=HALF), state_of(slices=HALF + 2048, steps=1)], {}, r"of steps \[0, 1\]"),
        (lambda: [], {}, r"of steps \[\]"),
        (lambda: [state_of("adagrad")], {}, r"saved with Adagrad, and is loaded with SGD"),
        (lambda: adagrads(2), {}, r"differ in what Adagrad keeps of all rows: step"),
    ],
)
def test_states_of_other_tables_are_refused(parts, options, text):
    """Before anything changes."""
    options = {**options}
    table = made("always", "none", **options)
    given = parts()
    optimizer = "adagrad" if given and given[0].kept.optimizer == "Adagrad" and len(given) == 2 else "sgd"
    opt = OPTIMIZERS[optimizer][1](table.parameters())
    table(torch.arange(3))
    before = take_out(table._table, opt)
    with pytest.raises(des.InputError, match=text):
        put_in(table._table, given, opt)
    assert same(before, take_out(table._table, opt))


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        ({"admit": AfterSightings(2)}, {"admit": AfterSightings(3)}),
        ({"evict": TimeToLive(3)}, {"evict": TimeToLive(4)}),
        ({"evict": Capacity(64)}, {"evict": Capacity(64, "lfu")}),
    ],
)
def test_other_strategies_are_refused(saved, here):
    state = take_out(DynamicEmbedding(2, **saved)._table)
    with pytest.raises(des.InputError, match=r"the dynamic table is of a table with (admit|evict)="):
        put_in(DynamicEmbedding(2, **here)._table, [state])


def test_optimisers_that_a_table_can_not_have_are_refused():
    table = DynamicEmbedding(2)
    with pytest.raises(des.UnsupportedError, match="Adam steps on"):
        take_out(table._table, torch.optim.Adam(table.parameters()))

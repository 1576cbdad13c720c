"""A dynamic table is its oracle: the same ids have rows, and the same rows, whatever admits, evicts and trains."""

import pytest
import torch

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
    stream,
)

ALL = [f"{admit} {evict} {optimizer}" for admit in ADMIT for evict in EVICT for optimizer in OPTIMIZERS]
FEW = [
    f"{admit} {evict} {[*OPTIMIZERS][(a + e) % len(OPTIMIZERS)]}"
    for a, admit in enumerate(ADMIT)
    for e, evict in enumerate(EVICT)
]
"""Each admission with each eviction, and each of both with each optimiser or almost."""

PAIRS = [(admit, evict) for admit in ADMIT for evict in EVICT]
SOME = [("always", "lru"), ("sightings", "lfu"), ("probability", "ttl")]


def trained(admit, evict, optimizer, steps, **options):
    """A table that was trained on a stream."""
    table = made(admit, evict, **options)
    run(table, OPTIMIZERS[optimizer][1](table.parameters()), steps)
    return table


@pytest.mark.parametrize("case", cases(ALL, FEW))
def test_the_table_is_its_oracle(draws, case):
    admit, evict, optimizer = case.split()
    table = made(admit, evict)
    oracle, optimiser = oracle_of(table, optimizer), OPTIMIZERS[optimizer][1](table.parameters())
    came = gone = 0
    for number, step in enumerate(stream(draws, 200)):
        if number >= 30 and came > 50 and (gone or evict == "none"):  # what is drawn may take longer to fill slices
            break
        before = set(oracle.rows)
        oracle.run(step)
        run(table, optimiser, [step])
        assert table.resident().tolist() == sorted(oracle.rows)
        came, gone = came + len(oracle.rows.keys() - before), gone + len(before - oracle.rows.keys())
    assert_equal(contents(table), {i: row.values for i, row in oracle.rows.items()})
    assert came > 50 and (gone > 0) == (evict != "none")


@pytest.mark.parametrize(("admit", "evict"), cases(PAIRS, SOME))
def test_the_order_of_ids_and_the_lookups_of_a_step_do_not_matter(draws, admit, evict):
    steps = list(stream(draws, 20, most=80))
    others = []
    for step in steps:
        ids = [i for lookup in step for i in lookup]
        draws.shuffle(ids)
        cut = draws.randint(0, len(ids))
        others.append([ids[:cut], [], ids[cut:]])
    one, other = (contents(trained(admit, evict, "adagrad", s)) for s in (steps, others))
    assert_equal(other, one)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("admit", "evict"), cases(PAIRS, SOME))
def test_tables_of_owners_are_one_table(draws, admit, evict, ranks):
    """Who sees the ids of some slices alone decides about them as who sees all; owners step without ids too."""
    steps = list(stream(draws, 20, most=80))
    whole = trained(admit, evict, "sparse_adam", steps)
    owners, keys = Owners(whole._table.residence.slices, ranks), whole._table.keys
    together = {}
    for rank in range(ranks):
        mine = [[[i for i in ids if int(owners.of(keys(torch.tensor([i])))) == rank] for ids in step] for step in steps]
        part = contents(trained(admit, evict, "sparse_adam", mine))
        assert not together.keys() & part.keys()
        together |= part
    assert_equal(together, contents(whole))

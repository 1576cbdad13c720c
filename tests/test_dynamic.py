"""A dynamic table is its oracle: the same ids have rows, and the same rows, whatever admits, evicts and trains."""

import pytest
import torch

from tests.harness.dynamic import (
    ADMIT,
    EVICT,
    OPTIMIZERS,
    assert_equal,
    contents,
    made,
    oracle_of,
    stream,
    train,
)

STRATEGIES = [(admit, evict) for admit in ADMIT for evict in EVICT]


def steps_of(table, optimizer, lookups):
    for step in lookups:
        train(table, optimizer, [torch.tensor(ids, dtype=torch.int64) for ids in step])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("admit", "evict"), STRATEGIES)
def test_the_table_is_its_oracle(draws, admit, evict, optimizer):
    table = made(admit, evict)
    oracle, optimiser = oracle_of(table, optimizer), OPTIMIZERS[optimizer][1](table.parameters())
    came = gone = 0
    for step in stream(draws, 40):
        before = set(oracle.rows)
        oracle.run(step)
        steps_of(table, optimiser, [step])
        assert table.resident().tolist() == sorted(oracle.rows)
        came, gone = came + len(oracle.rows.keys() - before), gone + len(before - oracle.rows.keys())
    assert_equal(contents(table), {i: row.values for i, row in oracle.rows.items()})
    assert came > 100 and (gone > 20) == (evict != "none")

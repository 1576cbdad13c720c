"""Checkpoints of dynamic tables: saved by any ranks, loaded by any other, under any plan; what is wrong is said."""

import copy

import pytest
import torch
from torch import nn

import descompiler as des
from descompiler.check.processes import on_ranks as run_anew
from descompiler.dynamic import Capacity, TimeToLive, WithProbability
from tests.harness.dynamic_ranks import (
    OPTIMIZERS,
    OPTIONS,
    PLANS,
    Clicks,
    assert_same_tables,
    rows_of,
    stream,
    train_on,
)
from tests.harness.killed import die_at


def compiled(options, plan, optimizer):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = Clicks(**OPTIONS[options])
    module = model if plan is None else des.compile(model, stream(0), plan=PLANS[plan], loss="sum")
    return module, OPTIMIZERS[optimizer](module)


def save(rank, ranks, path, options, plan, optimizer, steps):
    module, opts = compiled(options, plan, optimizer)
    train_on(module, opts, range(steps), rank, ranks)
    des.save(module, opts, path, step=steps)


def load_and_go_on(rank, ranks, path, options, plan, optimizer, until, again):
    """Load, train on, save again; on one rank compare with the original, which was never saved."""
    module, opts = compiled(options, plan, optimizer)
    for o in opts:
        for group in o.param_groups:
            group["lr"] = 17.0  # the checkpoint has the options
    train_on(module, opts, range(2), rank, ranks)  # what is there is replaced
    step = des.load(module, opts, path)["step"]
    train_on(module, opts, range(step, until), rank, ranks)
    des.save(module, opts, again, step=until)
    if plan is None:
        original, theirs = compiled(options, None, optimizer)
        train_on(original, theirs, range(until), 0, 1)
        assert_same_tables(module, original)
        for p, q in zip(module.head.parameters(), original.head.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def through(on_ranks, folder, options, optimizer, way):
    """Train and save on some ranks, load and go on on others; the last is one process, which compares."""
    (ranks, plan, until), *others = way
    on_ranks(save, ranks, f"{folder}/0", options, plan, optimizer, until)
    for i, (ranks, plan, until) in enumerate(others):
        on_ranks(load_and_go_on, ranks, f"{folder}/{i}", options, plan, optimizer, until, f"{folder}/{i + 1}")


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "optimizer", "way"),
    [
        ("sightings, lru", "adagrad", [(2, "row_wise", 6), (3, "unique_rows", 10), (1, None, 14)]),
        ("lfu", "sparse_adam", [(1, None, 6), (2, "both", 10), (2, "unique_rows", 14), (1, None, 18)]),
        ("lfu", "ftrl", [(2, "row_wise", 6), (3, "both", 10), (1, None, 14)]),
        ("sightings, lfu", "adagrad", [(2, "hot", 6), (3, "hot", 10), (2, "row_wise", 12), (1, None, 14)]),
    ],
)
def test_from_ranks_to_other_ranks(on_ranks, tmp_path, options, optimizer, way):
    through(on_ranks, tmp_path, options, optimizer, way)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["sightings, lru", "by chance, time", "sightings, lfu"])
@pytest.mark.parametrize(
    "way",
    [
        [(2, "row_wise", 500)],
        [(4, "unique_rows", 500)],
        [(2, "unique_rows", 250), (4, "row_wise", 500)],
        [(2, "hot", 250), (4, "hot", 500)],
    ],
)
def test_500_steps_are_those_of_one_process(on_ranks, tmp_path, options, way):
    through(on_ranks, tmp_path, options, "adagrad", [*way, (1, None, 501)])


def save_without_rows(rank, ranks, path, optimizer):
    module, opts = compiled("five sightings", "row_wise", optimizer)
    train_on(module, opts, range(3), rank, ranks)
    assert not len(module.user) and not len(module.tags)
    des.save(module, opts, path, step=3)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adagrad", "sparse_adam"])
def test_a_table_without_rows(on_ranks, tmp_path, optimizer):
    """What was sighted, and how often the optimiser has stepped, goes on."""
    on_ranks(save_without_rows, 2, str(tmp_path / "0"), optimizer)
    on_ranks(load_and_go_on, 2, str(tmp_path / "0"), "five sightings", "both", optimizer, 30, str(tmp_path / "1"))
    on_ranks(load_and_go_on, 1, str(tmp_path / "0"), "five sightings", None, optimizer, 30, str(tmp_path / "1"))
    on_ranks(load_and_go_on, 1, str(tmp_path / "1"), "five sightings", None, optimizer, 34, str(tmp_path / "2"))


OTHERS = {
    "dim=": lambda: Clicks(dim=5, max_rows=7000),
    "seed=": lambda: Clicks(seed=4, max_rows=7000),
    "admit=": lambda: Clicks(admit=WithProbability(0.5), max_rows=7000),
    "evict=": lambda: Clicks(evict=TimeToLive(9), max_rows=7000),
    "slices": lambda: Clicks(evict=Capacity(100_000)),
    "max_rows=": lambda: Clicks(max_rows=70),
    "no dynamic table 'people'": lambda: Clicks(dynamic_name="people", max_rows=7000),
}


def save_static(rank, ranks, path):
    static = nn.ModuleDict({"user": nn.Embedding(9, 4), "item": nn.Embedding(50, 4), "head": nn.Linear(12, 1)})
    des.save(static, None, path)


def refusals(rank, ranks, folder):
    torch.manual_seed(0)
    model = Clicks(max_rows=7000)
    module = des.compile(model, stream(0), plan=PLANS["row_wise"], loss="sum")
    opts = OPTIMIZERS["adagrad"](module)
    for step in range(20):
        nn.functional.softplus(module(*stream(step))).sum().backward()
        if step == 3:
            with pytest.raises(des.DescompilerError, match="gradient that no optimiser has taken"):
                des.save(module, opts, f"{folder}/within")
        for o in opts:
            o.step()
            o.zero_grad()
    des.save(module, opts, f"{folder}/there")
    said = {}
    for words, make in OTHERS.items():
        other = des.compile(make(), stream(0), plan={"*": "row_wise"}, loss="sum")
        before = copy.deepcopy(other.state_dict())
        try:
            des.load(other, OPTIMIZERS["adagrad"](other), f"{folder}/there")
            said[words] = ""
        except des.DescompilerError as error:
            said[words] = str(error)
        after = other.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(x, after[n]) for n, x in before.items())
    for words, other, opts in [
        ("saved with Adagrad", module, OPTIMIZERS["sgd"](module)),
        ("static table in the checkpoint", module, OPTIMIZERS["adagrad"](module)),
    ]:
        path = f"{folder}/{words.split()[0] if words.startswith('static') else 'there'}"
        try:
            des.load(other, opts, path)
            said[words] = ""
        except des.DescompilerError as error:
            said[words] = str(error)
    return said


@pytest.mark.long
def test_a_wrong_checkpoint_is_refused_by_name_and_nothing_changes(on_ranks, tmp_path):
    on_ranks(save_static, 1, str(tmp_path / "static"))
    for said in on_ranks(refusals, 2, str(tmp_path)):
        for words, text in said.items():
            assert words in text, (words, text)


def within_a_step(rank, ranks, folder):
    """Only rank 0's table has sighted ids."""
    module, opts = compiled("sightings, lru", "unique_rows", "adagrad")
    train_on(module, opts, range(2), rank, ranks)
    table, some = module.user._table, torch.arange(1, 500)
    users, items, _ = stream(5)
    module.tags.eval()
    module(some[table.owner(table.keys(some)) == 0][: len(users)], items, torch.zeros(len(users), 3, dtype=torch.int64))
    with pytest.raises(des.DescompilerError, match="within a step, which has sighted ids"):
        des.save(module, opts, f"{folder}/c")
    increments = des.increments(module, opts, f"{folder}/i")
    with pytest.raises(des.DescompilerError, match="numbers, strings and tensors"):
        increments.save(step=object() if rank else 1)
    for step in (2, 3):
        increments.save(step=step)
        assert increments.load() == {"step": step}


def test_what_one_rank_can_not_save_all_hear_of(on_ranks, tmp_path):
    """Before any waits for it; and what they save next is of one moment."""
    on_ranks(within_a_step, 2, str(tmp_path))


def save_increments(rank, ranks, folder, plan, steps):
    module, opts = compiled("lfu", plan, "sparse_adam")
    increments, deltas = des.increments(module, opts, f"{folder}/increments"), des.deltas(module, f"{folder}/deltas")
    assert increments.load() is None
    for step in range(steps):
        train_on(module, opts, [step], rank, ranks)
        increments.save(step=step + 1)
        deltas.publish(step=step + 1)
    des.save(module, opts, f"{folder}/whole", step=steps)
    state = des.full_state_dict(module)
    replica = des.dynamic.Replica(f"{folder}/deltas")
    torch.distributed.barrier()
    replica.refresh()
    for name in ("user", "tags"):
        ids = state[f"{name}.ids"][state[f"{name}.resident"]]
        assert torch.equal(replica.look_up(name, ids), state[f"{name}.weight"][state[f"{name}.resident"]])
    return len(ids)


def assert_as_in_one_process(module, original, opts, steps):
    """The tables are those of the original after so many steps."""
    state = des.full_state_dict(module)
    train_on(original, opts, range(steps), 0, 1)
    for name in ("user", "tags"):
        table, there = original.get_submodule(name)._table, state[f"{name}.resident"]
        ids, order = state[f"{name}.ids"][there].sort()
        assert torch.equal(ids, table.resident())
        rows = state[f"{name}.weight"][there][order]
        torch.testing.assert_close(rows, rows_of(table, ids), rtol=1e-10, atol=1e-12)


def load_increments(rank, ranks, folder, plan, until):
    module, opts = compiled("lfu", plan, "sparse_adam")
    des.load(module, opts, f"{folder}/whole")  # what is no table; these are given what increments have
    for name in ("user", "tags"):
        module.get_submodule(name)._table.restart()
    step = des.increments(module, opts, f"{folder}/increments").load()["step"]
    train_on(module, opts, range(step, until), rank, ranks)
    assert_as_in_one_process(module, *compiled("lfu", None, "sparse_adam"), until)


@pytest.mark.long
def test_increments_and_deltas_of_ranks(on_ranks, tmp_path):
    assert on_ranks(save_increments, 2, str(tmp_path), "unique_rows", 6)[0]
    on_ranks(load_increments, 3, str(tmp_path), "row_wise", 9)


def of_tables(options, plan):
    """A model, and what trains the rows of its dynamic tables alone."""
    module, _ = compiled(options, plan, "sgd")
    return module, [torch.optim.Adagrad([module.user.weight, module.tags.weight], lr=0.1)]


def go_on_and_die(rank, ranks, folder, plan, until, dies, at):
    """Go on from what there is, and save after each step; a rank dies at its n-th call of `tests.harness.killed`."""
    module, opts = of_tables("lfu", plan)
    increments = des.increments(module, opts, folder)
    begin = (increments.load() or {"step": 0})["step"]
    if rank == dies:
        die_at(at, [0])
    for step in range(begin, until):
        train_on(module, opts, [step], rank, ranks)
        increments.save(step=step + 1)
    assert_as_in_one_process(module, *of_tables("lfu", None), until)
    return begin


@pytest.mark.long
@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_rank_is_killed_and_nothing_is_lost(on_ranks, tmp_path, draws, times):
    """While rows come or go, or between a save's files; each time others go on, by another number of ranks."""
    plans = "unique_rows", "row_wise", "whole", "hot"
    for number in range(times):
        ranks, at = 2 + number % 2, draws.randint(25, 60)  # a step has some 23: the first was saved
        with pytest.raises(des.EquivalenceError, match="ended without an answer"):
            run_anew(go_on_and_die, ranks, str(tmp_path), plans[number % 4], 1000, draws.randrange(ranks), at)
    until = 14 + 8 * times  # each was killed within so many steps
    assert on_ranks(go_on_and_die, 2, str(tmp_path), "unique_rows", until, None, 0)[0] > 0

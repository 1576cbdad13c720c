"""Incremental checkpoints of dynamic tables: they replay exactly, under any owners, and whoever is killed where."""

import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import descompiler as des
from descompiler.dynamic import AfterSightings, DynamicEmbedding, Increments
from descompiler.dynamic.by_id import joined, take_out
from descompiler.dynamic.owned import slices_of_owner
from descompiler.dynamic.stores import Folder
from tests.harness.cases import cases
from tests.harness.dynamic import ADMIT, EVICT, OPTIMIZERS, made, run, same, seen_by, stream
from tests.harness.killed import killed_after, killed_at

ALL = [(a, e, o) for a in ADMIT for e in EVICT for o in OPTIMIZERS]
SOME = [("always", "lru", "sgd"), ("sightings", "lfu", "sparse_adam"), ("probability", "ttl", "adagrad")]


class Owners:
    """Some owners of a table in one process: each has its rows, its optimiser and its `Increments`."""

    def __init__(self, path, ranks, admit="sightings", evict="lfu", optimizer="sparse_adam", **options):
        self.held = []
        for rank in range(ranks):
            table = made(admit, evict)
            opt = OPTIMIZERS[optimizer][1](table.parameters())
            self.held.append((table, opt, Increments(path, {"t": table}, opt, rank=rank, ranks=ranks, **options)))

    def train(self, steps):
        table = self.held[0][0]
        for step in steps:
            for rank, (mine, opt, _) in enumerate(self.held):
                run(mine, opt, [[seen_by(table, rank, len(self.held), ids) for ids in step]])

    def save(self, **values):
        for _, _, increments in self.held:
            increments.save(**values)

    def load(self):
        found = [increments.load() for _, _, increments in self.held]
        assert all(x == found[0] for x in found)
        return found[0]

    def state(self):
        """What all have together, as of one table."""
        parts = []
        for rank, (table, opt, _) in enumerate(self.held):
            parts.append(take_out(table._table, opt, slices_of_owner(table._table, rank, len(self.held))))
        return joined(self.held[0][0]._table, parts, self.held[0][1])


@pytest.mark.parametrize(("admit", "evict", "optimizer"), cases(ALL, SOME))
def test_saved_and_loaded_by_other_owners_it_is_the_table_that_went_on(draws, tmp_path, admit, evict, optimizer):
    """One, then three, then two owners: each loads bit for bit what those before had, and goes on as one."""
    steps = list(stream(draws, 24, most=25))
    one, given = Owners(tmp_path / "one", 1, admit, evict, optimizer), (admit, evict, optimizer)
    kinds, done, before = set(), 0, None
    for ranks, until in ((1, 8), (3, 16), (2, 24)):
        owners = Owners(tmp_path / "path", ranks, *given, compact_at=0.7)
        assert owners.load() == (None if done == 0 else {"done": done})
        assert before is None or same(owners.state(), before)
        for number in range(done, until):
            owners.train(steps[number : number + 1])
            one.train(steps[number : number + 1])
            if number % 2:
                owners.save(done=number + 1)
                kinds |= {f.name.split(".")[-2] for f in (tmp_path / "path").glob("*.safetensors")}
        done, before = until, owners.state()
        assert same(before, one.state(), 1e-10)
    assert kinds == {"full", "update"}
    last = Owners(tmp_path / "path", 1, *given)
    assert last.load() == {"done": 24} and same(last.state(), before)


def files(path):
    return {f.name: f.stat().st_size for f in path.iterdir()}


def test_an_update_has_what_changed_and_compaction_removes_what_it_follows(tmp_path):
    """Bytes follow the rows of the steps, and what lies there follows the table."""
    table = DynamicEmbedding(8)
    opt = torch.optim.Adagrad(table.parameters(), lr=0.1)
    increments = Increments(tmp_path, {"user": table}, opt)
    run(table, opt, [[list(range(1000))]])
    increments.save()
    most = 0
    for step in range(40):
        run(table, opt, [[list(range(step, step + 50))]])
        increments.save()
        most = max(most, len(files(tmp_path)))
    sizes = files(tmp_path)
    updates = [s for n, s in sizes.items() if ".update." in n]
    (full,) = [s for n, s in sizes.items() if ".full." in n]
    row = 8 + 2 * 8 * 4
    assert 1000 * row < full < 1000 * row + 40_000 and all(50 * row < s < 50 * row + 2_000 for s in updates)
    assert sum(updates) < 1.1 * full and most <= 27 and not [n for n in sizes if n.endswith(".writing")]


def test_a_save_that_not_all_have_finished_is_not_there(draws, tmp_path):
    """Two owners, of which one was killed before its save; a later run of other owners begins where both were."""
    steps = list(stream(draws, 8, most=25))
    owners, one = Owners(tmp_path, 2), Owners(tmp_path / "one", 1)
    for number in range(4):
        owners.train(steps[number : number + 1])
        for _, _, increments in owners.held[: 1 if number == 3 else 2]:
            increments.save(done=number + 1)
    one.train(steps[:3])
    other = Owners(tmp_path, 3)
    assert other.load() == {"done": 3} and same(other.state(), one.state(), 1e-10)
    other.train(steps[3:5])
    one.train(steps[3:5])
    other.held[0][2].save(done=5)  # alone: the run before is the last one that is whole
    again = Owners(tmp_path, 1)
    assert again.load() == {"done": 3}
    for _, _, increments in other.held[1:]:
        increments.save(done=5)
    assert again.load() == {"done": 5} and same(again.state(), one.state(), 1e-10)
    other.save(done=5)
    assert not [n for n in files(tmp_path) if n.startswith("000001")]  # all owners are further


def test_a_first_save_that_not_all_have_finished_is_none(tmp_path):
    """It is said, and who begins writes beside it until all are further."""
    owners = Owners(tmp_path, 2)
    owners.train([[[1, 2, 3]]])
    owners.held[0][2].save(done=1)
    other = Owners(tmp_path, 1)
    with pytest.warns(UserWarning, match="a first save that not all owners have finished"):
        assert other.load() is None
    other.train([[[1, 2, 3]]])
    other.save(done=1)
    assert Owners(tmp_path, 3).load() == {"done": 1}
    assert {n[:6] for n in files(tmp_path)} == {"000002"}


def test_owners_that_go_back_begin_anew_together(draws, tmp_path):
    """One has saved what the other has not: both load what was before, go on otherwise, and what they save is whole."""
    owners = Owners(tmp_path, 2)
    steps = list(stream(draws, 4, most=25))
    owners.train(steps[:1])
    owners.save(done=1)
    owners.train(steps[1:2])
    owners.held[0][2].save(done=2)
    assert owners.load() == {"done": 1}
    owners.train(steps[2:3])
    owners.save(done=3)
    other = Owners(tmp_path, 1)
    assert other.load() == {"done": 3} and same(other.state(), owners.state())


def test_an_optimiser_that_was_given_a_state_is_saved_whole(tmp_path):
    """Rows have not changed, and what it keeps for them has."""
    owners = Owners(tmp_path, 1, "always", "none", "adagrad")
    ((_, opt, _),) = owners.held
    owners.train([[[1, 2, 3]], [[1]]])
    owners.save()
    state = opt.state_dict()
    state["state"][0]["sum"] = state["state"][0]["sum"] + 1
    opt.load_state_dict(state)
    owners.train([[[1]]])
    owners.save()
    other = Owners(tmp_path, 1, "always", "none", "adagrad")
    other.load()
    assert same(other.state(), owners.state())


def test_owners_that_do_not_write_are_told_of(tmp_path):
    first, _ = Owners(tmp_path, 2).held
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first[2].save()
        first[2].save()
    with pytest.warns(UserWarning, match=r"owners \[1\] have written nothing to run 1.*owner 0 3 times"):
        first[2].save()


def saved(path, **options):
    """Two owners' checkpoints of a table: a full state and an update of each."""
    owners = Owners(path, 2, "always", "lru", "adagrad", **options)
    for steps in ([[[1, 2, 3, 4, 5, 6]]], [[[5, 6, 7]]]):
        owners.train(steps)
        owners.save()
    return owners


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def foreign(path):
    other = Path(str(path).replace("0-of-2", "1-of-2"))
    shutil.copy(other, path)


def changed(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


LIST, FULL, UPDATE = "000001-0-of-2.json", "000001-0-of-2-000000000.full.", "000001-0-of-2-000000001.update."


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        (FULL, Path.unlink, "it lacks 000001-0-of-2-000000000.full"),
        (UPDATE, Path.unlink, "it lacks 000001-0-of-2-000000001.update"),
        (FULL, cut, r"has .* B of checksum"),
        (UPDATE, foreign, r"000001-0-of-2-000000001.update.* has .* B of checksum"),
        (UPDATE, changed, r"has .* B of checksum"),
        (LIST, Path.unlink, r"nothing that is whole: of run 1 there are the lists of owners \[1\], and it has 2"),
        (LIST, cut, "000001-0-of-2.json of .* can't be read: JSONDecodeError"),
        (LIST, foreign, r"is a list of incremental checkpoints, 000001-1-of-2.json"),
        (LIST, lambda p: p.write_text(p.read_text().replace('"number": 1', '"number": 2')), "its checksum is another"),
        (LIST, lambda p: p.write_text("{}"), "KeyError"),
    ],
)
def test_files_that_are_not_as_they_were_written_are_named(tmp_path, name, damage, text):
    """And nothing changes."""
    saved(tmp_path)
    (file,) = [f for f in tmp_path.iterdir() if f.name.startswith(name)]
    damage(file)
    other = Owners(tmp_path, 1, "always", "lru", "adagrad")
    other.train([[[1, 2, 30]]])
    before = other.state()
    with pytest.raises(des.InputError, match=text):
        other.load()
    assert same(before, other.state())


def relisted(change):
    """Writes a manifest anew, with its checksum."""

    def damage(path):
        from descompiler.dynamic import chains

        body = json.loads(path.read_text())["chain"]
        change(body)
        path.write_text(json.dumps({"crc32": chains._sum_of(body), "chain": body}))

    return damage


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda body: body.update(format=3), "has format 3, and this version reads 1, 2"),
        (lambda body: body.update(kind="deltas"), "is a list of deltas"),
    ],
)
def test_lists_of_others_are_named(tmp_path, change, text):
    saved(tmp_path)
    relisted(change)(tmp_path / LIST)
    with pytest.raises(des.InputError, match=text):
        Owners(tmp_path, 1, "always", "lru", "adagrad").load()


def test_lists_of_the_first_format_are_read(tmp_path):
    """They knew of no owners but `owners.Owners`."""

    def of_the_first(body):
        body["format"] = 1
        assert body.pop("slices") == {}

    before = saved(tmp_path).state()
    for rank in range(2):
        relisted(of_the_first)(tmp_path / f"000001-{rank}-of-2.json")
    other = Owners(tmp_path, 3, "always", "lru", "adagrad")
    other.load()
    assert same(other.state(), before)


def tables(dim=3, **options):
    return {"t": DynamicEmbedding(dim, **{"name": "t", "seed": 5, "dtype": torch.float64, **options})}


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (lambda: tables(dim=2), "dim=3"),
        (lambda: tables(seed=6), "seed=5, and the table has seed=6"),
        (lambda: tables(name="u"), "name=t"),
        (lambda: {"u": tables()["t"]}, "has the tables t, and not u"),
        (lambda: tables() | {"u": tables()["t"]}, "has the tables t, and not t, u"),
    ],
)
def test_checkpoints_of_other_tables_are_refused(tmp_path, made, text):
    first = tables()
    first["t"](torch.arange(4))
    Increments(tmp_path, first).save()
    given = made()
    for table in given.values():
        table(torch.arange(2))
    with pytest.raises(des.InputError, match=text):
        Increments(tmp_path, given).load()
    assert all(len(table) == 2 for table in given.values())


def test_what_is_there_is_not_written_over(tmp_path):
    """A process that has not loaded what there is begins elsewhere."""
    saved(tmp_path)
    other = Owners(tmp_path, 1, "always", "lru", "adagrad")
    before = files(tmp_path)
    with pytest.raises(des.InputError, match=r"has checkpoints: load\(\) them first"):
        other.save()
    assert files(tmp_path) == before
    other.load()
    other.save()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_save_that_one_owner_could_not_write_is_made_up_for(tmp_path, monkeypatch, call, times):
    """Its part, or its list: the next saves of both have the same number, and are whole."""
    owners, one = Owners(tmp_path / "path", 2), Owners(tmp_path / "one", 1)
    steps = [[[1, 2, 3]], [[1, 2, 3]], [[3, 4]], [[4, 5]]]
    owners.train(steps[:2])
    owners.save(done=2)
    owners.train(steps[2:3])
    called, come = getattr(os, call), []

    def full(*args):
        come.append(args)
        if len(come) == times:
            raise OSError(28, "No space left on device")
        return called(*args)

    with monkeypatch.context() as patched:
        patched.setattr(f"descompiler.dynamic.stores.os.{call}", full)
        with pytest.raises(des.InputError, match="was not written: No space left on device"):
            owners.held[0][2].save(done=3)
    owners.held[1][2].save(done=3)
    owners.train(steps[3:])
    owners.save(done=4)
    one.train(steps)
    other = Owners(tmp_path / "path", 1)
    assert other.load() == {"done": 4} and same(other.state(), one.state(), 1e-10)
    assert not [n for n in files(tmp_path / "path") if n.endswith(".writing")]


def test_a_save_that_one_owner_could_not_make_is_made_up_for(tmp_path):
    """A value that can't be saved, and a gradient that waits: before anything is written the number is used up."""
    owners, one = Owners(tmp_path / "path", 2), Owners(tmp_path / "one", 1)
    steps = [[[1, 2, 3]], [[1, 2, 3]], [[3, 4]], [[4, 5]]]
    (_, _, first), (table, _, second) = owners.held
    owners.train(steps[:1])
    owners.save(done=1)
    owners.train(steps[1:2])
    first.save(done=2)
    with pytest.raises(des.InputError, match="numbers, strings and tensors"):
        second.save(done=object())
    owners.train(steps[2:3])
    first.save(done=3)
    table.eval()(table.resident()).sum().backward()
    with pytest.raises(des.UnsupportedError, match="gradient"):
        second.save(done=3)
    table.train().zero_grad()
    owners.train(steps[3:])
    owners.save(done=4)
    one.train(steps)
    other = Owners(tmp_path / "path", 1)
    assert other.load() == {"done": 4} and same(other.state(), one.state(), 1e-10)


def test_files_that_can_not_be_removed_are_named_and_the_save_counts(tmp_path, monkeypatch):
    """Counters are halved as often as they were, when an update follows it."""
    given, other = ({"t": DynamicEmbedding(2, admit=AfterSightings(99, halve_every=5))} for _ in range(2))
    increments, table = Increments(tmp_path, given, compact_at=0.0), given["t"]

    def denied(*args):
        raise OSError(13, "Permission denied")

    def step(ids):
        table(ids)
        table.end_step()

    for _ in range(9):
        step(torch.arange(9))
    increments.save()
    with monkeypatch.context() as patched:
        patched.setattr("descompiler.dynamic.stores.os.unlink", denied)
        step(torch.tensor([100]))  # the tenth: counters are halved
        with pytest.raises(des.InputError, match="can't be removed: Permission denied"):
            increments.save()
    increments._owned._compact_at = 1e9
    step(torch.tensor([101]))
    increments.save()
    Increments(tmp_path, other).load()
    assert same(take_out(other["t"]._table), take_out(table._table))


def test_a_name_has_what_it_had_until_it_has_all_of_the_other(tmp_path):
    folder, had = Folder(tmp_path), []
    folder.write("a", [b"old"])

    def parts():
        yield b"ne"
        had.append(folder.read("a"))
        raise OSError(28, "No space left on device")

    with pytest.raises(des.InputError, match="a was not written: No space left"):
        folder.write("a", parts())
    assert folder.read("a") == had[0] == b"old" and folder.names() == ["a"]
    assert folder.write("a", [b"ne", b"w"])[0] == 3 and folder.read("a") == b"new"


@pytest.mark.parametrize(
    ("give", "text"),
    [
        (lambda table: torch.optim.SGD([torch.zeros(1, requires_grad=True)]), "'t' is in 0 of the optimizers"),
        (lambda table: [torch.optim.SGD([table.weight]), torch.optim.SGD([table.weight])], "in 2 of the optimizers"),
    ],
)
def test_optimisers_that_are_not_the_tables_are_refused(tmp_path, give, text):
    table = tables()["t"]
    with pytest.raises(des.InputError, match=text):
        Increments(tmp_path, {"t": table}, give(table))


def test_values_that_can_not_be_saved_are_refused(tmp_path):
    increments = Increments(tmp_path, tables())
    with pytest.raises(des.InputError, match="position is a list"):
        increments.save(position=[1])
    increments.save(position=3, text="a", weights=torch.ones(2, 2), nothing=None)
    values = Increments(tmp_path, tables()).load()
    assert torch.equal(values.pop("weights"), torch.ones(2, 2))
    assert values == {"position": 3, "text": "a", "nothing": None}


STEPS = 10


def work(path, steps, ranks=2):
    """Go on from what there is, and save after each step."""

    def run_on():
        owners = Owners(path, ranks, "always", "lru", "adagrad", compact_at=0.4)
        done = (owners.load() or {"done": 0})["done"]
        for number in range(done, STEPS):
            owners.train(steps[number : number + 1])
            owners.save(done=number + 1)

    return run_on


def check(path, steps, ranks=1):
    """What is on disk loads, and replaying the stream from there gives what was never killed."""
    one, other = (Owners(p, n, "always", "lru", "adagrad") for p, n in ((path / "never", 1), (path, ranks)))
    found = other.load() or {"done": 0}
    one.train(steps[:STEPS])
    other.train(steps[found["done"] : STEPS])
    assert same(other.state(), one.state(), 1e-10)
    return found["done"]


def killed_stream(draws):
    """Steps that let the table grow, and then evict."""
    return [[[draws.randint(0, 3000) for _ in range(120)]] for _ in range(STEPS)]


def test_killed_at_any_call_nothing_is_lost(draws, tmp_path):
    """A few places of all; and then again and again in one directory, by other numbers of owners."""
    steps = killed_stream(draws)
    most = killed_at(0, work(tmp_path / "all", steps))
    assert most > 100
    for number in draws.sample(range(1, most), 2):
        path = tmp_path / str(number)
        assert killed_at(number, work(path, steps)) is None
        check(path, steps)
    path, times = tmp_path / "again", 0
    while killed_at(draws.randint(20, 60), work(path, steps, 1 + times % 3)) is None and times < 4:
        times += 1
    check(path, steps, 2)
    assert times > 1


@pytest.mark.slow
def test_killed_at_every_call_nothing_is_lost(tmp_path):
    steps, number, done = killed_stream(random.Random(3)), 1, set()
    while killed_at(number, work(tmp_path / str(number), steps)) is None:
        done.add(check(tmp_path / str(number), steps))
        shutil.rmtree(tmp_path / str(number), ignore_errors=True)  # the first calls are before there is one
        number += 1
    assert number > 100 and done == set(range(STEPS + 1))


@pytest.mark.parametrize("times", cases([2, 40], [2]))
def test_killed_by_a_signal_nothing_is_lost(draws, tmp_path, times):
    steps = killed_stream(draws)
    for _ in range(times):
        killed_after(draws.uniform(0.0, 0.6), work(tmp_path, steps, draws.randint(1, 3)))
        check(tmp_path, steps)

"""Deltas of dynamic tables: a replica has the rows that were published, whoever is killed, late or gone."""

import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

import descompiler as des
from descompiler.dynamic import (
    AfterSightings,
    Deltas,
    DynamicEmbedding,
    Increments,
    RedisStore,
    Replica,
    TimeToLive,
    redis_store,
)
from descompiler.dynamic.stores import Folder
from tests.harness.cases import cases
from tests.harness.dynamic import ADMIT, EVICT, OPTIMIZERS, assert_equal, contents, made, run, seen_by, stream
from tests.harness.killed import killed_after, killed_at

ALL = [(a, e, o) for a in ADMIT for e in EVICT for o in OPTIMIZERS]
SOME = [("always", "lru", "adagrad"), ("sightings", "lfu", "sparse_adam"), ("probability", "ttl", "sgd")]


class Client:
    """As much of a client of Redis as a `RedisStore` calls: a hash under each key."""

    def __init__(self, decodes=False):
        self.held, self.decodes = {}, decodes

    def hset(self, key, field=None, value=None, mapping=None):
        given = mapping or {field: value}
        assert all(isinstance(x, bytes) for x in given.values())
        self.held.setdefault(key, {}).update({f.encode(): x for f, x in given.items()})

    def hget(self, key, field):
        return self.held.get(key, {}).get(field.encode())

    def hmget(self, key, fields):
        return [self.hget(key, f) for f in fields]

    def hkeys(self, key):
        return [f.decode() if self.decodes else f for f in self.held.get(key, {})]

    def hdel(self, key, *fields):
        for field in fields:
            self.held.get(key, {}).pop(field.encode(), None)


@pytest.fixture(params=["files", "redis"])
def place(request, tmp_path):
    return tmp_path / "deltas" if request.param == "files" else RedisStore(Client(), "rows")


def held_by(replica, table="t"):
    ids = replica.resident(table)
    return dict(zip(ids.tolist(), replica.look_up(table, ids).tolist(), strict=True))


@pytest.mark.parametrize(("admit", "evict", "optimizer"), cases(ALL, SOME))
def test_a_replica_has_the_rows_that_were_published(draws, place, admit, evict, optimizer):
    """After each delta; read at once, or several together; ids without rows have zeros."""
    table, replica, late = made(admit, evict), Replica(place), Replica(place)
    opt, deltas = OPTIMIZERS[optimizer][1](table.parameters()), Deltas(place, {"t": table}, compact_at=3.0)
    assert replica.refresh().parts == 0
    gone = 0
    for number, step in enumerate(stream(draws, 200, most=100)):
        if number > 12 and (gone or evict == "none"):
            break
        run(table, opt, [step])
        deltas.publish(number=number)
        found = replica.refresh()
        gone += found.gone
        assert found.gaps == () and found.parts == 1
        assert held_by(replica) == contents(table) and replica.steps == {"t": number + 1}
        if number % 4 == 3:
            assert late.refresh().gaps == () and held_by(late) == contents(table)
    assert replica.values == {"number": number - 1} and replica.refresh().parts == 0
    ids = torch.tensor([[10**12, -(10**12)], [10**13, 5]])
    assert torch.equal(replica.look_up("t", ids), table.eval()(ids)) and (gone > 0) == (evict != "none")


def test_a_delta_has_rows_that_changed_and_nothing_of_training(tmp_path):
    table = DynamicEmbedding(8, admit=AfterSightings(1))
    opt, deltas = torch.optim.Adagrad(table.parameters(), lr=0.1), Deltas(tmp_path, {"t": table})
    run(table, opt, [[list(range(1000))]])
    deltas.publish()
    run(table, opt, [[list(range(50))]])
    deltas.publish()
    (full,), (delta,) = ([f.stat().st_size for f in tmp_path.glob(f"*.{x}.*")] for x in ("full", "update"))
    assert 1000 * 40 < full < 1000 * 40 + 40_000 and 50 * 40 < delta < 50 * 40 + 1_200


@pytest.mark.parametrize("compact_at", [0.2, 1e9])
def test_who_lost_touch_is_told_and_begins_at_a_full_state(tmp_path, compact_at):
    """Deltas are pruned behind a full state and `keep`; without one all of them stay. Rows went meanwhile."""
    table, replica = DynamicEmbedding(2, evict=TimeToLive(20)), Replica(tmp_path)
    opt = torch.optim.SGD(table.parameters(), lr=0.1)
    deltas = Deltas(tmp_path, {"t": table}, keep=3, compact_at=compact_at)
    for number in range(30):
        run(table, opt, [[list(range(40 * (number == 0)))], [[number % 7]]])
        deltas.publish()
        if number == 2:
            replica.refresh()
    assert len(table) < len(replica.resident("t"))
    found = replica.refresh()
    if compact_at < 1:
        assert len(found.gaps) == 1 and found.gaps[0].startswith("owner 0: no delta 3 after 2; read from the full")
        assert len(list(tmp_path.iterdir())) < 20
    else:
        assert found.gaps == () and found.parts == 27
    assert held_by(replica) == contents(table)


def test_owners_publish_alone_and_others_come(draws, tmp_path):
    """Two owners, one of them late; then a run of three, which counts when all have begun."""
    steps, replica = list(stream(draws, 12, most=60)), Replica(tmp_path)
    one = made("always", "lru")
    run(one, OPTIMIZERS["sgd"][1](one.parameters()), steps)

    def owners(ranks):
        held = []
        for rank in range(ranks):
            table = made("always", "lru")
            opt = OPTIMIZERS["sgd"][1](table.parameters())
            run(table, opt, [[seen_by(table, rank, ranks, ids) for ids in step] for step in steps])
            held.append((table, opt, Deltas(tmp_path, {"t": table}, rank=rank, ranks=ranks)))
        return held

    two = owners(2)
    two[0][2].publish()
    assert replica.refresh().parts == 0
    two[1][2].publish()
    assert replica.refresh().parts == 2 and replica.refresh().parts == 0
    assert_equal(held_by(replica), contents(one))
    run(*two[1][:2], [[[]], [[]]])
    two[1][2].publish()
    assert replica.refresh().parts == 1 and replica.steps == {"t": 12}  # as far as both
    three = owners(3)
    for _, _, deltas in three[:2]:
        deltas.publish()
        assert replica.refresh().parts == 0
    three[2][2].publish()
    found = replica.refresh()
    assert found.parts == 3 and found.gaps == ("run 2 follows run 1: read from its full states",)
    assert_equal(held_by(replica), contents(one))
    for _, _, deltas in three:
        deltas.publish()
    assert {f.name[:6] for f in tmp_path.iterdir()} == {"000002"}


@pytest.mark.parametrize("which", ["full", "update"])
def test_a_delta_that_is_not_as_it_was_written_is_named(tmp_path, which):
    """And what was read before it stays."""
    table, replica = DynamicEmbedding(2), Replica(tmp_path)
    opt, deltas = torch.optim.SGD(table.parameters(), lr=0.1), Deltas(tmp_path, {"t": table})
    for ids in ([1, 2, 3], [1]):
        run(table, opt, [[ids]])
        deltas.publish()
    if which == "update":
        replica.refresh()
        before = held_by(replica)
        run(table, opt, [[[2, 9]]])
        deltas.publish()
    file = sorted(tmp_path.glob(f"*.{which}.*"))[-1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(des.InputError, match=rf"{file.name} has .* B of checksum"):
        replica.refresh()
    if which == "update":
        assert held_by(replica) == before
    file.write_bytes(whole)
    assert replica.refresh().gaps == () and held_by(replica) == contents(table)


class Removed(Folder):
    """A directory whose first file goes when it is about to be read, as one that is pruned, and others come."""

    def __init__(self, path, then):
        super().__init__(path)
        self.then = then

    def read(self, name):
        if name.endswith(".safetensors") and self.then is not None:
            then, self.then = self.then, None
            then()
        return super().read(name)


def test_files_that_are_pruned_while_they_are_read_are_read_anew(tmp_path):
    table = DynamicEmbedding(2)
    opt, deltas = torch.optim.SGD(table.parameters(), lr=0.1), Deltas(tmp_path, {"t": table}, keep=0, compact_at=0.0)

    def further():
        run(table, opt, [[[1, 2]]])
        deltas.publish()

    further()
    replica = Replica(Removed(tmp_path, further))
    replica.refresh()
    assert replica.steps == {"t": 2} and held_by(replica) == contents(table)


def test_threads_look_up_while_another_refreshes(tmp_path):
    """Each lookup finds a row whole."""
    table, replica = DynamicEmbedding(4, init=des.dynamic.Constant(0.0)), Replica(tmp_path)
    opt, deltas, ids = torch.optim.SGD(table.parameters(), lr=1.0), Deltas(tmp_path, {"t": table}), torch.arange(200)

    def train():
        opt.zero_grad()
        table(ids).sum().backward()
        opt.step()
        deltas.publish()
        replica.refresh()

    train()
    found, ended = [], threading.Event()

    def look():
        while not ended.is_set():
            found.append(replica.look_up("t", ids))

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(10):
        train()
    ended.set()
    thread.join(60)
    assert all(bool((rows == rows[0, 0]).all()) for rows in found) and found


def test_what_a_replica_can_not_look_up(tmp_path):
    replica = Replica(tmp_path)
    with pytest.raises(des.InputError, match=r"no table 't' in .*none yet: refresh\(\)"):
        replica.look_up("t", torch.arange(3))
    table = DynamicEmbedding(2)
    Deltas(tmp_path, {"t": table}).publish()
    replica.refresh()
    with pytest.raises(des.InputError, match=r"no table 'u' in .*there are: t"):
        replica.look_up("u", torch.arange(3))
    with pytest.raises(des.InputError, match="no int64 or int32 tensor"):
        replica.look_up("t", torch.ones(3))
    with pytest.raises(des.InputError, match="no tables were given"):
        Deltas(tmp_path, {})
    with pytest.raises(des.InputError, match="rank=2, ranks=2"):
        Deltas(tmp_path, {"t": table}, rank=2, ranks=2)
    with pytest.raises(des.InputError, match="is a list of deltas"):
        Increments(tmp_path, {"t": table}).load()


def test_redis_has_large_values_in_pieces(monkeypatch):
    monkeypatch.setattr(redis_store, "PIECE_BYTES", 10)
    store = RedisStore(Client(), "k")
    for size in (0, 1, 9, 10, 11, 20, 35):
        data = bytes(range(size))
        assert store.write("a", [data[:7], data[7:]])[0] == size and store.read("a") == data
    assert store.names() == ["a"] and len(store._client.held["k"]) == 5
    store.remove(["a", "b"])
    with pytest.raises(FileNotFoundError):
        store.read("a")
    assert store.names() == []


def test_redis_that_fails_is_named(monkeypatch):
    client = Client(decodes=True)
    store = RedisStore(client, "rows")
    store.write("a", [b"x"])
    with pytest.raises(des.InputError, match=r"decode_responses=False"):
        store.names()

    def fails(*args, **options):
        raise ConnectionError("refused")

    monkeypatch.setattr(client, "hset", fails)
    with pytest.raises(des.InputError, match=r"hash 'rows' of Redis: hset failed with ConnectionError: refused"):
        store.write("a", [b"x"])
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(des.InputError, match=r"pip install descompiler\[redis\]"):
        RedisStore("redis://localhost", "rows")


def test_a_real_server(tmp_path):
    """Through its own client, by a socket of its own."""
    redis = pytest.importorskip("redis", reason="the client redis is not installed")
    if (server := shutil.which("redis-server")) is None:
        pytest.skip("redis-server is not on the PATH")
    socket = tmp_path / "socket"
    command = [server, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(tmp_path)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not socket.exists() and time.monotonic() < until:
            time.sleep(0.05)
        url = f"unix://{socket}"
        table, replica = DynamicEmbedding(4), Replica(RedisStore(url, "rows"))
        opt, deltas = (
            torch.optim.SGD(table.parameters(), lr=0.1),
            Deltas(RedisStore(url, "rows"), {"t": table}, keep=2, compact_at=0.2),
        )
        for number in range(30):
            run(table, opt, [[[number, 1, 2]]])
            deltas.publish()
            assert replica.refresh().gaps == () and held_by(replica) == contents(table)
        assert len(RedisStore(url, "rows").names()) < 30
        with pytest.raises(des.InputError, match="decodes"):
            RedisStore(redis.Redis.from_url(url, decode_responses=True), "rows").names()
    finally:
        running.kill()
        running.wait(60)
    with pytest.raises(des.InputError, match="of Redis: hkeys failed with ConnectionError"):
        RedisStore(url, "rows").names()


STEPS = 8


def work(path, steps):
    """Go on from what there is; save after each second step, and publish after each."""

    def run_on():
        table = made("always", "lru")
        opt = OPTIMIZERS["adagrad"][1](table.parameters())
        increments = Increments(path / "saved", {"t": table}, opt, compact_at=0.5)
        deltas = Deltas(path / "deltas", {"t": table}, keep=2, compact_at=0.5)
        increments.load()
        for number in range(table.step, STEPS):
            run(table, opt, steps[number : number + 1])
            deltas.publish()
            if number % 2:
                increments.save()

    return run_on


def check(path, steps, replicas):
    """What was published is a table of some step; who goes on from what was saved publishes the same."""
    for replica in replicas:
        replica.refresh()
        if replica.steps:
            known = made("always", "lru")
            run(known, OPTIMIZERS["adagrad"][1](known.parameters()), steps[: replica.steps["t"]])
            assert_equal(held_by(replica), contents(known))


@pytest.mark.parametrize("times", cases([1, 60], [1]))
def test_killed_at_any_call_a_replica_has_what_was_published(draws, tmp_path, times):
    """One replica reads all along, another once."""
    steps = [[[draws.randint(0, 3000) for _ in range(120)]] for _ in range(STEPS)]
    most = killed_at(0, work(tmp_path / "all", steps))
    assert most > 50
    for number in draws.sample(range(1, most), times):
        path = tmp_path / str(number)
        replica = Replica(path / "deltas")
        assert killed_at(number, work(path, steps)) is None
        check(path, steps, [replica, Replica(path / "deltas")])
        killed_after(draws.uniform(0.0, 0.3), work(path, steps))
        check(path, steps, [replica, Replica(path / "deltas")])
        work(path, steps)()
        check(path, steps, [replica])
        assert replica.steps == {"t": STEPS} or (path / "saved").exists()
        names = [n for n in os.listdir(path / "deltas") if n.endswith(".writing")]
        assert not names or int(names[0][:6]) == max(int(n[:6]) for n in os.listdir(path / "deltas"))

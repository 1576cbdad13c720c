"""Dynamic tables are saved and go on: state dicts, copies, pickles, exports; and what they refuse, by name."""

import copy
import io
import pickle
import sys
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import descompiler as des
from descompiler.dynamic import AfterSightings, Capacity, Constant, DynamicEmbedding, DynamicEmbeddingBag, TimeToLive
from tests.harness.dynamic import ADMIT, EVICT, OPTIMIZERS, assert_equal, contents, made, run, stream

IDS = torch.arange
CASES = [("always", "none", "adagrad"), ("sightings", "lfu", "sparse_adam"), ("probability", "ttl", "sgd")]


def restored(how, table, optimizer, make):
    """The table and its optimiser, as they come back from being saved."""
    if how == "copy":
        return copy.deepcopy((table, optimizer))
    if how == "copy, optimiser first":
        return copy.deepcopy((optimizer, table))[::-1]
    file = io.BytesIO()
    if how == "pickle":
        torch.save((table, optimizer), file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    torch.save({"table": table.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = make()
    if how == "state, used before":
        run(other[0], other[1], [[[1, 2, 3, 10**9]], [[5]]])
    if how == "state, optimiser first":
        other[1].load_state_dict(state["optimizer"])
        other[0].load_state_dict(state["table"])
    else:
        other[0].load_state_dict(state["table"])
        other[1].load_state_dict(state["optimizer"])
    return other


HOW = ["copy", "copy, optimiser first", "pickle", "state", "state, used before", "state, optimiser first"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("admit", "evict", "optimizer"), CASES)
def test_a_table_goes_on_as_if_it_had_not_been_saved(draws, admit, evict, optimizer, how):
    """Saved between steps, and in a step whose lookups have been made, with rows in slots that had others."""
    steps = list(stream(draws, 24, most=60))

    def make():
        table = made(admit, evict)
        return table, OPTIMIZERS[optimizer][1](table.parameters())

    one = make()
    run(*one, steps[:14])
    with torch.no_grad():
        # of step 14, which ends after it was saved; what it sights and enters is of those that come next
        one[0](torch.tensor([i for step in steps[15:18] for ids in step for i in ids], dtype=torch.int64))
    other = restored(how, *one, make)
    assert other[0].weight is not one[0].weight and other[1].param_groups[0]["params"][0] is other[0].weight
    for pair in (one, other):
        run(*pair, steps[14:])
    assert one[0].step == other[0].step == 24
    assert_equal(contents(other[0]), contents(one[0]))


@pytest.mark.parametrize("optimizer", ["sparse_adam", "adagrad"])
def test_a_table_that_was_sent_to_a_process_goes_on(draws, optimizer):
    """There, and here: what torch puts into shared memory for that is not where rows come from then on."""
    steps = stream(draws, 30)
    table, known = (made("sightings", "lfu") for _ in range(2))
    opt, of_known = (OPTIMIZERS[optimizer][1](t.parameters()) for t in (table, known))
    run(table, opt, steps[:10])
    sent = pickle.loads(ForkingPickler.dumps((table, opt)))
    assert table.weight.is_shared()
    assert not table.float().double().weight.is_shared()
    run(known, of_known, steps[:10])
    known.float().double()
    ForkingPickler.dumps((table, opt))
    for there, its in (sent, (table, opt), (known, of_known)):
        run(there, its, steps[10:])
        its.load_state_dict(its.state_dict())
    assert contents(table) == contents(known) and not table.weight.is_shared()
    assert contents(sent[0]).keys() == contents(known).keys()


def test_a_state_has_what_there_is_and_no_more():
    """Not the room that the parameter grows into, nor other tables' views of the memory."""
    table = made("sightings", "lfu")
    opt = OPTIMIZERS["adagrad"][1](table.parameters())
    run(table, opt, [[[1, 2, 3]], [[1, 2, 4]]])
    state = table.state_dict()
    assert state["weight"].shape == (3, 3) and sorted(state["ids"].tolist()) == [0, 1, 2]
    assert {k: v.dtype for k, v in state.items()} == {
        "ids": torch.int64,
        "resident": torch.bool,
        "step": torch.int64,
        "made_from": torch.int64,
        "sighted": torch.int64,
        "fresh": torch.int64,
        "weight": torch.float64,
        "last_seen": torch.int32,
        "counts": torch.int32,
        "sketch": torch.uint8,
    }
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    assert len(file.getvalue()) < 20_000


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.user = DynamicEmbedding(2, name="user", dtype=torch.float64, **options)
        self.top = nn.Linear(2, 1, dtype=torch.float64)


def test_it_is_saved_with_its_model():
    model, other = Model(), Model()
    model.user(IDS(5))
    assert [k for k in model.state_dict() if k.startswith("user.")]
    assert not other.load_state_dict(model.state_dict()).missing_keys
    assert torch.equal(other.user(IDS(5)), model.user(IDS(5)))
    assert "user.weight" in dict(model.named_parameters())
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("user.")}
    with pytest.raises(RuntimeError, match=r"user\.ids"):
        other.load_state_dict(rest)
    other.load_state_dict(rest, strict=False)
    assert len(other.user) == 5


def state_of(model):
    model.user(IDS(5))
    return model.state_dict()


@pytest.mark.parametrize(
    ("saved", "options", "text"),
    [
        (lambda: state_of(Model(seed=1)), {}, r"'user' is of a table with seed=1, and the table's is 0"),
        (lambda: state_of(Model()) | {"user.weight": torch.zeros(6, 3)}, {}, r"rows of 3 numbers, and the table of 2"),
        (lambda: {"user.weight": torch.zeros(6, 2)}, {}, r"static embedding's.*from_embedding"),
        (lambda: {k: v for k, v in state_of(Model()).items() if "step" not in k}, {}, r"has no step: it is not one"),
        (lambda: state_of(Model(evict=TimeToLive(3))), {}, r"has a 'last_seen'.*another evict="),
        (
            lambda: state_of(Model(evict=TimeToLive(3))),
            {"evict": Capacity(64, "lfu")},
            r"has no 'counts'.*another evict=",
        ),
        (lambda: state_of(Model()), {"admit": AfterSightings(2)}, r"has no 'sketch'.*another admit="),
        (
            lambda: state_of(Model(admit=AfterSightings(2))),
            {"admit": AfterSightings(2, width=9)},
            r"counters of torch.uint8",
        ),
        (lambda: state_of(Model()), {"max_rows": 3}, r"has 5 rows, more than max_rows=3"),
    ],
)
def test_states_of_other_tables_are_refused(saved, options, text):
    """Before anything of the table changes."""
    model = Model(**options)
    model.user(IDS(2))
    before = {k: v.clone() for k, v in model.user.state_dict().items()}
    state = saved()
    with pytest.raises(des.InputError, match=text):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(before[k], v) for k, v in model.user.state_dict().items())


def test_a_table_of_another_name_is_refused():
    with pytest.raises(des.InputError, match="another name"):
        DynamicEmbedding(2, name="a").load_state_dict(DynamicEmbedding(2, name="b").state_dict())


def test_it_comes_from_a_static_table_and_goes_back():
    static = nn.Embedding(400, 3, padding_idx=7, dtype=torch.float64)
    table = des.dynamic.from_embedding(static, name="user")
    assert torch.equal(table(IDS(400)), static(IDS(400)))
    table(torch.tensor([1000, -1]))
    embedding, ids = table.to_embedding()
    assert ids.tolist() == [-1, *range(7), *range(8, 400), 1000]
    assert torch.equal(embedding(IDS(1, 8)), static(IDS(7)))
    assert embedding.weight.requires_grad and len(table) == 401


def hooked(embedding):
    embedding.register_forward_hook(lambda module, ids, rows: rows * 2)
    return embedding


@pytest.mark.parametrize(
    ("static", "options", "error", "text"),
    [
        (lambda: nn.Embedding(4, 2, max_norm=1.0), {}, des.UnsupportedError, "max_norm"),
        (lambda: nn.Embedding(4, 2, scale_grad_by_freq=True), {}, des.UnsupportedError, "scale_grad_by_freq"),
        (
            lambda: nn.Embedding(4, 2, _weight=torch.ones(4, 2), padding_idx=1),
            {},
            des.UnsupportedError,
            "row 1 .* not zeros",
        ),
        (lambda: nn.Embedding(4, 2), {"max_rows": 3}, des.InputError, "4 rows, more than max_rows=3"),
        (lambda: nn.Embedding(4, 2), {"padding_idx": 3, "dim": 2}, des.InputError, "dim, padding_idx= .* its own"),
        (lambda: nn.Embedding(4, 2), {"evcit": None}, des.InputError, "evcit= is no option.*evict"),
        (lambda: nn.Embedding(4, 2, device="meta"), {}, des.UnsupportedError, "meta device and has no rows"),
        (lambda: weight_norm(nn.Embedding(4, 2), "weight"), {}, des.UnsupportedError, "ParametrizedEmbedding may do"),
        (lambda: hooked(nn.Embedding(4, 2)), {}, des.UnsupportedError, "has hooks"),
    ],
)
def test_static_tables_that_it_can_not_be(static, options, error, text):
    with pytest.raises(error, match=text):
        des.dynamic.from_embedding(static(), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parquet(tmp_path, dtype):
    import pyarrow.parquet

    table = DynamicEmbedding(3, dtype=dtype)
    rows = table(torch.tensor([5, -9, 2**60]))
    table.to_parquet(tmp_path / "rows.parquet")
    read = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    assert read["id"].to_pylist() == [-9, 5, 2**60]
    assert torch.equal(torch.tensor(read["row"].to_pylist(), dtype=torch.float64), rows[[1, 0, 2]].double())
    DynamicEmbedding(3).to_parquet(tmp_path / "none.parquet")
    assert len(pyarrow.parquet.read_table(tmp_path / "none.parquet")) == 0


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(des.InputError, match=r"pip install descompiler\[parquet\]"):
        DynamicEmbedding(3).to_parquet(tmp_path / "rows.parquet")


def test_a_full_table_loses_nothing():
    """The lookup that would need more rows raises, and everything is as it was; known ids are looked up as before."""
    table = DynamicEmbedding(2, max_rows=5, admit=AfterSightings(2), evict=TimeToLive(9))
    opt = torch.optim.SGD(table.parameters(), lr=0.1)
    for ids in (IDS(20), IDS(4), IDS(4)):
        table(ids).sum().backward()
        opt.step()
        opt.zero_grad()
    before = {k: v.clone() for k, v in table.state_dict().items()}
    with pytest.raises(des.TableFullError, match=r"4 rows, and this lookup has 16 new ids.*max_rows=5.*evict="):
        table(IDS(30))
    assert all(torch.equal(before[k], v) for k, v in table.state_dict().items())
    table(IDS(5))
    assert len(table) == 5


def momentum(p):
    return torch.optim.SGD(p, lr=0.1, momentum=0.9)


class Mine(torch.optim.SGD):
    """May do anything."""


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (momentum, r"SGD\(momentum=0.9\)"),
        (lambda p: torch.optim.Adagrad(p, weight_decay=0.1), r"Adagrad\(weight_decay=0.1\)"),
        (torch.optim.Adam, r"Adam steps on the weight of a dynamic table.*SparseAdam"),
        (Mine, "Mine steps on"),
    ],
)
def test_optimisers_that_would_be_something_else_are_refused(optimizer, text):
    table = DynamicEmbedding(2, init=Constant(1.0))
    table(IDS(3)).sum().backward()
    opt = optimizer(table.parameters())
    with pytest.raises(des.UnsupportedError, match=text):
        opt.step()
    assert bool((table(IDS(3)) == 1).all()) and table.step == 0


def test_dense_gradients_are_refused():
    table = DynamicEmbedding(2)
    (table(IDS(3)).sum() + table.weight.square().sum()).backward()
    with pytest.raises(des.UnsupportedError, match=r"dense gradient.*Penalise the rows"):
        torch.optim.SGD(table.parameters(), lr=0.1).step()
    with pytest.raises(des.UnsupportedError, match="dense gradient"):
        table.end_step()


@pytest.mark.parametrize("ids", [torch.ones(2), torch.ones(2, dtype=torch.int16), [1, 2], torch.ones(2).bool()])
def test_ids_are_whole_numbers(ids):
    with pytest.raises(des.InputError, match=r"DynamicEmbedding 'user' was given ids of .*int64"):
        DynamicEmbedding(2, name="user")(ids)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: DynamicEmbedding(0), "dim=0"),
        (lambda: DynamicEmbedding(2, max_rows=0), "max_rows=0"),
        (lambda: DynamicEmbedding(2, dtype=torch.int64), "dtype=torch.int64"),
        (lambda: DynamicEmbedding(2, max_rows=70, evict=Capacity(100)), "max_rows=70 is below the 100 rows"),
        (lambda: DynamicEmbeddingBag(2, mode="median"), "mode='median'"),
        (lambda: DynamicEmbeddingBag(2)(IDS(3)), "1 dimensions without offsets"),
        (lambda: DynamicEmbeddingBag(2)(IDS(4).view(2, 2), IDS(1)), "2 dimensions and offsets"),
        (lambda: DynamicEmbeddingBag(2)(IDS(3), IDS(1), torch.ones(3)), "per_sample_weights"),
        (lambda: Capacity(63), "rows=63"),
        (lambda: Capacity(64, by="fifo"), "by='fifo'"),
        (lambda: TimeToLive(0), "steps=0"),
        (lambda: des.dynamic.WithProbability(1.1), "probability=1.1"),
    ],
)
def test_tables_that_can_not_be(make, text):
    with pytest.raises(des.InputError, match=text):
        make()


@pytest.mark.parametrize("move", [lambda t: t.share_memory(), lambda t: t.to("meta")])
def test_rows_stay_where_they_can_come_and_go(move):
    table = DynamicEmbedding(2, name="user")
    rows = table(IDS(4)).detach()
    with pytest.raises(des.UnsupportedError, match="can't be"):
        move(table)
    table(IDS(3000)).sum().backward()
    assert torch.equal(table(IDS(4)), rows) and not table.weight.is_shared()


def test_it_says_what_it_is():
    table = DynamicEmbedding(2, name="user", evict=TimeToLive(3), max_rows=10)
    table(IDS(3))
    assert repr(table) == (
        "DynamicEmbedding(2, rows=3, name='user', seed=0, init=Normal(mean=0.0, std=1.0), admit=Always(), "
        "evict=TimeToLive(steps=3), max_rows=10)"
    )
    assert bool(DynamicEmbedding(2)) and len(DynamicEmbedding(2)) == 0


def test_a_state_with_more_slots_than_rows_allowed_is_taken():
    """Most of its slots are free, and the optimiser's state has them too."""
    large, small = DynamicEmbedding(2, evict=TimeToLive(1)), DynamicEmbedding(2, evict=TimeToLive(1), max_rows=300)
    one, other = (torch.optim.SparseAdam(list(t.parameters()), lr=0.1) for t in (large, small))
    for ids in (IDS(3000), IDS(2990, 3010), IDS(2990, 3010)):
        large(ids).sum().backward()
        one.step()
        one.zero_grad()
    small.load_state_dict(large.state_dict())
    other.load_state_dict(one.state_dict())
    for table, opt in ((large, one), (small, other)):
        for ids in (IDS(2995, 3200), IDS(3050, 3250)):
            table(ids).square().sum().backward()
            opt.step()
            opt.zero_grad()
    assert contents(large) == contents(small)


def test_all_strategies_are_tried():
    assert {type(x).__name__ for x in [*ADMIT.values(), *EVICT.values()]} == {
        *("Always", "AfterSightings", "WithProbability", "NoneType", "Capacity", "TimeToLive")
    }

"""Ranks that are given the global batch's ids: what is computed is the same, no id crosses, and wrong use raises."""

import copy

import pytest
import torch
from torch import Tensor, nn

import descompiler as des
from descompiler.check import compare
from descompiler.layout.border import IdsIn
from examples.models import MODELS

SIZES = [50, 31, 7, 40]


def _ids(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(n, (rows,), generator=generator) for n in SIZES], 1)


def _dense(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class IdsOnly(nn.Module):
    """No input has own rows; a bag, and histories of which table-wise owners need some columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.bag, self.top = nn.EmbeddingBag(50, 4, mode="sum"), nn.Embedding(31, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.bag(ids[:, [0, 2, 3]]) * self.top(ids[:, 1])).sum(1)


def _deepfm(layout: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS["deepfm"](layout, vocab_sizes=SIZES, dim=4).double()


MAKES = {
    "fields": lambda: _deepfm("fields"),
    "offsets": lambda: _deepfm("offsets"),
    "ids only": lambda: IdsOnly().double(),
}


def trained(rank, ranks, make, form, counts):
    """Three steps, the last on a batch of which some rank has no row: outputs, weights, bytes."""
    model = MAKES[make]()
    alone = make == "ids only"
    example = (_ids(6),) if alone else (_dense(6), _ids(6))
    module = des.compile(copy.deepcopy(model), example, plan={"*": form}, ids="global", loss="sum")
    optimizers = [torch.optim.Adagrad(m.parameters(), lr=0.05, eps=0.05) for m in (model, module)]
    for step, of_ranks in enumerate(counts):
        total, first = sum(of_ranks[:ranks]), sum(of_ranks[:rank])
        if alone:
            of_ranks = [total // ranks + (r < total % ranks) for r in range(ranks)]
            first = sum(of_ranks[:rank])
        own, ids, dense = slice(first, first + of_ranks[rank]), _ids(total, step), _dense(total, step)
        read = ids.clone()
        for columns in module.id_columns().values():  # what this rank does not read, a loader leaves out
            if columns is not None:
                read[:, [i for i in range(len(SIZES)) if i not in columns]] = 0
        got, expected = (module(read), model(ids)) if alone else (module(dense[own], read), model(dense, ids))
        assert got.shape == expected[own].shape
        assert torch.allclose(got, expected[own], rtol=1e-10, atol=1e-12)
        got.square().sum().backward()
        expected.square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert module.traffic() == module.predicted_traffic()
        assert IdsIn.SEND not in module.traffic().calls_by_collective
    weights = des.full_state_dict(module)
    assert all(torch.allclose(w, weights[n], rtol=1e-10, atol=1e-12) for n, w in model.state_dict().items())
    with torch.no_grad():
        total = sum(counts[0][:ranks])
        of_ranks = counts[0] if not alone else [total // ranks + (r < total % ranks) for r in range(ranks)]
        first = sum(of_ranks[:rank])
        own = slice(first, first + of_ranks[rank])
        got = module(_ids(total)) if alone else module(_dense(total)[own], _ids(total))
        expected = model(_ids(total)) if alone else model(_dense(total), _ids(total))
        assert torch.allclose(got, expected[own], rtol=1e-10, atol=1e-12)
    return module.id_columns()


COUNTS = ([5, 2, 4], [3, 3, 1], [6, 0, 2])


@pytest.mark.long(but=1)
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("make", MAKES)
def test_training_is_the_originals(make, ranks, on_ranks):
    for form in ("table_wise", "row_wise", "column_wise"):
        read = [columns for of_rank in on_ranks(trained, ranks, make, form, COUNTS) for columns in of_rank.values()]
        if ranks == 1:
            assert read == []
        elif form != "table_wise":
            assert read == [list(range(len(SIZES)))] * ranks if make == "fields" else [None] * ranks
        elif make != "ids only":  # each by one rank
            assert sorted(i for columns in read for i in columns) == list(range(len(SIZES)))


@pytest.mark.long
def test_plans_say_that_ids_cost_nothing():
    model, example = _deepfm("fields"), (_dense(6), _ids(6))
    pins = {"*": "row_wise"}
    own, given = (des.plan(model, example, ranks=4, pins=pins, ids=ids) for ids in ("own", "global"))
    assert own.traffic(0).bytes_by_collective[IdsIn.SEND] > 0
    assert IdsIn.SEND not in given.traffic(0).calls_by_collective
    assert given.price_bytes == own.price_bytes - max(own.traffic(r).bytes_by_collective[IdsIn.SEND] for r in range(4))
    again = des.Plan.from_json(given.to_json())
    assert again == given and again.layout.given == (1,)
    assert "ids don't cross" in given.explain() and "ids don't cross" not in own.explain()
    free = des.plan(model, example, ranks=4, ids="global")
    assert set(free.forms.values()) <= {"table_wise", "row_wise", "column_wise"} and free.bound <= free.price


class Masked(nn.Module):
    """Ids are read for a mask, too, on own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.top = nn.Embedding(50, 4), nn.Linear(1, 1)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids[:, :1] > 3).float()
        return self.table(ids[:, 0]).sum(1, keepdim=True) * self.top(mask)


@pytest.mark.parametrize(
    "model, example, given, text",
    [
        (IdsOnly(), (_ids(6),), {"ids": "all"}, "it is one of 'own', 'global'"),
        (IdsOnly(), (_ids(6),), {"ids": "global", "pins": {"*": "unique_rows"}}, "used on own rows in the forms"),
        (Masked(), (_ids(6),), {"ids": "global"}, "reads .* too, on a rank's own rows"),
        (IdsOnly(), (_ids(6),), {"ids": "global", "plan": "own"}, "and the plan has own"),
    ],
)
def test_what_is_refused(model, example, given, text):
    if "plan" in given:
        given = {**given, "plan": des.plan(model, example, ranks=2, pins={"*": "row_wise"})}
    with pytest.raises(des.PlanError, match=text):
        des.plan(model, example, ranks=2, **given)


def wrong(rank, ranks, what):
    """What ranks say of a step in which they are given other ids, and that they go on afterwards."""
    module = des.compile(_deepfm("fields"), (_dense(6), _ids(6)), plan={"*": "row_wise"}, ids="global")
    dense, ids = _dense(3), _ids(6)
    if what == "order" and rank:
        ids = ids.flip(0)
    if what == "rows" and rank:
        ids = ids[:5]
    if what == "all rows":
        ids = _ids(8)
    if what == "few" and rank:
        ids = ids[:2]
    if what == "range" and rank:
        ids = ids + 1000
    with pytest.raises(des.DescompilerError) as error:
        module(dense, ids)
    again = module(dense, _ids(6))
    return type(error.value).__name__, str(error.value), again.shape


@pytest.mark.parametrize(
    "what, kind, text",
    [
        ("order", "RankError", "checksum"),
        ("rows", "RankError", "ids of 5 rows"),
        ("all rows", "InputError", r"ids are given for 8 rows, and ranks have 3 \+ 3 rows"),
        ("few", "InputError", "this rank has 3 rows, and ids are given for 2"),
        ("range", "InputError", "id 10"),
    ],
)
def test_wrong_use_raises_on_every_rank(what, kind, text, on_ranks):
    import re

    for name, words, shape in on_ranks(wrong, 2, what):
        assert name == kind and re.search(text, words), words
        assert shape == (3,)


def of_owners(rank, ranks):
    """Ranks are given other ids than each other, and each table is on one of them."""
    model = _deepfm("fields")
    module = des.compile(copy.deepcopy(model), (_dense(6), _ids(6)), plan={"*": "table_wise"}, ids="global")
    with torch.no_grad():
        return module(_dense(6)[3 * rank : 3 * rank + 3], _ids(6, seed=rank)), module.id_columns()[1]


def test_a_table_is_looked_up_with_the_ids_of_its_rank(on_ranks):
    """What is yours to see to: no rank has the others' ids to compare, and the batch is of what owners were given."""
    results = on_ranks(of_owners, 2)
    ids = _ids(6)
    for rank, (_, columns) in enumerate(results):
        ids[:, list(columns)] = _ids(6, seed=rank)[:, list(columns)]
    with torch.no_grad():
        expected = _deepfm("fields")(_dense(6), ids)
    assert torch.allclose(torch.cat([out for out, _ in results]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.long(but=1)
@pytest.mark.parametrize("make, ranks", [("offsets", 2), ("ids only", 2), ("fields", 3), ("fields", 1)])
def test_verify_gives_every_rank_the_ids(make, ranks, on_ranks):
    inputs = (_ids(6),) if make == "ids only" else (_dense(6), _ids(6))
    plans = [None, {"*": "table_wise"}, {"*": "row_wise"}]
    report = des.verify(MAKES[make](), inputs, ranks=ranks, plans=plans, ids="global", launch=on_ranks)
    assert report.cases == len(plans) and report.worst["output"] <= 1e-10


def with_other_ids(rank, ranks, *args):
    """What `verify` runs on a rank; the last one is given the ids in another order."""
    plain = compare.with_global_ids
    if rank == ranks - 1:
        compare.with_global_ids = lambda local, whole, given: plain(local, ([x.flip(0) for x in whole[0]], {}), given)
    try:
        return compare.train_and_compare(rank, ranks, *args)
    finally:
        compare.with_global_ids = plain


@pytest.mark.long
def test_verify_sees_other_ids(on_ranks):
    launch = lambda _, ranks, *args, timeout_s: on_ranks(with_other_ids, ranks, *args)  # noqa: E731
    for form, text in ("table_wise", "output .* differs"), ("row_wise", "checksum"):
        with pytest.raises(des.EquivalenceError, match=text):
            des.verify(_deepfm("fields"), (_dense(6), _ids(6)), plans=[{"*": form}], ids="global", launch=launch)


def test_verify_refuses_what_it_does_not_try():
    with pytest.raises(des.InputError, match="call verify once with each"):
        des.verify(_deepfm("fields"), (_dense(6), _ids(6)), ids="global", thorough=True)
    with pytest.raises(des.PlanError, match="it is one of 'own', 'global'"):
        des.verify(_deepfm("fields"), (_dense(6), _ids(6)), ids="all")

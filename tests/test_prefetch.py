"""`des.prefetch`: training is what it is without, and ids travel before their step; whatever the user does between."""

import copy
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import descompiler as des
from descompiler.layout.border import IdsIn
from descompiler.layout.fetches import Fetch
from descompiler.layout.step import AHEAD, EARLY
from tests.harness.cases import cases
from tests.harness.failures import raised
from tests.harness.models import Branch, Recommender, batch_of
from tests.harness.plans import LOOKED_UP

STEPS = 7
CAPTURED = 3
"""Batches that `prefetch` has seen when the first step has captured the program."""


class Model(nn.Module):
    """Two tables and a bag; ids are shifted by a buffer."""

    def __init__(self, sparse: bool = False, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item, self.user = nn.Embedding(11, 4, padding_idx=0, sparse=sparse), nn.Embedding(9, 4, sparse=sparse)
        self.bag = nn.EmbeddingBag(11, 4, mode="mean", padding_idx=0, sparse=sparse)
        self.register_buffer("shift", torch.tensor([1, 2]))
        self.hidden, self.top = nn.Linear(15, 4), nn.Linear(4, 1)
        self.drop, self.norm = nn.Dropout(dropout), nn.BatchNorm1d(4) if norm else nn.Identity()

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        shifted = ids[:, :2] + self.shift
        x = torch.cat([dense, self.user(shifted[:, 0]), self.item(shifted[:, 1]), self.bag(ids[:, 2:])], 1)
        return self.top(self.drop(self.norm(self.hidden(x))).tanh()).squeeze(1)


COUNTS = ((3, 1, 0), (2, 0, 4), (4, 2, 3))
"""Rows of ranks, by step."""


def batches_of(
    steps: int, ranks: int, every: Sequence[tuple[int, ...]] = COUNTS, most: int = 7
) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """By step, each rank's batch of dense features, ids and labels."""
    generator, result = torch.Generator().manual_seed(1), []
    for step in range(steps):
        counts = every[step % len(every)][:ranks]
        n = sum(counts)
        dense, y = (torch.rand(n, *s, generator=generator, dtype=torch.float64) for s in ((3,), ()))
        ids = torch.randint(most, (n, 5), generator=generator)
        parts = zip(*(torch.split(x, counts) for x in (dense, ids, y)), strict=True)
        result.append([tuple(x.clone() for x in p) for p in parts])
    return result


def whole(parts: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    return [torch.cat(x) for x in zip(*parts, strict=True)]


def compiled(plan: str, **options: object) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """The original, its compiled module and an optimiser that is right for both."""
    model = Model(**options).double()
    example = whole(batches_of(3, 3)[2])[:2]
    module = des.compile(copy.deepcopy(model), tuple(example), plan={"*": plan}, loss="sum")
    return model, module, torch.optim.SGD(module.parameters(), lr=0.1)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, dense: Tensor, ids: Tensor, y: Tensor) -> None:
    (module(dense, ids) - y).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_counted(module: des.DistributedModule, *, backward: bool = True) -> None:
    assert module.predicted_traffic(backward=backward) == module.traffic()


def difference(module: nn.Module, other: nn.Module) -> float:
    """The largest of weights, relative to the largest weight. Collective."""
    expected = other.state_dict() if not isinstance(other, des.DistributedModule) else des.full_state_dict(other)
    mine = des.full_state_dict(module)
    return max(float(((mine[n] - x).abs() / x.abs().max().clamp(min=1)).max()) for n, x in expected.items())


def _as_the_original(rank, ranks, plans, sparse):
    torch.set_default_dtype(torch.float64)
    found = {}
    for plan in plans:
        model, module, optimizer = compiled(plan, sparse=sparse)
        reference = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = batches_of(STEPS, ranks)
        ahead = des.prefetch([parts[rank] for parts in steps], module)
        given = 0
        for parts, batch in zip(steps, ahead, strict=True):
            assert batch is parts[rank]
            train(module, optimizer, *batch)
            assert_counted(module)
            train(model, reference, *whole(parts))
            given += 1
        found[plan] = given, ahead.taken, difference(module, model), ahead.unused.calls
    return found


SOME = ("row_wise", "unique_rows")


@pytest.mark.long(but=1)
@pytest.mark.parametrize(
    ("plans", "sparse", "ranks"),
    [
        (SOME, False, 3),
        *cases([((form,), s, 3) for form in LOOKED_UP for s in (False, True)], [(("hot_rows",), True, 3)]),
        pytest.param(LOOKED_UP, False, 1, marks=pytest.mark.slow),
        pytest.param(LOOKED_UP, True, 2, marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_the_original(on_ranks, plans, sparse, ranks):
    """Uneven and empty batches, duplicates; bytes and calls as predicted in every step."""
    for found in on_ranks(_as_the_original, ranks, plans, sparse):
        for given, taken, off, unused in found.values():
            assert given == STEPS and off < 1e-10, found
            # what was announced of the first batches, whose program nobody had, and of the end
            assert (taken, unused) == ((STEPS - CAPTURED, CAPTURED + 1) if ranks > 1 else (0, 0)), found


# ---- what a step is spared


def _entered(rank, ranks, plan):
    """By whether ids had gone ahead: collectives that a forward entered by channel, and the names that it counted."""
    torch.set_default_dtype(torch.float64)
    _, module, optimizer = compiled(plan)
    watch, found = module._runtime.channels.watch, {}
    for batch in des.prefetch([parts[rank] for parts in batches_of(STEPS, ranks)], module):
        before, waiting = dict(watch.entered), len(module._ahead)
        module(*batch[:2]).sum().backward()
        after = {c: n - before.get(c, 0) for c, n in watch.entered.items() if n > before.get(c, 0)}
        found[waiting > len(module._ahead)] = after, dict(module.traffic().calls_by_collective)
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize(("plan", "name"), [("table_wise", IdsIn.SEND), ("unique_rows", Fetch.IDS)])
def test_ids_are_no_business_of_their_step(on_ranks, plan, name):
    for found in on_ranks(_entered, 2, plan):
        (usual, counted), (spared, counted_ahead) = found[False], found[True]
        assert spared["data"] == usual["data"] - 1 and spared["control"] == usual["control"]
        assert not any("ahead" in channel for channel in spared)
        # yet they are counted in it, with what was told of the batch
        assert counted_ahead == counted | {AHEAD: 1} and counted[name] == 1


def _header_is_late(rank, ranks):
    """What a forward does between the header's start and its end."""
    torch.set_default_dtype(torch.float64)
    _, module, _ = compiled("row_wise")
    runtime, found = module._runtime, []
    enter_wait, agreed = runtime.enter_wait, runtime._agreed
    runtime.enter_wait = lambda handle: (found.append("ids"), enter_wait(handle))[1]
    runtime._agreed = lambda told, same_call: (found.append("header"), agreed(told, same_call=same_call))[1]
    with torch.no_grad():
        for batch in des.prefetch([parts[rank] for parts in batches_of(5, ranks)], module):
            found.clear()
            module(*batch[:2])
    return found


def test_the_header_is_heard_when_something_else_was_done(on_ranks):
    assert on_ranks(_header_is_late, 2) == [["ids", "header"]] * 2


# ---- rows


class Two(nn.Module):
    """Two tables, and one that nobody trains, of another dtype: rows of three classes."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item, self.user = nn.Embedding(60, 4, padding_idx=0, sparse=sparse), nn.Embedding(9, 2, sparse=sparse)
        self.fixed = nn.Embedding(60, 4, dtype=torch.float32)
        self.fixed.weight.requires_grad_(False)
        self.top = nn.Linear(13, 1)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        x = dense, self.item(ids[:, 0]), self.user(ids[:, 1] % 9), self.fixed(ids[:, 2]).to(dense.dtype)
        return self.top(torch.cat(x, 1)).squeeze(1)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),  # moves every row that ever had a gradient
}


def _rows(rank, ranks, plan, sparse, optimizer):
    """Steps that took ids, and rows; in which rows were told of; how far weights are from the original's."""
    torch.set_default_dtype(torch.float64)
    model = Two(sparse)
    steps = batches_of(14, ranks, [(5, 0, 9), (4, 7, 1), (6, 6, 6)], most=40)
    module = des.compile(copy.deepcopy(model), tuple(whole(steps[2])[:2]), plan={"*": plan}, loss="sum")
    mine, reference = OPTIMIZERS[optimizer](module.parameters()), OPTIMIZERS[optimizer](model.parameters())
    ahead = des.prefetch([parts[rank] for parts in steps], module, rows=True)
    told = []
    for parts, batch in zip(steps, ahead, strict=True):
        train(module, mine, *batch)
        assert_counted(module)
        told.append(module.traffic().calls_by_collective.get(EARLY, 0))
        train(model, reference, *whole(parts))
    return ahead.taken, ahead.rows_taken, told, difference(module, model)


@pytest.mark.parametrize(
    ("plan", "sparse", "optimizer", "ranks"),
    cases(
        [
            ("unique_rows", True, "adagrad", 3),
            ("unique_rows", False, "adam", 2),
            ("unique_rows", False, "sgd", 3),
            ("hot_rows", True, "adagrad", 3),
        ],
        [("unique_rows", True, "adagrad", 3), ("unique_rows", False, "adam", 2)],
    ),
)
def test_rows_go_ahead(on_ranks, plan, sparse, optimizer, ranks):
    for taken, rows_taken, told, off in on_ranks(_rows, ranks, plan, sparse, optimizer):
        # the first batch whose ids went ahead says which rows the next one has to wait for
        assert taken == 14 - CAPTURED - 1 and off < 1e-10
        if optimizer == "adam":  # rows change that no batch looks up
            assert rows_taken < taken - 1 and sum(told) < taken - 1
        else:
            assert rows_taken == taken - 1 and told == [0] * (CAPTURED + 2) + [1] * rows_taken


def _cast(rank, ranks):
    """Rows have gone ahead in a dtype that the module leaves before their step."""
    torch.set_default_dtype(torch.float64)
    steps, results = batches_of(9, ranks, [(5, 4), (3, 6)], most=40), []
    for rows in (False, True):
        module = des.compile(Two().double(), tuple(whole(steps[0])[:2]), plan={"*": "unique_rows"}, loss="sum")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        loader = [tuple(x.clone() for x in parts[rank]) for parts in steps]
        ahead = des.prefetch(loader, module, inputs=lambda batch: batch[:2], rows=rows)
        for step, (dense, ids, y) in enumerate(ahead):
            if step == 7:
                module.float()
            train(module, optimizer, dense.to(module.top.weight.dtype), ids, y)
        results.append(module)
    return difference(*results), ahead.rows_taken


def test_a_module_that_is_cast_when_rows_have_gone(on_ranks):
    for off, rows in on_ranks(_cast, 2):
        assert off == 0 and rows > 0


# ---- what users do between


def _between(rank, ranks, plan, options, rows=False):
    """Loops with prefetch and without, of the same steps, bit for bit."""
    torch.set_default_dtype(torch.float64)
    steps = [parts[rank] for parts in batches_of(12, ranks)]
    other = batches_of(1, ranks)[0][rank]
    results, seen = [], None
    for ahead in (False, True):
        torch.manual_seed(7)
        _, module, optimizer = compiled(plan, **options)
        loader = [tuple(x.clone() for x in batch) for batch in steps]
        loader = des.prefetch(loader, module, rows=rows) if ahead else loader
        for step, batch in enumerate(loader):
            if step == 5:
                continue  # left out
            if step == 6:  # given twice
                train(module, optimizer, *batch)
                assert_counted(module)
            if step == 7:  # evaluation in between
                module.eval()
                with torch.no_grad():
                    module(*other[:2])
                if not options.get("norm"):  # of the plan, which is that of training, statistics cross
                    assert_counted(module, backward=False)
                module.train()
            if step == 8:
                batch[1].copy_(batch[1].flip(0))
            if step == 9 and rank == 0:
                batch = tuple(x.clone() for x in batch)
            if step == 7 and rank == 1:  # rows of one owner, by hand, of which some have gone ahead
                with torch.no_grad():
                    for p in (module.item.weight, module.user.weight):
                        p.mul_(1.5)
            if step == 10:
                module.eval()  # other training flags than when it was sent
            train(module, optimizer, *batch)
            if module.training or not options.get("norm"):
                assert_counted(module)
            module.train()
        results.append(module)
        seen = loader
    return difference(*results), seen.taken, seen.rows_taken, seen.unused.calls


@pytest.mark.long
@pytest.mark.parametrize(
    ("plan", "options", "goes"),
    [
        ("row_wise", {"dropout": 0.3, "norm": True}, True),
        *cases([("unique_rows", {}, True), ("table_wise", {"norm": True}, True), ("hot_rows", {}, True)], []),
        # what was drawn before the header was heard can't be drawn again
        *cases([("replicate", {"dropout": 0.3}, False)], []),
    ],
)
def test_whatever_users_do_between(on_ranks, plan, options, goes):
    for off, taken, rows, unused in on_ranks(_between, 3, plan, options):
        # of 12 batches CAPTURED come too early, one is left out, three are not what was sent
        assert off == 0 and taken == (12 - CAPTURED - 4) * goes and unused > 0 and rows == 0


def test_whatever_users_do_between_when_rows_have_gone(on_ranks):
    for off, taken, rows, unused in on_ranks(_between, 3, "unique_rows", {}, True):
        # one more comes too early; of 4 steps one has a batch before it that came too early, and one finds other rows
        assert off == 0 and (taken, rows) == (12 - CAPTURED - 1 - 4, 2) and unused > 0


def _swapped(rank, ranks, plan, rows, orders):
    """Ranks take batches in orders of their own: of those that are swapped something has gone ahead."""
    torch.set_default_dtype(torch.float64)
    model, module, optimizer = compiled(plan)
    reference = torch.optim.SGD(model.parameters(), lr=0.1)
    steps, taken = batches_of(8, ranks, [(2, 3)]), []  # of as many rows: what is mistaken fits
    for step, _ in enumerate(des.prefetch([p[rank] for p in steps], module, rows=rows)):
        train(module, optimizer, *steps[orders[rank][step]][rank])
        assert_counted(module)
        taken.append(AHEAD in module.traffic().calls_by_collective)
        train(model, reference, *whole([steps[orders[r][step]][r] for r in range(ranks)]))
    return difference(module, model), taken


SWAPPED = (0, 1, 2, 3, 5, 4, 6, 7)


@pytest.mark.parametrize(("plan", "rows"), [("table_wise", False), ("unique_rows", True)])
def test_ranks_that_take_other_batches(on_ranks, plan, rows):
    for off, taken in on_ranks(_swapped, 2, plan, rows, (range(8), SWAPPED)):
        assert off < 1e-10 and taken == [False] * 3 + [not rows, False, False, True, True]


def test_a_step_before_its_turn(on_ranks):
    """Its rows were offered, and are sent when it begins; nothing waits for the one that comes after its turn."""
    for off, taken in on_ranks(_swapped, 2, "unique_rows", True, (SWAPPED, SWAPPED)):
        assert off < 1e-10 and taken == [False] * 4 + [True, False, True, True]


# ---- batches that are wrong, and loaders that end


def _wrong_id(rank, ranks, plan):
    torch.set_default_dtype(torch.float64)
    model, module, optimizer = compiled(plan)
    reference = torch.optim.SGD(model.parameters(), lr=0.1)
    steps, said = batches_of(STEPS, ranks), []
    steps[5][1][1][0, 3] = 99
    ahead = des.prefetch([p[rank] for p in steps], module)
    for parts, batch in zip(steps, ahead, strict=True):
        said.append(raised(lambda batch=batch: train(module, optimizer, *batch)))
        if parts is not steps[5]:
            train(model, reference, *whole(parts))
    return said, ahead.taken, difference(module, model)


@pytest.mark.parametrize("plan", ["row_wise", "unique_rows"])
def test_a_wrong_id_on_one_rank_is_an_error_of_its_step(on_ranks, plan):
    for said, taken, off in on_ranks(_wrong_id, 2, plan):
        assert [x != "nothing" for x in said] == [step == 5 for step in range(STEPS)], said
        assert "rank 1: table 'bag.weight'" in said[5] and "id 99" in said[5]
        assert taken == STEPS - CAPTURED - 1 and off < 1e-10


def _unequal(rank, ranks, failing):
    """Rank 0's loader has two batches less, or raises there: it goes on with empty ones."""
    torch.set_default_dtype(torch.float64)
    model, module, optimizer = compiled("table_wise")
    reference = torch.optim.SGD(model.parameters(), lr=0.1)
    steps, given = batches_of(8, ranks), []

    def loader():
        for step, parts in enumerate(steps):
            if step == 6 and rank == 0:
                if failing:
                    raise OSError("the disk is gone")
                return
            yield parts[rank]

    def step_of(batch):
        train(module, optimizer, *batch)
        assert_counted(module)
        given.append(AHEAD in module.traffic().calls_by_collective)

    text = None
    try:
        for batch in des.prefetch(loader(), module):
            step_of(batch)
    except OSError as error:
        text = str(error)
    while len(given) < 8:
        step_of([x[:0] for x in steps[0][0]])
    for step, parts in enumerate(steps):
        empty = tuple(x[:0] for x in parts[0])
        train(model, reference, *whole([empty, *parts[1:]] if step >= 6 else parts))
    return given, difference(module, model), text


@pytest.mark.parametrize("failing", cases([False, True], [True]))
def test_loaders_of_unequal_lengths(on_ranks, failing):
    for rank, (given, off, text) in enumerate(on_ranks(_unequal, 2, failing)):
        assert given == [False] * 3 + [True] * 3 + [False] * 2 and off < 1e-10
        assert text == ("the disk is gone" if failing and rank == 0 else None)


def _reused(rank, ranks):
    torch.set_default_dtype(torch.float64)
    _, module, optimizer = compiled("table_wise")
    dense, ids, y = (x.clone() for x in batches_of(3, ranks)[2][rank])

    def loader():
        for _ in range(4):
            yield dense, ids.copy_(ids.flip(0)), y

    return raised(lambda: [train(module, optimizer, *batch) for batch in des.prefetch(loader(), module)])


def test_a_loader_that_changes_its_batch_is_refused(on_ranks):
    for said in on_ranks(_reused, 2):
        assert said.startswith("InputError: the loader has changed a batch in place")


def _left_apart(rank, ranks):
    """Rank 0 asks for one batch more than rank 1; then both begin another loop."""
    torch.set_default_dtype(torch.float64)
    _, module, optimizer = compiled("table_wise")
    steps = [p[rank] for p in batches_of(8, ranks)]

    def loops():
        for step, batch in enumerate(des.prefetch(steps, module)):
            if step == 5 - rank:
                break
            if step < 4:
                train(module, optimizer, *batch)
        for batch in des.prefetch(steps, module):
            train(module, optimizer, *batch)

    return raised(loops)


def test_loops_that_ranks_leave_at_different_batches(on_ranks):
    one, other = on_ranks(_left_apart, 2)
    for said in (one, other):
        assert "ranks are at different batches of loops over prefetch" in said, (one, other)


# ---- what is given, and to whom


def _ways(rank, ranks):
    """By way of calling, how many of 7 steps took what had gone ahead."""
    torch.set_default_dtype(torch.float64)
    steps, found = [p[rank] for p in batches_of(STEPS, ranks)], {}
    named = [{"dense": d, "ids": i, "y": y} for d, i, y in steps]
    ways = {
        "as they are": (steps, None, lambda m, b: m(b[0], b[1])),
        "by name": (
            named,
            lambda b: {k: b[k] for k in ("dense", "ids")},
            lambda m, b: m(ids=b["ids"], dense=b["dense"]),
        ),
        "in another order": ([b[::-1] for b in steps], lambda b: (b[2], b[1]), lambda m, b: m(b[2], b[1])),
        "one batch, with other labels each time": (steps[:1] * STEPS, None, lambda m, b: m(*b[:2]) + b[2].add_(1)),
        "other ids": (steps, None, lambda m, b: m(b[0], b[1] + 0)),
    }
    for name, (loader, inputs, call) in ways.items():
        _, module, _ = compiled("table_wise")
        ahead = des.prefetch(loader, module, inputs)
        for batch in ahead:
            call(module, batch).sum().backward()
        found[name] = ahead.taken, len(ahead)
    return found


@pytest.mark.long
def test_how_a_batch_is_given_to_forward(on_ranks):
    for found in on_ranks(_ways, 2):
        taken = {name: 0 if name == "other ids" else STEPS - CAPTURED for name in found}
        assert found == {name: (n, STEPS) for name, n in taken.items()}


def _never_taken(rank, ranks):
    torch.set_default_dtype(torch.float64)
    _, module, optimizer = compiled("table_wise")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dense, ids, y in des.prefetch([p[rank] for p in batches_of(14, ranks)], module):
            train(module, optimizer, dense, ids.clone(), y)
    return [str(w.message) for w in caught if "prefetch" in str(w.message)]


def test_users_are_told_that_nothing_was_taken(on_ranks):
    first, other = on_ranks(_never_taken, 2)
    assert len(first) == 1 and "no step has used ids" in first[0] and not other


def _in_place(rank, ranks, kind):
    """Steps that took what had gone ahead, the difference from the original, and what was said."""
    torch.set_default_dtype(torch.float64)
    model = kind().double()
    reference = copy.deepcopy(model)
    everything, rows = batch_of(slice(0, 8)), slice(0, 3) if rank == 0 else slice(3, 8)

    def given(batch):
        return batch if kind is Recommender else batch["ids"]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        des.compile(model, (given(everything),), in_place=True, plan={"*": "row_wise"}, loss="sum")
        batches = [{k: x[rows].clone() for k, x in everything.items()} for _ in range(6)]
        ahead = des.prefetch(batches, model, None if kind is Recommender else lambda batch: (batch["ids"],))
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, reference)]
        for batch in ahead:
            for m, o, b in zip((model, reference), optimizers, (batch, everything), strict=True):
                m(given(b)).square().sum().backward()
                o.step()
                o.zero_grad()
    return ahead.taken, difference(model, reference), [str(w.message) for w in caught if "prefetch" in str(w.message)]


def test_a_model_that_was_compiled_in_place(on_ranks):
    for taken, off, said in on_ranks(_in_place, 2, Recommender):
        assert taken == 6 - CAPTURED and off < 1e-10 and not said


def test_a_model_that_was_captured_in_part_gets_batches_as_they_come(on_ranks):
    (taken, off, said), (_, off_too, nothing) = on_ranks(_in_place, 2, Branch)
    assert taken == 0 and max(off, off_too) < 1e-10 and not nothing
    assert len(said) == 1 and "captured in part" in said[0]

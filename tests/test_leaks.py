"""Training holds nothing of the steps before: graphs end with the step, and memory stays as it is."""

import gc
import importlib
import pkgutil
import threading
import weakref

import pytest
import torch
import torch.distributed as dist

import descompiler
import descompiler as des
from benchmarks.soak import SCENARIOS, memory, prepared
from descompiler.runtime.channels import _WATCHED, Channels
from descompiler.runtime.runtime import Runtime
from tests.harness.cases import cases
from tests.harness.models import IDS, Branch, Recurrent
from tests.harness.pool import RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as ranks:
        yield ranks


def functions() -> list[type]:
    """Every autograd function of the package."""
    for module in pkgutil.walk_packages(descompiler.__path__, "descompiler."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, queue = [], [torch.autograd.Function]
    while queue:
        children = queue.pop().__subclasses__()
        queue += children
        found += [c for c in children if c.__module__.startswith("descompiler") and "forward" in vars(c)]
    return sorted(found, key=lambda c: c.__qualname__)


def _contexts(rank, ranks, name):
    """By function, how many of its contexts a scenario made, and how many were alive once their graphs were dropped."""
    made: dict[str, list[weakref.ref]] = {}
    originals = {cls: cls.__dict__["forward"] for cls in functions()}

    def watched(cls, forward):
        def call(ctx, *args):
            made.setdefault(f"{cls.__module__}.{cls.__qualname__}", []).append(weakref.ref(ctx))
            return forward(ctx, *args)

        return staticmethod(call)

    scenario = SCENARIOS[name]
    try:
        for cls, original in originals.items():
            cls.forward = watched(cls, original.__func__)
        module, ids = prepared(scenario, 12, 4)
        gc.collect()
        gc.disable()  # what only the collector would find is held too long
        made.clear()  # compile's probes have their own graphs
        for _ in range(3):
            scenario.step(module, ids)
        return {c: (len(refs), sum(r() is not None for r in refs)) for c, refs in made.items()}
    finally:
        gc.enable()
        for cls, original in originals.items():
            cls.forward = original


@pytest.mark.long
def test_no_function_holds_an_output_of_its_own(on_ranks):
    """Nothing that a context reaches has it in its history, in any function: it dies with its graph."""
    seen = set()
    for name in SCENARIOS:
        for rank, found in enumerate(on_ranks(_contexts, 2, name)):
            alive = {c: counts for c, counts in found.items() if counts[1]}
            assert not alive, f"{name}, rank {rank}: contexts (made, alive) {alive}"
            seen |= found.keys()
    missing = {f"{c.__module__}.{c.__qualname__}" for c in functions()} - seen
    assert not missing, f"no scenario of benchmarks/soak.py uses {sorted(missing)}"


def _grows(rank, ranks, name, warm_up, steps):
    """KiB a step by which what the allocator has in use grows."""
    scenario = SCENARIOS[name]
    module, ids = prepared(scenario, 512, 64)
    for _ in range(warm_up):
        scenario.step(module, ids)
        module.zero_grad()
    gc.collect()
    before = memory()[1]
    for _ in range(steps):
        scenario.step(module, ids)
        module.zero_grad()
    gc.collect()
    return (memory()[1] - before) / 1024 / steps


KEPT_NOTHING = ["row_wise", "unique_rows", "hot_rows", "rows ahead", "replicate", "partial", "leaf", "vocabulary"]


@pytest.mark.long
@pytest.mark.parametrize("name", cases(KEPT_NOTHING, ["row_wise"]))
def test_memory_in_use_stays_as_it_is(pool, name):
    """A step of these leaves 128 KiB or more behind if any of what crosses is held."""
    assert max(pool(_grows, name, 20, 100)) < 20


def _watched(rank, ranks):
    """How many process groups are watched, and threads of boards, with one group compiled for."""
    channels = Channels.of(dist.group.WORLD)
    assert channels.watch.board.answers
    gc.collect()
    boards = [t for t in threading.enumerate() if t.name == "descompiler board"]
    for thread in boards[:-1]:  # the last one stays, as its group does
        thread.join(5)
    return len(_WATCHED), sum(t.is_alive() for t in boards)


def test_groups_that_ended_leave_nothing(pool):
    """Compiling for one group after another, as tests do, keeps no threads."""
    for _ in range(4):  # each call has a process group of its own
        assert pool(_watched) == [(3, 1)] * 2


def test_what_is_held_is_seen(pool):
    """The measure sees a step's output that is kept."""
    assert min(pool(_keeps, 50)) > 100


def _keeps(rank, ranks, steps):
    kept, before = [], memory()[1]
    for _ in range(steps):
        kept.append(torch.ones(32 << 10))
    return (memory()[1] - before) / 1024 / steps


def _left(rank, ranks, cls, options, how):
    """Modules that are there after each of a few was compiled, trained and dropped."""
    found = []
    for _ in range(2):
        module = des.compile(cls(), (IDS,), plan={"*": "row_wise"}, **options)
        for _ in range(2):
            loss = sum(x.square().sum() for x in torch.utils._pytree.tree_leaves(module(IDS)) if x is not None)
            if how == "asked for":
                torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
            else:
                loss.backward()
        del module, loss
        gc.collect()  # what one finds has ends that let go of more
        gc.collect()
        found.append(sum(isinstance(x, Runtime) for x in gc.get_objects()))
    return found


@pytest.mark.long
@pytest.mark.parametrize("how", ["trained", "asked for"])
@pytest.mark.parametrize("options", [{}, {"in_place": True, "loss": "sum"}], ids=["", "in place"])
@pytest.mark.parametrize("cls", [Recurrent, Branch])
def test_a_module_that_is_dropped_leaves_nothing(pool, cls, options, how):
    """The second is captured in part."""
    for found in pool(_left, cls, options, how):
        assert found == [0, 0]

"""Increments and deltas of compiled modules, in every form: what each rank writes and loads, and what replicas have."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import descompiler as des
from descompiler.dynamic import Deltas, Increments, Replica
from descompiler.dynamic.by_id import joined, take_out
from descompiler.dynamic.owners import in_ranges
from descompiler.dynamic.stores import Folder
from tests.harness.dynamic import same
from tests.harness.dynamic_ranks import OPTIONS, PLANS, Clicks, stream, train_on

TABLES = "user", "tags"
LEG = 6
ADAGRAD = {"lr": 0.1, "initial_accumulator_value": 0.25}
OPTIMIZERS = {
    "adagrad": lambda weights: torch.optim.Adagrad(weights, **ADAGRAD),
    "fused": lambda weights: torch.optim.Adagrad(weights, **ADAGRAD),
    "sparse_adam": lambda weights: torch.optim.SparseAdam(weights, lr=0.05),
    "ftrl": lambda weights: des.optim.FTRL(weights, lr=0.1, l1=0.02, l2=0.1),
}


def of_tables(options, plan, optimizer):
    """A model, compiled or not, and what trains the rows of its dynamic tables alone."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    module = Clicks(**OPTIONS[options])
    samples = [stream(step) for step in range(4)] if plan == "hot" else None  # shared slices that lie apart
    if plan is not None:
        module = des.compile(module, stream(0), plan=PLANS[plan], loss="sum", samples=samples)
    weights = [module.user.weight, module.tags.weight]
    if plan is not None and optimizer == "fused":
        return module, des.fuse_optimizer(module, torch.optim.Adagrad, params=weights, **ADAGRAD)
    return module, OPTIMIZERS[optimizer](weights)


def of_every_rank(mine):
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def assert_as_one(module, opt, original, theirs):
    """What ranks tell of together is the original's, and each holds what they tell; counters and optimiser too."""
    for name in TABLES:
        table, one = (m.get_submodule(name)._table for m in (module, original))
        expected = take_out(one, theirs)
        whole = joined(table, of_every_rank(take_out(table, opt, table.own_slices)), opt)
        assert len(whole.ids) and same(whole, expected, 1e-10)
        assert same(take_out(table, opt, table.held_slices), whole.only(table.held_slices), 1e-10)


def assert_served(replica, module):
    state = des.full_state_dict(module)
    for name in TABLES:
        there = state[f"{name}.resident"]
        ids, order = state[f"{name}.ids"][there].sort()
        assert torch.equal(replica.resident(name), ids)
        assert torch.equal(replica.look_up(name, ids), state[f"{name}.weight"][there][order])


def relay(rank, ranks, folder, plans, options, optimizer):
    """Each plan goes on from what the one before has saved; all deltas are read at once, and as they come."""
    for plan in plans:
        module, opt = of_tables(options, plan, optimizer)
        increments = des.increments(module, opt, f"{folder}/increments", compact_at=0.7)
        deltas, early = des.deltas(module, f"{folder}/deltas"), Replica(f"{folder}/deltas")
        done = (increments.load() or {"step": 0})["step"]
        for step in range(done, done + LEG):
            train_on(module, [opt], [step], rank, ranks)
            deltas.publish(step=step + 1)
            increments.save(step=step + 1)
            if rank == 0:
                early.refresh()
        dist.barrier()
        late = Replica(f"{folder}/deltas")
        for replica in (late, early):
            replica.refresh()
            assert_served(replica, module)
            assert replica.steps == dict.fromkeys(TABLES, done + LEG)
        original, theirs = of_tables(options, None, optimizer)
        train_on(original, [theirs], range(done + LEG), 0, 1)
        assert_as_one(module, opt, original, theirs)
    return done + LEG


def kinds(folder):
    return {f.name.split(".")[-2] for f in Path(folder).glob("*.safetensors")}


def through(on_ranks, folder, way, options, optimizer):
    done = 0
    for ranks, *plans in way:
        found = on_ranks(relay, ranks, str(folder), plans, options, optimizer)
        done += LEG * len(plans)
        assert found == [done] * ranks
        assert kinds(folder / "increments") == kinds(folder / "deltas") == {"full", "update"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "optimizer", "way"),
    [
        ("sightings, lfu", "adagrad", [(2, "hot", "whole"), (3, "whole", "hot", "row_wise"), (1, "hot")]),
        ("sightings, lru", "sparse_adam", [(1, "whole"), (3, "hot"), (2, "both")]),
        ("lfu", "fused", [(3, "hot", "whole"), (2, "whole")]),
    ],
)
def test_saved_in_one_form_and_loaded_in_another(on_ranks, tmp_path, options, optimizer, way):
    through(on_ranks, tmp_path, way, options, optimizer)


FORMS = "row_wise", "unique_rows", "hot", "whole"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", ["sightings, lru", "sightings, lfu", "by chance, time"])
@pytest.mark.parametrize("saved", FORMS)
def test_every_form_loads_every_form(on_ranks, tmp_path, saved, options, optimizer):
    way = [(ranks, x) for form in FORMS for ranks, x in ((2, saved), (3, form), (3, saved), (1, form))]
    through(on_ranks, tmp_path, way, options, optimizer)


def saved_and_read(rank, ranks, folder, plan):
    """What each rank's manifest says, and of which owners files are read by it; and who is refused."""
    module, opt = of_tables("lfu", plan, "adagrad")
    increments, names = des.increments(module, opt, folder), []
    for step in range(3):
        train_on(module, [opt], [step], rank, ranks)
        increments.save()
    dist.barrier()

    class Watched(Folder):
        def read(self, name):
            names.append(name)
            return super().read(name)

    again = des.increments(module, opt, folder)
    again._store = Watched(folder)
    again.load()
    read = {int(name.split("-")[1]) for name in names if name.endswith(".safetensors")}
    table = module.get_submodule(TABLES[rank])
    for given in (table, copy.deepcopy(table)):
        for cls in (Deltas, Increments):
            for owner in ((1 - rank, ranks), (rank, ranks + 1), (0, 1)):
                with pytest.raises(
                    des.InputError, match=rf"rank {rank} of 2 .* not of owner {owner[0]} of {owner[1]}:"
                ):
                    cls(f"{folder}/others", {"t": given}, rank=owner[0], ranks=owner[1])
    body = json.loads((Path(folder) / f"000001-{rank}-of-{ranks}.json").read_text())["chain"]
    return read, body["slices"], [module.get_submodule(n)._table.is_idle for n in TABLES]


@pytest.mark.long
def test_a_manifest_says_whose_files_are_read(on_ranks, tmp_path):
    """Slices that rank 0 tells of, and a table that is on one rank; nothing where all owners have what is usual."""
    (first, of_first, idle), (second, of_second, other_idle) = on_ranks(saved_and_read, 2, f"{tmp_path}/whole", "whole")
    assert idle == [not x for x in other_idle] and sorted(idle) == [False, True]
    assert of_first == {name: "" if none else "0-63" for name, none in zip(TABLES, idle, strict=True)}
    assert of_second == {name: "0-63" if none else "" for name, none in zip(TABLES, idle, strict=True)}
    assert (first, second) == ({0}, {1})
    (first, of_first, _), (second, of_second, _) = on_ranks(saved_and_read, 2, f"{tmp_path}/hot", "hot")
    assert of_first.keys() == of_second.keys() != set() and (first, second) == ({0}, {0, 1})
    for name, slices in of_first.items():
        told = torch.cat([in_ranges(slices), in_ranges(of_second[name])])
        assert torch.equal(told.sort().values, torch.arange(64))
    for _, listed, _ in on_ranks(saved_and_read, 2, f"{tmp_path}/rows", "row_wise"):
        assert listed == {}

"""Checkpoints know no world size: saved on some ranks under a plan, loaded on others, or in one process."""

import copy
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F

import descompiler as des
from descompiler.module.checkpoint import BEFORE, SAVING, whole_at
from descompiler.module.checksums import CHECKSUMS
from tests.harness.cases import cases
from tests.harness.failures import raised

IDS = torch.randint(63, (12, 4), generator=torch.Generator().manual_seed(1))
LABELS = torch.randn(12, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1, eps=0.01),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, eps=0.01),
    "FTRL": lambda p: des.optim.FTRL(p, 0.1, l1=0.02, l2=0.1),
}


class Model(nn.Module):
    """A table, a norm with buffers, a layer under two names."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item, self.user = nn.Embedding(63, 8, sparse=sparse), nn.Embedding(5, 8)
        self.norm, self.first = nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.second, self.top = self.first, nn.Linear(8, 1)

    def forward(self, ids):
        x = self.norm(self.item(ids).mean(1) + self.user(ids[:, 0] % 5))
        return self.top(self.second(torch.tanh(self.first(x))))


ROW_WISE = "row-wise Adagrad, fused"


class RowWise(torch.optim.Optimizer):
    """Adagrad with one number for each row, in one process."""

    def __init__(self, parameters, lr=0.1, eps=0.01):
        super().__init__(parameters, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                g, state = p.grad.to_dense(), self.state[p]
                state["step"] = state.get("step", torch.zeros(())) + 1
                state["sum"] = state.get("sum", 0) + g.square().mean(1, keepdim=True)
                p.sub_(group["lr"] * g / (state["sum"].sqrt() + group["eps"]))


def optimizers_of(net, name):
    """Of a compiled module, or of the original; the last is row-wise for one table, fused where it is divided."""
    if name != ROW_WISE:
        return [OPTIMIZERS[name](net.parameters())]
    rest = OPTIMIZERS["SGD"]([p for p in net.parameters() if p is not net.item.weight])
    if type(net) is Model and "_descompiler" not in vars(net):
        return [RowWise([net.item.weight]), rest]
    return [des.fuse_optimizer(net, torch.optim.Adagrad, row_wise=True, lr=0.1, eps=0.01), rest]


def train(net, optimizers, rows, steps=3):
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    for _ in range(steps):
        for o in optimizers:
            o.zero_grad()
        F.mse_loss(net(IDS[rows]), LABELS[rows], reduction="sum").backward()
        for o in optimizers:
            o.step()


def own(rank, ranks):
    bounds = [12 * r * r // (ranks * ranks) for r in range(ranks + 1)]  # batches of other sizes
    return slice(bounds[rank], bounds[rank + 1])


def compiled(form, optimizer, in_place=False):
    torch.set_default_dtype(torch.float64)
    model = Model(sparse=optimizer == ROW_WISE)
    module = des.compile(model, (IDS,), plan={"item": form}, loss="sum", in_place=in_place)
    found = optimizers_of(module, optimizer)
    return module, found if len(found) > 1 else found[0]


def _save(rank, ranks, path, form, optimizer, in_place):
    module, o = compiled(form, optimizer, in_place)
    train(module, o, own(rank, ranks))
    des.save(module, o, path, step=3, note="after three", loss=torch.tensor(0.5))


def _load(rank, ranks, path, form, optimizer, in_place):
    module, o = compiled(form, optimizer, in_place)
    values = des.load(module, o, path)
    train(module, o, own(rank, ranks))
    return values, des.full_state_dict(module)


@pytest.fixture(scope="module")
def expected():
    """Weights of one process after six steps."""
    torch.set_default_dtype(torch.float64)
    try:
        result = {}
        for name in (*OPTIMIZERS, ROW_WISE):
            model = Model()
            train(model, optimizers_of(model, name), slice(12), 6)
            result[name] = model.state_dict()
        return result
    finally:
        torch.set_default_dtype(torch.float32)


def differences(state, expected):
    return max(float((state[n] - x).abs().max()) for n, x in expected.items())


def in_one_process(path, optimizer, tmp_path):
    """The original, by `des.load`, and from the checkpoint as torch converts it to one file."""
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)["app"]
    torch.set_default_dtype(torch.float64)
    try:
        states = []
        for how in ("des.load", "one file"):
            model = Model()
            found = optimizers_of(model, optimizer)
            if how == "des.load":
                assert des.load(model, found, path)["step"] == 3
            else:
                for i, o in enumerate(found):
                    state = whole["optimizers"][str(i)]
                    set_state_dict(model, o, model_state_dict=whole["module"], optim_state_dict=state)
            train(model, found, slice(12))
            states.append(model.state_dict())
        return states
    finally:
        torch.set_default_dtype(torch.float32)


WORLDS = [
    (ranks, "unique_rows" if (form, optimizer) == ("column_wise", ROW_WISE) else form, to, other, optimizer, in_place)
    for optimizer in (*OPTIMIZERS, ROW_WISE)
    for ranks, form, in_place in ((1, "replicate", False), (2, "row_wise", False), (4, "column_wise", True))
    for to, other in ((1, "row_wise"), (2, "hot_rows"), (4, "table_wise"))
]
WORLDS_ALWAYS = [
    (2, "row_wise", 4, "table_wise", "Adam", False),
    (4, "column_wise", 2, "hot_rows", "Adagrad", True),
    (1, "replicate", 2, "hot_rows", "SGD", False),
    (2, "row_wise", 1, "row_wise", "FTRL", False),
    (2, "row_wise", 4, "table_wise", ROW_WISE, False),
]


@pytest.mark.long(but=1)
@pytest.mark.parametrize(("ranks", "form", "to", "other", "optimizer", "in_place"), cases(WORLDS, WORLDS_ALWAYS))
def test_training_goes_on_in_another_world(
    ranks, form, to, other, optimizer, in_place, expected, on_ranks, tmp_path, record_property
):
    path, found = tmp_path / "checkpoint", []
    on_ranks(_save, ranks, path, form, optimizer, in_place)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["checkpoint"]
    for values, state in on_ranks(_load, to, path, other, optimizer, in_place):
        assert values.pop("loss") == 0.5 and values == {"step": 3, "note": "after three"}
        found.append(differences(state, expected[optimizer]))
    found += [differences(state, expected[optimizer]) for state in in_one_process(path, optimizer, tmp_path)]
    record_property("difference", max(found))  # pytest --junitxml
    assert max(found) < 1e-10


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item, self.a, self.b = nn.Embedding(63, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, ids):
        x = self.item(ids).mean(1)
        return self.a(x), self.b(x)


def _late_tower(rank, ranks, path):
    """One tower is trained from the fourth step on; the weights, and those of one process that did not stop."""
    torch.set_default_dtype(torch.float64)

    def steps(net, optimizer, rows, first, last):
        for i in range(first, last):
            optimizer.zero_grad()
            net(IDS[rows])[i >= 3].pow(2).sum().backward()
            optimizer.step()

    make = OPTIMIZERS["Adam"]
    reference, module = Towers(), des.compile(Towers(), (IDS,), plan={"item": "row_wise"}, loss="sum")
    steps(reference, make(reference.parameters()), slice(12), 0, 6)
    optimizer = make(module.parameters())
    steps(module, optimizer, own(rank, ranks), 0, 3)
    des.save(module, optimizer, path)
    fresh = des.compile(Towers(), (IDS,), plan={"item": "column_wise"}, loss="sum")
    optimizer = make(fresh.parameters())
    des.load(fresh, optimizer, path)
    steps(fresh, optimizer, own(rank, ranks), 3, 6)
    return differences(des.full_state_dict(fresh), reference.state_dict())


def test_what_had_no_gradient_yet_has_no_state(on_ranks, tmp_path):
    assert max(on_ranks(_late_tower, 2, tmp_path / "checkpoint")) < 1e-10


def _by_torch(rank, ranks, path, asynchronous):
    """Users' own code: `dcp.save` of states, and of a `TrainingState`; each rank's difference when it goes on."""
    module, o = compiled("row_wise", "Adam")
    train(module, o, own(rank, ranks))
    model_state, optimizer_state = get_state_dict(module, o)
    states = {"m": model_state, "o": optimizer_state, "plain": module.state_dict()}
    if asynchronous:
        dcp.async_save({**states, "app": des.TrainingState(module, o)}, checkpoint_id=path).result()
    else:
        dcp.save({**states, "app": des.TrainingState(module, o)}, checkpoint_id=path)
    train(module, o, own(rank, ranks))
    wanted, worst = des.full_state_dict(module), []
    for how in ("states", "plain", "app"):
        fresh, p = compiled("column_wise", "Adam")
        if how == "app":
            dcp.load({"app": des.TrainingState(fresh, p)}, checkpoint_id=path)
        else:
            a, b = get_state_dict(fresh, p)
            read = {"m": a, "o": b} if how == "states" else {"plain": fresh.state_dict(), "o": b}
            dcp.load(read, checkpoint_id=path)
            fresh.load_state_dict(read["m" if how == "states" else "plain"])
            set_state_dict(fresh, p, model_state_dict=a, optim_state_dict=read["o"])
            fresh.load_state_dict(read["m" if how == "states" else "plain"])
        train(fresh, p, own(rank, ranks))
        worst.append(differences(des.full_state_dict(fresh), wanted))
    return worst


@pytest.mark.long(but=1)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_users_do_with_torch_distributed_checkpoint(asynchronous, on_ranks, tmp_path):
    for worst in on_ranks(_by_torch, 2, tmp_path, asynchronous):
        assert max(worst) < 1e-10


def _bad(rank, ranks, folder):
    module, o = compiled("row_wise", "Adam")
    des.save(module, None, folder / "weights")
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "thesis.txt").write_text("not to be replaced")
    torch.distributed.barrier()
    return [
        raised(lambda: des.load(module, o, folder / "nothing")),
        raised(lambda: des.load(module, o, folder / "weights")),
        raised(lambda: des.save(module, o, folder / "other")),
        raised(lambda: des.load(des.compile(nn.Linear(4, 1), (IDS.double(),)), None, folder / "weights")),
    ]


def test_what_is_no_checkpoint_is_refused_on_every_rank(on_ranks, tmp_path):
    for nothing, weights, other, model in on_ranks(_bad, 2, tmp_path):
        assert "nothing is no checkpoint: it holds no .metadata" in nothing
        assert "is no checkpoint of this model and these optimisers: " in weights and "Missing key" in weights
        assert "other is no checkpoint, and not empty" in other
        assert "is no checkpoint of this model and these optimisers: " in model
    assert (tmp_path / "other" / "thesis.txt").exists()


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


IN_TORCH = b"torch.distributed.checkpoint.metadata"
INDICES = {  # pickles that make a directory
    "a function": pickle.dumps(Runs()),
    "what torch's module imports": b"\x80\x04\x8c\x25" + IN_TORCH + b"\x8c\x08os.mkdir\x93\x8c\x03ran\x85R.",
    "a module of a dtype's name": b"cruns\nfloat32\n.",
}


@pytest.mark.parametrize("what", [*INDICES, "values"])
def test_a_checkpoint_runs_no_code(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "runs.py").write_text("import os; os.mkdir('ran'); float32 = 0")
    module = des.compile(Model(), (IDS,))
    if what == "values":
        dcp.save({"app": des.TrainingState(module, None, {"step": Runs()})}, checkpoint_id="c")
    else:
        des.save(module, None, "c")
        (tmp_path / "c" / CHECKSUMS).unlink()
        (tmp_path / "c" / ".metadata").write_bytes(INDICES[what])
    with pytest.raises(des.InputError, match="asks "):
        des.load(module, None, "c")
    assert not (tmp_path / "ran").exists()


def test_what_a_checkpoint_can_not_hold_is_refused(tmp_path):
    with pytest.raises(des.InputError, match="history is a list: a checkpoint holds numbers, strings and tensors"):
        des.save(des.compile(Model(), (IDS,)), None, tmp_path / "c", history=[1, 2])


def test_a_checkpoint_that_is_being_replaced_is_found(tmp_path):
    """At each moment of `save` the new one, or the one before, is whole."""
    module = des.compile(Model(), (IDS,))
    path = tmp_path / "checkpoint"
    des.save(module, None, path, step=1)
    shutil.move(path, path.with_name(path.name + BEFORE))  # killed between two renames
    assert des.load(module, None, path)["step"] == 1
    (path.with_name(path.name + SAVING)).mkdir()  # and, the time after, while it wrote
    des.save(module, None, path, step=2)
    assert des.load(module, None, path)["step"] == 2 and whole_at(path) == path
    assert sorted(x.name for x in tmp_path.iterdir()) == ["checkpoint"]


SAVES = """
    import sys, torch, descompiler as des
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(200_000, 16), torch.nn.Linear(16, 1))
    module = des.compile(model, (torch.zeros(4, 2, dtype=torch.int64),))
    for step in range(1000):
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(step)
        des.save(module, None, sys.argv[1], step=step)
        print(step, flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("kills", cases([2, 50], [2]))
def test_the_checkpoint_before_survives_a_kill(kills, tmp_path, draws):
    module = des.compile(
        nn.Sequential(nn.EmbeddingBag(200_000, 16), nn.Linear(16, 1)), (torch.zeros(4, 2, dtype=torch.int64),)
    )
    path, environment = tmp_path / "checkpoint", {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(kills):
        command = [sys.executable, "-c", textwrap.dedent(SAVES), str(path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()  # the first is there
            time.sleep(draws.random())
            process.send_signal(signal.SIGKILL)
        step = des.load(module, None, path)["step"]
        assert all(bool((p == step).all()) for p in module.parameters())


class Larger(Model):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(1, 1)


def _load_damaged(rank, ranks, folder, names):
    """What loading each says, and whether what it loaded without an error is all that was saved."""
    module, o = compiled("row_wise", "Adam")
    fresh = Model().state_dict()
    des.load(module, o, folder / "good")
    good, moments = des.full_state_dict(module), [x.clone() for x in map(des.local_tensor, _moments(o))]
    found = []
    for name in names:
        des.load_full_state_dict(module, {n: x.clone() for n, x in fresh.items()})
        with torch.no_grad():
            for x in _moments(o):
                x.fill_(7.0)
        try:
            des.load(module, o, folder / name)
            text = ""
        except des.DescompilerError as error:
            text = str(error)
        except Exception as error:
            text = f"unnamed {type(error).__name__}: {error}"
        if not text:
            now = des.full_state_dict(module)
            same = all(torch.equal(now[n], x) for n, x in good.items())
            same &= all(torch.equal(x, y) for x, y in zip(map(des.local_tensor, _moments(o)), moments, strict=True))
            text = "" if same else "unlike what was saved"
        found.append(text)
    return found


def _moments(optimizer):
    return [x for state in optimizer.state.values() for x in (state["exp_avg"], state["exp_avg_sq"])]


def damage(path, draws, *, of_values=False):
    """Damage a checkpoint, or its values and no size; what was done."""
    files = sorted(path.iterdir())
    file, kind = draws.choice(files), draws.choice(["cut", "flip", "flips", "zeros", "missing", "swap", "append"])
    if of_values:
        file, kind = path / "__1_0.distcp", "flips"
    data = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind == "swap":
        other = draws.choice([x for x in files if x != file])
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    else:
        place = draws.randrange(len(data))
        if kind == "cut":
            data = data[:place]
        elif kind == "append":
            data += draws.randbytes(10)
        elif kind == "zeros":
            data[place : place + 64] = bytes(len(data[place : place + 64]))
        else:
            for _ in range(1 if kind == "flip" else 20):
                data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        file.write_bytes(data)
    return f"{kind} {file.name}"


@pytest.mark.long(but=1)
@pytest.mark.parametrize("count", cases([10, 200], [10]))
@pytest.mark.parametrize("summed", [True, False])
def test_a_damaged_checkpoint_is_refused_on_every_rank(count, summed, on_ranks, tmp_path, draws):
    """Or is loaded as it was; without checksums, as torch's own, what is cut short or missing."""
    path = tmp_path / "good"
    on_ranks(_save, 2, path, "row_wise", "Adam", False)
    names, done = ["empty", "other", "larger"], {}
    (tmp_path / "empty").mkdir()
    des.save(des.compile(nn.Linear(8, 1), (torch.ones(2, 8),)), None, tmp_path / "other")
    torch.set_default_dtype(torch.float64)
    larger = Larger()
    optimizer = OPTIMIZERS["Adam"](larger.parameters())
    torch.set_default_dtype(torch.float32)
    des.save(larger, optimizer, tmp_path / "larger")
    for i in range(count):
        target = tmp_path / f"{i}"
        shutil.copytree(path, target)
        if not summed:
            (target / CHECKSUMS).unlink()
        names.append(target.name)
        done[target.name] = damage(target, draws, of_values=not i)
    for found in on_ranks(_load_damaged, 2, tmp_path, names, timeout_s=280.0):
        said = dict(zip(names, found, strict=True))
        refused = {n: said.pop(n) for n in ("empty", "other", "larger")}
        assert "holds no .metadata" in refused["empty"] and "is no checkpoint of this model" in refused["other"]
        assert "it has module.extra.bias, module.extra.weight beside" in refused["larger"]
        wrong = {done[n]: text for n, text in said.items() if text.startswith("un")}
        if not summed:  # nobody knows what was there
            wrong = {n: t for n, t in wrong.items() if n.startswith(("cut", "missing")) or t.startswith("unnamed")}
        assert not wrong, wrong


def _other_rank_fails(rank, ranks, path):
    """What is said where one rank finds no checkpoint."""
    module, o = compiled("row_wise", "Adam")
    return raised(lambda: des.load(module, o, path if rank else path / "nowhere"))


def test_no_rank_waits_for_one_that_finds_no_checkpoint(on_ranks, tmp_path):
    on_ranks(_save, 2, tmp_path / "c", "row_wise", "Adam", False)
    first, second = on_ranks(_other_rank_fails, 2, tmp_path / "c")
    assert "nowhere is no checkpoint" in first and second.startswith("RankError") and "rank 0" in second


def _single(rank, ranks, form, in_place):
    module, o = compiled(form, "Adam", in_place)
    module.train()
    train(module, o, own(rank, ranks))
    copied = copy.deepcopy(module) if not in_place else module
    single, state = [des.to_single(x) for x in (module, copied)], des.full_state_dict(module)
    with torch.no_grad():
        predicted = des.gather_rows(module, module(IDS[own(rank, ranks)])[:, 0])
        masks = des.gather_rows(module, predicted[own(rank, ranks)] > 0)
    wrong = raised(lambda: des.gather_rows(module, torch.zeros(3, 1 + rank)))
    return single, predicted, masks, wrong, state


@pytest.mark.parametrize(("form", "in_place"), [("row_wise", False), ("column_wise", True)])
def test_the_way_back(form, in_place, on_ranks):
    (single, *of_first), ((no, none), *of_second) = on_ranks(_single, 2, form, in_place)
    assert no is none is None
    for model in single:
        assert type(model) is Model and model.first is model.second and model.training
        state = model.state_dict()
        assert state.keys() == of_first[-1].keys()
        assert all(torch.equal(x, of_first[-1][n]) for n, x in state.items())
    with torch.no_grad():
        expected = single[0](IDS)[:, 0]
    for predicted, masks, wrong, _ in (of_first, of_second):
        torch.testing.assert_close(predicted, expected)
        assert torch.equal(masks, predicted > 0) and "ranks have tensors of [3, 1]" in wrong


def test_a_byte_of_a_weight_that_has_changed_is_seen(tmp_path):
    """Everything can be read, and every file is as long as it was."""
    model, path = nn.Linear(1000, 50), tmp_path / "saved"
    des.save(model, None, path)
    file = max(path.glob("__*"), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before = model.weight.detach().clone()
    with pytest.raises(des.InputError, match="is not as it was saved"):
        des.load(model, None, path)
    assert torch.equal(model.weight, before)

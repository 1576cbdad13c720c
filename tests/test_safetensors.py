"""Safetensors files: weights under the original's names, written and read without the whole on any rank."""

import json
import resource
import sys

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import descompiler as des
from tests.harness.cases import cases
from tests.harness.failures import raised

IDS = torch.randint(63, (12, 4), generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """Tables, one of many columns; a norm with buffers, a number, a layer under two names, several dtypes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.item, self.user = nn.Embedding(63, 8), nn.Embedding(5, 8)
        self.norm, self.first = nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.second, self.top, self.scale = self.first, nn.Linear(8, 1).double(), nn.Parameter(torch.rand(()))
        self.register_buffer("mask", torch.rand(3) > 0.5)

    def forward(self, ids):
        x = self.norm(self.item(ids).mean(1) + self.user(ids[:, 0] % 5)) * self.scale
        return self.top(self.second(torch.tanh(self.first(x))).double())


FORMS = ("row_wise", "column_wise", "hot_rows", "table_wise", "unique_rows", "replicate")


def compiled(form, in_place=False, seed=0):
    return des.compile(Model(seed), (IDS,), plan={"item": form}, in_place=in_place)


def _round(rank, ranks, form, path, in_place):
    """What was saved is as torch's; what the original saves, also with one of two names, is loaded. Small blocks."""
    from descompiler.module import safetensors as module_of_files

    module_of_files.BLOCK_ELEMENTS = 24  # three rows of the table
    module = compiled(form, in_place)
    whole = des.full_state_dict(module)
    des.save_safetensors(module, path, metadata={"epoch": "3"})
    found = []
    for name, seed in (("all", 1), ("once", 2)):
        other, file = Model(seed), path.with_name(f"{name}.safetensors")
        if rank == 0:
            state = {n: x.clone() for n, x in other.state_dict().items()}
            save_file(state, file) if name == "all" else save_model(other, file)
        torch.distributed.barrier()
        des.load_safetensors(module, file)
        now = des.full_state_dict(module)
        found.append(all(torch.equal(now[n], x) for n, x in other.state_dict().items()))
    return whole, found


@pytest.mark.parametrize(
    ("form", "in_place"), cases([(f, f == "column_wise") for f in FORMS], [(f, f == "column_wise") for f in FORMS[:3]])
)
def test_a_file_is_as_those_of_the_original(form, in_place, on_ranks, tmp_path):
    path = tmp_path / "model.safetensors"
    for whole, found in on_ranks(_round, 2, form, path, in_place):
        assert found == [True, True]
        state = load_file(path)
        assert state.keys() == whole.keys()
        assert all(torch.equal(x, whole[n]) and x.dtype == whole[n].dtype for n, x in state.items())
    original = Model(5)
    original.load_state_dict(state)
    assert torch.equal(original.item.weight, whole["item.weight"])
    assert sorted(x.name for x in tmp_path.iterdir()) == ["all.safetensors", "model.safetensors", "once.safetensors"]


def _read(rank, ranks, form, path):
    module = compiled(form, seed=1)
    des.load_safetensors(module, path)
    return des.full_state_dict(module)


@pytest.mark.long
def test_a_file_knows_no_number_of_ranks(on_ranks, tmp_path):
    path = tmp_path / "model.safetensors"
    whole, _ = on_ranks(_round, 2, "row_wise", path, False)[0]
    module = compiled("replicate", seed=3)  # one process
    des.load_safetensors(module, path)
    for state in (*on_ranks(_read, 3, "column_wise", path), module.state_dict()):
        assert all(torch.equal(x, whole[n]) for n, x in state.items())
    des.save_safetensors(module, path)
    assert all(torch.equal(x, whole[n]) for n, x in load_file(path).items())


def test_several_files_are_found_by_their_index(tmp_path):
    model = Model(4)
    state = {n: x.clone() for n, x in model.state_dict().items()}
    files = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(state)}
    for file in set(files.values()):
        save_file({n: x for n, x in state.items() if files[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    module = compiled("replicate")
    des.load_safetensors(module, index)
    assert all(torch.equal(x, module.state_dict()[n]) for n, x in state.items())
    index.write_text(json.dumps({"weight_map": {n: f for n, f in files.items() if n != "mask"}}))
    with pytest.raises(des.InputError, match="differ in mask"):
        des.load_safetensors(module, index)
    for text in ("[]", "{", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(des.InputError, match="is no index of safetensors files"):
            des.load_safetensors(module, index)


def _bad(rank, ranks, folder):
    module = compiled("row_wise")
    before = des.full_state_dict(module)
    good, names = folder / "good.safetensors", ("short", "long", "header", "shape", "lacks", "more", "empty")
    des.save_safetensors(module, good)
    if rank == 0:
        data, state = good.read_bytes(), load_file(good)
        (folder / "short").write_bytes(data[:-5])
        (folder / "long").write_bytes(data + b"12345")
        (folder / "header").write_bytes(data[:8] + b"!" + data[9:])
        (folder / "empty").write_bytes(b"")
        save_file(state | {"item.weight": torch.ones(62, 8)}, folder / "shape")
        lacks = ("mask", "first.weight", "second.weight")
        save_file({n: x for n, x in state.items() if n not in lacks}, folder / "lacks")
        save_file(state | {"stranger": torch.ones(1)}, folder / "more")
    torch.distributed.barrier()
    said = {n: raised(lambda n=n: des.load_safetensors(module, folder / n)) for n in (*names, "nothing")}
    mine = good if rank == 0 else folder / "more"
    said["others"] = raised(lambda: des.load_safetensors(module, mine))
    said["folder"] = raised(lambda: des.save_safetensors(module, folder))
    said["metadata"] = raised(lambda: des.save_safetensors(module, good, metadata={"epoch": 3}))
    now = des.full_state_dict(module)
    return said, all(torch.equal(now[n], x) for n, x in before.items())


def test_bad_files_are_refused_on_every_rank(on_ranks, tmp_path):
    for rank, (said, same) in enumerate(on_ranks(_bad, 2, tmp_path)):
        assert same
        for name in ("short", "long", "header", "empty"):
            assert f"{name} is no safetensors file that can be read" in said[name], said[name]
        assert "nothing" in said["nothing"] and "can be read" in said["nothing"]
        assert "'item.weight' has shape (62, 8)" in said["shape"] and "the model's is (63, 8)" in said["shape"]
        assert "missing ['first.weight', 'mask', 'second.weight'], unexpected []" in said["lacks"]
        assert "missing [], unexpected ['stranger']" in said["more"]
        assert "unexpected ['stranger']" in said["others"] or (rank == 0 and said["others"].startswith("RankError"))
        assert "is a directory: give the name of a file" in said["folder"]
        assert "metadata of a safetensors file is text, and 'epoch' is 3" in said["metadata"]


def _other_files(rank, ranks, folder):
    module = compiled("row_wise")
    file = folder / f"{rank}.safetensors"
    save_file({n: x.clone() for n, x in Model(rank).state_dict().items()}, file)
    return raised(lambda: des.load_safetensors(module, file))


def test_ranks_that_read_other_files_are_told(on_ranks, tmp_path):
    for text in on_ranks(_other_files, 2, tmp_path):
        assert "ranks load different safetensors files" in text


def _full(rank, ranks, path):
    """A disk that is full in the middle of a file: what was there stays, and no rank waits."""
    module = compiled("row_wise")
    des.save_safetensors(module, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        text = raised(lambda: des.save_safetensors(module, path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    des.load_safetensors(module, path)
    return text


def test_a_full_disk_leaves_the_file_before(on_ranks, tmp_path):
    for text in on_ranks(_full, 2, tmp_path / "model.safetensors"):
        assert "model.safetensors was not written: File too large" in text
    assert [x.name for x in tmp_path.iterdir()] == ["model.safetensors"]


class Odd(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.item, self.odd = nn.Embedding(63, 8), nn.Buffer(x)

    def forward(self, ids):
        return self.item(ids).sum(1)


@pytest.mark.parametrize("kind", ["sparse", "complex128"])
def test_what_the_format_can_not_hold_is_refused(kind, tmp_path):
    x = torch.eye(3).to_sparse() if kind == "sparse" else torch.ones(2, dtype=torch.complex128)
    with pytest.raises(des.InputError, match=r"'odd' is .*: a safetensors file can't hold that; use des\.save"):
        des.save_safetensors(des.compile(Odd(x), (IDS,)), tmp_path / "file")


def test_small_dtypes_are_written_as_they_are(tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int16, torch.uint8, torch.complex64):
        x = torch.arange(5).to(dtype)
        module = des.compile(Odd(x), (IDS,))
        des.save_safetensors(module, tmp_path / "file")
        load_model(other := Odd(torch.zeros_like(x)), tmp_path / "file")
        assert torch.equal(other.odd.view(torch.uint8), x.view(torch.uint8)) and other.odd.dtype == dtype
        assert torch.equal(other.item.weight, module.item.weight)


def test_who_lacks_the_library_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(des.UnsupportedError, match=r"pip install descompiler\[safetensors\]"):
        des.load_safetensors(compiled("replicate"), tmp_path / "file")

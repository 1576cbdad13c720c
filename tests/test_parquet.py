"""Parquet files, read by columns: batches are those of the whole file, and a rank reads the ids of its tables alone."""

import sys

import pytest
import torch

import descompiler as des
from examples.models import MODELS

SIZES, ROWS, BATCH = [50, 31, 7, 40], 23, 10
DENSE, C = [f"I{i}" for i in range(3)], [f"C{i}" for i in range(len(SIZES))]


def _model():
    torch.manual_seed(0)
    return MODELS["deepfm"]("fields", vocab_sizes=SIZES, dim=4).double()


def _data():
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randint(n, (ROWS,), generator=generator) for n in SIZES], 1)
    return torch.randn(ROWS, 3, generator=generator), ids, torch.randint(2, (ROWS, 1), generator=generator)


@pytest.fixture
def file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (descompiler[parquet])")
    import pyarrow.parquet as parquet

    dense, ids, labels = _data()
    columns = {name: x.numpy() for name, x in zip([*DENSE, *C, "y"], torch.cat([dense, ids, labels], 1).T, strict=True)}
    columns = {n: x.astype("float32" if n in DENSE else "int32") for n, x in columns.items()}
    parquet.write_table(pyarrow.table(columns), tmp_path / "clicks.parquet", row_group_size=7)
    return tmp_path / "clicks.parquet"


def trained(rank, ranks, path, form, whose):
    dense, ids, labels = _data()
    model = _model()
    module = des.compile(_model(), (dense.double(), ids), plan={"*": form}, ids=whose, loss="sum")
    loader = des.ParquetColumns(path, module, ids=C, dense=DENSE, labels=["y"], batch=BATCH)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, module)]
    for first, (x, given, y) in zip(range(0, ROWS, BATCH), loader, strict=True):
        stop = min(first + BATCH, ROWS)
        (module(x.double(), given) - y.squeeze(1)).square().sum().backward()
        (model(dense[first:stop].double(), ids[first:stop]) - labels[first:stop, 0]).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = des.full_state_dict(module)
    assert all(torch.allclose(w, weights[n], rtol=1e-10, atol=1e-12) for n, w in model.state_dict().items())
    return loader.read_ids


@pytest.mark.long(but=1)
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("form, whose", [("table_wise", "global"), ("row_wise", "global"), ("row_wise", "own")])
def test_batches_are_the_files(form, whose, ranks, file, on_ranks):
    read = on_ranks(trained, ranks, str(file), form, whose)
    if (form, whose, ranks) == ("table_wise", "global", 3):
        assert sorted(c for of in read for c in of) == C and all(read)  # each by its table's owner alone
    else:
        assert all(of == C for of in read)


def test_what_is_refused(file, monkeypatch):
    module = des.compile(_model(), (_data()[0].double(), _data()[1]))
    with pytest.raises(des.InputError, match="no column 'C9'"):
        des.ParquetColumns(file, module, ids=[*C, "C9"], batch=4)
    with pytest.raises(des.InputError, match="from 1 on"):
        des.ParquetColumns(file, module, ids=C, batch=0)


def test_nulls_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (descompiler[parquet])")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"C0": [1, None, 2]}), tmp_path / "nulls.parquet")
    module = des.compile(_model(), (_data()[0].double(), _data()[1]))
    with pytest.raises(des.InputError, match="'C0' has nulls"):
        next(iter(des.ParquetColumns(tmp_path / "nulls.parquet", module, ids=["C0"], batch=4)))


def test_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    module = des.compile(_model(), (_data()[0].double(), _data()[1]))
    with pytest.raises(des.InputError, match=r"pip install descompiler\[parquet\]"):
        des.ParquetColumns("none.parquet", module, ids=C, batch=4)

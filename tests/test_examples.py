"""The examples: their models, their data, and the training script on two real ranks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import data, models
from examples.data import ClickLog, DataError
from tests.harness.cases import cases

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"

MODEL_LAYOUTS = [(name, layout) for name in models.MODELS for layout in models.LAYOUTS]


def real(name: str) -> Path:
    """A folder of real data, which is no part of the project; the test is skipped where it is absent."""
    path = REAL / name
    if not path.is_dir():
        pytest.skip(f"no real data: {name}/ is not in ../shared/data beside the checkout")
    return path


# --- models


@pytest.mark.parametrize(("name", "layout"), MODEL_LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"mode": "mean"}], ids=str)
def test_forward_and_backward(name, layout, options):
    model = models.MODELS[name](layout, **options)
    for batch in (0, 1, 7):
        model.zero_grad()
        out = model(*models.make_inputs(name, layout, batch))
        assert out.shape == (batch,)
        out.sum().backward()
        gradients = {n: p.grad.to_dense() for n, p in model.named_parameters()}
        assert all(g.isfinite().all() for g in gradients.values())
        assert any(g.any() for g in gradients.values()) == (batch > 0)


@pytest.mark.parametrize(("name", "layout"), cases(MODEL_LAYOUTS, MODEL_LAYOUTS[::2]))
def test_export_with_dynamic_batch_reproduces_eager(name, layout):
    torch.manual_seed(0)
    model = models.MODELS[name](layout)
    inputs = models.make_inputs(name, layout)
    dim = torch.export.Dim("batch")
    exported = torch.export.export(model, inputs, dynamic_shapes=tuple({0: dim} for _ in inputs), strict=False).module()
    for batch in (0, 1, 7, 8):
        other = models.make_inputs(name, layout, batch, seed=1)
        torch.testing.assert_close(exported(*other), model(*other))


@pytest.mark.parametrize(("name", "layout"), MODEL_LAYOUTS)
def test_created_on_meta_then_initialised(name, layout):
    with torch.device("meta"):
        model = models.MODELS[name](layout)
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())  # their values could not be drawn again
    expected = {n: b.clone() for n, b in model.named_buffers()}

    model.to_empty(device="cpu")
    for t in model.state_dict().values():
        t.fill_(99)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not any((p == 99).any() for p in model.parameters())
    for n, b in model.named_buffers():
        assert torch.equal(b, expected[n])
    assert model(*models.make_inputs(name, layout)).isfinite().all()


@pytest.mark.parametrize("name", [n for n in models.MODELS if n not in ("lr", "fm")])
@pytest.mark.parametrize("layout", models.LAYOUTS)
def test_dropout_and_batch_norm(name, layout):
    model = models.MODELS[name](layout, dropout=0.5, batch_norm=True)
    kinds = {type(m) for m in model.modules()}
    assert {torch.nn.Dropout, torch.nn.BatchNorm1d} <= kinds
    inputs = models.make_inputs(name, layout)
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    torch.testing.assert_close(model(*inputs), model(*inputs))
    assert model(*models.make_inputs(name, layout, batch=0)).shape == (0,)


@pytest.mark.parametrize("name", models.MODELS)
def test_layouts_agree(name):
    """The same weights give the same logits whether tables are separate, joined, or bags of one id."""
    torch.manual_seed(0)
    fields = models.MODELS[name]("fields").double()
    offsets = models.MODELS[name]("offsets").double()
    bags = models.MODELS[name]("bags").double()
    bags.load_state_dict(fields.state_dict())

    # In both layouts modules come in the same order, and within a module its tables in the order of the fields.
    separate = dict(fields.named_parameters())
    for prefix, module in offsets.named_modules():
        if isinstance(module, models.Offset):
            owner = prefix.removesuffix(".both")
            tables = [p for n, p in separate.items() if n.startswith(f"{owner}.")]
            with torch.no_grad():
                module.table.weight.copy_(torch.cat(tables))
        else:
            for n, p in module.named_parameters(prefix, recurse=False):
                if n in separate:
                    p.data.copy_(separate[n])

    inputs = [x.double() if x.is_floating_point() else x for x in models.make_inputs(name)]
    expected = fields(*inputs)
    torch.testing.assert_close(offsets(*inputs), expected)
    one_id = [x if x.is_floating_point() else x.unsqueeze(-1) for x in inputs]
    torch.testing.assert_close(bags(*one_id), expected)


def test_fm_interaction_is_the_sum_over_pairs():
    v = torch.randn(5, 4, 3, dtype=torch.float64)
    pairs = sum((v[:, i] * v[:, j]).sum(1) for i in range(4) for j in range(i))
    torch.testing.assert_close(models.fm_interaction(v).squeeze(1), pairs)


@pytest.mark.parametrize("name", models.CTR_MODELS)
def test_models_without_dense_features(name):
    model = models.MODELS[name](n_dense=0)
    _, sparse = models.make_inputs(name)
    assert model(torch.empty(8, 0), sparse).shape == (8,)


@pytest.mark.parametrize(("name", "layout"), MODEL_LAYOUTS)
def test_inputs_repeat_ids(name, layout):
    for x, again in zip(models.make_inputs(name, layout), models.make_inputs(name, layout), strict=True):
        assert torch.equal(x, again)
        if not x.is_floating_point():
            assert torch.equal(x[0], x[-1])


def test_options_and_names_are_checked():
    with pytest.raises(TypeError, match="no option widht"):
        models.MODELS["fm"](widht=3)
    with pytest.raises(ValueError, match="layout must be one of"):
        models.MODELS["neumf"]("rows")
    with pytest.raises(ValueError, match="no model 'fmm'"):
        models.make_inputs("fmm")


def test_deepfm_criteo_needs_no_memory():
    model, (dense, sparse) = models.deepfm_criteo()
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) > 17 * 33_000_000
    assert dense.shape == (1024, 13)
    assert sparse.shape == (1024, 26)
    assert (sparse >= 0).all()
    assert (sparse < torch.tensor(models.CRITEO_CARDINALITIES)).all()
    assert models.CRITEO_CARDINALITIES == data.CRITEO_CARDINALITIES


# --- data


def numbered(rows: int) -> ClickLog:
    """A log whose rows can be told apart."""
    n = torch.arange(rows)
    return ClickLog(n.float().unsqueeze(1), n.unsqueeze(1), (n % 2).float(), (max(rows, 1),))


@given(rows=st.integers(0, 40), batch=st.integers(1, 12), world=st.integers(1, 5), shuffled=st.booleans())
@settings(deadline=None, max_examples=80)
def test_batches_cover_each_row_once(rows, batch, world, shuffled):
    log = numbered(rows)
    seed = 3 if shuffled else None
    ranks = [list(log.batches(batch, r, world, seed)) for r in range(world)]
    single = list(log.batches(batch, seed=seed))
    assert {len(r) for r in ranks} == {len(single)} == {-(-rows // batch)}
    for step, (dense, sparse, labels) in enumerate(single):
        slices = [r[step] for r in ranks]
        assert [len(s[2]) for s in slices] == data.row_counts(min(batch, rows - step * batch), world)
        for whole, parts in zip((dense, sparse, labels), zip(*slices, strict=True), strict=True):
            assert torch.equal(torch.cat(parts), whole)
    seen = torch.cat([s for _, s, _ in single]).flatten().tolist() if single else []
    assert sorted(seen) == list(range(rows))
    assert shuffled or seen == list(range(rows))


def test_split_and_shapes():
    first, rest = numbered(10).split(0.7)
    assert (len(first), len(rest)) == (7, 3)
    assert rest.sparse.flatten().tolist() == [7, 8, 9]
    with pytest.raises(ValueError, match="do not belong together"):
        ClickLog(torch.zeros(3, 1), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3), (1,))


def test_generator():
    log, again = data.synthetic_ctr(4000, seed=5), data.synthetic_ctr(4000, seed=5)
    assert torch.equal(log.labels, again.labels)
    assert torch.equal(log.sparse, again.sparse)
    assert not torch.equal(log.labels, data.synthetic_ctr(4000, seed=6).labels)
    assert (log.dense.dtype, log.sparse.dtype, log.labels.dtype) == (torch.float32, torch.int64, torch.float32)
    assert log.dense.shape == (4000, 13)
    assert log.sparse.shape == (4000, 26)
    assert (log.sparse >= 0).all()
    assert (log.sparse < torch.tensor(log.vocab_sizes)).all()
    assert 0.1 < log.labels.mean() < 0.6
    # Zipf: in the largest field a few ids have much of the rows, and most ids have none.
    counts = torch.bincount(log.sparse[:, 2], minlength=log.vocab_sizes[2]).sort(descending=True).values
    assert counts[:10].sum() > 0.2 * len(log)
    assert (counts == 0).float().mean() > 0.5


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30))
def test_auc_is_that_of_all_pairs(rows):
    labels, scores = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], dtype=float)
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]  # a tie is half a success
    value = data.auc(torch.from_numpy(labels).float(), torch.from_numpy(scores))
    if pairs:
        assert value == pytest.approx(np.mean(pairs))
    else:
        assert np.isnan(value)


def test_log_loss():
    logits, labels = torch.tensor([0.3, -2.0, 900.0]), torch.tensor([1.0, 0.0, 0.0])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert data.log_loss(labels, logits) == pytest.approx(float(expected))


def criteo_row(label="1", dense="", fields="a") -> list[str]:
    return [label, *[dense] * 13, *[fields] * 26]


CRITEO_HEADER = ["Label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]


def write(path: Path, rows: list[list[str]], separator: str = "\t") -> Path:
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    return path


def test_read_criteo_tsv(tmp_path):
    rows = [criteo_row("1", "3", "a"), criteo_row("0", "-2", ""), criteo_row("0", "", "a")]
    log = data.read_criteo(write(tmp_path / "day.tsv", rows))
    assert log.labels.tolist() == [1, 0, 0]
    assert log.sparse[:, 25].tolist() == [0, 1, 0]
    assert log.vocab_sizes == (2,) * 26
    torch.testing.assert_close(log.dense[:, 0], torch.tensor([4.0, 1.0, 1.0]).log())


def test_read_criteo_csv_finds_columns_by_name(tmp_path):
    header = ["Id", *reversed(CRITEO_HEADER)]
    rows = [header, ["7", *reversed(criteo_row("1", "3", "x"))], ["8", *reversed(criteo_row("0", "", "y"))]]
    path = write(tmp_path / "day.csv", rows, ",")
    assert data.sniff(path) == "criteo"
    log = data.read_criteo(path)
    assert log.labels.tolist() == [1, 0]
    assert log.dense[0, 0] > 1
    assert log.vocab_sizes == (2,) * 26
    assert len(data.read_criteo(path, rows=1)) == 1


def test_read_libfm(tmp_path):
    path = tmp_path / "clicks.libfm"
    path.write_text("-1 4:1 90:1\n\n1 5:1.0 90:1\n0 4:1 91:1\n")
    assert data.sniff(path) == "libfm"
    log = data.read_libfm(path)
    assert log.labels.tolist() == [0, 1, 0]
    assert log.sparse.tolist() == [[0, 0], [1, 0], [0, 1]]
    assert log.vocab_sizes == (2, 2)
    assert log.dense.shape == (3, 0)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("1 4:1 9:1\n1 4:1\n", 2, "1 fields instead of 2 as in the rows before"),
        ("1 4:1\n\n2 4:1\n", 3, "label must be 0 or 1"),
        ("1 4:1\n1 x:1\n", 2, "expected index:value, found 'x:1'"),
        ("1 4:1\n1 4:0.5\n", 2, "only one-hot fields"),
        ("1 4:1\n1 4:\n", 2, "only one-hot fields"),
        ("1 4:1\n1\n", 2, "0 fields instead of 1"),
    ],
)
def test_libfm_errors_name_file_and_line(tmp_path, text, line, message):
    path = tmp_path / "bad.libfm"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        data.load(path)
    assert str(error.value).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    ("rows", "separator", "line", "message"),
    [
        ([criteo_row(), criteo_row()[:-1]], "\t", 2, "39 columns instead of 40"),
        ([criteo_row("yes")], "\t", 1, "label must be 0 or 1"),
        ([criteo_row(), criteo_row(dense="many")], "\t", 2, "must be numbers or empty"),
        ([CRITEO_HEADER[:-2]], ",", 1, "no column c25, c26"),
        ([CRITEO_HEADER, criteo_row(), criteo_row()[:-2]], ",", 3, "38 columns instead of 40"),
        ([["some", "text"]], " ", 1, "neither Criteo"),
    ],
)
def test_criteo_errors_name_file_and_line(tmp_path, rows, separator, line, message):
    path = write(tmp_path / "bad.txt", rows, separator)
    with pytest.raises(DataError, match=message) as error:
        data.load(path)
    assert str(error.value).startswith(f"{path}:{line}: ")


def test_load_folders(tmp_path):
    libfm = {"train.libfm": "1 4:1 9:1\n0 5:1 9:1\n", "valid.libfm": "1 6:1 9:1\n", "test.libfm": "0 5:1 8:1\n"}
    for name, text in libfm.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("not data\n")
    train, valid, test = data.load(tmp_path)
    assert (len(train), len(valid), len(test)) == (2, 1, 1)
    # The same value has the same id in every file.
    assert train.vocab_sizes == valid.vocab_sizes == test.vocab_sizes == (3, 2)
    assert test.sparse[0, 0] == train.sparse[1, 0]

    (tmp_path / "test.libfm").unlink()
    train, valid, test = data.load(tmp_path)
    assert (len(train), valid, len(test)) == (2, None, 1)

    (tmp_path / "train.tsv").write_text("1\n")
    with pytest.raises(DataError, match=r"both train\.libfm and train\.tsv"):
        data.load(tmp_path)


def test_load_errors(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        data.load(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds no file whose name begins with train"):
        data.load(tmp_path)
    empty = tmp_path / "empty.tsv"
    empty.write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        data.load(empty)
    empty.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="not a text file"):
        data.load(empty)
    empty.write_text("1 4:1\n")
    with pytest.raises(DataError, match="too few rows"):
        data.load(empty)
    write(tmp_path / "train.tsv", [criteo_row()])
    (tmp_path / "test.libfm").write_text("1 4:1\n")
    with pytest.raises(DataError, match="has other columns than"):
        data.load(tmp_path)


def test_load_generates():
    train, valid, test = data.load(rows=100, fraction=0.7)
    assert (len(train), valid, len(test)) == (70, None, 30)
    assert train.vocab_sizes == test.vocab_sizes


def test_real_frappe():
    train, valid, test = data.load(real("frappe"), rows=5000)
    assert (len(train), valid, len(test)) == (5000, None, 5000)
    assert len(train.vocab_sizes) == 10
    assert train.n_dense == 0
    assert 0.2 < train.labels.mean() < 0.5


def test_real_criteo():
    train, _, test = data.load(real("criteo"))
    assert len(train) + len(test) == 1999  # and a header
    assert train.dense.shape[1] == 13
    assert len(train.vocab_sizes) == 26
    assert 0.1 < train.labels.mean() < 0.4


# --- the training script


def train_ctr(*arguments: str) -> str:
    """Run the script on two ranks; what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "train_ctr.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=270,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(280)
@pytest.mark.slow
def test_train_ctr_on_generated_rows():
    # 1,601 training rows: the last global batch has one, so that a rank has none.
    out = train_ctr("--rows", "2001", "--batch", "160", "--dim", "4")
    assert "deepfm on 2 ranks" in out
    assert "0, 1" in out
    assert "predicted == actual: yes" in out
    assert ": equivalent" in out


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_train_ctr_on_real_rows():
    out = train_ctr("--data", str(real("frappe")), "--rows", "4000", "--batch", "300", "--dim", "4", "--model", "fm")
    assert "fm on 2 ranks" in out
    assert "predicted == actual: yes" in out
    assert ": equivalent" in out


# --- rules and forms of one's own


@pytest.mark.slow  # `test_plugins` has them, in processes that are there
@pytest.mark.parametrize("script", ["custom_rule.py", "custom_form.py"])
def test_scripts_of_plug_ins_run(script):
    command = [sys.executable, ROOT / "examples" / script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    assert "largest relative errors" in done.stdout.splitlines()[-1]

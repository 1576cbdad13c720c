"""The example that trains on a stream: its clicks, AUC on any number of ranks, and exactly on after a stop."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console

from descompiler.dynamic.hashing import mix

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # where a script's imports are found

import clicks  # noqa: E402
import contest  # noqa: E402
import data  # noqa: E402
import streaming  # noqa: E402
from train_ctr import Ranks  # noqa: E402

SMALL = ["--smaller", "60", "--batch", "40", "--dim", "4", "--capacity", "64", "--every", "4", "--window", "10"]
SMALL += ["--save-every", "12"]
QUIET = Console(quiet=True)


# --- clicks


def test_a_step_is_a_function_of_seed_and_step():
    one, other = clicks.Stream(3), clicks.Stream(3)
    for step in (900, 2, 900):  # whatever was drawn before
        first, second = one.batch(step, 50), other.batch(step, 50)
        assert all(map(torch.equal, (*first.inputs, first.labels), (*second.inputs, second.labels)))
    for unlike in (clicks.Stream(4).batch(900, 50), one.batch(901, 50)):
        assert not any(map(torch.equal, unlike.inputs, second.inputs))


def test_ids_are_words_that_come_and_go():
    stream = clicks.Stream(0)
    early, later, late = (stream.batch(step, 4000).inputs for step in (0, 60, 8000))
    for kind in (0, 1):
        ids = early[kind]
        counts = ids.unique(return_counts=True)[1].sort(descending=True).values
        assert 0.45 < (ids < 0).double().mean() < 0.55 and (ids.abs() > 1 << 40).all()
        assert counts[:10].sum() > 0.05 * len(ids) and (counts == 1).sum() > 200  # few are popular, many are not
        kept = torch.isin(later[kind], ids).double().mean()
        assert 0.2 < kept < 0.9 and torch.isin(late[kind], ids).double().mean() < 0.05
    once = [stream.batch(step, 1000).inputs.users for step in range(2)]
    users = torch.cat(once)
    assert len(users.unique()) > 0.15 * len(users)


def test_clicks_follow_hidden_odds():
    batch = clicks.Stream(0).batch(5, 20_000)
    assert data.auc(batch.labels, batch.odds) > 0.8
    assert 0.2 < batch.labels.mean() < 0.4
    expected = batch.odds.sigmoid()
    high = expected > 0.6
    assert batch.labels[high].mean() == pytest.approx(float(expected[high].mean()), abs=0.03)


def test_distinct_ids_are_estimated():
    distinct = contest.Distinct()
    for first in range(0, 60_000, 3000):
        distinct.add(mix(torch.arange(first, first + 4000)))  # 1000 of them again
        if first == 0:
            assert len(distinct) == 4000
    assert len(distinct) == pytest.approx(61_000, rel=0.08)
    assert len(distinct.smallest) == contest.Distinct.KEPT


# --- both models on the stream


def trained(rank, ranks, folder, *runs):
    """Histories of runs in float64, which go on from each other: options of each, and when it is told to stop."""
    torch.set_default_dtype(torch.float64)
    histories = []
    for options, asked in runs:
        args = streaming.arguments([*SMALL, "--folder", folder, *options])
        reports = iter(range(1, 100))

        def stop(reports=reports, asked=asked):
            return asked == (rank, next(reports))

        histories.append(streaming.run(args, Ranks(rank, ranks), QUIET, stop))
    return histories


def known(history):
    """What runs have to have in common: not the room that tables and processes have."""
    return [{name: x for name, x in r.items() if name not in ("dynamic bytes", "process bytes")} for r in history]


def latest(folder):
    return json.loads((folder / "latest.json").read_text())["checkpoint"]


@pytest.fixture(scope="module")
def whole(on_ranks, tmp_path_factory):
    """24 steps on two ranks: the history, and the folder."""
    folder = tmp_path_factory.mktemp("whole")
    (history,) = on_ranks(trained, 2, str(folder), (["--steps", "24"], None))[0]
    return history, folder


def in_one_process(folder, *options):
    before = torch.get_default_dtype()
    try:
        return trained(0, 1, str(folder), ([*options, "--steps", "24"], None))[0]
    finally:
        torch.set_default_dtype(before)


def assert_alike(one, other):
    assert len(one) == len(other) == 6
    for here, there in zip(one, other, strict=True):
        for name in here:
            if "auc" in name or "loss" in name or name in ("step", "seen", "rows", "hashed bytes"):
                assert here[name] == pytest.approx(there[name], rel=1e-9), name


@pytest.mark.long
def test_a_stopped_run_goes_on_exactly(on_ranks, whole, tmp_path):
    """Told on one rank at its second report, all stop there; the next run gets to where one that was not stopped is."""
    on, alone = tmp_path / "on", tmp_path / "alone"
    for (first,) in on_ranks(trained, 2, str(on), (["--steps", "24"], (1, 2))):
        assert [r["step"] for r in first] == [4, 8]
    shutil.copytree(on, alone)
    for (second,) in on_ranks(trained, 2, str(on), (["--steps", "24"], None)):
        assert known(second) == known(whole[0])
    assert [f.name for f in on.glob("step-*")] == ["step-24"] == [latest(on)]
    assert_alike(in_one_process(alone), whole[0])


@pytest.mark.long
def test_two_ranks_are_one(whole, tmp_path):
    history, _ = whole
    one = in_one_process(tmp_path, "--hashed-rows", str(round(history[0]["hashed bytes"] / (2 * 2 * 4 * 8))))
    assert_alike(one, history)
    assert all(r["dynamic sent"] == r["pushed"] == 0 for r in one)
    assert all(r["dynamic sent"] > 0 for r in history)


def test_a_batch_is_predicted_before_it_is_trained_on():
    """The first one by weights that nobody has trained; the second by others."""
    args = streaming.arguments([*SMALL, "--every", "1", "--window", "1", "--hashed-rows", "50"])
    untrained = contest.models(args)
    stream = clicks.Stream(0).smaller(60)
    both = contest.Contest(args, Ranks(0, 1), stream)
    for _ in range(2):
        both.step()
        both.report(False)
    for step, record in enumerate(both.history):
        batch = stream.batch(step, 40)
        for name, model in untrained.items():
            loss = data.log_loss(batch.labels, model(*batch.inputs))
            assert (record[f"{name} log loss"] == pytest.approx(loss, rel=1e-6)) == (step == 0), name


@pytest.mark.long
def test_what_a_run_reports(whole):
    """By hand: what is of the stream alone."""
    history, folder = whole
    last = history[-1]
    steps = [clicks.Stream(0).smaller(60).batch(step, 40) for step in range(24)]
    labels, odds = (torch.cat([getattr(c, x) for c in steps[-10:]]) for x in ("labels", "odds"))
    assert last["best auc"] == pytest.approx(data.auc(labels, odds), rel=1e-5)
    assert last["seen"] == len(torch.cat([x for c in steps for x in c.inputs[:2]]).unique())
    assert 0 < last["rows"] <= 2 * 64 < last["seen"]
    # 20 rows of a rank, two ids each; one of two servers is the rank's own
    assert last["pushed"] == 20 * 2 * 2 * (8 + 4 * 8) / 2
    shown = ElementTree.parse(folder / "stream.svg")
    headings = [x.text for x in shown.iter() if x.get("class") == "strong"]
    assert len(headings) == 5 and "AUC of the last 10 steps" in headings[0]
    assert len([x for x in shown.iter() if x.tag.endswith("polyline")]) == 3 + 3 + 2 + 3 + 4


def test_another_run_is_refused(whole):
    _, folder = whole
    args = streaming.arguments([*SMALL, "--folder", str(folder), "--hashed-rows", "10", "--window", "12"])
    with pytest.raises(streaming.GoOnError, match=r"a run with --hashed-rows \d+, --window 10: give the same"):
        streaming.run(args, Ranks(0, 1), QUIET, lambda: True)


@pytest.mark.parametrize("capacity", [1024, 5000])
def test_hashed_tables_have_as_many_bytes(capacity):
    args = streaming.arguments(["--capacity", str(capacity), "--dim", "8"])
    args.hashed_rows = contest.hashed_rows(args, 1)
    made = contest.models(args)
    table, hashed = made[contest.DYNAMIC].user, made[contest.HASHED].user
    opt, most = torch.optim.Adagrad(table.parameters(), lr=0.1), 0
    for step in range(120):
        ids = mix(torch.arange(capacity // 40) + step // 2 * (capacity // 40))  # each in two steps: it is admitted
        table(ids).sum().backward()
        opt.step()
        opt.zero_grad()
        most = max(most, table.memory_bytes())
    assert len(table) > 0.8 * capacity
    assert 0.7 * 2 * hashed.weight.nbytes < most <= 2 * hashed.weight.nbytes


@pytest.mark.parametrize("options", [["--steps", "10"], ["--save-every", "30"], ["--every", "0"], ["--dim", "-1"]])
def test_options_are_checked(options, capsys):
    with pytest.raises(SystemExit):
        streaming.arguments(options)
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_line_in_a_terminal(whole, terminal):
    out = io.StringIO()
    with streaming.Line(Console(file=out, force_terminal=terminal, width=200)) as line:
        for record in whole[0][:3]:
            line.show(record)
    text = out.getvalue()
    assert all(f"step {step}: AUC " in text for step in (4, 8, 12))
    assert text.count("\n") == (1 if terminal else 3)


# --- as a script


def script(folder, *options, **more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [*command, str(ROOT / "examples" / "streaming.py"), *SMALL, "--folder", str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        **more,
    )


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_ctrl_c_stops_it_with_a_checkpoint(tmp_path):
    """As a terminal does it: all processes get the signal."""
    process = script(tmp_path, start_new_session=True)
    try:
        assert process.stdout.readline().startswith("step 4: AUC ")
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    stopped = int(latest(tmp_path).removeprefix("step-"))
    assert f"stopped at step {stopped}: " in out
    assert stopped >= 4 and (tmp_path / "stream.svg").exists() == (stopped > 4)
    out, error = (process := script(tmp_path, "--steps", str(stopped + 8))).communicate(timeout=240)
    assert process.returncode == 0, out + error
    assert [line.partition(":")[0] for line in out.splitlines()] == [f"step {stopped + n}" for n in (4, 8)]


@pytest.mark.slow
def test_dynamic_tables_predict_better_in_less_memory(tmp_path):
    options = ["--smaller", "10", "--batch", "256", "--dim", "8", "--capacity", "1024", "--window", "100"]
    args = streaming.arguments([*options, "--steps", "600", "--save-every", "600", "--folder", str(tmp_path)])
    history = streaming.run(args, Ranks(0, 1), QUIET, lambda: False)
    assert all(r["dynamic bytes"] <= r["hashed bytes"] for r in history)
    won = np.array([r["dynamic auc"] - r["hashed auc"] for r in history if r["step"] > 300])
    assert won.min() > 0 and won.mean() > 0.01

"""The bench of training steps: every contestant trains as the original does, and the page shows what was stored."""

import time

import pytest
import torch

from benchmarks import page, ranks, steps
from benchmarks.contestants import Case, adagrad
from benchmarks.workloads import WORKLOADS

ROWS, STEPS = 16, 3
TRIED = [name for name in steps.CONTESTANTS if "form" not in name]  # forced forms have tests of their own
SIZE = {"sasrec": 6_000, "hstu": 60, "dcnv2": 3_000}


def workload(name):
    return WORKLOADS[name](SIZE.get(name, 26 * 20))


def losses(rank, n_ranks, name, sparse):
    """Of each contestant: the mean of all ranks' losses, step by step; and why the others can't."""
    case = Case(workload(name), ROWS, sparse, rank, n_ranks)
    runners, refused = steps.build_all(case, {n: steps.CONTESTANTS[n] for n in TRIED})
    batches = [case.batch(i) for i in range(STEPS)]
    for runner in runners.values():
        runner.train(batches, STEPS)
    return {n: of.tolist() for n, of in steps.means(runners).items()}, refused, steps.void(runners)


def single(name, n_ranks):
    """The original's losses, in one process on the global batch."""
    of = workload(name)
    model = of.model(sparse=False)
    optimizer, answer = adagrad(model.parameters()), []
    for i in range(STEPS):
        parts = [Case(of, ROWS, False, rank, n_ranks).batch(i) for rank in range(n_ranks)]
        inputs = [torch.cat(x) for x in zip(*(inputs for inputs, _ in parts), strict=True)]
        loss = of.loss(model(*inputs), torch.cat([labels for _, labels in parts]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        answer.append(loss.item())
    return answer


@pytest.mark.long
@pytest.mark.parametrize(
    "name, sparse, n_ranks",
    [
        ("lr", True, 2),
        pytest.param("fm", True, 2, marks=pytest.mark.slow),
        pytest.param("fm", False, 3, marks=pytest.mark.slow),
        pytest.param("wide_deep", True, 2, marks=pytest.mark.slow),
        pytest.param("deepfm", False, 2, marks=pytest.mark.slow),
        pytest.param("dcnv2", True, 2, marks=pytest.mark.slow),
        pytest.param("dlrm", True, 2, marks=pytest.mark.slow),
        pytest.param("sasrec", False, 2, marks=pytest.mark.slow),
        pytest.param("hstu", True, 2, marks=pytest.mark.slow),
    ],
)
def test_contestants_train_as_the_original(on_ranks, name, sparse, n_ranks):
    pytest.importorskip("torchrec", reason="torchrec is not installed")
    original = single(name, n_ranks)
    for means, refused, void in on_ranks(losses, n_ranks, name, sparse):
        assert set(means) | set(refused) == set(TRIED) and not void
        for contestant, of in means.items():
            assert of == pytest.approx(original, rel=steps.RTOL), contestant
        if name in ("lr", "fm", "wide_deep", "deepfm"):
            assert not refused


RUN = {
    "workload": "fm",
    "rows": 1000,
    "batch": 16,
    "ranks": 2,
    "gradients": "sparse",
    "link": "1 Gbit/s",
    "machine": {"cores": 2, "memory_gib": 24},
    "commit": "abcdef0",
    "date": "2026-11-27",
    "refused": {"form fsdp": "no table can be fsdp"},
    "void": {"DDP dense": "losses differ by 2.0e-03"},
    "contestants": {
        "by bytes": {"median_s": 0.010, "plan": "row_wise", "traffic": 4000, "wire_bytes": 4200},
        "by cluster": {"median_s": 0.020, "plan": "replicate", "traffic": 9000, "wire_bytes": 9200},
        "form row_wise": {"median_s": 0.008, "plan": "row_wise", "traffic": 4000, "wire_bytes": 4200},
        "DDP dense": {"median_s": 0.001, "wire_bytes": 68_000},
        "dedup pull": {"median_s": 0.015, "wire_bytes": 5000},
    },
}


def test_the_page_shows_what_is_stored(tmp_path):
    spread = {"least_s": 0.007, "most_s": 0.03, "rounds": 7, "steps": 2}
    of = {name: {**spread, **x} for name, x in RUN["contestants"].items()}
    for link in ("1 Gbit/s", "100 Mbit/s", "1 Gbit/s"):  # the last replaces the first
        steps.store(tmp_path, RUN | {"contestants": of, "link": link})
    runs = page.load(tmp_path)
    assert [run["link"] for run in runs] == ["100 Mbit/s", "1 Gbit/s"]
    text = page.page(runs)
    assert "| FM | by cluster | 2 |  | 0.75 | 2.50 | 2.50 |" in text
    assert (
        "| 1,000 | 2 | 16 | sparse | 1 Gbit/s | by bytes | 10.0 |  | 1.50 |" in text
    )  # a void contestant has no ratio
    assert "| 1,000 | 2 | 16 | sparse | 1 Gbit/s | by cluster | 20.0 |  | 0.75 |" in text
    assert "| 1 Gbit/s | row_wise | 8.0 | 1.25 | row_wise | 2.50 | replicate |" in text
    assert "DDP dense: losses differ by 2.0e-03" in text and "form fsdp: no table can be fsdp" in text
    assert "dedup pull" in steps.table(runs[0])


class Sleeper:
    """A contestant that takes a while, with a loss of its own."""

    def __init__(self, seconds, loss):
        self.seconds, self.loss = seconds, loss

    def step(self, inputs, labels):
        time.sleep(self.seconds)
        return torch.tensor(self.loss)

    def about(self):
        return {"traffic": 7}


def measured(rank, n_ranks):
    losses = {"slow": 1.0, "quick": 1.0, "other": 1.5}
    runners = {n: steps.Runner(Sleeper(0.3 if n == "slow" else 0.01, loss)) for n, loss in losses.items()}
    return steps.measure(runners, [((), None)], 5, 0.7, False), steps.void(runners)


def test_turns_are_measured(on_ranks):
    """A slow contestant has fewer rounds, and fewer steps in each; who has other losses than most is void."""
    for answer, void in on_ranks(measured, 2):
        assert (answer["slow"]["rounds"], answer["slow"]["steps"]) == (2, 1)
        assert (answer["quick"]["rounds"], answer["quick"]["traffic"]) == (5, 7)
        assert 0.3 <= answer["slow"]["least_s"] <= answer["slow"]["median_s"] <= answer["slow"]["most_s"]
        assert list(void) == ["other"]


WORKER = """
import json, sys
from benchmarks.ranks import ask_link, tell
task = json.loads(sys.argv[2])
print("rank", task["rank"])
ask_link(task["rank"], "loopback")
tell(task["rank"], {"x": task["x"], "ranks": task["ranks"]})
sys.exit(task["rank"] * task["fails"])
"""


def test_processes_answer_and_fail(tmp_path, capsys):
    script, answers = tmp_path / "worker.py", []
    script.write_text(WORKER)
    ranks.on_ranks(str(script), 2, {"x": 5, "fails": 0}, False, answers.append)
    assert answers == [{"x": 5, "ranks": 2}] and capsys.readouterr().out == "rank 0\n"
    with pytest.raises(RuntimeError, match="rank 1 failed:\nrank 1"):
        ranks.on_ranks(str(script), 2, {"x": 5, "fails": 1}, False, answers.append)

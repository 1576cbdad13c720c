"""The mutations that are kept: each says what it breaks, and breaks the product; the runner tells killed from lived."""

import subprocess
from pathlib import Path

import pytest

from tests.mutants.run import BROKEN, KILLED, LIVED, ROOT, Bench, Mutant, Results, mutants


def test_every_mutant_breaks_one_file_of_the_product():
    found = mutants()
    assert len(found) >= 40
    assert len({m.what for m in found}) == len(found)
    for m in found:
        changed = [x.split(" b/")[1] for x in m.file.read_text().splitlines() if x.startswith("diff --git")]
        assert len(changed) == 1 and changed[0].split("/")[0] in ("descompiler", "passes", "cost_models", "examples")
        assert m.file.name.startswith(changed[0].split("/")[-1].removesuffix(".py") + "-")
        assert all((ROOT / t.split("::")[0]).exists() for t in m.tests)


@pytest.mark.slow
def test_every_mutant_applies():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    for m in mutants():
        applied = subprocess.run(["git", "apply", "--check", m.file], cwd=ROOT, capture_output=True, text=True)
        assert not applied.returncode, applied.stderr


@pytest.fixture
def bench(tmp_path):
    """A tree with one function and one test."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "half.py").write_text("def half(x):\n    return x / 2  # of it\n")
    (tree / "test_half.py").write_text("from half import half\n\n\ndef test_half():\n    assert half(4) == 2\n")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    with Bench(tree, ["pytest"]) as found:
        yield found


def test_the_runner_tells_them_apart(bench, tmp_path):
    """A patch that the test sees, one that it doesn't, one that doesn't apply."""
    results = []
    for line, other in (
        ("    return x / 2  # of it", "    return x - 1"),
        ("    return x / 2  # of it", "    return x - 2"),
        ("    return x / 3", "    return x"),
    ):
        file = tmp_path / "half-other.patch"
        head = "diff --git a/half.py b/half.py\n--- a/half.py\n+++ b/half.py\n@@ -1,2 +1,2 @@\n def half(x):\n"
        file.write_text(f"# It is not half.\n# tests: test_half.py\n{head}-{line}\n+{other}\n")
        results.append(bench.judge(Mutant.read(file), 200))  # a second where the machine is idle
    assert [result for result, _ in results] == [KILLED, LIVED, BROKEN]
    assert results[0][1].startswith("FAILED test_half.py::test_half") and "1 passed" in results[1][1]
    assert "x / 2" in (bench.tree / "half.py").read_text()


RANKS_AND_A_CHILD = """
import subprocess
import time
from multiprocessing import get_context


def answer(pipe):
    pipe.send(__import__("half").half(4))


def test_ranks():
    context = get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs,))
    process.start()
    assert ours.recv() == 2
    process.join()


def test_that_never_ends():
    with open("child", "w") as file:
        print(subprocess.Popen(["sleep", "1000"]).pid, file=file)
    time.sleep(1000)
"""


@pytest.mark.long
def test_the_runner_forks_ranks_and_ends_what_does_not_end(bench):
    """Ranks are forked from the process that has imported what takes long, and what a test started ends with it."""
    (bench.tree / "test_ranks.py").write_text(RANKS_AND_A_CHILD)
    assert bench.run_tests(["test_ranks.py::test_ranks"], 60)[0] == LIVED
    for limit in (5, 20, 60):  # a busy machine may not have begun the test within the first
        ended = bench.run_tests(["test_ranks.py::test_that_never_ends"], limit)
        assert ended == (KILLED, f"no end after {limit} s")
        if (bench.tree / "child").exists():
            break
    child = Path("/proc") / (bench.tree / "child").read_text().strip() / "stat"
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"
    assert bench.run_tests(["test_half.py"], 60)[0] == LIVED


def test_the_runner_goes_on(tmp_path):
    """What was as expected is not looked for again, and what was not, or of another text, is."""
    looked = []

    def look(result):
        return lambda: (looked.append(result), (result, "a test"))[1]

    for text in ("one", "one", "another"):
        results = Results(tmp_path / "results", anew=False)
        for expected in (KILLED, LIVED):
            assert results.of(f"{expected} mutant", text, KILLED, look(expected)).result == expected
    assert looked == [KILLED, LIVED, LIVED, KILLED, LIVED]
    Results(tmp_path / "results", anew=True).of("killed mutant", "one", KILLED, look(KILLED))
    assert len(looked) == 6


def test_a_patch_has_to_say_what_it_breaks(tmp_path):
    file = tmp_path / "half-other.patch"
    file.write_text("# tests: test_half.py\ndiff --git a/half.py b/half.py\n")
    with pytest.raises(ValueError, match="what it breaks"):
        Mutant.read(file)

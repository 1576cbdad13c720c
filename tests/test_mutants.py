"""The mutations that are kept: each says what it breaks, and breaks the product; the runner tells killed from lived."""

import subprocess

import pytest

from tests.mutants.run import BROKEN, KILLED, LIVED, ROOT, Mutant, judge, mutants


def test_every_mutant_breaks_one_file_of_the_product():
    found = mutants()
    assert len(found) >= 40
    assert len({m.what for m in found}) == len(found)
    for m in found:
        changed = [x.split(" b/")[1] for x in m.file.read_text().splitlines() if x.startswith("diff --git")]
        assert len(changed) == 1 and changed[0].split("/")[0] in ("descompiler", "passes", "cost_models")
        assert m.file.name.startswith(changed[0].split("/")[-1].removesuffix(".py") + "-")
        assert all((ROOT / t.split("::")[0]).exists() for t in m.tests)


@pytest.mark.slow
def test_every_mutant_applies():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    for m in mutants():
        applied = subprocess.run(["git", "apply", "--check", m.file], cwd=ROOT, capture_output=True, text=True)
        assert not applied.returncode, applied.stderr


def test_the_runner_tells_them_apart(tmp_path):
    """A tree with one function and one test: a patch that it sees, one that it doesn't, one that doesn't apply."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "half.py").write_text("def half(x):\n    return x / 2  # of it\n")
    (tree / "test_half.py").write_text("from half import half\n\n\ndef test_half():\n    assert half(4) == 2\n")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    results = []
    for line, other in (
        ("    return x / 2  # of it", "    return x - 1"),
        ("    return x / 2  # of it", "    return x - 2"),
        ("    return x / 3", "    return x"),
    ):
        file = tmp_path / "half-other.patch"
        head = "diff --git a/half.py b/half.py\n--- a/half.py\n+++ b/half.py\n@@ -1,2 +1,2 @@\n def half(x):\n"
        file.write_text(f"# It is not half.\n# tests: test_half.py\n{head}-{line}\n+{other}\n")
        results.append(judge(Mutant.read(file), tree, 60))
    assert [result for result, _ in results] == [KILLED, LIVED, BROKEN]
    assert results[0][1].startswith("FAILED test_half.py::test_half") and "1 passed" in results[1][1]
    assert "x / 2" in (tree / "half.py").read_text()


def test_a_patch_has_to_say_what_it_breaks(tmp_path):
    file = tmp_path / "half-other.patch"
    file.write_text("# tests: test_half.py\ndiff --git a/half.py b/half.py\n")
    with pytest.raises(ValueError, match="what it breaks"):
        Mutant.read(file)

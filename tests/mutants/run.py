"""Do the tests see? Applies each mutation in a work tree of its own and runs the tests that should die of it.

A mutation is a patch, ``tests/mutants/<module>-<what>.patch``, with a header: ``# <one sentence: what it breaks>``, and
``# tests: <files or tests>``; without the latter every test that is not slow is run. ``python -m tests.mutants.run``
(`make mutants`) prints which are killed and which live; it fails if one lives, or can't be applied to what is
committed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
TIMEOUT_S = 600.0

KILLED, LIVED, BROKEN = "killed", "lived", "broken"
"""A test failed, or did not end; none failed; the patch does not apply, or pytest ran no test."""


@dataclass(frozen=True)
class Mutant:
    """One patch: what it breaks, and the tests that should see it."""

    file: Path
    what: str
    tests: tuple[str, ...]

    @staticmethod
    def read(file: Path) -> Mutant:
        """The mutant of a patch file.

        Raises
        ------
        ValueError
            If its first line does not say what it breaks.
        """
        header = [x[2:] for x in file.read_text(encoding="utf-8").split("diff --git")[0].splitlines() if x[:2] == "# "]
        tests = [x.removeprefix("tests:").split() for x in header if x.startswith("tests:")]
        if not header or header[0].startswith("tests:"):
            raise ValueError(f"{file.name}: the first line has to be '# <what it breaks>'")
        return Mutant(file, header[0], tuple(t for line in tests for t in line))


def mutants() -> list[Mutant]:
    """All that are kept, in order of their names."""
    return [Mutant.read(f) for f in sorted(FOLDER.glob("*.patch"))]


def run_tests(tree: Path, tests: tuple[str, ...], timeout_s: float) -> tuple[str, str]:
    """Whether tests fail in a tree, and what pytest says."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    try:
        ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return KILLED, f"no end after {timeout_s:.0f} s"
    return {0: LIVED, 1: KILLED}.get(ended.returncode, BROKEN), ended.stdout + ended.stderr


def judge(mutant: Mutant, tree: Path, timeout_s: float) -> tuple[str, str]:
    """What becomes of a mutant, and by what; the tree is as it was afterwards."""
    if _git(tree, "apply", str(mutant.file)).returncode:
        return BROKEN, "the patch does not apply"
    try:
        result, said = run_tests(tree, mutant.tests, timeout_s)
    finally:
        _git(tree, "checkout", "--", ".")
    failed = [x for x in said.splitlines() if x.startswith(("FAILED ", "ERROR "))]
    return result, failed[-1] if failed else said[-200:].strip()


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of patches' names; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time, each in a work tree of its own")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds per mutant, after which it is killed")
    options = parser.parse_args(arguments)
    chosen = [m for m in mutants() if not options.names or any(part in m.file.name for part in options.names)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as trees:
        free: SimpleQueue[Path] = SimpleQueue()
        for job in range(options.jobs):
            free.put(trees.enter_context(_work_tree(Path(folder) / f"tree{job}")))
        every = tuple(dict.fromkeys(t for m in chosen for t in m.tests))
        tree = free.get()
        result, said = run_tests(tree, every, options.timeout * max(len(every), 1))
        free.put(tree)
        if result != LIVED:
            sys.exit(f"{said}\nThe tests fail without any mutation.")
        with ThreadPoolExecutor(options.jobs) as jobs:
            results = list(jobs.map(lambda m: _report(m, free, options.timeout), chosen))
    print(", ".join(f"{results.count(kind)} {kind}" for kind in (KILLED, LIVED, BROKEN)))
    return int(results.count(KILLED) < len(results))


@contextmanager
def _work_tree(tree: Path) -> Iterator[Path]:
    """What is committed, in a folder of its own."""
    if (made := _git(ROOT, "worktree", "add", "--detach", str(tree), "HEAD")).returncode:
        sys.exit(made.stderr.decode())
    try:
        yield tree
    finally:
        _git(ROOT, "worktree", "remove", "--force", str(tree))


def _report(mutant: Mutant, free: SimpleQueue[Path], timeout_s: float) -> str:
    tree, start = free.get(), time.monotonic()
    try:
        result, why = judge(mutant, tree, timeout_s)
    finally:
        free.put(tree)
    # what killed it is told too: a test that took too long on a busy machine has seen nothing
    print(f"{result:7} {time.monotonic() - start:5.0f} s  {mutant.file.stem}: {mutant.what}\n{'':17}{why}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

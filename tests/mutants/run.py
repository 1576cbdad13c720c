"""Do the tests see? Applies each mutation in a work tree of its own and runs the tests that should die of it.

A mutation is a patch, ``tests/mutants/<module>-<what>.patch``, with a header: ``# <one sentence: what it breaks>``, and
``# tests: <files or tests>``; without the latter every test that is not slow is run. ``python -m tests.mutants.run``
(`make mutants`) prints which are killed and which live; it fails if one lives, or can't be applied to what is
committed. What it finds is kept in ``artefacts/mutants.jsonl``: run again after an interruption, it goes on, as long as
commit and patch are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
RESULTS = ROOT / "artefacts" / "mutants.jsonl"
TIMEOUT_S = 600.0

KILLED, LIVED, BROKEN = "killed", "lived", "broken"
"""A test failed, or did not end; none failed; the patch does not apply, or pytest ran no test."""

TAKE_LONG = ("torch.export", "torch._dynamo", "torch._meta_registrations", "torch.distributed", "networkx", "pytest")
"""What every test imports that no mutation changes."""

PYTHON = ("descompiler", "passes", "cost_models", "benchmarks", "examples")
"""Folders that tests import."""


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


class Bench:
    """A work tree, and a process that runs pytest in it without importing torch each time (`warm`). A context."""

    def __init__(self, tree: Path, modules: Sequence[str] = ()):
        self.tree, self._log = tree, tree.parent / f"{tree.name}.log"
        command = [sys.executable, str(FOLDER / "warm.py"), *modules]
        self._warm = subprocess.Popen(command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self._warm.kill()
        self._warm.communicate()

    def run_tests(self, tests: Sequence[str], timeout_s: float) -> tuple[str, str]:
        """Whether tests fail, and what pytest says."""
        assert self._warm.stdin is not None and self._warm.stdout is not None
        arguments = ["-q", "-x", "-p", "no:cacheprovider", *tests]
        asked = {"tree": str(self.tree), "arguments": arguments, "log": str(self._log), "timeout_s": timeout_s}
        print(json.dumps(asked), file=self._warm.stdin, flush=True)
        status = json.loads(self._warm.stdout.readline())
        if status is None:
            return KILLED, f"no end after {timeout_s:.0f} s"
        return {0: LIVED, 1: KILLED}.get(status, BROKEN), self._log.read_text(encoding="utf-8", errors="replace")

    def judge(self, mutant: Mutant, timeout_s: float) -> tuple[str, str]:
        """What becomes of a mutant, and by what; the tree is as it was afterwards."""
        if _git(self.tree, "apply", str(mutant.file)).returncode:
            return BROKEN, "the patch does not apply"
        try:
            result, said = self.run_tests(mutant.tests, timeout_s)
        finally:
            _git(self.tree, "checkout", "--", ".")
        failed = [x for x in said.splitlines() if x.startswith(("FAILED ", "ERROR "))]
        return result, failed[-1] if failed else said[-200:].strip()


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True)


@dataclass(frozen=True)
class Found:
    """What was found of a mutant, or of a file's tests without any: those have to live."""

    name: str
    digest: str
    result: str
    why: str
    seconds: float


class Results:
    """What was found before of the same commit and patches, and what is found now, line by line in a file."""

    def __init__(self, file: Path, anew: bool):
        self.file, self.commit = file, _git(ROOT, "rev-parse", "HEAD").stdout.decode().strip()
        self.found: dict[tuple[str, str], Found] = {}
        file.parent.mkdir(exist_ok=True)
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() and not anew else ():
            found = Found(**json.loads(line))
            self.found[found.name, found.digest] = found

    def of(self, name: str, text: str, expected: str, look: Callable[[], tuple[str, str]]) -> Found:
        """Of what a text says, on this commit; looked for unless it is known to be as expected."""
        digest = hashlib.sha256(f"{self.commit}\n{text}".encode()).hexdigest()[:16]
        if (name, digest) in self.found:
            return self.found[name, digest]
        start = time.monotonic()
        result, why = look()
        found = Found(name, digest, result, why, time.monotonic() - start)
        if result == expected:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(vars(found)) + "\n")
        return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of patches' names; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time, each in a work tree of its own")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds per mutant, after which it is killed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what was found, to go on from")
    parser.add_argument("--anew", action="store_true", help="take nothing from the results of before")
    options = parser.parse_args(arguments)
    chosen = [m for m in mutants() if not options.names or any(part in m.file.name for part in options.names)]
    results, counts = Results(options.results, options.anew), Counter[str]()
    not_killed: list[str] = []
    whats = {m.file.stem: m.what for m in chosen}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        free: SimpleQueue[Bench] = SimpleQueue()
        for job in range(options.jobs):
            tree = opened.enter_context(_work_tree(Path(folder) / f"tree{job}"))
            free.put(opened.enter_context(Bench(tree, TAKE_LONG)))
        jobs = opened.enter_context(ThreadPoolExecutor(options.jobs))

        def look(name: str, text: str, expected: str, of: Callable[[Bench], tuple[str, str]]) -> Found:
            def on_a_bench() -> tuple[str, str]:
                bench = free.get()
                try:
                    return of(bench)
                finally:
                    free.put(bench)

            return results.of(name, text, expected, on_a_bench)

        every = sorted({t for m in chosen for t in m.tests} or {"tests"})
        files = [(name, tuple(tests)) for name, tests in groupby(every, key=lambda t: t.split("::")[0])]
        unchanged: list[Any] = [
            jobs.submit(look, name, " ".join(tests), LIVED, lambda b, t=tests: b.run_tests(t, options.timeout * len(t)))
            for name, tests in files
        ]
        changed = [
            jobs.submit(look, m.file.stem, m.file.read_text(), KILLED, lambda b, m=m: b.judge(m, options.timeout))
            for m in sorted(chosen, key=lambda m: (m.tests, m.file))
        ]
        for done in as_completed(unchanged):
            found: Found = done.result()
            if found.result != LIVED:
                jobs.shutdown(wait=False, cancel_futures=True)
                sys.exit(f"{found.why}\nThe tests fail without any mutation.")
            print(f"unchanged {found.seconds:3.0f} s  {found.name}", flush=True)
        for i, done in enumerate(as_completed(changed), 1):
            found = done.result()
            # what killed it is told too: a test that took too long on a busy machine has seen nothing
            said = f"{found.result:7} {found.seconds:5.0f} s  {found.name}: {whats[found.name]}\n{'':17}{found.why}"
            print(f"{i:3}/{len(changed)} {said}", flush=True)
            counts[found.result] += 1
            not_killed += [said] * (found.result != KILLED)
    print(*not_killed, sep="\n")
    print(", ".join(f"{counts[kind]} {kind}" for kind in (KILLED, LIVED, BROKEN)))
    return int(bool(not_killed))


@contextmanager
def _work_tree(tree: Path) -> Iterator[Path]:
    """What is committed, in a folder of its own, compiled: a file is compiled again where its text is another's."""
    if (made := _git(ROOT, "worktree", "add", "--detach", str(tree), "HEAD")).returncode:
        sys.exit(made.stderr.decode())
    try:
        compiled = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", *PYTHON]
        subprocess.run(compiled, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=True)
        yield tree
    finally:
        _git(ROOT, "worktree", "remove", "--force", str(tree))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The processes of the bench: one a rank, each in its own network namespace, or on loopback without root.

Rank 0 speaks to the parent by lines: ``@link <name>`` asks for links of another rate and waits for an answer, so
that what was built once is measured on every link; ``@run <JSON>`` is a result. Other lines are shown.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.network import network, reshape

LINKS = {"100 Mbit/s": 100, "1 Gbit/s": 1000, "10 Gbit/s": 10_000, "unshaped": None}
LOOPBACK = "loopback"
ROOT = Path(__file__).resolve().parent.parent


def on_ranks(script: str, ranks: int, task: dict[str, Any], shaped: bool, result: Callable[[Any], None]) -> None:
    """Run ``script --worker <JSON>`` on each rank; ``result`` gets what rank 0 says."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        names = stack.enter_context(network(ranks, None)) if shaped else None
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0" if shaped else "lo",
            "PYTHONPATH": str(ROOT),
        }
        processes = []
        try:
            for rank in range(ranks):
                worker = json.dumps({**task, "rank": rank, "ranks": ranks, "folder": folder})
                command = ["ip", "netns", "exec", names[rank]] if names else []
                command += [sys.executable, script, "--worker", worker]
                log = stack.enter_context(open(f"{folder}/log{rank}", "w"))
                pipes = {"stdin": subprocess.PIPE, "stdout": log if rank else subprocess.PIPE, "stderr": log}
                processes.append(subprocess.Popen(command, env=environment, text=True, cwd=ROOT, **pipes))
            _listen(processes[0], names, result)
            failed = [rank for rank, p in enumerate(processes) if p.wait() != 0]
            if failed:
                texts = [Path(f"{folder}/log{rank}").read_text()[-3000:] for rank in failed]
                raise RuntimeError("\n".join(f"rank {r} failed:\n{t}" for r, t in zip(failed, texts, strict=True)))
        finally:
            for p in processes:
                if p.poll() is None:
                    p.kill()
                p.wait()


def _listen(first: Any, names: Sequence[str] | None, result: Callable[[Any], None]) -> None:
    for line in first.stdout:
        kind, _, rest = line.rstrip("\n").partition(" ")
        if kind == "@link":
            if names:
                reshape(names, LINKS[rest])
            first.stdin.write("done\n")
            first.stdin.flush()
        elif kind == "@run":
            result(json.loads(rest))
        else:
            print(line, end="", flush=True)


def ask_link(rank: int, link: str) -> None:
    """On each rank, between two barriers: have the parent change the links."""
    if rank == 0:
        print(f"@link {link}", flush=True)
        sys.stdin.readline()


def tell(rank: int, run: dict[str, Any]) -> None:
    """On each rank: rank 0 gives a result to the parent."""
    if rank == 0:
        print(f"@run {json.dumps(run)}", flush=True)

"""How processes end: exit statuses of many runs under torchrun, by what the process does at its end.

    python benchmarks/exits.py --runs 50 --ranks 2 4
    python benchmarks/exits.py --runs 50 --ranks 2 4 --busy
    python benchmarks/exits.py --only ends destroys --runs 5

One line a script and number of ranks: how many of the runs ended with exit status 0, and what the first other run said
last. ``--busy`` keeps every core busy meanwhile. ``plain``, which is not part of the whole, is DistributedDataParallel
alone, without this library: how often it dies on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TRAIN = """
import sys, torch, torch.distributed as dist, descompiler as des
from torch import nn
dist.init_process_group("gloo")
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.item, self.top = nn.Embedding(1000, 16), nn.Linear(16, 1)
    def forward(self, x): return self.top(self.item(x).relu())
x = torch.randint(0, 1000, (64,))
module = des.compile(Model(), example_inputs=(x,)){how}
optimizer = torch.optim.SGD(module.parameters(), 0.01)
for _ in range(10):
    module(x).pow(2).mean().backward(); optimizer.step(); optimizer.zero_grad()
"""

PLAIN = """
import torch, torch.distributed as dist
from torch import nn
dist.init_process_group("gloo")
module = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)))
for _ in range(20):
    module(torch.randn(32, 64)).pow(2).mean().backward()
"""

MODEL = """
from descompiler.examples import MODELS, make_inputs
def small(): return MODELS["fm"]("fields"), make_inputs("fm", "fields", 64)
"""

SCRIPTS = {
    "ends": TRAIN.format(how=""),
    "destroys": TRAIN.format(how="") + "dist.destroy_process_group()\n",
    "sys.exit(0)": TRAIN.format(how="") + "sys.exit(0)\n",
    "after backward": TRAIN.format(how="") + "module(x).sum().backward()\nsys.exit(0)\n",
    "plain": PLAIN,
}
"""What a user's script does, by how it ends."""

COMMANDS = {
    "demo": ["examples/train_ctr.py"],
    "audit": ["-m", "descompiler", "audit", "model.py:small", "--steps", "2"],
    "calibrate": ["-m", "descompiler", "calibrate", "--out", "cluster.json", "--repeats", "5"],
}
"""Commands of this project that run under torchrun."""


def run(name: str, ranks: int, folder: Path, timeout_s: float) -> tuple[int, str]:
    """Exit status and output of one run."""
    command = list(COMMANDS.get(name, ["script.py"]))
    if name in SCRIPTS:
        (folder / "script.py").write_text(SCRIPTS[name])
    if name == "demo":
        command = [str(ROOT / command[0])]
    (folder / "model.py").write_text(MODEL)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*launch, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        out, _ = process.communicate()
        return 124, out
    return process.returncode, out


@contextlib.contextmanager
def busy(cores: int) -> Iterator[None]:
    """Context in which every core has something else to do."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def statuses(names: Sequence[str], ranks: Sequence[int], runs: int, timeout_s: float = 300.0) -> int:
    """Run every script, print a line for each, and count the runs that did not end with 0."""
    failed = 0
    for name in names:
        for n in ranks:
            ends, said, begin = [], "", time.perf_counter()
            for _ in range(runs):
                with tempfile.TemporaryDirectory() as folder:
                    status, out = run(name, n, Path(folder), timeout_s)
                ends.append(status)
                if status and not said:
                    said = next((x for x in out.splitlines() if "terminate called" in x or "Error" in x), out[-200:])
            seconds = (time.perf_counter() - begin) / runs
            good = ends.count(0)
            print(f"{name:15} {n} ranks: {good} of {runs} ended with 0, {seconds:.1f} s a run {said}", flush=True)
            failed += runs - good
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--busy", action="store_true", help="keep every core busy meanwhile")
    parser.add_argument("--only", nargs="+", choices=[*SCRIPTS, *COMMANDS], help="some of the scripts")
    args = parser.parse_args()
    names = args.only or [n for n in (*SCRIPTS, *COMMANDS) if n != "plain"]
    with busy(os.cpu_count() or 1) if args.busy else contextlib.nullcontext():
        failed = statuses(names, args.ranks, args.runs)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

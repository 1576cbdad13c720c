"""Peak memory of compiling a large model, of its state_dict, checkpoints and the way back, on local gloo ranks.

    python benchmarks/memory.py --gib 4 --ranks 2

A rank's peak is that of its resident set (``VmHWM``, reset before each call), beyond what the process held before.
Kinds of compile: ``meta``, all parameters on the meta device on every rank; ``first``, real ones on rank 0 alone;
``in place``, real ones on every rank, each freed as it is cut; ``copy``, real ones on every rank, which stay. Limit:
the rank's share, a tenth of it, and 300 MB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import descompiler as des
from descompiler.check.processes import on_ranks

KINDS = ("meta", "first", "in place", "copy")
ALLOWANCE_BYTES = 300 * 10**6


class Model(nn.Module):
    """Four tables of equal size and a layer."""

    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, dim) for _ in range(4))
        self.top = nn.Linear(4 * dim, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.top(torch.cat([t(ids[:, i]) for i, t in enumerate(self.tables)], 1))


def status(name: str) -> int:
    """A line of this process's status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(next(x for x in text.splitlines() if x.startswith(f"{name}:")).split()[1]) * 1024


def peak_of(call: Callable[[], Any]) -> tuple[Any, int, float]:
    """What a call returns, the bytes by which it raised the resident set at most, and its seconds."""
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = status("VmRSS"), time.perf_counter()
    result = call()
    return result, status("VmHWM") - before, time.perf_counter() - begin


def measure(rank: int, ranks: int, kind: str, rows: int, dim: int, folder: str) -> dict[str, tuple[int, float]]:
    """Peaks and seconds on one rank."""
    real = kind in ("in place", "copy") or (kind == "first" and rank == 0)
    with torch.device("cpu" if real else "meta"):
        model = Model(rows, dim)
    ids = torch.randint(rows, (64, 4))
    des.compile(Model(100, dim), (ids % 100,), plan={"tables*": "row_wise"})  # imports, threads
    in_place = kind == "in place"
    module, peak, seconds = peak_of(lambda: des.compile(model, (ids,), plan={"tables*": "row_wise"}, in_place=in_place))
    found = {"compile": (peak, seconds)}
    if kind == "meta":
        state, *found["full_state_dict(rank0_only=True)"] = peak_of(
            lambda: des.full_state_dict(module, rank0_only=True)
        )
        _, *found["load_full_state_dict(rank0_only=True)"] = peak_of(
            lambda: des.load_full_state_dict(module, state, rank0_only=True)
        )
        del state
        _, *found["save"] = peak_of(lambda: des.save(module, None, folder))
        _, *found["load"] = peak_of(lambda: des.load(module, None, folder))
        file = f"{folder}.safetensors"
        _, *found["save_safetensors"] = peak_of(lambda: des.save_safetensors(module, file))
        _, *found["load_safetensors"] = peak_of(lambda: des.load_safetensors(module, file))
        _, *found["to_single"] = peak_of(lambda: des.to_single(module))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4, help="of tables in all")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    rows = int(args.gib * 2**30 / (4 * args.dim * 4))
    whole = 4 * rows * args.dim * 4
    limit = whole / args.ranks * 1.1 + ALLOWANCE_BYTES
    worst = True
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            by_rank = on_ranks(measure, args.ranks, kind, rows, args.dim, f"{folder}/checkpoint", timeout_s=600)
        for call in by_rank[0]:
            peaks = [x[call][0] for x in by_rank]
            # rank 0 has the whole state_dict, in memory that the caller asked for
            has_whole = "full_state_dict(" in call or call == "to_single"
            most = [limit + whole if has_whole and r == 0 else limit for r in range(args.ranks)]
            good = all(p <= m for p, m in zip(peaks, most, strict=True))
            worst &= good
            figures = ", ".join(f"{p / 1e6:,.0f} MB" for p in peaks)
            bounds = ", ".join(f"{m / 1e6:,.0f}" for m in most)
            print(f"{kind:9} {call:32} {figures}; limits {bounds}: {'yes' if good else 'NO'}", flush=True)
            print(f"{'':9} {max(x[call][1] for x in by_rank):.1f} s", flush=True)
    sys.exit(0 if worst else 1)


if __name__ == "__main__":
    main()

"""Memory that is free, asked before much of it is allocated, and memory that is given back."""

from __future__ import annotations

import ctypes
import functools
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import torch

from descompiler.errors import PlanError
from descompiler.runtime.ranks import Ranks

RECORDED_COLLECTIVES = 2000
"""How many collectives torch.distributed remembers by default, for who looks for a hang (``TORCH_FR_BUFFER_SIZE``)."""


MARGIN_BYTES = 64 << 20
"""Less than this is not asked for: small models need no account."""


def check_room(ranks: Ranks, needed_bytes: int, device: torch.device, what: str, instead: str) -> None:
    """Raise on every rank unless the ranks of each machine find the memory that they need. Collective.

    Parameters
    ----------
    needed_bytes : int
        By this rank, on ``device``.
    what : str
        It is for.
    instead : str
        What to do where there is too little.

    Raises
    ------
    PlanError
        Which machine lacks how much.
    """
    place = socket.gethostname() if device.type == "cpu" else f"{socket.gethostname()} {device}"
    by_place: dict[str, list[tuple[int, int, int]]] = {}
    told = (place, needed_bytes, free_bytes(device), _limit_of_process() if device.type == "cpu" else None)
    for r, (where, needed, free, limit) in enumerate(ranks.of_every(told)):
        by_place.setdefault(where, []).append((r, needed, free))
        if limit is not None and needed > max(limit, MARGIN_BYTES):
            raise PlanError(
                _missing(what, needed, limit, f"in rank {r}, whose process is limited (ulimit -v)", instead)
            )
    for where, there in by_place.items():
        needed, free = sum(n for _, n, _ in there), min(f for _, _, f in there)
        if needed > max(free, MARGIN_BYTES):
            each = ", ".join(f"rank {r} {n:,} B" for r, n, _ in there[:8]) + ", ..." * (len(there) > 8)
            raise PlanError(_missing(what, needed, free, f"on {where} ({each})", instead))


def _missing(what: str, needed: int, free: int, where: str, instead: str) -> str:
    return f"{what} need {needed:,} B {where}, and {free:,} B are free: {needed - free:,} B are missing. {instead}"


def free_bytes(device: torch.device) -> int:
    """Bytes that all processes together may still allocate on a device: of the machine, or of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_machine(), *_limits_of_container()])


def _machine() -> int:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62  # not known here


def _limit_of_process() -> int | None:
    """Bytes that this process may still map; None without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = [line.split()[0] for line in _lines(Path("/proc/self/statm"))]
    if soft == resource.RLIM_INFINITY or not used:
        return None
    return max(0, soft - int(used[0]) * resource.getpagesize())


def _limits_of_container() -> list[int]:
    """Of control groups, version 2 or 1; what files are cached in can be taken back."""
    result = []
    for root, limit, usage in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        most, now = (_lines(Path(root) / name) for name in (limit, usage))
        stat = dict(line.split() for line in _lines(Path(root) / "memory.stat") if len(line.split()) == 2)
        if most and now and most[0].isdigit():
            result.append(max(0, int(most[0]) - int(now[0]) + int(stat.get("inactive_file", 0))))
    return result


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # another system
        return []


def give_back(forwards: int) -> None:
    """Return unused pages of the C heap to the system, at the 2nd, 4th, 8th ... of the first forwards of a module.

    torch.distributed keeps a record of each of the latest `RECORDED_COLLECTIVES`: small blocks of memory that stay,
    among the large ones that every step frees. Until there are so many, each may leave a hole where a large block was,
    and the heap grows by another one; hundreds of megabytes that nobody uses, for tables of a megabyte. Later a record
    takes the place of an older one.
    """
    if 1 < forwards <= 2 * RECORDED_COLLECTIVES and forwards & (forwards - 1) == 0 and (trim := _trim()) is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; other allocators give back by themselves."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)

"""Ranks in network namespaces of their own, behind links of a given rate.

Each namespace has a veth pair to one bridge, shaped by tc at both ends: htb, with bursts of 16 KB at 100 Mbit/s, 128 KB
at 1 Gbit/s and 1.28 MB at 10 Gbit/s (`BURST_BYTES`), below which nothing is shaped. Needs root, ip and tc.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

SYSFS = "/sys/class/net/eth0/statistics"
BURST_BYTES = {100: 16_000, 1000: 128_000, 10_000: 1_280_000}


def why_not() -> str | None:
    """Why this machine can't run the benchmark; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; on Debian: apt-get install iproute2"
    probe = f"dscp{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if tried.returncode:
        return f"the kernel refuses a network namespace: {tried.stderr.strip()}"
    run("ip", "netns", "delete", probe)
    return None


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def network(ranks: int, mbit: int | None) -> Iterator[list[str]]:
    """Namespaces with an interface ``eth0`` each, on one bridge; shaped, unless ``mbit`` is None."""
    tag = f"dsc{os.getpid() % 100_000}"
    names = [f"{tag}r{rank}" for rank in range(ranks)]
    bridge = f"{tag}b"
    try:
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "link", "set", bridge, "up")
        for rank, name in enumerate(names):
            outer = f"{tag}v{rank}"
            run("ip", "netns", "add", name)
            run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", outer, "master", bridge, "up")
            inside = ["ip", "netns", "exec", name]
            run(*inside, "ip", "link", "set", "lo", "up")
            run(*inside, "ip", "address", "add", f"10.213.0.{rank + 1}/24", "dev", "eth0")
            run(*inside, "ip", "link", "set", "eth0", "up")
        reshape(names, mbit)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)  # its veth pair goes with it
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)


def reshape(names: Sequence[str], mbit: int | None) -> None:
    """Give the links of a `network` another rate, at both ends; None: as fast as the kernel is."""
    for name in names:
        tag, _, rank = name.rpartition("r")
        for inside, device in (([], f"{tag}v{rank}"), (["ip", "netns", "exec", name], "eth0")):
            subprocess.run([*inside, "tc", "qdisc", "delete", "dev", device, "root"], capture_output=True)  # if any
            if mbit is not None:
                _shape(inside, device, mbit)


def _shape(inside: Sequence[str], device: str, mbit: int) -> None:
    """An htb class of this rate for all traffic that leaves through a device."""
    rate, burst = f"{mbit}mbit", str(BURST_BYTES[mbit])
    run(*inside, "tc", "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "1")
    of = ["parent", "1:", "classid", "1:1", "htb", "rate", rate, "ceil", rate, "burst", burst, "cburst", burst]
    run(*inside, "tc", "class", "add", "dev", device, *of)


def counters() -> tuple[int, int]:
    """Bytes and packets that left this namespace."""
    base = Path(SYSFS)  # `ip netns exec` mounts this namespace's /sys
    return int((base / "tx_bytes").read_text()), int((base / "tx_packets").read_text())

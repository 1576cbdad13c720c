"""Clusters: ranks, nodes and links in numbers, each with its source; the time that a step's collectives take.

    seconds of a call = start + messages(collective, ranks) · α + bytes sent · β

The number of messages is the algorithm's (`descompiler.cost_models.collectives`), so that what was measured on few
ranks says something about many. A call's seconds are no straight line everywhere: gloo's all-to-all is nearly
half-duplex above some 100 KB, and links let bursts pass at more than their rate. So a calibrated cluster keeps what was
measured (`Link.curve`), and on as many ranks as were measured it is interpolated; the line serves formulas and other
numbers of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

from descompiler.cost_models.collectives import BACKENDS, GLOO, seconds
from descompiler.cost_models.work import Rates
from descompiler.errors import PlanError
from descompiler.layout.traffic import Traffic, kind_of
from descompiler.planning.json import BROKEN, decode
from descompiler.registry import Registry
from descompiler.units import MOST_RANKS

COLLECTIVES = tuple(GLOO)
"""The kinds of collectives that a cluster has numbers for."""


@dataclass(frozen=True)
class Link:
    """One collective on one class of links.

    Attributes
    ----------
    alpha_s : float
        Seconds of one message.
    bytes_per_s : float
        Inside a node: of one rank. Between nodes: of one node, which its ranks share.
    start_s : float
        Seconds of a call, whatever the ranks.
    source : str
        Where the numbers are from.
    curve : tuple of (float, float), optional
        Measured (bytes that a rank sends in a call, seconds), ascending.
    """

    alpha_s: float
    bytes_per_s: float
    start_s: float = 0.0
    source: str = ""
    curve: tuple[tuple[float, float], ...] = ()

    def measured_s(self, sent_bytes: float) -> float:
        """Seconds of a call by the curve: linear between its points, as the first one below, and on beyond the last.

        >>> link = Link(0.0, 1e6, curve=((100.0, 1.0), (200.0, 2.0)))
        >>> link.measured_s(10), link.measured_s(150), link.measured_s(400)
        (1.0, 1.5, 4.0)
        """
        first, *_ = self.curve
        if sent_bytes <= first[0]:
            return first[1]
        for (x0, t0), (x1, t1) in pairwise(self.curve):
            if sent_bytes <= x1 or x1 == self.curve[-1][0]:
                return t0 + (t1 - t0) * (sent_bytes - x0) / (x1 - x0)
        return first[1] + (sent_bytes - first[0]) / self.bytes_per_s

    def __post_init__(self) -> None:
        if not (0 <= self.alpha_s < inf and self.bytes_per_s > 0 and 0 <= self.start_s < inf):
            raise PlanError(f"a link needs alpha_s >= 0, bytes_per_s > 0 and start_s >= 0: {self}")
        rising = all(a < b for (a, _), (b, _) in pairwise(self.curve))
        if not rising or not all(0 <= x < inf and 0 <= t < inf for x, t in self.curve):
            raise PlanError(f"a link's curve needs rising bytes, and seconds that are not negative: {self}")


@dataclass(frozen=True)
class Cluster:
    """Where a module runs.

    Attributes
    ----------
    ranks, ranks_per_node : int
        Without links "inter", or on one node, all messages go over the links "intra"; with one rank a node, "inter".
    links : mapping of str to mapping of str to Link
        ``links["intra" | "inter"][collective]``, collectives as in `COLLECTIVES`.
    memory_bytes : int, optional
        Of each rank, for weights, gradients, optimiser state and activations.
    flops_per_s : float, optional
        Floating point operations of each rank.
    backend : {"gloo", "nccl"}
        Whose algorithms are used.
    sources : mapping of str to str
        Where memory_bytes, flops_per_s and the rest are from.
    rates : Rates, optional
        Of a rank's own work: without, a plan's seconds are those of its collectives alone.
    provenance : mapping
        How it was measured, for calibrated clusters: see `descompiler.calibrate`.

    Examples
    --------
    >>> cluster = Cluster.builtin("ethernet-25g", ranks=8)
    >>> traffic = Traffic()
    >>> traffic.add("all_to_all (ids in)", 3_000_000)
    >>> round(cluster.seconds(traffic) * 1e3, 2)  # 7 messages, and 3 MB at 2.94 GB/s
    1.13
    >>> Cluster.from_json(cluster.to_json()) == cluster
    True
    """

    name: str
    ranks: int
    ranks_per_node: int
    links: Mapping[str, Mapping[str, Link]] = field(hash=False)
    memory_bytes: int | None = None
    flops_per_s: float | None = None
    backend: str = "gloo"
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    rates: Rates | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.ranks_per_node < 1:
            raise PlanError(f"cluster {self.name!r}: ranks and ranks_per_node must be at least 1")
        if max(self.ranks, self.ranks_per_node) > MOST_RANKS:
            raise PlanError(f"cluster {self.name!r}: more than {MOST_RANKS:,} ranks")
        for what, number in (("memory_bytes", self.memory_bytes), ("flops_per_s", self.flops_per_s)):
            if number is not None and not 0 < number < inf:
                raise PlanError(f"cluster {self.name!r}: {what} must be more than 0, not {number}")
        if self.backend not in BACKENDS:
            raise PlanError(f"cluster {self.name!r}: backend {self.backend!r} is not one of {', '.join(BACKENDS)}")
        if set(self.links) - {"intra", "inter"} or not self.links:
            raise PlanError(f"cluster {self.name!r}: links are 'intra', 'inter' or both, not {sorted(self.links)}")
        for link, by_collective in self.links.items():
            if missing := set(COLLECTIVES) - set(by_collective):
                raise PlanError(f"cluster {self.name!r}: links[{link!r}] has nothing for {', '.join(sorted(missing))}")

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)

    def seconds(self, traffic: Traffic | Sequence[Traffic], messages: Mapping[str, int] | None = None) -> float:
        """Seconds of the collectives of a step, one after the other.

        Parameters
        ----------
        traffic : Traffic or sequence of Traffic
            One rank's, or every rank's: then each collective takes as long as on its busiest rank.
        messages : mapping of str to int, optional
            Calls of each collective, in place of the traffic's own.
        """
        every = [traffic] if isinstance(traffic, Traffic) else list(traffic)
        names = dict.fromkeys(name for t in every for name in t.bytes_by_collective)
        total = 0.0
        for name in names:
            sent = max(float(t.bytes_by_collective.get(name, 0)) for t in every)
            calls = max(t.calls_by_collective.get(name, 0) for t in every) if messages is None else messages[name]
            total += self.seconds_of(kind_of(name), sent, calls)
        return total

    def seconds_of(self, collective: str, sent_bytes: float, calls: int = 1) -> float:
        """Seconds of ``calls`` calls of one collective, in which a rank sends ``sent_bytes`` in all."""
        if self.ranks == 1:
            return 0.0
        if collective not in COLLECTIVES:
            raise PlanError(f"no cost model of collective {collective!r}; there are {', '.join(COLLECTIVES)}")
        if len(self.links) == 1 or self.nodes == 1 or self.ranks_per_node == 1:
            only = next(iter(self.links)) if len(self.links) == 1 else "intra" if self.nodes == 1 else "inter"
            near = far = self.links[only][collective]
            per_node = None
            if far.curve and calls:
                return calls * far.measured_s(sent_bytes / calls)
        else:
            near, far = self.links["intra"][collective], self.links["inter"][collective]
            per_node = self.ranks_per_node
        return float(
            seconds(
                collective,
                sent_bytes,
                calls,
                ranks=self.ranks,
                ranks_per_node=per_node,
                start=far.start_s,
                alpha=(near.alpha_s, far.alpha_s),
                beta=(1 / near.bytes_per_s, 1 / far.bytes_per_s),
                backend=self.backend,
            )
        )

    @property
    def flops_per_byte(self) -> float | None:
        """Operations that take as long as sending a byte by all-to-all between nodes; None if it is not known."""
        link = self.links.get("inter" if self.nodes > 1 or "intra" not in self.links else "intra", {})
        return None if self.flops_per_s is None or not link else self.flops_per_s / link["all_to_all"].bytes_per_s

    def with_ranks(self, ranks: int, ranks_per_node: int | None = None) -> Cluster:
        """The same machines, another number of them; curves, which are of one number of ranks, are left out."""
        links = self.links
        if ranks != self.ranks:
            links = {link: {c: replace(x, curve=()) for c, x in of.items()} for link, of in links.items()}
        per_node = ranks_per_node or min(self.ranks_per_node, ranks)
        return replace(self, ranks=ranks, ranks_per_node=per_node, links=links)

    # ---- files

    def to_json(self) -> str:
        """As JSON; `from_json` is its inverse."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Cluster:
        """A cluster from JSON.

        Raises
        ------
        PlanError
            If the text is no cluster.
        """
        try:
            data = json.loads(text)
            known = {f.name for f in fields(cls)}
            if unknown := [name for name in data if name not in known]:
                raise ValueError(f"a cluster has no {', '.join(unknown)}")
            found: Cluster = decode(cls, data)
            return found
        except BROKEN as error:
            raise PlanError(f"this is no cluster file ({error}); Cluster.builtin(...).save(path) writes one") from None

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a JSON file.

        Raises
        ------
        PlanError
            If there is none, or it is no cluster.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PlanError(f"no cluster in {str(path)!r}: {error}") from None
        return cls.from_json(text)

    @classmethod
    def builtin(cls, name: str, ranks: int = 8, ranks_per_node: int | None = None) -> Cluster:
        """A class of clusters by name, from published numbers; measure your own with `descompiler.calibrate`.

        Parameters
        ----------
        name : str
            Of `CLUSTERS`: "ethernet-10g", "-25g", "-100g", "-400g", "nvlink-v100", "-a100", "-h100", or of a plug-in.
        ranks_per_node : int, optional
            1 by default for Ethernet (several ranks share the link), 8 for NVLink.
        """
        kind = CLUSTERS.named(name)
        if isinstance(kind, Cluster):
            return kind.with_ranks(ranks, ranks_per_node)
        links = {link: dict.fromkeys(COLLECTIVES, value) for link, value in kind.links.items()}
        per_node = min(ranks, ranks_per_node or kind.ranks_per_node)
        sources = {**kind.sources, "flops_per_s": kind.flops_source}
        return cls(name, ranks, per_node, links, kind.memory_bytes, kind.flops_per_s, kind.backend, sources, kind.rates)


@dataclass(frozen=True)
class _Kind:
    """A class of clusters."""

    name: str
    ranks_per_node: int
    backend: str
    links: Mapping[str, Link]
    rates: Rates
    flops_per_s: float
    flops_source: str
    memory_bytes: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict)


ETHERNET_PAYLOAD = 1448 / 1538
"""TCP payload of a full frame: of 1,538 B with preamble, header, check sum and gap (IEEE 802.3), 1,500
are IP's (RFC 894), less 20 of IP, 20 of TCP and 12 of its time stamps (RFC 7323)."""


NETWORK_S, NVLINK_S, CALL_S = 14.0e-6, 3.4e-6, 8.4e-6
"""Seconds of a step of NCCL's ring over a network, over NVLink, and of a call: ``hwLat`` and ``baseLat`` ("Ring,
Simple") of ``src/graph/tuning.cc``, NCCL 2.19."""


LOOPBACK_BYTES_PER_S = 1.3e9
"""Measured: gloo's all-to-all, 1 MiB to each of 2 processes of one machine with 2 cores, median of 15."""


CPU = Rates(3.7e-4, 1.7e-7, 5.4e-9, 4.4e-8, 6e-9, 1.8e-9, "measured: one core of a server, torch 2.13")
CPU_FLOPS_PER_S = 5e10
GPU = Rates(8.5e-4, 1.5e-9, 3e-11, 1e-8, 1.6e-10, 1.6e-10, "measured: one H200, torch 2.11")
"""What a rank does itself, where nobody has measured it: by `descompiler.check.rates.measured_rates`."""


_NCCL = "latency: NCCL 2.19, src/graph/tuning.cc, hwLat and baseLat, ring, simple protocol"


def _ethernet(gigabits_per_s: int) -> _Kind:
    rate = gigabits_per_s * 1e9 / 8 * ETHERNET_PAYLOAD
    source = f"{gigabits_per_s} Gbit/s (IEEE 802.3) x 1448/1538 of TCP payload (RFC 894, RFC 7323); {_NCCL}"
    local = f"bandwidth: measured, gloo, 2 ranks, loopback; {_NCCL}"
    return _Kind(
        f"ethernet-{gigabits_per_s}g",
        1,
        "gloo",
        {
            "intra": Link(NETWORK_S, LOOPBACK_BYTES_PER_S, CALL_S, local),
            "inter": Link(NETWORK_S, rate, CALL_S, source),
        },
        CPU,
        CPU_FLOPS_PER_S,
        "measured: products of 512 x 512 float32 matrices, one core",
    )


def _nvlink(
    gigabytes_per_s: float, gpu: str, memory_gigabytes: int, teraflops: float, nic_gigabits_per_s: float, node: str
) -> _Kind:
    near = f"NVLink, one direction: half of the {2 * gigabytes_per_s:.0f} GB/s of the {gpu} data sheet; {_NCCL}"
    far = f"{nic_gigabits_per_s:.0f} Gbit/s a node: network of the {node} data sheet; {_NCCL}"
    return _Kind(
        f"nvlink-{gpu.split()[0].lower()}",
        8,
        "nccl",
        {
            "intra": Link(NVLINK_S, gigabytes_per_s * 1e9, CALL_S, near),
            "inter": Link(NETWORK_S, nic_gigabits_per_s * 1e9 / 8, CALL_S, far),
        },
        GPU,
        teraflops * 1e12,
        f"NVIDIA {gpu} data sheet: {teraflops:g} Tflop/s in float32",
        memory_gigabytes * 10**9,
        {"memory_bytes": f"NVIDIA {gpu} data sheet: {memory_gigabytes} GB"},
    )


CLUSTERS: Registry[_Kind | Cluster] = Registry(
    "cluster",
    (
        _ethernet(10),
        _ethernet(25),
        _ethernet(100),
        _ethernet(400),
        _nvlink(150, "V100 SXM2", 32, 15.7, 4 * 100, "DGX-1 (4 x 100 Gbit/s InfiniBand)"),
        _nvlink(300, "A100 SXM", 80, 19.5, 8 * 200, "DGX A100 (8 x 200 Gbit/s InfiniBand)"),
        _nvlink(450, "H100 SXM", 80, 67, 8 * 400, "DGX H100 (8 x 400 Gbit/s InfiniBand)"),
    ),
)
"""Clusters that have names: classes, from published numbers (Ethernet: one link a node), and those of plug-ins."""

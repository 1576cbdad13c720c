"""The cluster that is meant: one that is given, a class by its name, or, where nothing is said, one that is assumed.

No step is made of links alone: where they are fast, the plan of the fewest bytes may be slower than one that sends more
and looks up less. So a plan is for a cluster, and says for which; who wants the fewest bytes asks for `BYTES`.
"""

from __future__ import annotations

from dataclasses import replace

from descompiler.errors import PlanError
from descompiler.planning.cluster import Cluster

BYTES = "bytes"
"""In the place of a cluster: the bytes of the busiest rank are minimised."""

ASSUMED = {"cpu": "ethernet-10g", "cuda": "nvlink-h100"}
"""The class that is assumed, by the device of the model."""

GivenCluster = Cluster | str | None
"""A cluster, the name of a class of clusters, `BYTES`, or nothing: then a class is assumed."""


def cluster_of(given: GivenCluster, ranks: int, device: str = "cpu") -> Cluster | None:
    """The cluster that is meant by what a user gives; None if it is `BYTES`.

    What is assumed limits no memory: that is the user's to say.

    Raises
    ------
    PlanError
        If no class has this name.

    >>> cluster_of(None, 4).name
    'ethernet-10g (assumed)'
    >>> cluster_of("ethernet-100g", 4).ranks
    4
    >>> cluster_of("bytes", 4) is None
    True
    """
    if isinstance(given, Cluster):
        return given
    if isinstance(given, str):
        return None if given == BYTES else Cluster.builtin(given, ranks)
    if given is not None:
        raise PlanError(f"cluster={given!r}; it is a Cluster, the name of a class of clusters, or {BYTES!r}")
    found = Cluster.builtin(ASSUMED.get(device, ASSUMED["cpu"]), ranks)
    return replace(found, name=f"{found.name} (assumed)", memory_bytes=None)

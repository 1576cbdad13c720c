"""Dynamic tables: lookups and insertions a second of one core, memory of an id, and the longest pause.

    python benchmarks/dynamic.py                      # 1e6 and 1e7 resident ids, about two minutes of an idle core
    python benchmarks/dynamic.py --resident 1e6 --batch 10000

Each contestant has the ids resident, and then maps batches of which 100 % or 90 % are; the others are new, and entered.
In `ids` it finds the slots, in `rows` the rows of them too (dim 16, float32, without gradients). Contestants: a Python
dict; pandas' `Int64HashTable` (khash; private, and without deletion); `searchsorted` in sorted ids, which enters by
sorting anew; ``id % rows``, without a map; TorchRec's managed collision (`MCHManagedCollisionModule`, if it is
installed), which enters at intervals and is asked for resident ids alone. Seconds are those of the process's clock, so
that other processes count less. The longest call is by the wall clock, of batches with 90 % resident ids by which the
table grew by a half: at least one of its moves to more cells is among them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from descompiler.dynamic import Capacity, DynamicEmbedding
from descompiler.dynamic.hashing import mix

DIM = 16
REPEATS = 7


class Contestant(Protocol):
    """A map from ids to slots."""

    def enter(self, ids: Tensor) -> None:
        """Enter ids that differ and are new."""
        ...

    def slots(self, ids: Tensor) -> Tensor:
        """The slots of ids; those that are new are entered."""
        ...


class Dynamic:
    """`DynamicEmbedding`, with what an eviction by LFU counts: the most that it keeps of an id."""

    def __init__(self, resident: int):
        self.module = DynamicEmbedding(DIM, evict=Capacity(4 * resident, by="lfu"), dtype=torch.float32)
        self._table = self.module._table
        self._entered = 0

    def enter(self, ids: Tensor) -> None:
        self.slots(ids)

    def slots(self, ids: Tensor) -> Tensor:
        slots, came, _ = self._table.residence.look_up(self._table.keys(ids))
        self._entered += len(came)
        return slots


class Dict:
    """A dict of Python, id by id."""

    def __init__(self, resident: int):
        self._held: dict[int, int] = {}

    def enter(self, ids: Tensor) -> None:
        self.slots(ids)

    def slots(self, ids: Tensor) -> Tensor:
        held = self._held
        return torch.tensor([held.setdefault(i, len(held)) for i in ids.tolist()])


class Pandas:
    """khash by way of pandas: maps arrays, takes no id out."""

    def __init__(self, resident: int):
        from pandas._libs.hashtable import Int64HashTable

        self._held, self._count = Int64HashTable(), 0

    def enter(self, ids: Tensor) -> None:
        self._held.map_keys_to_values(ids.numpy(), np.arange(self._count, self._count + len(ids)))
        self._count += len(ids)

    def slots(self, ids: Tensor) -> Tensor:
        found = self._held.lookup(ids.numpy())
        if (missing := found < 0).any():
            self.enter(ids[torch.from_numpy(missing)].unique())
            found = self._held.lookup(ids.numpy())
        return torch.from_numpy(found)


class Sorted:
    """Binary search in sorted ids."""

    def __init__(self, resident: int):
        self._held = torch.empty(0, dtype=torch.int64)

    def enter(self, ids: Tensor) -> None:
        self._held = torch.cat([self._held, ids]).sort().values

    def slots(self, ids: Tensor) -> Tensor:
        at = torch.searchsorted(self._held, ids).clamp_(max=len(self._held) - 1)
        missing = self._held[at] != ids
        if bool(missing.any()):
            self.enter(ids[missing].unique())
            at = torch.searchsorted(self._held, ids)
        return at


class Modulo:
    """No map: ids share rows."""

    def __init__(self, resident: int):
        self._rows = resident

    def enter(self, ids: Tensor) -> None:
        pass

    def slots(self, ids: Tensor) -> Tensor:
        return ids.remainder(self._rows)


class ManagedCollision:
    """TorchRec's sorted ids with slots."""

    def __init__(self, resident: int):
        from torchrec.modules.mc_modules import DistanceLFU_EvictionPolicy, MCHManagedCollisionModule

        self._held = MCHManagedCollisionModule(
            resident, torch.device("cpu"), DistanceLFU_EvictionPolicy(), eviction_interval=1, input_hash_size=2**63 - 1
        )
        self._held._mch_sorted_raw_ids[:resident] = mix(torch.arange(resident)).sort().values
        self._held.eval()
        self.features = importlib.import_module("torchrec.sparse.jagged_tensor").JaggedTensor

    def enter(self, ids: Tensor) -> None:
        pass

    def slots(self, ids: Tensor) -> Tensor:
        given = {"ids": self.features(values=ids, lengths=torch.ones(len(ids), dtype=torch.int64))}
        return self._held.remap(given)["ids"].values()


CONTESTANTS: dict[str, tuple[Callable[[int], Any], str | None]] = {
    "DynamicEmbedding": (Dynamic, None),
    "dict": (Dict, None),
    "pandas Int64HashTable": (Pandas, "pandas"),
    "sorted, searchsorted": (Sorted, None),
    "id % rows": (Modulo, None),
    "TorchRec managed collision": (ManagedCollision, "torchrec"),
}


@dataclass
class Found:
    """What was measured of a contestant."""

    ids: dict[float, float]
    rows: dict[float, float]
    entered: float
    pause: float


def batches(resident: int, batch: int, hit: float, start: int) -> Iterator[Tensor]:
    """Batches of which a part is resident, the rest new; ids are hashes."""
    known = round(batch * hit)
    while True:
        old = torch.randint(0, resident, (known,))
        new = torch.arange(start, start + batch - known)
        start += batch - known
        yield mix(torch.cat([old, new])[torch.randperm(batch)])


def seconds(call: Callable[[Tensor], Any], given: Iterator[Tensor]) -> float:
    """The median of a call's seconds of this process."""
    taken = []
    for _ in range(REPEATS):
        ids = next(given)
        begin = time.process_time()
        call(ids)
        taken.append(time.process_time() - begin)
    return sorted(taken)[REPEATS // 2]


def measure(make: Callable[[int], Any], resident: int, batch: int) -> Found:
    torch.manual_seed(0)
    contestant = make(resident)
    table = nn.Embedding(2 * resident, DIM, _freeze=True)
    spent, half = 0.0, round(resident / 1.5)
    for start in range(0, half, batch):
        ids = mix(torch.arange(start, min(start + batch, half)))
        begin = time.process_time()
        contestant.enter(ids)
        spent += time.process_time() - begin
    pauses, growing = [], batches(half, batch, 0.9, half)
    for _ in range((resident - half) // (batch // 10)):
        ids = next(growing)
        begin = time.perf_counter()
        contestant.slots(ids)
        pauses.append(time.perf_counter() - begin)

    def rows(ids: Tensor) -> Tensor:
        slots = contestant.slots(ids)
        return table(slots)

    found = Found({}, {}, half / spent, max(pauses))
    start = resident
    for hit in (1.0, 0.9):
        for into, call in ((found.ids, contestant.slots), (found.rows, rows)):
            if hit < 1 and isinstance(contestant, ManagedCollision):
                continue
            into[hit] = batch / seconds(call, batches(resident, batch, hit, start))
            start += REPEATS * batch
    return found


def memory(resident: int, batch: int) -> str:
    """Bytes of an id beside its row, by what is kept of it."""
    contestant = Dynamic(resident)
    most = 0.0
    for start in range(0, resident, batch):
        contestant.enter(mix(torch.arange(start, start + batch)))
        if start >= resident // 2:
            most = max(most, contestant._table.residence.memory_bytes() / len(contestant.module))
    now = contestant._table.residence.memory_bytes() / len(contestant.module)
    return f"{now:.1f} bytes of an id beside its row, {most:.1f} while the map moved to more cells"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resident", type=lambda x: int(float(x)), nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--batch", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", choices=[*CONTESTANTS])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for resident in args.resident:
        print(f"\n{resident:,} resident ids, batches of {args.batch:,}; million a second")
        print(f"{'':27} ids 100 %    90 % rows 100 %    90 %  filling longest call, ms")
        for name, (make, needs) in CONTESTANTS.items():
            if name not in (args.only or CONTESTANTS) or (needs and importlib.util.find_spec(needs) is None):
                continue
            found = measure(make, resident, args.batch)
            numbers = [x.get(hit, float("nan")) / 1e6 for x in (found.ids, found.rows) for hit in (1.0, 0.9)]
            print(
                f"{name:27} {numbers[0]:9.2f} {numbers[1]:7.2f} {numbers[2]:10.2f} {numbers[3]:7.2f} "
                f"{found.entered / 1e6:8.2f} {1000 * found.pause:17.1f}",
                flush=True,
            )
            gc.collect()
        print(memory(resident, args.batch))


if __name__ == "__main__":
    main()

"""The oracle of dynamic tables: a dict and loops over ids, in plain Python; and streams to try both on."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from descompiler.dynamic import AfterSightings, Always, Capacity, DynamicEmbedding, Normal, TimeToLive, WithProbability
from descompiler.dynamic.by_id import ById
from descompiler.dynamic.hashing import word_of
from descompiler.dynamic.owners import Owners
from descompiler.optim import FTRL

WORD = 1 << 64
MASK = WORD - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(word: int) -> int:
    """splitmix64's finaliser, as it is published."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def signed(word: int) -> int:
    return word - WORD if word >> 63 else word


def normal_row(key: int, dim: int, mean: float, std: float) -> list[float]:
    """The sum of twelve 16-bit lanes of three outputs of splitmix64, for each column."""
    drawn = [mix((key + GOLDEN * (i + 1)) & MASK) for i in range(3 * dim)]
    sums = [sum((w >> s) & 0xFFFF for w in drawn[3 * c : 3 * c + 3] for s in (0, 16, 32, 48)) for c in range(dim)]
    return [(s - 12 * 65535 // 2) * (std / math.sqrt(12 * (65536**2 - 1) / 12)) + mean for s in sums]


def sgd(row: list[float], grad: list[float], state: dict[str, Any], step: int) -> list[float]:
    return [x - LR / 100 * g for x, g in zip(row, grad, strict=True)]


def adagrad(row: list[float], grad: list[float], state: dict[str, Any], step: int) -> list[float]:
    state["sum"] = [s + g * g for s, g in zip(state.get("sum", [0.25] * len(row)), grad, strict=True)]
    return [x - LR * g / (math.sqrt(s) + 1e-10) for x, g, s in zip(row, grad, state["sum"], strict=True)]


def sparse_adam(row: list[float], grad: list[float], state: dict[str, Any], step: int) -> list[float]:
    zeros = [0.0] * len(row)
    first = state["m"] = [0.9 * m + 0.1 * g for m, g in zip(state.get("m", zeros), grad, strict=True)]
    second = state["v"] = [0.999 * v + 0.001 * g * g for v, g in zip(state.get("v", zeros), grad, strict=True)]
    size = LR * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    return [x - size * m / (math.sqrt(v) + 1e-8) for x, m, v in zip(row, first, second, strict=True)]


def ftrl(row: list[float], grad: list[float], state: dict[str, Any], step: int) -> list[float]:
    """Algorithm 1 of McMahan et al. (2013) with alpha = LR, beta = 1; its z begins at what gives the row."""
    l1, l2 = FTRL_L1, FTRL_L2
    begin = [-w * (1 / LR + l2) - (math.copysign(l1, w) if w else 0.0) for w in row]
    z, n = state.setdefault("z", begin), state.setdefault("n", [0.0] * len(row))
    for i, g in enumerate(grad):
        sigma = (math.sqrt(n[i] + g * g) - math.sqrt(n[i])) / LR
        z[i] += g - sigma * row[i]
        n[i] += g * g
    rates = [-1 / ((1 + math.sqrt(x)) / LR + l2) for x in n]
    return [0.0 if abs(x) <= l1 else r * (x - math.copysign(l1, x)) for x, r in zip(z, rates, strict=True)]


LR = 0.1
FTRL_L1, FTRL_L2 = 0.3, 0.2
OPTIMIZERS: dict[str, tuple[Callable[..., list[float]], Callable[[Iterable[Any]], torch.optim.Optimizer]]] = {
    "sgd": (sgd, lambda p: torch.optim.SGD(p, lr=LR / 100)),
    "adagrad": (adagrad, lambda p: torch.optim.Adagrad(p, lr=LR, initial_accumulator_value=0.25)),
    "sparse_adam": (sparse_adam, lambda p: torch.optim.SparseAdam(list(p), lr=LR)),
    "ftrl": (ftrl, lambda p: FTRL(p, lr=LR, l1=FTRL_L1, l2=FTRL_L2)),
}

ADMIT = {"always": Always(), "sightings": AfterSightings(2, width=4096), "probability": WithProbability(0.4)}
EVICT = {"none": None, "lru": Capacity(64 * 8), "lfu": Capacity(64 * 8, by="lfu"), "ttl": TimeToLive(16)}
"""Capacity of 64 slices with 8 rows each; a time to live with which slices are looked at in two turns."""


def slope(i: int, column: int) -> float:
    """What the loss asks of an id beside its square."""
    return math.cos(0.37 * (i % 1009) + column)


@dataclass
class Row:
    """What is known of a resident id."""

    values: list[float]
    last: int
    count: int = 0
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class Oracle:
    """A table as it is meant, of one dimension, name, seed, admission, eviction and optimiser."""

    dim: int
    name: str
    seed: int
    admit: Any
    evict: Any
    slices: int
    update: Callable[..., list[float]]
    rows: dict[int, Row] = field(default_factory=dict)
    sightings: Counter[int] = field(default_factory=Counter)
    step: int = 0

    def key(self, i: int) -> int:
        return mix((i ^ word_of(self.seed, self.name)) & MASK)

    def slice(self, i: int) -> int:
        return self.key(i) * self.slices // WORD

    def admits(self, i: int) -> bool:
        if isinstance(self.admit, AfterSightings):
            return self.sightings[i] >= self.admit.sightings - 1
        if isinstance(self.admit, WithProbability):
            drawn = mix(mix((self.key(i) + 0xD1B54A32D192ED03 * (2 * self.step + 1)) & MASK))
            return (drawn >> 11) / 2**53 < self.admit.probability
        return True

    def run(self, lookups: Sequence[Sequence[int]]) -> None:
        """A step: look up, train with half the squares and `slope` times each row that was looked up, end."""
        ids = [i for lookup in lookups for i in lookup]
        for i in sorted(set(ids)):
            if i not in self.rows and self.admits(i):
                self.rows[i] = Row(normal_row(self.key(i), self.dim, 0.0, 1.0), self.step)
            elif i not in self.rows:
                self.sightings[i] += 1
            if i in self.rows:
                self.rows[i].last = self.step
                self.rows[i].count += 1
        for i, times in Counter(ids).items():
            if i in self.rows:
                row = self.rows[i]
                grad = [times * (x + slope(i, c)) for c, x in enumerate(row.values)]
                row.values = self.update(row.values, grad, row.state, self.step + 1)
        self.end()

    def end(self) -> None:
        for i in self.leaving():
            del self.rows[i]
        self.step += 1

    def leaving(self) -> list[int]:
        if isinstance(self.evict, TimeToLive):
            turns = max(self.evict.steps // 8, 1)
            return [
                i
                for i, row in self.rows.items()
                if self.slice(i) % turns == self.step % turns and self.step - row.last >= self.evict.steps
            ]
        if isinstance(self.evict, Capacity):
            share, gone, held = self.evict.rows // self.slices, [], defaultdict(list)
            for i in self.rows:
                held[self.slice(i)].append(i)
            for mine in held.values():
                if len(mine) > share:
                    by = self.evict.by == "lfu"
                    mine.sort(key=lambda i: (self.rows[i].count if by else 0, self.rows[i].last, signed(self.key(i))))
                    gone += mine[: len(mine) - (share - share // 8)]
            return gone
        return []


def train(table: DynamicEmbedding, optimizer: torch.optim.Optimizer, lookups: Sequence[Tensor]) -> None:
    """The step that `Oracle.run` makes."""
    optimizer.zero_grad()
    losses = []
    for ids in lookups:
        rows = table(ids)
        asked = [[slope(i, c) for c in range(rows.shape[-1])] for i in ids.reshape(-1).tolist()]
        slopes = torch.tensor(asked, dtype=torch.float64).view(rows.shape)
        losses.append((0.5 * rows.square() + slopes * rows).sum())
    sum(losses).backward()
    optimizer.step()


def run(table: DynamicEmbedding, optimizer: torch.optim.Optimizer, steps: Iterable[Sequence[Sequence[int]]]) -> None:
    """Train on steps of a stream."""
    for step in steps:
        train(table, optimizer, [torch.tensor(ids, dtype=torch.int64) for ids in step])


def contents(table: DynamicEmbedding) -> dict[int, list[float]]:
    """The rows of a table by id."""
    embedding, ids = table.to_embedding()
    return dict(zip(ids.tolist(), embedding.weight.tolist(), strict=True))


def assert_equal(found: dict[int, list[float]], expected: dict[int, list[float]]) -> None:
    """The same ids, and rows that are equal to 1e-10 of the largest number."""
    assert found.keys() == expected.keys()
    if expected:
        a, b = (torch.tensor([x[i] for i in expected], dtype=torch.float64) for x in (found, expected))
        assert (a - b).abs().max() <= 1e-10 * max(1.0, float(b.abs().max()))


@cache
def owners_of(slices: int, ranks: int) -> Owners:
    return Owners(slices, ranks)


def seen_by(table: DynamicEmbedding, rank: int, ranks: int, ids: Sequence[int]) -> list[int]:
    """Of ids those of a rank's slices."""
    given, owners = torch.tensor(ids, dtype=torch.int64), owners_of(table._table.residence.slices, ranks)
    return given[owners.of(table._table.keys(given)) == rank].tolist()


def same(one: ById, other: ById, within: float = 0.0) -> bool:
    """Whether two states are equal, bit for bit, or in their numbers to so much of the largest.

    Sums of several gradients of a row have another order where slots or owners are others.
    """

    def equal(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor) or not within or not a.is_floating_point():
            return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)
        return a.shape == b.shape and bool(
            ((a - b).abs() <= within * max(1.0, float(b.abs().max()) if len(b) else 0.0)).all()
        )

    for f in fields(one):
        a, b = getattr(one, f.name), getattr(other, f.name)
        if f.name == "kept" and a is not None:
            assert a.optimizer == b.optimizer and a.scalars == b.scalars and a.rows.keys() == b.rows.keys()
            assert all(equal(a.rows[n], b.rows[n]) for n in a.rows)
        else:
            assert equal(a, b), f.name
    return True


def made(admit: str, evict: str, *, dim: int = 3, **options: Any) -> DynamicEmbedding:
    """A table in float64."""
    given = {"name": "t", "seed": 5, "init": Normal(), "dtype": torch.float64, **options}
    return DynamicEmbedding(dim, admit=ADMIT[admit], evict=EVICT[evict], **given)


def oracle_of(table: DynamicEmbedding, optimizer: str) -> Oracle:
    """The oracle of a table that has seen nothing."""
    config = table._table.config
    slices = table._table.residence.slices
    update = OPTIMIZERS[optimizer][0]
    return Oracle(config.dim, config.name, config.seed, config.admit, config.evict, slices, update)


def stream(draws: random.Random, steps: int, most: int = 120, ids: int = 2000) -> list[list[list[int]]]:
    """Steps of lookups of ids: some often, some new ones, any 64-bit ones, negative ones, none at all."""
    made = []
    for step in range(steps):
        lookups = []
        for _ in range(draws.randint(1, 3)):
            count = draws.choice([0, 1, draws.randint(0, most), most])
            lookups.append(
                [
                    draws.choice(
                        [
                            int(draws.paretovariate(0.6)) % ids,
                            -draws.randint(1, ids),
                            draws.randint(0, 40) + 10 * step,
                            signed(mix(draws.randint(0, ids))),
                        ]
                    )
                    for _ in range(count)
                ]
            )
        made.append(lookups)
    return made

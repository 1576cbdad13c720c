"""An endless click stream: users and items with ids of 64 bits that appear, are popular for a while, and are gone.

A kind of entity (`Crowd`) has places, from the most popular to the least, by Zipf's law. A place has one holder at a
time: its popularity rises as it appears, fades, and with the next holder comes an id that nobody has seen. Some users
pass by once. What users like is hidden (`Stream._traits`) and shows in their clicks alone.

What happens in a step is a function of the seed and the step: nothing is kept between steps, so that a run which is
resumed sees what it would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from descompiler.dynamic import Normal
from descompiler.dynamic.hashing import mix, unit, word_of

HOURS, POSITIONS = 24, 10


class Inputs(NamedTuple):
    """What a model is given: ids, int64; the hour, int64; the position on the page, 0 to 1."""

    users: Tensor
    items: Tensor
    hours: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Clicks:
    """A batch: inputs, whether there was a click, and its log odds, which no model is told."""

    inputs: Inputs
    labels: Tensor
    odds: Tensor

    def part(self, first: int, end: int) -> Clicks:
        """Some rows."""
        return Clicks(Inputs(*(x[first:end] for x in self.inputs)), self.labels[first:end], self.odds[first:end])


@dataclass(frozen=True)
class Crowd:
    """Entities of a kind: how many at a time, how many steps they stay on average, how steep their popularity is."""

    name: str
    places: int
    lifetime: int
    exponent: float = 0.9


USERS, ITEMS = Crowd("user", 12_000, 1500), Crowd("item", 6_000, 800)


class Stream:
    """The stream of a seed.

    Parameters
    ----------
    seed : int
    users, items : Crowd
    passing : float
        Share of rows whose user comes once.
    traits : int
        Hidden numbers of users and items, whose products are what users like.

    Examples
    --------
    >>> stream = Stream(seed=0)
    >>> clicks = stream.batch(7, rows=4)
    >>> torch.equal(clicks.inputs.users, Stream(seed=0).batch(7, rows=4).inputs.users)
    True
    >>> stream.batch(10**6, rows=4).labels.shape
    torch.Size([4])
    """

    def __init__(self, seed: int, users: Crowd = USERS, items: Crowd = ITEMS, passing: float = 0.15, traits: int = 6):
        self.seed, self.passing, self.traits = seed, passing, traits
        self._users, self._items = _Places(seed, users), _Places(seed, items)

    def smaller(self, factor: int) -> Stream:
        """The stream with so many times fewer users and items, which stay as many times shorter."""
        users, items = (
            replace(p.crowd, places=p.crowd.places // factor, lifetime=p.crowd.lifetime // factor)
            for p in (self._users, self._items)
        )
        return Stream(self.seed, users, items, self.passing, self.traits)

    def batch(self, step: int, rows: int) -> Clicks:
        """The rows of a step."""
        word = word_of(self.seed, f"step {step}")
        drawn = torch.Generator().manual_seed(word)
        users, items = self._users.draw(step, rows, drawn), self._items.draw(step, rows, drawn)
        once = torch.rand(rows, generator=drawn, dtype=torch.float64) < self.passing
        users = torch.where(once, mix(word + torch.arange(rows)), users)
        hours = (step // 20 + torch.randint(0, 3, (rows,), generator=drawn)) % HOURS
        positions = torch.randint(0, POSITIONS, (rows,), generator=drawn).double() / (POSITIONS - 1)
        odds = self._odds(users, items, hours, positions)
        labels = torch.rand(rows, generator=drawn, dtype=torch.float64) < odds.sigmoid()
        dtype = torch.get_default_dtype()
        return Clicks(Inputs(users, items, hours, positions.to(dtype)), labels.to(dtype), odds)

    def _odds(self, users: Tensor, items: Tensor, hours: Tensor, positions: Tensor) -> Tensor:
        user, item = self._traits("user", users), self._traits("item", items)
        likes = (user[:, 2:] * item[:, 2:]).sum(1) * (1.6 / self.traits**0.5)
        phase = item[:, 1] * 3.0  # when in the day an item is liked
        daily = torch.cos(hours.double() * (2 * torch.pi / HOURS) + phase)
        return likes + 0.5 * user[:, 0] + 0.9 * item[:, 0] + 0.4 * daily - 1.0 * positions - 0.7

    def _traits(self, kind: str, ids: Tensor) -> Tensor:
        """Of each id: how much it clicks or is clicked, when, and what it likes or is."""
        return Normal().values(ids ^ word_of(self.seed, f"traits of {kind}"), 2 + self.traits)


class _Places:
    """The places of a crowd, and who holds them at a step."""

    def __init__(self, seed: int, crowd: Crowd):
        self.crowd, self._salt = crowd, word_of(seed, crowd.name)
        place = torch.arange(crowd.places)
        drawn = [unit(mix(place * 2 + i + self._salt)) for i in (0, 1)]
        # some stay four times as long as most, others a quarter
        self._lifetime = (crowd.lifetime * 4 ** (2 * drawn[0] - 1)).clamp(min=1).long()
        self._begun = (drawn[1] * self._lifetime).long()
        self._popular = (place.double() + 1) ** -crowd.exponent

    def draw(self, step: int, rows: int, generator: torch.Generator) -> Tensor:
        """The ids of some holders, by how popular they are now."""
        since = self._begun + step
        age = (since % self._lifetime).double() / self._lifetime
        popular = (self._popular * (age * 10 + 0.1).clamp(max=1) * (1.05 - age)).cumsum(0)
        at = torch.rand(rows, generator=generator, dtype=torch.float64) * popular[-1]
        place = torch.searchsorted(popular, at, right=True).clamp(max=self.crowd.places - 1)
        holder = since[place] // self._lifetime[place]
        return mix(mix(place + self._salt) + holder)

"""Meta-learning with higher: weights that take steps on a support set are asked about a query set.

Its inner loop differentiates in forward, and its optimisers are differentiable: the outer gradient is of second order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.harness.loops import Loop, steps

USERS, ITEMS, ROWS, SUPPORT, QUERY = 11, 17, 6, 3, 2


class Ratings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, 4), nn.Embedding(ITEMS, 4)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        x = torch.cat([self.users(users.unsqueeze(1).expand_as(items)), self.items(items)], -1)
        return self.head(x).squeeze(-1)


class Adapted(nn.Module):
    """One task is the batch: two inner steps on all support sets (MAML)."""

    def __init__(self, optimizer: type[torch.optim.Optimizer]):
        super().__init__()
        self.net, self.optimizer = Ratings(), optimizer

    def adapted_loss(self, users: Tensor, items: Tensor, ratings: Tensor, asked: Tensor, answers: Tensor) -> Tensor:
        import higher

        inner = self.optimizer(self.net.parameters(), lr=0.1)
        with higher.innerloop_ctx(self.net, inner, copy_initial_weights=False) as (net, step):
            for _ in range(2):
                step.step(F.mse_loss(net(users, items), ratings))
            return F.mse_loss(net(users, asked), answers)

    def forward(self, *batch: Tensor) -> Tensor:
        return self.adapted_loss(*batch)


class AdaptedUsers(Adapted):
    """Each user is a task (MeLU): rows stay on their own."""

    def forward(self, *batch: Tensor) -> Tensor:
        users = range(batch[0].shape[0])
        return torch.stack([self.adapted_loss(*(x[i : i + 1] for x in batch)) for i in users]).mean()


MODELS = {
    "innerloop_ctx, batch": (Adapted, torch.optim.SGD),
    "innerloop_ctx, users": (AdaptedUsers, torch.optim.SGD),
    "innerloop_ctx, Adam": (Adapted, torch.optim.Adam),
}


def meta(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    cls, optimizer = MODELS[name]
    g = torch.Generator().manual_seed(0)
    users = torch.randint(USERS, (ROWS,), generator=g)
    sets = [(torch.randint(ITEMS, (ROWS, n), generator=g), torch.rand(ROWS, n, generator=g)) for n in (SUPPORT, QUERY)]
    return cls(optimizer), (users, *sets[0], *sets[1])


def loop(name: str) -> Loop:
    """The outer loop, as the library's examples write it."""
    model, inputs = meta(name)

    def train(net: nn.Module, batches: Sequence[Any]) -> list[float]:
        return steps(net, batches, torch.optim.Adam(net.parameters(), lr=0.01))

    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return Loop(model, (inputs, {}), train)

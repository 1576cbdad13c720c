"""Modules that are silently wrong, each in one way: what `des.verify` has to find.

`BODIES` has forwards: the original's, and what a wrong module computes in its place, with the same parameters.
`SPOILED` are right ones that something is done to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IDS = torch.randint(1, 11, (6, 3), generator=torch.Generator().manual_seed(3))
"""Of a table of 12 rows, without the first and the last."""


class Net(nn.Module):
    """Two tables and a buffer; its forward is one of `BODIES`."""

    def __init__(self, kind: str, wrong: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.other, self.head = nn.Embedding(12, 4), nn.Embedding(12, 4), nn.Linear(4, 1)
        self.register_buffer("steps", torch.zeros(()))
        self.kind, self.wrong = kind, wrong

    def forward(self, *args: Any) -> Any:
        return BODIES[self.kind][self.wrong](self, *args)

    def score(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).sum(1)).squeeze(1).tanh()


def right(net: Net, ids: Tensor) -> Tensor:
    return net.score(ids)


def doubled(where: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """Rows in which a condition holds are doubled."""
    return lambda net, ids: net.score(ids) * (1 + torch.as_tensor(where(ids)).to(net.head.weight.dtype))


def count_steps(net: Net, ids: Tensor) -> Tensor:
    net.steps = net.steps + 1
    return net.score(ids) + net.steps


def update_list(net: Net, ids: Tensor, state: list[Tensor]) -> Tensor:
    state[0] = net.score(ids)
    return state[0] * 2


def padded(net: Net, ids: Tensor, **padding: int) -> Tensor:
    return net.head(F.embedding_bag(ids, net.table.weight, mode="sum", **padding)).squeeze(1)


def masked(net: Net, ids: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
    return net.head((net.table(ids) * mask.unsqueeze(-1)).sum(1)).squeeze(1)


def two(net: Net, ids: Tensor) -> tuple[Tensor, Tensor]:
    return net.score(ids), net.other(ids).sum((1, 2)).sin()


BODIES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "a branch on many rows": (doubled(lambda ids: ids.shape[0] > 60), right),
    "a branch on few rows": (doubled(lambda ids: ids.shape[0] < 3), right),
    "a branch on id 0": (doubled(lambda ids: (ids == 0).any(1)), right),
    "a branch on the last id": (doubled(lambda ids: (ids == 11).any(1)), right),
    "a branch on equal rows": (doubled(lambda ids: (ids == ids[:1]).all()), right),
    "a longer sequence is cut": (right, lambda net, ids: net.score(ids[:, :3])),
    "a buffer is not updated": (count_steps, lambda net, ids: net.score(ids) + net.steps + 1),
    "a list is not updated": (update_list, lambda net, ids, state: net.score(ids) * 2),
    "an output is frozen": (lambda n, ids: (n.score(ids), ids.sum(1)), lambda n, ids: (n.score(ids), 0 * ids.sum(1))),
    "a number is frozen": (lambda net, ids: (net.score(ids), 2), lambda net, ids: (net.score(ids), 1)),
    "keys of training": (lambda net, ids: {"ab"[net.training]: net.score(ids)}, lambda net, ids: {"b": net.score(ids)}),
    "values of training": (lambda net, ids: net.score(ids) * (2 - net.training), right),
    "another set of ids": (doubled(lambda ids: torch.isin(ids[:, 0], ids[:, 1])), right),
    "padding from the end": (lambda net, ids: padded(net, ids, padding_idx=int(IDS[0, 0]) - 12), padded),
    "lengths of other rows": (masked, lambda net, ids, lengths: masked(net, ids, lengths.flip(0))),
    "an output without gradient": (two, lambda net, ids: (two(net, ids)[0], two(net, ids)[1].detach())),
}


def zero_for_none(module: nn.Module) -> None:
    p = module.get_parameter("other.weight")
    module.register_forward_hook(lambda *_: setattr(p, "grad", torch.zeros_like(p)))


def mixed_rows(module: nn.Module) -> None:
    module.get_parameter("table.weight").register_hook(lambda g: g.mean(0, keepdim=True).expand_as(g))


def averaged(module: nn.Module) -> None:
    for p in module.parameters():
        p.register_hook(lambda g: g / 2)


def narrow_gradient(module: nn.Module) -> None:
    module.get_parameter("head.weight").register_hook(lambda g: g if g.dtype == torch.float64 else g.bfloat16().to(g))


def narrow_start(module: nn.Module) -> None:
    p = module.get_parameter("head.weight")
    with torch.no_grad():
        p.detach().copy_(p.detach().bfloat16())


def lacks_a_name(module: nn.Module) -> None:
    def drop(_module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
        del state["steps"]

    module.register_state_dict_post_hook(drop)


def momentum(module: nn.Module) -> None:
    """In its third forward and later ones a weight moves."""
    calls: list[None] = []

    def move(*_: Any) -> None:
        calls.append(None)
        if len(calls) > 2:
            module.get_parameter("head.bias").detach().add_(1e-6)

    module.register_forward_pre_hook(move)


SPOILED: dict[str, Callable[[nn.Module], None]] = {
    "zero in place of None": zero_for_none,
    "gradients of mixed rows": mixed_rows,
    "a sum that is averaged": averaged,
    "gradients that cross in 16 bits": narrow_gradient,
    "weights that cross in 16 bits": narrow_start,
    "a state dict without a name": lacks_a_name,
    "a weight that moves": momentum,
}


def inputs_of(kind: str) -> tuple[Any, ...]:
    if kind == "a list is not updated":
        return IDS, [torch.zeros(6)]
    return (IDS, torch.tensor([1, 2, 3, 1, 2, 3])) if kind == "lengths of other rows" else (IDS,)

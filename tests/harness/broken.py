"""Modules that are silently wrong, each in one way: what `des.verify` has to find.

`BODIES` has forwards: the original's, and what a wrong module computes in its place, with the same parameters.
`SPOILED` says what is done to a module, that of the wrong forward where there is one. `LOSSES` has which kind of loss a
module is made for in place of another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descompiler.model.random_state import ONE_DRAW

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
        self.calls, self.cache = 0, None

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


def annealed(net: Net, ids: Tensor) -> Tensor:
    net.calls += 1
    return net.score(ids) * min(1.0, net.calls / 3)


def remembers(net: Net, ids: Tensor) -> Tensor:
    x, before = net.score(ids), net.cache
    net.cache = x.detach()
    return x if before is None or not len(before) else x + before.mean()


def beside(net: Net, ids: Tensor, dense: Tensor) -> Tensor:
    return net.head(net.table(ids).sum(1) + dense).squeeze(1).tanh()


Draw = Callable[[int], Tensor]


def permuted(rows: int) -> Tensor:
    return torch.randperm(rows)


def with_another(rows: int) -> Tensor:
    return torch.randint(0, rows, (rows,)) if rows else permuted(0)


def without_replacement(rows: int) -> Tensor:
    return torch.ones(rows).multinomial(rows) if rows else permuted(0)


def plus_drawn(draw: Draw) -> Callable[..., Tensor]:
    """Each row plus one that is drawn over the batch."""

    def body(net: Net, ids: Tensor) -> Tensor:
        x = net.score(ids)
        return x + x[draw(len(x)).to(x.device)]

    return body


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
    "a counter is reset": (annealed, lambda net, ids: net.score(ids) / 3),
    "a memory is reset": (remembers, right),
    "a memory of own rows": (remembers, right),
    "randint from own rows": (plus_drawn(with_another), right),
    "randperm of own rows": (plus_drawn(permuted), right),
    "multinomial of own rows": (plus_drawn(without_replacement), right),
    "second-order terms are dropped": (beside, beside),
    "second-order terms are doubled": (beside, beside),
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


def own_memory(module: nn.Module) -> None:
    """What the next call reads is of a rank's own rows."""
    memory: list[Tensor] = []

    def add(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        before = [x.mean() for x in memory if len(x)]
        memory[:] = [out.detach()]
        return out + sum(before)

    module.register_forward_hook(add)


def draws_of_own(draw: Draw) -> Callable[[nn.Module], None]:
    """The same numbers as one process draws for the batch, for a rank's own rows."""

    def spoil(module: Any) -> None:
        object.__setattr__(module, "plan", replace(module.plan, notes=(*module.plan.notes, f"random: {ONE_DRAW}")))

        def add(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            with module.latest_draws():
                return out + out[draw(len(out))]

        module.register_forward_hook(add)

    return spoil


class OtherSecond(torch.autograd.Function):
    """The identity, with its gradient; of the gradient's own gradient only a share goes on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.detach() + ctx.share * (grad - grad.detach()), None


def second_order(share: float) -> Callable[[nn.Module], None]:
    """Of what the outputs' gradients are made of, only a share is seen by a second backward."""

    def through(_module: nn.Module, args: Any) -> Any:
        return args[0], OtherSecond.apply(args[1], share)

    return lambda module: module.register_forward_pre_hook(through)


SPOILED: dict[str, Callable[[nn.Module], None]] = {
    "zero in place of None": zero_for_none,
    "gradients of mixed rows": mixed_rows,
    "a sum that is averaged": averaged,
    "gradients that cross in 16 bits": narrow_gradient,
    "weights that cross in 16 bits": narrow_start,
    "a state dict without a name": lacks_a_name,
    "a weight that moves": momentum,
    "a memory of own rows": own_memory,
    "randint from own rows": draws_of_own(with_another),
    "randperm of own rows": draws_of_own(permuted),
    "multinomial of own rows": draws_of_own(without_replacement),
    "second-order terms are dropped": second_order(0.0),
    "second-order terms are doubled": second_order(2.0),
}


LOSSES: dict[str, dict[str, str]] = {
    "a mean over ranks as a sum": {"rank_mean": "sum"},
    "a mean over rows as one over ranks": {"row_mean": "rank_mean"},
    "a mean over rows as a sum": {"row_mean": "sum"},
    "a sum as a mean over rows": {"sum": "row_mean"},
}


EVERYTHING = tuple(dict.fromkeys((*BODIES, *SPOILED, *LOSSES)))


VARIED = (
    "a counter is reset",
    "a memory is reset",
    "randperm of own rows",
    "multinomial of own rows",
    "second-order terms are doubled",
    "a mean over rows as a sum",
    "a sum as a mean over rows",
)
"""What differs from another way in what it says, not in what has to be seen."""


def inputs_of(kind: str) -> tuple[Any, ...]:
    if kind == "a list is not updated":
        return IDS, [torch.zeros(6)]
    if kind.startswith("second-order"):
        return IDS, IDS[:, :1] * torch.linspace(-0.3, 0.3, 4)
    return (IDS, torch.tensor([1, 2, 3, 1, 2, 3])) if kind == "lengths of other rows" else (IDS,)

"""FTRL-Proximal (McMahan et al., 2013, "Ad Click Prediction: a View from the Trenches", algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from descompiler.errors import InputError, UnsupportedError
from descompiler.ops.local import plain, put_rows, rows_at

STATES = ("z", "n")
"""What it keeps of each element."""

OPTIONS = {"lr": 0.1, "beta": 1.0, "l1": 0.0, "l2": 0.0}


class FTRL(Optimizer):
    """FTRL-Proximal: a rate for each element, and weights that ``l1`` holds at zero exactly.

    Of each element it keeps ``z``, ``n``, zeros at first. With the gradient g, the weight w, and alpha as ``lr``::

        n' = n + g^2
        z' = z + g - (sqrt(n') - sqrt(n)) / lr * w
        w' = 0                                                          where |z'| <= l1
             (sign(z') * l1 - z') / ((beta + sqrt(n')) / lr + l2)       elsewhere

    The paper begins with weights of zero. Here a weight that is not zero says what z is: the one of which the last line
    makes that weight, ``-w * ((beta + sqrt(n)) / lr + l2) - sign(w) * l1``. After a step that is the z that it has
    left; before the first it lets training start from the weight as it was initialised, after a change of ``lr`` or of
    the weight itself from there. A weight of zero goes on with the z that is kept.

    What has a gradient of zero does not move, so sparse gradients and dense ones of the same values are the same step,
    and of a sparse one only rows that have entries are touched, each once. With ``lr=0`` nothing moves.

    Parameters
    ----------
    params : iterable
        Parameters or groups; `descompiler.DynamicEmbedding`'s ``weight`` too.
    lr : float
        The paper's alpha.
    beta : float
        Makes the first steps of an element smaller.
    l1, l2 : float
        Strengths of both regularisations.
    maximize : bool

    Raises
    ------
    InputError
        For an option out of its range.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.tensor([0.5, -0.5, 0.0]))
    >>> opt = FTRL([weight], lr=0.5, l1=0.25)
    >>> weight.grad = torch.tensor([0.0, -4.0, 0.2])
    >>> opt.step()
    >>> weight.tolist()
    [0.5, -0.10000000149011612, 0.0]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = OPTIONS["lr"],
        beta: float = OPTIONS["beta"],
        l1: float = OPTIONS["l1"],
        l2: float = OPTIONS["l2"],
        *,
        maximize: bool = False,
    ):
        options = {"lr": lr, "beta": beta, "l1": l1, "l2": l2}
        check(options)
        super().__init__(params, {**options, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises
        ------
        InputError
            For an option out of its range.
        """
        check(self.defaults | {n: x for n, x in param_group.items() if n != "params"})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; what ``closure`` returns.

        Raises
        ------
        UnsupportedError
            For complex parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)
        return loss

    def _step(self, p: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[p]
        if not state:
            if p.is_complex():
                raise UnsupportedError("FTRL of a complex parameter: signs and l1 are of real numbers")
            state.update({name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in STATES})
        with torch._C.DisableTorchFunctionSubclass():  # of a piece, its own memory
            weight, gradient = plain(p), p.grad
            states = [plain(state[name]) for name in STATES]
            assert gradient is not None
            if gradient.is_sparse and gradient.sparse_dim() == 1:
                gradient = gradient.coalesce()
                values = -gradient.values() if group["maximize"] else gradient.values()
                update_rows(weight, states, gradient.indices()[0], values, group)
            else:
                gradient = gradient.to_dense() if gradient.is_sparse else gradient
                gradient = -gradient if group["maximize"] else gradient
                for x, new in zip((weight, *states), _updated((weight, *states), gradient, group), strict=True):
                    x.copy_(new)


def check(options: Mapping[str, Any]) -> None:
    """Raise unless FTRL has steps with these options."""
    for name in OPTIONS:
        if not options[name] >= 0 or (name == "lr" and not options[name]):
            raise InputError(f"FTRL: {name}={options[name]}; it is {'above' if name == 'lr' else 'at least'} 0")


def update_rows(
    weight: Tensor, states: list[Tensor], rows: Tensor, gradient: Tensor, options: Mapping[str, Any]
) -> None:
    """One step of some rows, each of which is there once."""
    every = (weight, *states)
    found = [rows_at(x, rows) for x in every]
    for x, new in zip(every, _updated(found, gradient, options), strict=True):
        put_rows(x, rows, new)


def _updated(found: Sequence[Tensor], gradient: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What weights, z and n are after a step."""
    weight, z, n = found
    lr, beta, l1, l2 = (options[name] for name in OPTIONS)
    if not lr:
        return weight, z, n
    total = n + gradient * gradient
    before, root = n.sqrt(), total.sqrt()
    started = -weight * ((before + beta) / lr + l2) - weight.sign() * l1
    z_new = z.where(weight == 0, started) + gradient - (root - before) / lr * weight
    w_new = ((z_new.sign() * l1 - z_new) / ((root + beta) / lr + l2)).masked_fill(z_new.abs() <= l1, 0.0)
    moves = gradient != 0
    return w_new.where(moves, weight), z_new.where(moves, z), total

"""What optimisers keep for the rows of dynamic tables: it grows with them, and new rows begin with what it begins with.

Two hooks of all optimisers do that: before a step the state gets the parameter's rows, after it the table's step ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from descompiler.dynamic.rows import Rows
from descompiler.dynamic.storage import Growing
from descompiler.errors import UnsupportedError
from descompiler.ops.local import plain
from descompiler.optim import FTRL
from descompiler.optim.ftrl import STATES
from descompiler.optim.kinds import called

INITIAL: dict[type[Optimizer], Callable[[Mapping[str, Any]], dict[str, float]]] = {
    SGD: lambda defaults: {},
    Adagrad: lambda defaults: {"sum": float(defaults["initial_accumulator_value"])},
    SparseAdam: lambda defaults: {"exp_avg": 0.0, "exp_avg_sq": 0.0},
    FTRL: lambda defaults: dict.fromkeys(STATES, 0.0),  # a row's weight says the rest
}
"""Optimisers whose steps on sparse gradients change the gradient's rows alone; how their state of rows begins."""


class InBackward(Optimizer):
    """An optimiser that steps in backward, and ends tables' steps there; its ``step`` is none.

    ``kept_as`` is whose state it keeps, ``begins`` how that begins, by name.
    """

    kept_as: str
    begins: Mapping[str, float]


def name_of(optimizer: Optimizer) -> str:
    """Whose state an optimiser keeps."""
    return optimizer.kept_as if isinstance(optimizer, InBackward) else type(optimizer).__name__


def initial_of(optimizer: Optimizer) -> dict[str, float]:
    """How what an optimiser keeps for a row begins, by its names.

    Raises
    ------
    UnsupportedError
        For optimisers that would be something else on these rows.
    """
    if isinstance(optimizer, InBackward):
        return dict(optimizer.begins)
    name, known = type(optimizer).__name__, ", ".join(map(called, INITIAL))
    if type(optimizer) not in INITIAL:  # a class of its own may do more, where it has one as its base
        raise UnsupportedError(
            f"{name} steps on the weight of a dynamic table: of its state it is not known how new rows begin. Use "
            f"{known} for dynamic tables"
        )
    return INITIAL[type(optimizer)](optimizer.defaults)


_TABLES: WeakIdKeyDictionary = WeakIdKeyDictionary()
_HOOKS: list[Any] = []


class Stepped(Protocol):
    """A table, as its optimiser's steps know it."""

    states: States

    def after_optimizer(self) -> None:
        """End the table's step."""
        ...


class States:
    """The states of a table's rows in the optimisers that have stepped."""

    def __init__(self, rows: Rows):
        self._rows = rows
        self._held: weakref.WeakKeyDictionary[Optimizer, dict[str, Growing]] = weakref.WeakKeyDictionary()
        self.in_backward: weakref.ref[Optimizer] | None = None
        """What steps on the rows in backward, so that nothing else does."""
        self.fresh: list[Tensor] = []
        """Slots that have got rows since the last step of an optimiser."""

    def before_step(self, optimizer: Optimizer, group: Mapping[str, Any]) -> None:
        """Let the optimiser's state have the parameter's rows, and begin anew for those that are new.

        Raises
        ------
        UnsupportedError
            For optimisers that would be something else on these rows, and for dense gradients.
        """
        self._check(optimizer, group)
        self._rows.follow()
        self._rows.notice()
        self._held.setdefault(optimizer, {})
        fresh = torch.cat(self.fresh) if self.fresh else None
        for known, held in self._held.items():
            initial = initial_of(known)
            state = known.state.get(self._rows.parameter, {})
            for name, value in initial.items():
                if name in state:
                    self._check_state(known, name, state[name])
                    grown = self._grown(held, name, plain(state[name]))
                    if fresh is not None:
                        grown.index_fill_(0, fresh.to(grown.device), value)
                    state[name] = self._rows.marked(grown)
        self.fresh.clear()
        self._rows.settle()

    def memory_bytes(self) -> int:
        """Bytes of what optimisers keep."""
        states = [(o.state.get(self._rows.parameter, {}), initial_of(o)) for o in self._held]
        return sum(plain(state[name]).nbytes for state, initial in states for name in initial if name in state)

    def _grown(self, held: dict[str, Growing], name: str, state: Tensor) -> Tensor:
        """A state of as many rows as the parameter; where it grows without a copy, once it has grown."""
        self._rows.need(len(state))  # loaded from a table that had more room
        size = len(self._rows.tensor)
        shared = not state.is_cuda and state.is_shared()  # it was sent to a process, where the table goes its own way
        if len(state) == size and not shared:
            return state
        growing = held.get(name)
        if growing is None or shared or growing.tensor.data_ptr() != state.data_ptr():  # loaded, or the optimiser's own
            growing = held[name] = Growing.holding(state, self._rows.most)
        growing.grow(size)
        return growing.tensor

    def _check_state(self, optimizer: Optimizer, name: str, state: Tensor) -> None:
        if type(state) is not type(self._rows.marked(plain(state))):
            raise UnsupportedError(
                f"{name!r} of {type(optimizer).__name__} for the weight of a dynamic table is not this rank's: it was "
                "loaded from elsewhere, and is of other rows. Load a checkpoint with des.load(module, optimizer, path)"
            )

    def _check(self, optimizer: Optimizer, group: Mapping[str, Any]) -> None:
        initial_of(optimizer)
        name = type(optimizer).__name__
        other = None if self.in_backward is None else self.in_backward()
        if other is not None and other is not optimizer:
            raise UnsupportedError(
                f"{name} steps on the weight of a dynamic table that is updated in backward already, and whose step "
                f"has ended there: make {name} of the other parameters, or unfuse() that optimiser first"
            )
        for option in ("momentum", "weight_decay"):
            if group.get(option):
                raise UnsupportedError(
                    f"{name}({option}={group[option]}) on the weight of a dynamic table changes rows that the step has "
                    f"not looked up: give the table a parameter group with {option}=0"
                )
        self._rows.gradient()


def step_with(parameter: nn.Parameter, table: Stepped) -> None:
    """Let steps of the parameter's optimiser be steps of the table."""
    _TABLES[parameter] = weakref.ref(table)
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_before))
        _HOOKS.append(register_optimizer_step_post_hook(_after))


def _stepping(optimizer: Optimizer) -> Iterator[tuple[Stepped, Mapping[str, Any]]]:
    """Tables whose weights an optimiser has, and steps on now, with their groups."""
    if not _TABLES or isinstance(optimizer, InBackward):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            reference = _TABLES.get(parameter)
            if reference is not None and (table := reference()) is not None:
                yield table, group


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    tables = list(_stepping(optimizer))
    if not tables:
        return None

    def prepare() -> None:
        for table, group in tables:
            table.states.before_step(optimizer, group)

    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args begins with the optimiser
    if closure is None:
        prepare()
        return None

    def followed() -> Any:
        loss = closure()  # looks up, too
        prepare()
        return loss

    return args[:1], kwargs | {"closure": followed}


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for table, _ in _stepping(optimizer):
        table.after_optimizer()

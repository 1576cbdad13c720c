"""Optimisers of tables that step in backward: the rows that were looked up are updated, and no gradient is kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.eager.held import Whose, held
from descompiler.eager.piece import Piece, plain
from descompiler.errors import InputError, PlanError, UnsupportedError
from descompiler.layout.pieces import Pieces
from descompiler.module.distributed import DistributedModule
from descompiler.module.installed import module_of


class FusedOptimizer(torch.optim.Optimizer):
    """What `fuse_optimizer` returns: it has the groups and the state, for schedulers and checkpoints.

    ``step`` and ``zero_grad`` do nothing: the step was made in backward.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        options: dict[str, Any],
        update: Update,
        row_wise: bool,
        kept_by: list[torch.optim.Optimizer],
    ):
        super().__init__(parameters, options)
        self._update, self._handles, self._kept_by = update, [], kept_by
        kept_by.append(self)  # a parameter's hooks would be gone with an optimiser that nobody keeps, without a word
        me = weakref.ref(self)

        def step(p: Tensor) -> None:
            if (fused := me()) is not None:
                fused._step_of(p)

        for p in parameters:
            for name in update.states:
                self.state[p][name] = _numbers_of_rows(p) if row_wise else torch.zeros_like(p)
                self.state[p][name].fill_(options.get("initial_accumulator_value", 0.0))
            self.state[p]["step"] = torch.zeros(())
            self._handles.append(p.register_post_accumulate_grad_hook(step))

    @torch.no_grad()
    def _step_of(self, p: Tensor) -> None:
        gradient, p.grad = p.grad, None
        if gradient is None:
            return
        rows, values = _rows_of(gradient, self._update.linear)
        options = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        state = self.state[p]
        state["step"] += 1
        if options["maximize"]:
            values = -values
        states = [plain(state[name]) for name in self._update.states]
        self._update.of(Step(plain(p), rows, values, states, float(state["step"]), options))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Nothing: rows were updated in backward."""
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: no gradient is kept."""

    def unfuse(self) -> None:
        """Leave gradients where they are from now on; those of rows alone stay so."""
        for handle in self._handles:
            handle.remove()
        if self in self._kept_by:
            self._kept_by.remove(self)


def _rows_of(gradient: Tensor, as_they_come: bool) -> tuple[Tensor, Tensor]:
    """Rows that have a gradient, each once, and their gradients; or ``as_they_come``, some of them in several parts."""
    if gradient.is_sparse:
        if not as_they_come:
            gradient = gradient.coalesce()  # an id that was looked up twice is one row
        return gradient._indices()[0], gradient._values()
    gradient = plain(gradient)  # of a table that every rank holds; where it is zero nothing moves
    rows = gradient.flatten(1).any(1).nonzero()[:, 0]
    return rows, gradient[rows]


@dataclass
class Step:
    """One step of one table: the rows that have gradients, each once unless the update is linear.

    Attributes
    ----------
    states : list of Tensor
        Of the optimiser, by `Update.states`.
    number : float
        Of the table's steps, from 1.
    """

    table: Tensor
    rows: Tensor
    gradient: Tensor
    states: list[Tensor]
    number: float
    options: dict[str, Any]


@dataclass(frozen=True)
class Update:
    """How rows of a table are updated.

    Attributes
    ----------
    states : tuple of str
        Tensors of the optimiser, of the table's shape, or of one number a row.
    options : mapping of str
        With torch's defaults.
    linear : bool
        In gradients: parts of a row's may be applied one by one, and are not sorted and summed first.
    """

    of: Callable[[Step], None]
    states: tuple[str, ...]
    options: Mapping[str, Any]
    linear: bool = False


def _sgd(s: Step) -> None:
    s.table.index_add_(0, s.rows, s.gradient, alpha=-s.options["lr"])


def _adagrad(s: Step) -> None:
    """Adagrad (Duchi et al., 2011), as `torch.optim.Adagrad` updates rows of sparse gradients."""
    (total,), square = s.states, s.gradient.square()
    if total.shape[1:] != square.shape[1:]:  # row-wise: the mean of a row's
        square = square.mean(1, keepdim=True)
    total.index_add_(0, s.rows, square)
    root = total.index_select(0, s.rows).sqrt_().add_(s.options["eps"])
    rate = s.options["lr"] / (1 + (s.number - 1) * s.options["lr_decay"])
    s.table.index_add_(0, s.rows, s.gradient / root, alpha=-rate)


def _adam(s: Step) -> None:
    """Adam (Kingma and Ba, 2014) of the rows that have gradients, as `torch.optim.SparseAdam`."""
    (beta1, beta2), g = s.options["betas"], s.gradient
    first, second = (x.index_select(0, s.rows) for x in s.states)
    first.lerp_(g, 1 - beta1)
    second.lerp_(g.square(), 1 - beta2)
    for state, x in zip(s.states, (first, second), strict=True):
        state.index_copy_(0, s.rows, x)
    rate = s.options["lr"] * (1 - beta2**s.number) ** 0.5 / (1 - beta1**s.number)
    s.table.index_add_(0, s.rows, first / second.sqrt_().add_(s.options["eps"]), alpha=-rate)


_ADAM = Update(_adam, ("exp_avg", "exp_avg_sq"), {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8})


_ADAGRAD = {"lr": 1e-2, "eps": 1e-10, "lr_decay": 0.0, "initial_accumulator_value": 0.0}


KINDS: dict[type[torch.optim.Optimizer], Update] = {
    torch.optim.SGD: Update(_sgd, (), {"lr": 1e-3}, linear=True),
    torch.optim.Adagrad: Update(_adagrad, ("sum",), _ADAGRAD),
    torch.optim.Adam: _ADAM,
    torch.optim.SparseAdam: _ADAM,
}
"""What tables may be updated by."""


def fuse_optimizer(
    module: nn.Module,
    kind: type[torch.optim.Optimizer],
    *,
    params: Iterable[nn.Parameter] | None = None,
    row_wise: bool = False,
    **options: Any,
) -> FusedOptimizer:
    """Update rows of tables in backward, as soon as their gradient is there; no gradient of a table's size is made.

    Each backward is a step: gradients are not accumulated over several. Weights are those of the optimiser's own step,
    duplicate ids included: of `torch.optim.SGD`, `torch.optim.Adagrad`, and, for Adam of tables with sparse gradients,
    of `torch.optim.SparseAdam`, which leaves rows alone that were not looked up.

    Tables with dense gradients, as ``nn.Embedding`` makes them, are named by ``params``. SGD and Adagrad move no row
    without a gradient, so nothing else changes: those that ranks hold in part have sparse gradients from now on. Of a
    table that every rank holds whole ranks average the whole gradient, as before, and drop it. Adam would move rows
    that were not looked up, by what is left of earlier gradients: it is refused for them; ask for
    `torch.optim.SparseAdam` if rows that were not looked up may stay. Every rank makes the same call.

    Parameters
    ----------
    module : DistributedModule, or a model that was compiled in place
    kind : type
        `torch.optim.SGD`, `torch.optim.Adagrad`, `torch.optim.Adam` or `torch.optim.SparseAdam`.
    params : iterable of nn.Parameter, optional
        Tables; by default all that have sparse gradients. Give the others to an optimiser of their own.
    row_wise : bool
        Adagrad with one number for each row, the mean of its squares.
    **options
        As the optimiser's: ``lr``, ``eps``, ``betas``, ``lr_decay``, ``initial_accumulator_value``, ``maximize``.

    Returns
    -------
    FusedOptimizer
        For schedulers and checkpoints.

    Raises
    ------
    InputError
        For another optimiser or option, a parameter that is no table, or Adam of dense gradients.
    UnsupportedError
        For ``row_wise`` where whole rows are on no rank, and for tables that are used beside their lookups.
    """
    compiled = module_of(module)
    if kind not in KINDS:
        names = ", ".join(f"torch.optim.{k.__name__}" for k in KINDS)
        raise InputError(f"fuse_optimizer: {getattr(kind, '__name__', kind)!r} is none of {names}")
    update = KINDS[kind]
    known = {**update.options, "maximize": False}
    if unknown := sorted(set(options) - set(known)):
        raise InputError(
            f"fuse_optimizer: of torch.optim.{kind.__name__}'s options it takes {', '.join(known)}, not {unknown[0]}"
        )
    if row_wise and kind is not torch.optim.Adagrad:
        raise InputError("fuse_optimizer: one number for each row is Adagrad's")
    held_names = {id(p): n for n, p in compiled.named_parameters()}
    sparse = [p for n, p in compiled.named_parameters() if n in compiled.plan.sparse and p.requires_grad]
    chosen = sparse if params is None else list(params)
    dense = []
    for p in chosen:
        if (name := held_names.get(id(p))) is None:
            raise InputError(f"fuse_optimizer: a tensor of shape {tuple(p.shape)} is no parameter of the module")
        if any(p is q for fused in compiled._fused for g in fused.param_groups for q in g["params"]):
            raise InputError(f"fuse_optimizer: {name!r} is updated in backward already: unfuse() that optimiser first")
        if name in compiled._sparse or not any(p is q for q in sparse):
            _check_dense(compiled, name, kind)
            dense.append(name)
        if row_wise and isinstance(p, Piece) and p.pieces.dim != 0:
            raise UnsupportedError(
                f"one number for each row, and {name!r}, of which each rank holds some columns: a row's mean is on no "
                "rank. Pin a form that divides rows (docs/forms.md), or plan with optimizer='rowwise_adagrad'"
            )
    if not chosen:
        raise InputError(
            "fuse_optimizer: the module has no table with sparse gradients (sparse=True); name others, "
            "params=[module.item.weight]"
        )
    _let_be_sparse(compiled, [name for name in dense if not _is_averaged(compiled, name)])
    return FusedOptimizer(chosen, known | options, update, row_wise, compiled._fused)


def _check_dense(compiled: DistributedModule, name: str, kind: type[torch.optim.Optimizer]) -> None:
    """Raise unless a table's dense gradient says nothing of rows that are not looked up, nor does the optimiser."""
    table = next((t for t in compiled.plan.tables if t.name == name), None)
    if table is None or not table.vectors:
        raise InputError(
            f"fuse_optimizer: {name!r} is no table that is looked up (nn.Embedding, nn.EmbeddingBag): leave it to "
            "another optimiser with params="
        )
    if not compiled.predicts_traffic:
        raise UnsupportedError(
            f"fuse_optimizer: gradients of {name!r} are dense, and the module runs the user's own forward: make the "
            "table with sparse=True"
        )
    if table.whole:
        raise UnsupportedError(
            f"fuse_optimizer: {name!r} is used beside its lookups, so that each of its rows has a gradient: leave it "
            "to another optimiser with params="
        )
    if kind is torch.optim.Adam:
        raise InputError(
            f"fuse_optimizer: gradients of {name!r} are dense, and torch.optim.Adam moves rows that were not looked up "
            "by what is left of earlier gradients. torch.optim.SparseAdam leaves them alone: ask for it by name"
        )
    if kind is torch.optim.SparseAdam and _is_averaged(compiled, name):
        raise UnsupportedError(
            f"fuse_optimizer: every rank holds {name!r} whole, and from the average of dense gradients nobody knows "
            "which rows were looked up: make the table with sparse=True, or pin another form in plan="
        )


def _is_averaged(compiled: DistributedModule, name: str) -> bool:
    """Whether ranks average the whole gradient of a table."""
    split = compiled.plan.splits[name]
    gathers = split.gathered and not compiled._in_place
    return split.pieces.is_replicated and compiled._runtime.ranks > 1 and not gathers


def _let_be_sparse(compiled: DistributedModule, names: Iterable[str]) -> None:
    """Emit the module's programs anew, with sparse gradients of these tables; what crosses may be other bytes."""
    before, now = compiled._sparse, compiled._sparse.union(names)
    if now == before:
        return
    compiled._sparse = now
    try:
        emitted = compiled._sized().emitted
    except PlanError as error:
        compiled._sparse = before
        raise UnsupportedError(f"fuse_optimizer: with gradients of rows alone, {error}") from error
    tables = [replace(t, table=replace(t.table, sparse=t.sparse or t.name in now)) for t in compiled.plan.tables]
    plan = replace(compiled.plan, tables=tables, layout=emitted.layout, labels=emitted.labels)
    object.__setattr__(compiled, "plan", plan)


def _numbers_of_rows(p: Tensor) -> Tensor:
    """``[rows, 1]``: a number for each row of a table, cut as the table is."""
    numbers = plain(p).detach().new_zeros(len(plain(p)), 1)
    if not isinstance(p, Piece) or p.runtime is None or p.runtime.ranks == 1:
        return numbers
    result = held(numbers, p)
    pieces = Pieces((p.pieces.shape[0], 1), 0, p.pieces.division, p.pieces.ranks)
    result.whose = Whose(p.original, pieces, p.rank, p.runtime)
    return result

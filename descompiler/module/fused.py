"""Optimisers of tables that step in backward: the rows that were looked up are updated, and no gradient is kept."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from descompiler.dynamic.states import InBackward
from descompiler.dynamic.table import Table
from descompiler.eager.held import Whose, held
from descompiler.eager.piece import Piece
from descompiler.errors import InputError, UnsupportedError
from descompiler.layout.pieces import Pieces
from descompiler.module import fbgemm
from descompiler.module.distributed import DistributedModule
from descompiler.module.fused_dense import check_dense, is_averaged, let_be_sparse
from descompiler.module.fused_dynamic import DynamicRows, Taken
from descompiler.module.installed import module_of
from descompiler.module.updates import KINDS, Step, Update, as_one, rows_of
from descompiler.ops.local import plain
from descompiler.ops.together import Mixed, Part, flat, on_device, summed, update_by
from descompiler.ops.unique import Unique
from descompiler.optim.kinds import called
from descompiler.runtime.agreement import say
from descompiler.runtime.backward import TakesNone


class FusedOptimizer(InBackward):
    """What `fuse_optimizer` returns: it has the groups and the state, for schedulers and checkpoints.

    ``step`` and ``zero_grad`` do nothing: the step was made in backward. Tables of one width and dtype lie one behind
    the other in one storage, and so does what the optimiser keeps of them; their rows are updated together.

    Attributes
    ----------
    backend : {"fbgemm", "torch"}
        Whose kernels update them, where FBGEMM's can.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        options: dict[str, Any],
        update: Update,
        row_wise: bool,
        kept_by: list[torch.optim.Optimizer],
        kernel: Callable[[Step], bool] | None = None,
        tables: Mapping[int, Table] = {},
    ):
        self._handles: list[Any] = []
        self._dynamic = {number: DynamicRows(table, update, row_wise) for number, table in tables.items()}
        self._ended = 0  # the backward with which dynamic tables' latest step has
        self.begins: Mapping[str, float] = dict.fromkeys(
            update.states, float(options.get("initial_accumulator_value", 0.0))
        )
        self.kept_as = f"row-wise {update.kept_as}" if row_wise else update.kept_as
        super().__init__(parameters, options)
        self._update, self._kernel, self._kept_by = update, kernel, kept_by
        self.backend = TORCH if kernel is None else FBGEMM
        kept_by.append(self)  # a parameter's hooks would be gone with an optimiser that nobody keeps, without a word
        self._waiting: dict[int, _Waiting] = {}  # by backward
        came = _Came(weakref.ref(self))
        for p in parameters:
            self._handles.append(p.register_post_accumulate_grad_hook(came))
            if (rows := self._dynamic.get(id(p))) is not None:
                rows.table.states.in_backward = weakref.ref(self)
                continue
            for name, value in self.begins.items():
                self.state[p][name] = (_numbers_of_rows(p) if row_wise else torch.zeros_like(p)).fill_(value)
            self.state[p]["step"] = torch.zeros(())
            update_by(p, self)
        self._addresses: list[int] = []
        self._steps = torch.zeros(0)
        self._storages: list[tuple[int, list[Tensor]]] = []
        self._places: dict[int, tuple[int, int, int]] = {}
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            self._stored()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused but for the first: `fuse_optimizer` makes an optimiser of tables, whose gradients it waits for.

        Raises
        ------
        InputError
            Always.
        """
        if hasattr(self, "_waiting"):
            raise InputError("add_param_group: fuse_optimizer(module, kind, params=[...]) fuses further tables")
        super().add_param_group(param_group)

    def _gradient_came(self, p: Tensor) -> None:
        """A table's gradient is there, as it is to others."""
        with torch._C.DisableTorchFunctionSubclass():
            if p.grad is None:  # its rows came by themselves
                return
        if (rows := self._dynamic.get(id(p))) is not None:
            self._under_way().rows.setdefault(id(p), []).append(rows.take())
            return
        gradient, p.grad = p.grad, None
        assert gradient is not None
        self.came([Part.of(p, *rows_of(gradient))])

    def takes(self, tables: Sequence[Tensor]) -> bool:
        """Whether rows of tables may come by themselves: no hook but this optimiser's waits for their gradients."""
        if not self._handles:
            return False
        with torch._C.DisableTorchFunctionSubclass():
            for t in tables:
                if t._backward_hooks or len(t._post_accumulate_grad_hooks or ()) != 1 or t.grad is not None:
                    return False
        return True

    def came(self, parts: Sequence[Part[Tensor] | Mixed[Tensor]]) -> None:
        """Rows of tables and their gradients: applied with the others of the same backward, at its end."""
        self._under_way().parts += parts

    def _under_way(self) -> _Waiting:
        """What waits for the end of the backward that is under way."""
        backward = torch._C._current_graph_task_id()
        if backward not in self._waiting:
            for failed in sorted(self._waiting)[:-MOST_NESTED]:  # what a backward left that did not come to its end
                del self._waiting[failed]
            self._waiting[backward] = _Waiting()
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._apply, backward))
        return self._waiting[backward]

    @torch.no_grad()
    def _apply(self, backward: int) -> None:
        came = self._waiting.pop(backward)
        if came.parts:
            with torch._C.DisableTorchFunctionSubclass():  # of a piece, its own memory
                self._apply_parts(came.parts)
        if backward == self._ended:  # averages of whole gradients come when all else has been applied
            return
        self._ended = backward
        for group in self.param_groups:
            for p in group["params"]:
                if (rows := self._dynamic.get(id(p))) is not None:
                    rows.step(self, group, came.rows.get(id(p), ()))

    def _apply_parts(self, came: list[Part[Tensor] | Mixed[Tensor]]) -> None:
        storages, places = self._stored()
        here = [[places[id(table)] for table in p.tables] for p in came]
        stepped = {number for of_part in here for _, _, number in of_part}
        self._steps[on_device(tuple(stepped), self._steps.device)] += 1
        steps = self._steps.tolist()
        # by storage, and steps that a table has made: parts, and where their tables begin
        parts: dict[tuple[int, float], list[tuple[Part[Tensor] | Mixed[Tensor], list[int]]]] = {}
        for p, of_part in zip(came, here, strict=True):
            of_tables = [((storage, steps[number]), start) for storage, start, number in of_part]
            if p.ids.shape[0] and len({key for key, _ in of_tables}) == 1:
                parts.setdefault(of_tables[0][0], []).append((p, [start for _, start in of_tables]))
            elif p.ids.shape[0]:
                for i, (key, start) in enumerate(of_tables):
                    parts.setdefault(key, []).append((p.of_table(i), [start]))
        known: list[tuple[Tensor, Unique]] = []
        for (storage, number), several in parts.items():
            group, (table, *states) = storages[storage]
            options = self.param_groups[group]  # as they are now: a state that is loaded brings groups of its own
            rows, values = flat(*zip(*several, strict=True))
            step = Step(table, rows, -values if options["maximize"] else values, states, number, options)
            if self._kernel is not None and self._kernel(step):
                continue
            if not self._update.linear:
                step.rows, step.gradient = summed(step.rows, step.gradient, known)
            self._update.of(step)

    def _stored(self) -> tuple[list[tuple[int, list[Tensor]]], dict[int, tuple[int, int, int]]]:
        """Each storage's parameter group, table and states, as one; and where each table lies: storage, first row, and
        which of the numbers of steps is its own.

        They are found anew where somebody has put a table or a state elsewhere.
        """
        if self._places and self._addresses == self._where():
            return self._storages, self._places
        alike: dict[Any, list[Tensor]] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if id(p) in self._dynamic:
                    continue
                kept = [self.state[p][n] for n in self._update.states]
                of = [(x.dtype, x.device, x.shape[1:], x.is_contiguous()) for x in (p, *kept)]
                alike.setdefault((number, *of), []).append(p)
        every = [p for tables in alike.values() for p in tables]
        if every:
            self._steps = torch.stack([self.state[p]["step"].float() for p in every])
        numbers = {id(p): i for i, p in enumerate(every)}
        for p, step in zip(every, self._steps, strict=True):
            self.state[p]["step"] = step
        self._storages, self._places = [], {}
        for (number, *_), tables in alike.items():
            starts = itertools.accumulate((p.shape[0] for p in tables), initial=0)
            for p, start in zip(tables, starts, strict=False):
                self._places[id(p)] = len(self._storages), start, numbers[id(p)]
            states = ([self.state[p][n] for p in tables] for n in self._update.states)
            self._storages.append((number, [as_one(x) for x in (tables, *states)]))
        self._addresses = self._where()
        return self._storages, self._places

    def _where(self) -> list[int]:
        """Where tables and states lie; as long as one is held as a part of a storage nothing else can lie there."""
        every: list[Tensor] = []
        for table, states in self.state.items():  # nothing is looked up by a tensor, which asks Python for its hash
            if id(table) not in self._dynamic:
                every += (table, *states.values())
        return [*map(torch.Tensor.data_ptr, every)]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Nothing: rows were updated in backward."""
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: no gradient is kept."""

    def unfuse(self) -> None:
        """Leave gradients where they are from now on; those of rows alone stay so."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for rows in self._dynamic.values():
            rows.table.states.in_backward = None
        if self in self._kept_by:
            self._kept_by.remove(self)


@dataclass
class _Waiting:
    """What a backward has brought: rows of tables, and of dynamic ones by parameter."""

    parts: list[Part[Tensor] | Mixed[Tensor]] = field(default_factory=list)
    rows: dict[int, list[Taken]] = field(default_factory=dict)


class _Came(TakesNone):
    """The hook on a table that waits for its gradient, for an optimiser that does not live because of it."""

    def __init__(self, optimizer: weakref.ref[FusedOptimizer]):
        self._optimizer = optimizer

    def __call__(self, p: Tensor) -> None:
        if (fused := self._optimizer()) is not None:
            fused._gradient_came(p)


MOST_NESTED = 4
"""Backwards that may be on their way inside of each other."""

AUTO, FBGEMM, TORCH = BACKENDS = "auto", "fbgemm", "torch"


def fuse_optimizer(
    module: nn.Module,
    kind: type[torch.optim.Optimizer],
    *,
    params: Iterable[nn.Parameter] | None = None,
    row_wise: bool = False,
    backend: str = AUTO,
    **options: Any,
) -> FusedOptimizer:
    """Update rows of tables at the end of backward, of all tables together; no gradient of a table's size is made.

    Each backward is a step: gradients are not accumulated over several. One that fails updates nothing. Tables of one
    width and dtype, and what the optimiser keeps of them, are views of one storage from now on. Weights are those of
    the optimiser's own step, duplicate ids included: of `torch.optim.SGD`, `torch.optim.Adagrad`, `des.optim.FTRL`,
    and, for Adam of tables with sparse gradients, of `torch.optim.SparseAdam`, which leaves rows alone that were not
    looked up. Dynamic tables are updated where they are, and their step ends: of all that the optimiser has, with a
    backward that came to any of its tables.

    Tables with dense gradients, as ``nn.Embedding`` makes them, are named by ``params``. SGD, Adagrad and FTRL move no
    row without a gradient, so nothing else changes: those that ranks hold in part have sparse gradients from now on. Of
    a table that every rank holds whole ranks average the whole gradient, as before, and drop it. Adam would move rows
    that were not looked up, by what is left of earlier gradients: it is refused for them; ask for
    `torch.optim.SparseAdam` if rows that were not looked up may stay. Every rank makes the same call.

    Parameters
    ----------
    module : DistributedModule, or a model that was compiled in place
    kind : type
        `torch.optim.SGD`, `torch.optim.Adagrad`, `torch.optim.Adam`, `torch.optim.SparseAdam` or `des.optim.FTRL`.
    params : iterable of nn.Parameter, optional
        Tables; by default all that have sparse gradients. Give the others to an optimiser of their own.
    row_wise : bool
        Adagrad with one number for each row, the mean of its squares.
    backend : {"auto", "fbgemm", "torch"}
        Whose kernels make the step. FBGEMM's are the same to rounding for Adagrad of float32 tables on CPUs; by default
        they are called where every rank has them and all tables are narrow (four columns at most): of wider ones
        PyTorch's take less time. With "fbgemm" a rank that lacks it raises.
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
        For ``row_wise`` where whole rows are on no rank, for tables that are used beside their lookups, and for FBGEMM
        where it is not installed.
    """
    compiled = module_of(module)
    if kind not in KINDS:
        names = ", ".join(map(called, KINDS))
        raise InputError(f"fuse_optimizer: {getattr(kind, '__name__', kind)!r} is none of {names}")
    update = KINDS[kind]
    known = {**update.options, "maximize": False}
    if unknown := sorted(set(options) - set(known)):
        raise InputError(f"fuse_optimizer: of {called(kind)}'s options it takes {', '.join(known)}, not {unknown[0]}")
    if update.check is not None:
        update.check(known | options)
    if row_wise and kind is not torch.optim.Adagrad:
        raise InputError("fuse_optimizer: one number for each row is Adagrad's")
    if backend not in BACKENDS:
        raise InputError(f"fuse_optimizer: backend={backend!r} is none of {', '.join(BACKENDS)}")
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
            check_dense(compiled, name, kind)
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
    tables = {n: t for p in chosen if (t := compiled._runtime.tables.get(held_names[n := id(p)])) is not None}
    kernel = _agreed_kernel(compiled, kind, backend, [p for p in chosen if id(p) not in tables])
    let_be_sparse(compiled, [name for name in dense if not is_averaged(compiled, name)])
    return FusedOptimizer(chosen, known | options, update, row_wise, compiled._fused, kernel, tables)


def _agreed_kernel(
    compiled: DistributedModule, kind: type[torch.optim.Optimizer], backend: str, chosen: Sequence[Tensor]
) -> Callable[[Step], bool] | None:
    """FBGEMM's kernel for this optimiser, if every rank has it: what all ranks hold alike they have to round alike."""
    kernel = fbgemm.KERNELS.get(kind) if any(fbgemm.is_for(p) for p in chosen) else None
    if backend == AUTO and not all(fbgemm.is_narrow(p) for p in chosen):
        kernel = None
    if backend == TORCH or (backend == AUTO and kernel is None):
        return None
    told = say(fbgemm.lacks(), compiled._runtime.group, compiled._runtime.ranks)
    lacking = [f"rank {rank}: {why}" for rank, why in enumerate(told) if why is not None]
    if lacking and backend == FBGEMM:
        raise UnsupportedError("\n".join(["fuse_optimizer(backend='fbgemm'):", *lacking]))
    return None if lacking else kernel


def _numbers_of_rows(p: Tensor) -> Tensor:
    """``[rows, 1]``: a number for each row of a table, cut as the table is."""
    numbers = plain(p).detach().new_zeros(len(plain(p)), 1)
    if not isinstance(p, Piece) or p.runtime is None or p.runtime.ranks == 1:
        return numbers
    result = held(numbers, p)
    pieces = Pieces((p.pieces.shape[0], 1), 0, p.pieces.division, p.pieces.ranks)
    result.whose = Whose(p.original, pieces, p.rank, p.runtime)
    return result

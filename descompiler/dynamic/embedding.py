"""`DynamicEmbedding` and `DynamicEmbeddingBag`, which stand where ``nn.Embedding`` and ``nn.EmbeddingBag`` do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from descompiler.dynamic import export, saved
from descompiler.dynamic.admission import Admission, Always
from descompiler.dynamic.eviction import Eviction
from descompiler.dynamic.initial import Initial, Normal
from descompiler.dynamic.rows import lasting
from descompiler.dynamic.table import Config, Table
from descompiler.errors import InputError, UnsupportedError
from descompiler.ops.as_python import as_python

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODES = ("sum", "mean", "max")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""What a module's call does beside its forward."""


def check_ids(ids: Any, named: str) -> None:
    """Raise unless these are ids of any dynamic table."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(
            f"{named} was given ids of {kind}: ids are int64 or int32 tensors; "
            "hash strings, and don't convert ids to floating numbers, which are exact up to 2**53 (2**24) only"
        )


def check_untransformed(named: str) -> None:
    """Raise where a lookup would be recorded, once for all ids, or be part of a transform of ``torch.func``."""
    recorded = torch.jit.is_tracing() or torch.compiler.is_exporting()
    modes = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
    recorded |= any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)
    if recorded or torch._C._are_functorch_transforms_active():
        what = "traced or exported" if recorded else "transformed by torch.func (grad, vmap, ...)"
        raise UnsupportedError(
            f"{named} is {what}: who has a row is known when ids are looked up. Look up before, and give the rows to "
            "what is traced or transformed; `to_embedding()` is a static table of the rows there are"
        )


def check_bags(ids: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None, mode: str) -> None:
    """Raise unless these are bags of a mode."""
    if per_sample_weights is not None and mode != "sum":
        raise InputError(f"per_sample_weights are of mode='sum', and the bags' mode is {mode!r}")
    if (ids.dim(), offsets is not None) not in ((1, True), (2, False)):
        given = "without offsets" if offsets is None else "and offsets"
        raise InputError(f"ids of {ids.dim()} dimensions {given}: bags are ids [bags, length], or [n] with offsets")


def pooled(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    *,
    mode: str,
    include_last_offset: bool,
    padding_idx: int | None,
    more: bool = True,
) -> Tensor:
    """A row for each bag, of the rows of its ids ``[bags, length]``, or ``[n]`` with offsets.

    ``more``: with a row of zeros behind them, which padding has, and without which torch makes no bags of no ids.
    """
    rows, padding = rows.reshape(-1, rows.shape[-1]), ids.numel()
    at = torch.arange(padding, device=rows.device).view(ids.shape)
    if more:
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    if padding_idx is not None:
        at = at.masked_fill(ids.to(rows.device) == padding_idx, padding)
    return F.embedding_bag(
        at,
        rows,
        None if offsets is None else offsets.to(rows.device),
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding if more else None,
    )


class DynamicTable(nn.Module):
    """What `DynamicEmbedding` and `DynamicEmbeddingBag` have in common: a table in a module.

    See `DynamicEmbedding` for the parameters.
    """

    weight: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        name: str | None = None,
        seed: int = 0,
        init: Initial | None = None,
        admit: Admission | None = None,
        evict: Eviction | None = None,
        max_rows: int | None = None,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ):
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dim < 1:
            raise InputError(f"dim={dim}; a row has one number or more")
        if max_rows is not None and max_rows < 1:
            raise InputError(f"max_rows={max_rows}; it is 1 or more, or None")
        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype}; rows are one of {', '.join(map(str, DTYPES))}")
        if evict is not None and evict.capacity is not None and max_rows is not None and max_rows < evict.capacity:
            raise InputError(f"max_rows={max_rows} is below the {evict.capacity} rows that {evict} keeps: leave it out")
        self.padding_idx = padding_idx
        config = Config(dim, name or "", seed, Normal() if init is None else init, admit or Always(), evict, max_rows)
        device = torch.device(torch.get_default_device() if device is None else device)
        # a model that is created on meta, to be filled later: there are no rows yet
        self._table = self._made(config, dtype, torch.device("cpu") if device.type == "meta" else device)
        self.register_parameter("weight", self._table.parameter)

    def _made(self, config: Config, dtype: torch.dtype, device: torch.device) -> Table:
        table = Table(config, dtype, device)
        table.padding_idx = self.padding_idx
        return table

    @property
    def embedding_dim(self) -> int:
        """Numbers of a row."""
        return self._table.config.dim

    @property
    def step(self) -> int:
        """How many steps have ended."""
        return self._table.residence.step

    def __len__(self) -> int:
        return len(self._table.residence)

    def __bool__(self) -> bool:
        return True  # a table without rows is a table

    def resident(self) -> Tensor:
        """The ids that have rows, sorted; int64, on the CPU."""
        return self._table.resident()

    def memory_bytes(self) -> int:
        """Bytes of the table: rows, what optimisers keep for them, map, counters and sketch.

        What is reserved to grow into and has not been grown into is not counted; of a compiled module it is this rank's
        part.
        """
        return self._table.memory_bytes()

    def end_step(self) -> None:
        """End a step by hand: where no optimiser that has `weight` steps. Rows with a gradient stay."""
        self._table.end_step()

    def to_embedding(self) -> tuple[nn.Embedding, Tensor]:
        """A static embedding of the rows, and the id of each, sorted."""
        self.check_weight()
        return export.to_embedding(self._table)

    def to_parquet(self, path: str | Path) -> None:
        """Write ids and rows to a Parquet file: columns ``id`` and ``row``, sorted by id.

        Raises
        ------
        InputError
            If pyarrow is missing.
        """
        self.check_weight()
        export.to_parquet(self._table, path)

    def check_weight(self) -> None:
        """Raise unless `weight` is the parameter that has the rows, and those of its ids."""
        self._table.check_weight(self._parameters.get("weight"))
        self._table.check_written()

    def part_of(self, owners: Tensor | None, rank: int, ranks: int = 1) -> DynamicTable:
        """A table of the same kind, empty, which looks up the ids of a rank's slices of the key space alone.

        Parameters
        ----------
        owners : Tensor or None
            The rank of each slice; None: all are this rank's.
        rank, ranks : int
        """
        made = type(self).__new__(type(self))
        vars(made).update({n: copy.copy(x) if isinstance(x, dict) else x for n, x in vars(self).items()})
        table = made._table = self._made(self._table.config, self.weight.dtype, self.weight.device)
        table.own(owners, rank, ranks)
        made._parameters["weight"] = table.parameter
        table.parameter.requires_grad_(self.weight.requires_grad)
        return made

    def extra_repr(self) -> str:
        config = self._table.config
        parts = [str(config.dim), f"rows={len(self)}"]
        parts += [f"name={config.name!r}"] if config.name else []
        parts += [f"seed={config.seed}", f"init={config.init}", f"admit={config.admit}"]
        given = {"evict": config.evict, "max_rows": config.max_rows, "padding_idx": self.padding_idx}
        return ", ".join(parts + [f"{k}={v}" for k, v in given.items() if v is not None])

    def _look_up(self, ids: Tensor) -> Tensor:
        """Rows of ids of any shape."""
        check_ids(ids, type(self).__name__ + self._called())
        check_untransformed(type(self).__name__ + self._called())
        self._table.check_weight(self._parameters.get("weight"))
        flat = ids.reshape(-1).to("cpu", torch.int64)
        table, create = self._table, self.training
        look_up = table.look_up if table.elsewhere is None else table.elsewhere
        if table.owners is not None and table.elsewhere is None:
            raise UnsupportedError(
                f"{type(self).__name__}{self._called()} of a compiled module is called outside of its forward, and "
                "this rank has rows of some ids only: call the compiled module"
            )
        if self.padding_idx is None:
            rows = look_up(flat, create=create)
        else:
            some = (flat != self.padding_idx).nonzero()[:, 0]
            found = look_up(flat[some], create=create)
            rows = found.new_zeros(len(flat), self.embedding_dim).index_copy(0, some.to(found.device), found)
        return rows.view(*ids.shape, self.embedding_dim)

    _rows_of = as_python(_look_up, _look_up, "a dynamic table gives rows to ids, which no graph can")

    def _called(self) -> str:
        name = self._table.config.name
        return f" {name!r}" if name else ""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._table.rows.follow()  # out of what another process shares, if it was sent there
        super()._apply(fn, recurse)
        if self.weight.is_shared() or self.weight.is_meta:
            what = "shared between processes" if self.weight.is_shared() else "on the meta device"
            self._parameters["weight"] = self._table.parameter  # as it was
            self._table.adopt(self._table.parameter)
            raise UnsupportedError(f"the rows of a dynamic table{self._called()} can't be {what}: they come and go")
        if self.weight is not self._table.parameter or self.weight.data_ptr() != self._table.rows.tensor.data_ptr():
            self._table.adopt(self.weight)
            self._table.rows.tensor[0] = 0  # to_empty has anything there
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.check_weight()
        for name, value in saved.state_of(self._table).items():
            destination[prefix + name] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if not mine:
            missing_keys += [prefix + name for name in saved.NEEDED]
            return
        if strict:
            unexpected_keys += [prefix + name for name in mine if name not in saved.KNOWN]
        saved.load(self._table, mine, prefix.removesuffix("."))

    def __copy__(self) -> DynamicTable:
        made = type(self).__new__(type(self))
        made.__dict__ |= self.__dict__  # one table: what __getstate__ has makes another
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_table"]
        residents = saved.state_of(self._table, rows=False).items()
        # by value: tensors that are made here would be gone when another process opens their shared memory
        return state | {"_made": (self._table.config, self._table.ranks, {n: x.numpy() for n, x in residents})}

    @lasting
    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicTable:
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        made._table.copied_from(self._table)
        return made

    @lasting
    def __setstate__(self, state: dict[str, Any]) -> None:
        config, ranks, arrays = state.pop("_made")
        residents = {name: torch.as_tensor(x) for name, x in arrays.items()}
        super().__setstate__(state)
        self._table = self._made(config, self.weight.dtype, self.weight.device)
        if "owners" in residents:  # a copy of a rank's part is one
            self._table.own(residents["owners"], int(residents["rank"]), ranks)
        saved.restore(self._table, residents)
        self._table.adopt(self.weight)


class DynamicEmbedding(DynamicTable):
    """A lookup table for any int64 ids, which stands where ``nn.Embedding`` does.

    In training (`torch.nn.Module.train`) an id that is looked up for the first time gets a row, if it is admitted;
    until then, and for any unknown id in evaluation, it has the default row: zeros, which are not trained. A step ends
    when the optimiser that holds `weight` has stepped; then rows go that are to be evicted, with what the optimiser
    kept for them. Gradients are sparse; ``torch.optim``'s SGD, Adagrad and SparseAdam take them, and
    `descompiler.optim.FTRL`.

    Which ids are resident is a function of the sets of ids of the steps, and a row's initial numbers one of seed, name
    and id: neither depends on the order of ids, or on who holds them.

    Parameters
    ----------
    dim : int
        Numbers of a row.
    name : str, optional
        Tables of different names draw different numbers for the same id.
    seed : int
    init : Initial, optional
        `Normal`, as ``nn.Embedding``, by default; or `Uniform`, `Constant`.
    admit : Admission, optional
        `Always` by default; or `AfterSightings`, `WithProbability`.
    evict : Eviction, optional
        By default rows stay; or `Capacity`, `TimeToLive`.
    max_rows : int, optional
        Never more rows than that: a lookup that would need more raises `TableFullError` and changes nothing.
    padding_idx : int, optional
        An id that has the default row always.
    dtype, device : optional
        Of rows; of a table that is made on the meta device they are on the CPU, as they come later.

    Examples
    --------
    >>> table = DynamicEmbedding(4, name="user", seed=1)
    >>> opt = torch.optim.Adagrad(table.parameters(), lr=0.1)
    >>> table(torch.tensor([[-3, 1 << 60], [5, 5]])).sum().backward()
    >>> opt.step()
    >>> len(table), table.resident().tolist()
    (3, [-3, 5, 1152921504606846976])
    >>> table.eval()(torch.tensor([6])).tolist()
    [[0.0, 0.0, 0.0, 0.0]]
    """

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of ids, of their shape with a dimension more."""
        return self._rows_of(ids)


class DynamicEmbeddingBag(DynamicTable):
    """Sums, means or maxima of rows of a `DynamicEmbedding`, which stands where ``nn.EmbeddingBag`` does.

    An id that has no row counts with the default row, zeros; only `padding_idx` is left out of its bag.

    Parameters
    ----------
    dim : int
    mode : {"mean", "sum", "max"}
    include_last_offset : bool
        Whether offsets end with the number of ids.
    **options
        Those of `DynamicEmbedding`.

    Examples
    --------
    >>> from descompiler.dynamic import Constant
    >>> bags = DynamicEmbeddingBag(2, mode="sum", init=Constant(1.0))
    >>> bags(torch.tensor([7, -7, 7]), torch.tensor([0, 2, 2])).tolist()
    [[2.0, 2.0], [0.0, 0.0], [1.0, 1.0]]
    """

    def __init__(self, dim: int, *, mode: str = "mean", include_last_offset: bool = False, **options: Any):
        if mode not in MODES:
            raise InputError(f"mode={mode!r}; it is one of {', '.join(MODES)}")
        super().__init__(dim, **options)
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """A row for each bag: rows of ids ``[bags, length]``, or of ids ``[n]`` from each offset to the next.

        Raises
        ------
        InputError
            For ids of other shapes or kinds, and weights without mode="sum".
        """
        check_bags(ids, offsets, per_sample_weights, self.mode)
        return pooled(
            self._rows_of(ids),
            ids,
            offsets,
            per_sample_weights,
            mode=self.mode,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
            more=self.padding_idx is not None or not ids.numel(),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"

"""A loader of Parquet files that reads columns: to each rank its own rows, and the ids that its tables need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from descompiler.errors import InputError
from descompiler.layout.rows import share_of
from descompiler.module.distributed import DistributedModule


class ParquetColumns:
    """Batches of a Parquet file for a rank of a module that was compiled with ``ids="global"``.

    Each is ``(dense, ids, labels)``, without those that have no columns: of dense columns and labels this rank's rows,
    float32; of ids the global batch's, int64 ``[rows, columns]``. Columns of ids that no table of this rank reads are
    not read from the file, and are 0. Of the rows of a batch the first ranks have one more where they don't divide.
    A module that was compiled otherwise gets its own rows of all columns.

    Parameters
    ----------
    path : path
    module : DistributedModule
    ids, dense, labels : sequence of str
        Columns, in the order in which forward takes them: one matrix of each.
    batch : int
        Rows of the global batch; the last one of the file may have fewer.

    Raises
    ------
    InputError
        If pyarrow is missing, or columns are, or have nulls; and for a module with several inputs of ids.

    Examples
    --------
    Needs pyarrow, ``pip install descompiler[parquet]``::

        module = des.compile(model, (dense, ids), ids="global")
        for dense, ids, y in des.ParquetColumns("clicks.parquet", module, ids=C, dense=I, labels=["click"], batch=8192):
            loss_fn(module(dense, ids), y.squeeze(1)).backward()
    """

    def __init__(
        self,
        path: str | Path,
        module: DistributedModule,
        *,
        ids: Sequence[str],
        dense: Sequence[str] = (),
        labels: Sequence[str] = (),
        batch: int,
    ):
        if batch < 1:
            raise InputError(f"batch={batch}; it is a number of rows, from 1 on")
        self.path, self.batch, self._rank, self._ranks = Path(path), batch, module.rank, module.ranks
        self.columns = {"dense": list(dense), "ids": list(ids), "labels": list(labels)}
        read = module.id_columns()
        if len(read) > 1:
            raise InputError(f"the module has {len(read)} inputs of ids, and ParquetColumns makes one: pass one matrix")
        self._global = bool(read)
        needed = next(iter(read.values()), None)
        self.read_ids = [c for i, c in enumerate(ids) if needed is None or i in needed]
        present = set(_pyarrow_parquet().ParquetFile(self.path).schema_arrow.names)
        if missing := [c for of in self.columns.values() for c in of if c not in present]:
            raise InputError(f"{self.path} has no column {', '.join(map(repr, missing))}")

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        file = _pyarrow_parquet().ParquetFile(self.path)
        columns = [*self.columns["dense"], *self.read_ids, *self.columns["labels"]]
        groups: Any = file.iter_batches(batch_size=self.batch, columns=list(dict.fromkeys(columns)))
        for table in groups:
            yield self._tensors(table)

    def _tensors(self, table: Any) -> tuple[Tensor, ...]:
        """What forward and loss take, of the rows of a global batch."""
        total = table.num_rows
        sizes = [share_of(total, r, self._ranks) for r in range(self._ranks)]
        own = slice(sum(sizes[: self._rank]), sum(sizes[: self._rank + 1]))
        result = []
        for kind, names in self.columns.items():
            if names:
                dtype = torch.int64 if kind == "ids" else torch.float32
                rows = slice(0, total) if kind == "ids" and self._global else own
                x = torch.zeros((rows.stop - rows.start, len(names)), dtype=dtype)
                for i, name in enumerate(names):
                    if kind != "ids" or name in self.read_ids:
                        x[:, i] = self._column(table, name, rows)
                result.append(x)
        return tuple(result)

    def _column(self, table: Any, name: str, rows: slice) -> Tensor:
        values = table.column(name)
        if values.null_count:
            raise InputError(
                f"{self.path}: column {name!r} has nulls: give them a value, an id of their own for example"
            )
        return torch.from_numpy(values.slice(rows.start, rows.stop - rows.start).to_numpy(zero_copy_only=False).copy())


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("ParquetColumns needs pyarrow: pip install descompiler[parquet]") from None
    return pyarrow.parquet

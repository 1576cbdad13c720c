"""Ways out of a dynamic table: a static embedding with the ids of its rows, a Parquet file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from descompiler.dynamic.table import Table
from descompiler.errors import InputError


def rows_by_id(table: Table) -> tuple[Tensor, Tensor]:
    """Ids, sorted, and their rows."""
    slots = table.residence.resident()
    ids, order = table.ids_of(slots).sort()
    return ids, table.rows.tensor.index_select(0, slots[order].to(table.rows.tensor.device))


def to_embedding(table: Table) -> tuple[nn.Embedding, Tensor]:
    """A static embedding of the rows, whose row i is that of the i-th id, and these ids, sorted."""
    ids, rows = rows_by_id(table)
    return nn.Embedding.from_pretrained(rows, freeze=False), ids


def to_parquet(table: Table, path: str | Path) -> None:
    """Write columns ``id`` (int64) and ``row`` (lists of one length), sorted by id; bfloat16 as float32.

    Raises
    ------
    InputError
        If pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("to_parquet needs pyarrow: pip install descompiler[parquet]") from error
    ids, rows = rows_by_id(table)
    plain = rows.cpu()
    flat = (plain.float() if plain.dtype == torch.bfloat16 else plain).reshape(-1)
    lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat.numpy()), rows.shape[1])
    columns = pyarrow.table({"id": pyarrow.array(ids.numpy()), "row": lists})
    pyarrow.parquet.write_table(columns, str(path))

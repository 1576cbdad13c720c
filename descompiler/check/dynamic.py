"""Dynamic tables in a proof: states and gradients by id, since slots are each table's own business."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from descompiler.dynamic.by_id import put_in, take_out
from descompiler.dynamic.embedding import DynamicTable
from descompiler.module.dynamic import names_of_tables, tables_of, without_tables
from descompiler.module.state import without_extra
from descompiler.ops.local import plain


def by_id(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict, in which dynamic tables have their rows in the order of keys, between two steps."""
    tables, names = tables_of(model), names_of_tables(model)
    state = without_extra(without_tables(model.state_dict(), names))
    for name, first in names.items():
        ordered = tables[first].part_of(None, 0)
        put_in(ordered._table, [take_out(tables[first]._table)])
        state |= ordered.state_dict(prefix=f"{name}.")
    return state


def gradient(table: DynamicTable, owner: DynamicTable | None = None) -> tuple[Tensor, Tensor]:
    """Ids that have a gradient, sorted, and what it is; of those that a rank's part of a table owns."""
    grad = table.weight.grad
    if grad is None:
        return torch.empty(0, dtype=torch.int64), plain(table.weight.detach())[:0]
    grad = plain(grad).coalesce()
    ids, order = table._table.ids_of(grad.indices()[0].cpu()).sort()
    values = grad.values()[order.to(grad.device)]
    if owner is not None:
        mine = owner._table.holds(owner._table.keys(ids))
        ids, values = ids[mine], values[mine.to(values.device)]
    return ids, values


def optimizer_groups(module: nn.Module, options: dict[str, float]) -> list[dict[str, object]]:
    """Parameter groups, in which dynamic tables have options that change no row that a step has not looked up."""
    tables = {id(t.weight): t.weight for t in tables_of(module).values()}
    rest = [p for p in module.parameters() if id(p) not in tables]
    return [{"params": rest}, *([{"params": list(tables.values()), **options}] if tables else [])]

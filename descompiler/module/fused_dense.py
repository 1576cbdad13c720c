"""Tables with dense gradients that are updated in backward: which can be, and what changes for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from descompiler.errors import InputError, PlanError, UnsupportedError
from descompiler.module.distributed import DistributedModule


def check_dense(compiled: DistributedModule, name: str, kind: type[torch.optim.Optimizer]) -> None:
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
    if kind is torch.optim.SparseAdam and is_averaged(compiled, name):
        raise UnsupportedError(
            f"fuse_optimizer: every rank holds {name!r} whole, and from the average of dense gradients nobody knows "
            "which rows were looked up: make the table with sparse=True, or pin another form in plan="
        )


def is_averaged(compiled: DistributedModule, name: str) -> bool:
    """Whether ranks average the whole gradient of a table."""
    split = compiled.plan.splits[name]
    gathers = split.gathered and not compiled._in_place
    return split.pieces.is_replicated and compiled._runtime.ranks > 1 and not gathers


def let_be_sparse(compiled: DistributedModule, names: Iterable[str]) -> None:
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

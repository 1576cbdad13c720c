"""Incremental checkpoints and deltas of a compiled module's dynamic tables: each rank writes its own slices."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from descompiler.dynamic.deltas import Deltas
from descompiler.dynamic.increments import Increments
from descompiler.dynamic.stores import Store
from descompiler.module.checkpoint import Optimizers
from descompiler.module.dynamic import tables_of
from descompiler.module.installed import module_of, ranks_for


class RankIncrements(Increments):
    """`descompiler.dynamic.Increments` of a compiled module: collective, and what fails raises on every rank."""

    def __init__(self, module: nn.Module, optimizers: Optimizers, path: str | os.PathLike[str], compact_at: float):
        self._module = module_of(module)
        ranks = ranks_for(self._module, "des.increments")
        tables = tables_of(self._module)
        several = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers or ())
        weights = {id(t.weight) for t in tables.values()}
        holding = [o for o in several if any(id(p) in weights for g in o.param_groups for p in g["params"])]

        def begin() -> None:
            self._begin(path, tables, holding, ranks.rank, ranks.count, compact_at)

        ranks.everywhere(begin, "could not begin increments")

    def _begin(self, path: Any, tables: Any, optimizers: Any, rank: int, ranks: int, compact_at: float) -> None:
        super().__init__(path, tables, optimizers, rank=rank, ranks=ranks, compact_at=compact_at)

    def save(self, **values: Any) -> None:
        """As `descompiler.dynamic.Increments.save`, of every rank. Collective."""
        ranks_for(self._module, "save").everywhere(lambda: Increments.save(self, **values), "could not save")

    def load(self) -> dict[str, Any] | None:
        """As `descompiler.dynamic.Increments.load`, on every rank. Collective."""
        return ranks_for(self._module, "load").everywhere(lambda: Increments.load(self), "could not load")


def increments(
    module: nn.Module, optimizers: Optimizers, path: str | os.PathLike[str], *, compact_at: float = 1.0
) -> RankIncrements:
    """Incremental checkpoints of the dynamic tables of a compiled module, and of what optimisers keep for their rows.

    Collective: every rank calls it, and its ``save`` and ``load``. Any number of ranks loads what some have saved.
    Other parameters are not in it: `descompiler.save` has those.

    Parameters
    ----------
    module : DistributedModule
    optimizers : torch.optim.Optimizer or sequence of them, or None
    path : str or path
        A directory that all ranks see.
    compact_at : float
        See `descompiler.dynamic.Increments`.

    Raises
    ------
    InputError
        If the directory can't be written.
    """
    return RankIncrements(module, optimizers, path, compact_at)


def deltas(module: nn.Module, place: str | os.PathLike[str] | Store, **options: Any) -> Deltas:
    """What `descompiler.dynamic.Replica` serves of a compiled module's dynamic tables: every rank publishes its slices.

    Parameters
    ----------
    module : DistributedModule
    place : str, path or Store
        One that all ranks see: a directory, or a `descompiler.dynamic.RedisStore`.
    **options
        ``keep`` and ``compact_at`` of `descompiler.dynamic.Deltas`.
    """
    runtime = module_of(module)._runtime
    return Deltas(place, tables_of(module), rank=runtime.rank, ranks=runtime.ranks, **options)

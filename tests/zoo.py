"""Models of public libraries that nobody here wrote, unmodified: name -> (model, example inputs).

They need the ``zoo`` extra; import this module only where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FIELD_ROWS = (7, 13, 29, 11)
DENSE = 3
ROWS = 9


def _ids(generator: torch.Generator) -> Tensor:
    return torch.stack([torch.randint(n, (ROWS,), generator=generator) for n in FIELD_ROWS], 1)


def torchfm(name: str, *args: Any) -> tuple[nn.Module, Any]:
    """A model of torchfm: one table plus offsets inside."""
    import importlib

    module, _, cls = name.rpartition(".")
    model = getattr(importlib.import_module(f"torchfm.model.{module}"), cls)(FIELD_ROWS, *args)
    return model, (_ids(torch.Generator().manual_seed(0)),)


def deepctr(name: str, **kwargs: Any) -> tuple[nn.Module, Any]:
    """A model of deepctr-torch: ids are columns of a float matrix, parameters are also held in plain lists."""
    import deepctr_torch.models as library
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    columns = [SparseFeat(f"c{i}", n, embedding_dim=4) for i, n in enumerate(FIELD_ROWS)]
    columns += [DenseFeat(f"d{i}", 1) for i in range(DENSE)]
    model = getattr(library, name)(columns, columns, dnn_hidden_units=(8, 6), **kwargs)
    generator = torch.Generator().manual_seed(0)
    return model, (torch.cat([_ids(generator).float(), torch.randn(ROWS, DENSE, generator=generator)], 1),)


ZOO: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "torchfm.LR": lambda: torchfm("lr.LogisticRegressionModel"),
    "torchfm.FM": lambda: torchfm("fm.FactorizationMachineModel", 4),
    "torchfm.WideDeep": lambda: torchfm("wd.WideAndDeepModel", 4, (8, 6), 0.2),
    "torchfm.DeepFM": lambda: torchfm("dfm.DeepFactorizationMachineModel", 4, (8, 6), 0.2),
    "deepctr.WDL": lambda: deepctr("WDL"),
    "deepctr.DeepFM": lambda: deepctr("DeepFM"),
    "deepctr.DCN": lambda: deepctr("DCN"),
}

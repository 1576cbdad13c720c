"""rectools' models of sequences, trained by its Lightning modules: SASRec, BERT4Rec, HSTU, and towers of features."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.harness.loops import Calls, Loop

USERS, ITEMS = 9, 17
SETTINGS: dict[str, Any] = {
    "n_blocks": 1,
    "n_heads": 2,
    "n_factors": 8,
    "dropout_rate": 0.0,
    "session_max_len": 5,
    "batch_size": USERS,
    "epochs": 1,
    "lr": 0.01,
}
NEGATIVES = {"n_negatives": 3}
MODELS: dict[str, dict[str, Any]] = {
    "SASRecModel": {},
    "SASRecModel, BCE": {"loss": "BCE", **NEGATIVES},
    "SASRecModel, gBCE": {"loss": "gBCE", **NEGATIVES},
    "SASRecModel, sampled softmax": {"loss": "sampled_softmax", **NEGATIVES},
    "SASRecModel, LiGR": {"transformer_layers_type": "LiGRLayers"},
    "BERT4RecModel": {"mask_prob": 0.5},
    "HSTUModel": {},
    "HSTUModel, gBCE": {"loss": "gBCE", **NEGATIVES},
}
LAYERS = "rectools.models.nn.transformers.ligr"
LEFT_OUT = {"DSSMModel": "is given dense rows of all interactions; training_step logs loss.item()"}
"""Model classes of rectools that are not in the zoo, and why."""


@functools.cache
def _data() -> Any:
    """Interactions with times, and a category of each item."""
    import pandas as pd
    from rectools import Columns
    from rectools.dataset import Dataset

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    random = np.random.default_rng(0)
    start = pd.Timestamp("2026-01-01")
    rows = [
        (u, i, 1, start + pd.Timedelta(hours=3 * u + 7 * t * t))
        for u in range(USERS)
        for t, i in enumerate(random.permutation(ITEMS)[: 3 + u % 5].tolist())
    ]
    table = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime])
    features = pd.DataFrame({"id": (ids := table[Columns.Item].unique()), "value": ids % 4, "feature": "genre"})
    return Dataset.construct(table, item_features_df=features, cat_item_features=["genre"])


def _fitted(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model as its trainer first sees it, and its first batch."""
    models = importlib.import_module("rectools.models")
    settings = SETTINGS | MODELS[name]
    if kind := settings.get("transformer_layers_type"):
        settings["transformer_layers_type"] = getattr(importlib.import_module(LAYERS), kind)
    torch.manual_seed(0)
    np.random.seed(0)
    model = getattr(models, name.partition(",")[0])(**settings)
    model._build_model_from_dataset(_data())
    module = model.lightning_model
    module.on_train_start()  # draws the weights; it would again, of this rank's pieces, in a compiled model
    module.on_train_end()
    return model, next(iter(model.data_preparator.get_dataloader_train()))


def rectools(name: str) -> tuple[nn.Module, Any]:
    model, batch = _fitted(name)
    return Calls(model.lightning_model, "training_step"), (batch, 0)


def loop(name: str) -> Loop:
    """rectools' trainer, Lightning's, over given batches.

    The original is trained as it is. ``training_step`` reads the trainer, to which it logs, so a compiled one is
    given to the trainer in a module of its own, which does not.
    """
    from pytorch_lightning import Callback, LightningModule

    model, batch = _fitted(name)
    module = model.lightning_model.double()
    original = Calls(module, "training_step")

    class Compiled(LightningModule):
        def __init__(self, step: nn.Module):
            super().__init__()
            self.step = step

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.step(batch, 0)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.step.parameters(), lr=module.lr, betas=module.adam_betas)

    class Losses(Callback):
        seen: list[float]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            self.seen.append(float(outputs["loss"]))

    def train(net: nn.Module, batches: Sequence[Any]) -> list[float]:
        losses = Losses()
        losses.seen = []
        model._trainer.callbacks.append(losses)
        trained = module if net is original else Compiled(net)
        model._trainer.fit(trained, DataLoader([args[0] for args, _ in batches], batch_size=None))
        return losses.seen

    return Loop(original, ((batch, 0), {}), train)


def classes() -> list[str]:
    """Names of all model classes that are networks."""
    from rectools import models
    from rectools.models import nn as networks

    return [n for n, c in vars(models).items() if isinstance(c, type) and c.__module__.startswith(networks.__name__)]

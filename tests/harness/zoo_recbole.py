"""recbole's models: what they train by, ``calculate_loss``, on a small data set written for them.

recbole 1.2.1 wants releases of NumPy, pandas and SciPy that are older than what runs here (and ray, which none of its
models needs), so it is installed without its dependencies; the names that it misses are given back below.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import descompiler as des

USERS, ITEMS, EVENTS = 12, 17, 8
ROWS = 9
KINDS = ("context_aware", "sequential", "general", "knowledge_aware")

SETTINGS: dict[str, Any] = {
    "train_batch_size": ROWS,
    "embedding_size": 8,
    "hidden_size": 8,
    "inner_size": 16,
    "n_layers": 2,
    "n_heads": 2,
    "mlp_hidden_size": [8, 6],
    "MAX_ITEM_LIST_LENGTH": 5,
    "dropout_prob": 0.0,  # some of its dropouts are functions, which `verify` can't set to 0
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
}
CONTEXT_AWARE: dict[str, Any] = {"threshold": {"rating": 3}, "train_neg_sample_args": None}  # labels are in the data
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "BERT4Rec": {"mask_ratio": 0.8},  # without a masked item its loss is NaN
    "ConvNCF": {"embedding_size": 64},
}

MODELS = (
    *("AFM", "AutoInt", "BERT4Rec", "BPR", "CDAE", "CFKG", "CKE", "CORE", "Caser", "ConvNCF", "DCN", "DCNV2"),
    *("DGCF", "DIEN", "DIN", "DMF", "DSSM", "DeepFM", "DiffRec", "ENMF", "EulerNet", "FDSA", "FEARec", "FFM"),
    *("FISM", "FM", "FNN", "FOSSIL", "FPMC", "FiGNN", "FwFM", "GCMC", "GCSAN", "GRU4Rec", "GRU4RecF", "HGN"),
    *("HRM", "KD_DAGFM", "KGCN", "KGNNLS", "KTUP", "LDiffRec", "LINE", "LR", "LightGCN", "LightSANs"),
    *("MacridVAE", "MultiDAE", "MultiVAE", "NAIS", "NARM", "NFM", "NGCF", "NNCF", "NPE", "NeuMF", "NextItNet"),
    *("PNN", "RaCT", "RepeatNet", "RippleNet", "S3Rec", "SASRec", "SASRecF", "SGL", "SHAN", "SINE", "SRGNN"),
    *("STAMP", "SimpleX", "SpectralCF", "TransRec", "WideDeep", "xDeepFM"),
)

LEFT_OUT = {
    **dict.fromkeys(("GRU4RecKG", "KSR"), "reads embeddings of entities from a file"),
    **dict.fromkeys(("GRU4RecCPR", "SASRecCPR"), "re-ranks the best hundreds of items, more than this data has"),
    **dict.fromkeys(
        ("ADMMSLIM", "AsymKNN", "EASE", "ItemKNN", "NCEPLRec", "Pop", "Random", "SLIMElastic"),
        "is not trained by gradients",
    ),
    "KGAT": "needs dgl",
    **dict.fromkeys(("KGIN", "MCCLK"), "needs torch_scatter"),
    "MKR": "has two losses, and none named calculate_loss",
    "NCL": "clusters its embeddings, between epochs, with faiss",
    "RecVAE": "calculate_loss takes a phase of its own training loop",
}
"""Model classes of recbole that are not in the zoo, and why."""


class Loss(nn.Module):
    """Calls ``calculate_loss`` of a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, interaction: Any) -> Tensor:
        result = self.model.calculate_loss(interaction)
        return sum(result) if isinstance(result, tuple) else result


@functools.cache
def _ready() -> Path:
    """Make recbole importable and its ``Interaction`` known; the folder of the data set."""
    import scipy.sparse

    for name, kind in {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
        setattr(np, name, kind)  # removed in NumPy 2
    if not hasattr(scipy.sparse.dok_matrix, "_update"):  # removed in SciPy 1.13
        scipy.sparse.dok_matrix._update = lambda self, new: [self.__setitem__(k, v) for k, v in new.items()]
    interaction = importlib.import_module("recbole.data.interaction").Interaction
    des.register_input(
        interaction,
        lambda x: (list(x.interaction.values()), tuple(x.interaction)),
        lambda values, names: interaction(dict(zip(names, values, strict=True))),
    )
    folder = Path(tempfile.mkdtemp(prefix="recbole-")) / "toy"
    folder.mkdir()
    random = np.random.default_rng(0)
    events = [
        (u, i, random.integers(1, 6), t) for u in range(USERS) for t, i in enumerate(random.permutation(ITEMS)[:EVENTS])
    ]
    tables: dict[str, tuple[list[str], Any]] = {
        "inter": (["user_id:token", "item_id:token", "rating:float", "timestamp:float"], events),
        "user": (["user_id:token", "age:token"], [(u, u % 5) for u in range(USERS)]),
        "item": (["item_id:token", "class:token"], [(i, i % 4) for i in range(ITEMS)]),
        "kg": (
            ["head_id:token", "relation_id:token", "tail_id:token"],
            [(f"e{i}", f"r{r}", f"e{(3 * i + r) % (ITEMS + 5)}") for i in range(ITEMS) for r in range(2)],
        ),
        "link": (["item_id:token", "entity_id:token"], [(i, f"e{i}") for i in range(ITEMS)]),
    }
    for suffix, (names, rows) in tables.items():
        lines = ["\t".join(map(str, row)) for row in (names, *rows)]
        (folder / f"toy.{suffix}").write_text("\n".join(lines) + "\n")
    return folder.parent


def recbole(name: str) -> tuple[nn.Module, Any]:
    """A model and the first batch of its own loader."""
    folder = _ready()
    config_class = importlib.import_module("recbole.config").Config
    data, utils = importlib.import_module("recbole.data"), importlib.import_module("recbole.utils")
    cls = utils.get_model(name)
    torch.autograd.set_detect_anomaly(False)  # importing one of its models turns it on for all
    settings = SETTINGS | OWN_SETTINGS.get(name, {}) | {"data_path": str(folder), "checkpoint_dir": str(folder)}
    settings |= {"use_gpu": False, "show_progress": False, "state": "ERROR", "load_col": None}
    if "context_aware" in cls.__module__:
        settings |= CONTEXT_AWARE
    arguments, sys.argv = sys.argv, sys.argv[:1]  # its configuration reads the command line
    try:
        try:
            config = config_class(model=name, dataset="toy", config_dict=settings)
        except ValueError:  # losses over all items take no negatives
            config = config_class(model=name, dataset="toy", config_dict=settings | {"train_neg_sample_args": None})
    finally:
        sys.argv = arguments
    utils.init_seed(0, True)
    loader, _, _ = data.data_preparation(config, data.create_dataset(config))
    if hasattr(loader, "set_mode"):
        loader.set_mode(utils.KGDataLoaderState.RSKG)
    model = cls(config, loader._dataset)
    model.train()  # some make views of their graph here
    batch = next(iter(loader))
    rows = min(len(x) for x in batch.interaction.values())  # a batch of events beside one of a knowledge graph
    batch = type(batch)({name: x[:rows] for name, x in batch.interaction.items()})
    return Loss(model), (batch,)


def classes() -> Iterator[str]:
    """Names of all model classes."""
    _ready()
    for kind in KINDS:
        package = importlib.import_module(f"recbole.model.{kind}_recommender")
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            torch.autograd.set_detect_anomaly(False)  # as above
            for name, cls in vars(module).copy().items():
                own = isinstance(cls, type) and cls.__module__ == module.__name__
                if own and hasattr(cls, "calculate_loss") and name.lower() == info.name:
                    yield name

"""Models of public libraries that nobody here wrote, unmodified: name -> (model, example inputs).

All models of torchfm, deepctr-torch, torch-rechub, recbole and rectools, and those of torch-geometric, transformers and
higher that recommenders are made of, small. They need the ``zoo`` extra, recbole and rectools; import this module only
where they are installed. `library_classes` lists the libraries' own model classes, so that a test can tell if one is
missing; `LOOPS` has the training loops of libraries.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.harness import zoo_graphs, zoo_meta, zoo_recbole, zoo_sequences, zoo_text
from tests.harness.loops import Loop

FIELD_ROWS = (7, 13, 29, 11)
DENSE = 3
ROWS = 9
DIM = 4
LENGTH = 5
ITEMS = 17

Built = tuple[nn.Module, Any]
LIBRARIES = (
    *("torchfm", "deepctr_torch", "torch_rechub", "recbole"),
    *("rectools", "torch_geometric", "transformers", "higher"),
)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _ids(generator: torch.Generator) -> Tensor:
    return torch.stack([torch.randint(n, (ROWS,), generator=generator) for n in FIELD_ROWS], 1)


def _histories(generator: torch.Generator, items: int = ITEMS) -> tuple[Tensor, Tensor]:
    """Padded item sequences (0 is padding, at the end) and their lengths, at least 1."""
    length = torch.randint(1, LENGTH + 1, (ROWS,), generator=generator)
    length[0] = LENGTH
    ids = torch.randint(1, items, (ROWS, LENGTH), generator=generator)
    return torch.where(torch.arange(LENGTH) < length.unsqueeze(1), ids, 0), length


# ---- torchfm: one table plus offsets inside


def torchfm(name: str, *args: Any) -> Built:
    module, _, cls = name.rpartition(".")
    model = getattr(importlib.import_module(f"torchfm.model.{module}"), cls)(FIELD_ROWS, *args)
    return model, (_ids(_generator()),)


MLP = (8, 6)
TORCHFM: dict[str, tuple[Any, ...]] = {
    "afi.AutomaticFeatureInteractionModel": (DIM, 8, 2, 2, MLP, (0.0, 0.0)),
    "afm.AttentionalFactorizationMachineModel": (DIM, 8, (0.0, 0.0)),  # its dropout is a function, which `verify` keeps
    "afn.AdaptiveFactorizationNetwork": (DIM, 6, MLP, (0.2, 0.2)),
    "dcn.DeepCrossNetworkModel": (DIM, 2, MLP, 0.2),
    "dfm.DeepFactorizationMachineModel": (DIM, MLP, 0.2),
    "ffm.FieldAwareFactorizationMachineModel": (DIM,),
    "fm.FactorizationMachineModel": (DIM,),
    "fnfm.FieldAwareNeuralFactorizationMachineModel": (DIM, MLP, (0.2, 0.2)),
    "fnn.FactorizationSupportedNeuralNetworkModel": (DIM, MLP, 0.2),
    "lr.LogisticRegressionModel": (),
    "ncf.NeuralCollaborativeFiltering": (np.array([0]), np.array([1]), DIM, MLP, 0.2),
    "nfm.NeuralFactorizationMachineModel": (DIM, MLP, (0.2, 0.2)),
    "pnn.ProductNeuralNetworkModel": (DIM, MLP, 0.2, "inner"),
    "wd.WideAndDeepModel": (DIM, MLP, 0.2),
    "xdfm.ExtremeDeepFactorizationMachineModel": (DIM, MLP, 0.2, (6, 6), True),
}
TORCHFM_VARIANTS = {"pnn.ProductNeuralNetworkModel, outer": (DIM, MLP, 0.2, "outer")}


# ---- deepctr-torch: ids are columns of a float matrix, parameters are also held in plain lists


def deepctr(name: str, *, sequences: bool = False, dense: bool = True, **kwargs: Any) -> Built:
    library = importlib.import_module("deepctr_torch.models")
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat, build_input_features

    g = _generator()
    columns: list[Any] = [SparseFeat(f"c{i}", n, embedding_dim=DIM) for i, n in enumerate(FIELD_ROWS)]
    values = {f"c{i}": x for i, x in enumerate(_ids(g).unbind(1))}
    if dense:
        columns += [DenseFeat(f"d{i}", 1) for i in range(DENSE)]
        values |= {f"d{i}": torch.randn(ROWS, generator=g) for i in range(DENSE)}
    if sequences:  # of the item that row 1 is about, and of a tag with a table of its own
        items, length = _histories(g, FIELD_ROWS[1])
        shared = SparseFeat("hist_c1", FIELD_ROWS[1], embedding_dim=DIM, embedding_name="c1")
        columns.append(VarLenSparseFeat(shared, maxlen=LENGTH, length_name="length"))
        values |= {"hist_c1": items, "length": length}
        if name == "DIEN":
            negative = SparseFeat("neg_hist_c1", FIELD_ROWS[1], embedding_dim=DIM, embedding_name="c1")
            columns.append(VarLenSparseFeat(negative, maxlen=LENGTH, length_name="length"))
            values["neg_hist_c1"] = items.flip(0)
    positional = (columns, ["c1"]) if name in ("DIN", "DIEN") else (columns, columns)
    if name in ("PNN", "SharedBottom", "ESMM", "MMOE", "PLE", "MLR"):
        positional = (columns,)
    model = getattr(library, name)(*positional, **kwargs)
    order = build_input_features(columns)
    return model, (torch.cat([values[n].reshape(ROWS, -1).float() for n in order], 1),)


TOWER = {"dnn_hidden_units": MLP}
DEEPCTR: dict[str, dict[str, Any]] = {
    "WDL": TOWER,
    "DeepFM": TOWER | {"sequences": True, "dnn_use_bn": True},
    "xDeepFM": TOWER | {"cin_layer_size": (6, 6)},
    "AFM": {"dense": False},
    "DIFM": TOWER,
    "IFM": TOWER,
    "AutoInt": TOWER | {"att_layer_num": 2},
    "DCN": TOWER,
    "DCNMix": TOWER | {"low_rank": 3, "num_experts": 2},
    "FiBiNET": TOWER,
    "NFM": TOWER,
    "MLR": {},
    "ONN": TOWER,
    "PNN": TOWER | {"use_outter": True},
    "CCPM": TOWER | {"dense": False},
    "DIEN": TOWER | {"sequences": True, "use_negsampling": True},
    "DIN": TOWER | {"sequences": True},
    "AFN": {"ltl_hidden_size": 6, "afn_dnn_hidden_units": MLP},
    "SharedBottom": {"bottom_dnn_hidden_units": MLP, "tower_dnn_hidden_units": (5,)},
    "ESMM": {"tower_dnn_hidden_units": MLP},
    "MMOE": {"expert_dnn_hidden_units": MLP, "gate_dnn_hidden_units": (5,), "tower_dnn_hidden_units": (5,)},
    "PLE": {"expert_dnn_hidden_units": MLP, "gate_dnn_hidden_units": (5,), "tower_dnn_hidden_units": (5,)},
}
DEEPCTR_VARIANTS: dict[str, dict[str, Any]] = {
    "DCN, matrix": TOWER | {"cross_parameterization": "matrix"},
    "DIEN, AUGRU": TOWER | {"sequences": True, "gru_type": "AUGRU"},
}


# ---- torch-rechub: inputs are a dictionary


def rechub(name: str) -> Built:
    """A model of torch-rechub with a user, an item, a context field, two dense features and a history of items."""
    from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature

    g = _generator()
    items, _ = _histories(g)
    negatives = torch.randint(1, ITEMS, (ROWS, LENGTH), generator=g)
    inputs = {
        "user": torch.randint(11, (ROWS,), generator=g),
        "item": torch.randint(1, ITEMS, (ROWS,), generator=g),
        "place": torch.randint(7, (ROWS,), generator=g),
        "age": torch.rand(ROWS, generator=g),
        "price": torch.rand(ROWS, generator=g),
        "history": items,
        "tags": items.flip(0) % 6,
        "negatives": negatives,
    }
    user, place = SparseFeature("user", 11, DIM), SparseFeature("place", 7, DIM)
    item = SparseFeature("item", ITEMS, DIM, padding_idx=0)
    dense = [DenseFeature("age"), DenseFeature("price")]
    tags = SequenceFeature("tags", 6, DIM, pooling="mean", padding_idx=0)
    history = SequenceFeature("history", ITEMS, DIM, pooling="concat", shared_with="item", padding_idx=0)
    pooled = SequenceFeature("history", ITEMS, DIM, pooling="mean", shared_with="item", padding_idx=0)
    negative = SequenceFeature("negatives", ITEMS, DIM, pooling="concat", shared_with="item", padding_idx=0)
    fields = [user, item, place, tags]
    params = {"dims": list(MLP)}
    match = ([user, place], [history], [item], [negative])
    arguments: dict[str, Callable[[], dict[str, Any]]] = {
        "WideDeep": lambda: {"wide_features": [user, *dense], "deep_features": [*fields, *dense], "mlp_params": params},
        "DeepFM": lambda: {"deep_features": [*fields, *dense], "fm_features": fields, "mlp_params": params},
        "DCN": lambda: {"features": [*fields, *dense], "n_cross_layers": 2, "mlp_params": params},
        "DCNv2": lambda: {"features": [*fields, *dense], "n_cross_layers": 2, "mlp_params": params, "low_rank": 3},
        "EDCN": lambda: {"features": fields, "n_cross_layers": 2, "mlp_params": {}},
        "AFM": lambda: {"fm_features": fields, "embed_dim": DIM, "t": 5},
        "FiBiNet": lambda: {"features": [user, item, place], "mlp_params": params},
        "DeepFFM": lambda: _ffm(),
        "FatDeepFFM": lambda: _ffm() | {"reduction_ratio": 2},
        "BST": lambda: {
            "features": [user, *dense],
            "history_features": [history],
            "target_features": [item],
            "mlp_params": params,
            "nhead": 2,
        },
        "DIN": lambda: {
            "features": [user, place],
            "history_features": [history],
            "target_features": [item],
            "mlp_params": params,
            "attention_mlp_params": {"dims": [6]},
        },
        "DIEN": lambda: {
            "features": [user, place],
            "history_features": [history],
            "neg_history_features": [negative],
            "target_features": [item],
            "mlp_params": params,
        },
        "AutoInt": lambda: {"sparse_features": fields, "dense_features": dense, "num_layers": 2, "mlp_params": params},
        "DSSM": lambda: {
            "user_features": [user, place],
            "item_features": [item, tags],
            "user_params": params,
            "item_params": params,
        },
        "FaceBookDSSM": lambda: {
            "user_features": [user, place],
            "pos_item_features": [item],
            "neg_item_features": [SparseFeature("place", ITEMS, DIM, shared_with="item")],
            "user_params": params,
            "item_params": params,
        },
        "YoutubeDNN": lambda: {
            "user_features": [user, pooled],
            "item_features": [item],
            "neg_item_feature": [negative],
            "user_params": {"dims": [8, DIM]},
        },
        "YoutubeSBC": lambda: {
            "user_features": [user, pooled],
            "item_features": [item],
            "sample_weight_feature": [DenseFeature("price")],
            "user_params": params,
            "item_params": params,
            "batch_size": ROWS,
        },
        "MIND": lambda: dict(zip(MATCH, match, strict=True)) | {"max_length": LENGTH, "interest_num": 2},
        "ComirecDR": lambda: dict(zip(MATCH, match, strict=True)) | {"max_length": LENGTH, "interest_num": 2},
        "ComirecSA": lambda: dict(zip(MATCH, match, strict=True)) | {"interest_num": 2},
        "GRU4Rec": lambda: dict(zip(MATCH, match, strict=True)) | {"user_params": {"dims": [8, DIM]}},
        "NARM": lambda: {
            "item_history_feature": history,
            "hidden_dim": 6,
            "emb_dropout_p": 0.1,
            "session_rep_dropout_p": 0.1,
        },
        "SASRec": lambda: {"features": _three_sequences(), "max_len": LENGTH, "num_blocks": 1},
        "SINE": lambda: {
            "history_features": ["history"],
            "item_features": ["item"],
            "neg_item_features": ["negatives"],
            "num_items": ITEMS,
            "embedding_dim": DIM,
            "hidden_dim": 5,
            "num_concept": 6,
            "num_intention": 2,
            "seq_max_len": LENGTH,
        },
        "STAMP": lambda: {"item_history_feature": history, "weight_std": 0.3, "emb_std": 0.3},
        "SharedBottom": lambda: _tasks([*fields, *dense]) | {"bottom_params": params},
        "ESMM": lambda: {
            "user_features": [user, place],
            "item_features": [item],
            "cvr_params": params,
            "ctr_params": params,
        },
        "MMOE": lambda: _tasks([*fields, *dense]) | {"n_expert": 2, "expert_params": params},
        "PLE": lambda: (
            _tasks([*fields, *dense])
            | {"n_level": 2, "n_expert_specific": 2, "n_expert_shared": 1, "expert_params": params}
        ),
        "AITM": lambda: {
            "features": [*fields, *dense],
            "n_task": 2,
            "bottom_params": params,
            "tower_params_list": [params, params],
        },
        "HSTUModel": lambda: {
            "vocab_size": ITEMS,
            "d_model": 8,
            "n_heads": 2,
            "n_layers": 1,
            "dqk": 4,
            "dv": 4,
            "max_seq_len": LENGTH,
        },
        "HLLMModel": lambda: {
            "item_embeddings": torch.randn(ITEMS, 8, generator=_generator()),
            "vocab_size": ITEMS,
            "d_model": 8,
            "n_heads": 2,
            "n_layers": 1,
            "max_seq_len": LENGTH,
        },
        "RQVAEModel": lambda: {
            "in_dim": 8,
            "num_emb_list": [5, 5],
            "e_dim": 4,
            "layers": [6],
            "sk_epsilons": [0.0, 0.0],
        },
    }
    if name == "TIGERModel":
        return zoo_text.tiger()
    model = getattr(importlib.import_module(f"torch_rechub.models.{_rechub_kind(name)}"), name)(**arguments[name]())
    if name in ("HSTUModel", "HLLMModel"):
        return model, (items,)
    if name == "RQVAEModel":
        return model, (torch.randn(ROWS, 8, generator=g),)
    if name == "SASRec":
        inputs |= {"seq": items, "pos": items.roll(1, 1), "neg": negatives}
    used = _recorded(model, inputs)
    return model, ({k: v for k, v in inputs.items() if k in used},)


MATCH = ("user_features", "history_features", "item_features", "neg_item_feature")
RECHUB = (
    *("WideDeep", "DeepFM", "DCN", "DCNv2", "EDCN", "AFM", "FiBiNet", "DeepFFM", "FatDeepFFM", "BST", "DIN", "DIEN"),
    *("AutoInt", "DSSM", "FaceBookDSSM", "YoutubeDNN", "YoutubeSBC", "MIND", "GRU4Rec", "NARM", "SASRec", "SINE"),
    *("STAMP", "ComirecDR", "ComirecSA", "SharedBottom", "ESMM", "MMOE", "PLE", "AITM"),
    *("HSTUModel", "HLLMModel", "RQVAEModel", "TIGERModel"),
)


def _rechub_kind(name: str) -> str:
    for kind in ("ranking", "matching", "multi_task", "generative"):
        if name in importlib.import_module(f"torch_rechub.models.{kind}").__all__:
            return kind
    raise KeyError(name)


def _tasks(features: list[Any]) -> dict[str, Any]:
    tower = {"dims": [5]}
    return {
        "features": features,
        "task_types": ["classification", "regression"],
        "tower_params_list": [tower, tower],
    }


def _ffm() -> dict[str, Any]:
    from torch_rechub.basic.features import SparseFeature

    names = ("user", "item", "place")
    sizes = (11, ITEMS, 7)
    return {
        "linear_features": [SparseFeature(n, s, 1) for n, s in zip(names, sizes, strict=True)],
        "cross_features": [SparseFeature(n, s * 3, DIM) for n, s in zip(names, sizes, strict=True)],
        "embed_dim": DIM,
        "mlp_params": {"dims": list(MLP)},
    }


def _three_sequences() -> list[Any]:
    from torch_rechub.basic.features import SequenceFeature

    return [
        SequenceFeature("seq", ITEMS, DIM, pooling="concat"),
        SequenceFeature("pos", ITEMS, DIM, pooling="concat", shared_with="seq"),
        SequenceFeature("neg", ITEMS, DIM, pooling="concat", shared_with="seq"),
    ]


class _Recorder(dict):
    """A dictionary that remembers which keys were read."""

    def __init__(self, data: dict[str, Tensor]):
        super().__init__(data)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)


def _recorded(model: nn.Module, inputs: dict[str, Tensor]) -> set[str]:
    recorder = _Recorder(inputs)
    with torch.no_grad():
        model(recorder)
    return recorder.read


# ---- all of them


def _build(make: Callable[[], Built]) -> Callable[[], Built]:
    def build() -> Built:
        torch.manual_seed(0)
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # memory that was not written, as of torch-rechub's capsules, is NaN
        with contextlib.redirect_stdout(io.StringIO()):
            model, inputs = make()
        torch.use_deterministic_algorithms(deterministic)
        for p in model.parameters():
            if not p.isfinite().all():
                nn.init.normal_(p, std=0.3)
        # weights of tables as large as others': several libraries draw them with deviations of 1e-4, which would hide
        # errors of products of embeddings in the rounding
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)
        return model, inputs

    return build


ZOO: dict[str, Callable[[], Built]] = {
    **{f"torchfm.{n.partition('.')[2]}": _build(lambda n=n, a=a: torchfm(n, *a)) for n, a in TORCHFM.items()},
    **{
        f"torchfm.{n.partition('.')[2]}": _build(lambda n=n, a=a: torchfm(n.partition(",")[0], *a))
        for n, a in TORCHFM_VARIANTS.items()
    },
    **{
        f"deepctr_torch.{n}": _build(lambda n=n, k=k: deepctr(n.partition(",")[0], **k))
        for n, k in (DEEPCTR | DEEPCTR_VARIANTS).items()
    },
    **{f"torch_rechub.{n}": _build(lambda n=n: rechub(n)) for n in RECHUB},
    **{f"recbole.{n}": _build(lambda n=n: zoo_recbole.recbole(n)) for n in zoo_recbole.MODELS},
    **{f"rectools.{n}": _build(lambda n=n: zoo_sequences.rectools(n)) for n in zoo_sequences.MODELS},
    **{f"torch_geometric.{n}": _build(lambda n=n: zoo_graphs.geometric(n)) for n in zoo_graphs.MODELS},
    **{f"transformers.{n}": _build(lambda n=n: zoo_text.text(n)) for n in zoo_text.MODELS},
    **{f"higher.{n}": _build(lambda n=n: zoo_meta.meta(n)) for n in zoo_meta.MODELS},
}

LOOPS: dict[str, Callable[[], Loop]] = {
    **{f"rectools.{n}": functools.partial(zoo_sequences.loop, n) for n in zoo_sequences.MODELS},
    **{f"torch_geometric.{n}": functools.partial(zoo_graphs.loop, n) for n in zoo_graphs.MODELS},
    **{f"transformers.{n}": functools.partial(zoo_text.loop, n) for n in zoo_text.LOOPS},
    **{f"higher.{n}": functools.partial(zoo_meta.loop, n) for n in zoo_meta.MODELS},
}
"""How libraries train them, by name as in `ZOO`."""

LEFT_OUT = {
    **{f"recbole.{n}": why for n, why in zoo_recbole.LEFT_OUT.items()},
    **{f"rectools.{n}": why for n, why in zoo_sequences.LEFT_OUT.items()},
    "torch_geometric.Node2Vec": "needs pyg-lib",
}
"""Model classes of the libraries that are not in the zoo, and why."""


def library_classes() -> Iterator[str]:
    """``library.Class`` of every model class that the libraries hold."""
    models = importlib.import_module("torchfm.model")
    for info in pkgutil.iter_modules(models.__path__):
        module = importlib.import_module(f"torchfm.model.{info.name}")
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and "field_dims" in inspect.signature(cls).parameters:
                yield f"torchfm.{name}"
    library = importlib.import_module("deepctr_torch.models")
    base = importlib.import_module("deepctr_torch.models.basemodel").BaseModel
    for name, cls in inspect.getmembers(library, inspect.isclass):
        if issubclass(cls, base) and cls is not base:
            yield f"deepctr_torch.{name}"
    for kind in ("ranking", "matching", "multi_task", "generative"):
        for name in importlib.import_module(f"torch_rechub.models.{kind}").__all__:
            yield f"torch_rechub.{name}"
    yield from (f"recbole.{name}" for name in zoo_recbole.classes())
    yield from (f"rectools.{name}" for name in zoo_sequences.classes())
